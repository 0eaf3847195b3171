"""Single reuses: what they say of many at once, which are measured, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.planted import Counted, measurements
from helpers.planted_reuse import ReuseLoop

from calibration.measure.measurements import Measurements
from calibration.scores import reuse
from calibration.scores.reuse import Reuses, errors_of, measure_reuses, single, vector_of
from engines.reuse import REUSES
from engines.sampler import SamplerRow, SamplerTable


def measured(loop: ReuseLoop) -> tuple[Reuses, Measurements]:
    found = measurements(loop)
    return measure_reuses(found, loop.timesteps(), range(loop.num_samples), lambda done, total: None), found


def truth(found: Measurements, choices: tuple[str, ...], samples: int) -> np.ndarray:
    return vector_of([found.planned("test", choices, sample) for sample in range(samples)])


def test_singles_are_predicted_as_they_were_measured() -> None:
    loop = ReuseLoop(12)
    singles, found = measured(loop)
    assert list(singles.orders) == [0, 1, 2]
    for step in range(1, 12):
        for order in range(min(step, 3)):
            choices = single("fp16", 12, step, order)
            assert singles.predicted([choices])[0] == pytest.approx(truth(found, choices, 4), abs=1e-7)
            assert singles.errors[step, order] == pytest.approx(errors_of(truth(found, choices, 4)[None])[0], rel=5e-3)


@pytest.mark.parametrize("pattern", ["..1.1.1.1.1.", "...22..11.0.", ".00..2.2..1.", "...2..11.22.", "...0.1.0.12."])
def test_patterns_are_exact_where_outputs_depend_on_time_alone(pattern: str) -> None:
    """As long as outputs lie within reach: three computed steps back, or on a parabola further back."""
    loop = ReuseLoop(12, response=False)
    singles, found = measured(loop)
    if len(singles.orders) < 3:
        pytest.skip("parabolas were of no use")
    choices = tuple("fp16" if mark == "." else REUSES[int(mark)] for mark in pattern)
    wanted, predicted = truth(found, choices, 4), singles.predicted([choices])[0]
    assert np.linalg.norm(predicted - wanted) < 0.05 * np.linalg.norm(wanted)


def test_far_reuses_add_up_where_outputs_answer_to_latents_too() -> None:
    loop = ReuseLoop(20)
    singles, found = measured(loop)
    choices = tuple("reuse1" if step in (5, 10, 15) else "fp16" for step in range(20))
    predicted = errors_of(singles.predicted([choices]))[0]
    assert predicted == pytest.approx(errors_of(truth(found, choices, 4)[None])[0], rel=0.3)


def test_parabolas_are_measured_where_they_are_of_use_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(loop: ReuseLoop) -> tuple[int, int]:
        counted = Counted(loop)
        found = measurements(counted)
        singles = measure_reuses(found, loop.timesteps(), range(2), lambda done, total: None)
        assert counted.calls["fp16"] == sum(sum(calls.values()) for calls in found.calls.values())
        return len(singles.orders), found.calls["calibration: reuse scores"]["fp16"]

    orders, calls = spent(ReuseLoop(12))
    assert (orders, calls) == (3, 2 * (sum(range(11)) + sum(range(10)) + sum(range(9))))
    monkeypatch.setattr(reuse, "PROBES", 0)
    assert spent(ReuseLoop(12)) == (2, 2 * (sum(range(11)) + sum(range(10))))


def test_steps_at_one_timestep_have_one_single() -> None:
    """As Heun's: two calls at every noise level but the last."""
    rows = [SamplerRow(((k, 1.0),), ((k, -0.1),)) for k in range(7)]
    timesteps = np.array([900.0, 700.0, 700.0, 400.0, 400.0, 100.0, 100.0])
    heun = SamplerTable("heun", 4, timesteps, None, 1.0, np.ones(7), tuple(rows))

    class Heun(ReuseLoop):
        @property
        def table(self) -> SamplerTable:  # type: ignore[override]
            return heun

        def _output(self, state, precision):  # type: ignore[no-untyped-def]
            return np.sin(state.latents.astype(np.float64) + heun.timesteps[state.step_index] / 300)

    loop = Heun(7, num_samples=2)
    singles, found = measured(loop)
    for step in (2, 4, 6):
        assert np.isfinite(singles.errors[step]).tolist() == [True, *[False] * (len(singles.orders) - 1)]
    assert np.isfinite(singles.errors[5, 1])
    for choices in (single("fp16", 7, 4, 2), ("fp16", "fp16", "reuse0", "fp16", "reuse1", "reuse0", "fp16")):
        assert np.isfinite(singles.predicted([choices])).all()
    assert singles.predicted([single("fp16", 7, 4, 1)])[0] == pytest.approx(
        truth(found, single("fp16", 7, 4, 1), 2), abs=1e-7
    )


def test_reused_steps_are_no_calls() -> None:
    loop = Counted(ReuseLoop(10, num_samples=1))
    found = measurements(loop)
    choices = ("fp16", "fp16", "reuse1", "fp16", "reuse0", "reuse0", "fp16", "fp16", "fp16", "reuse2")
    assert found.schedule_calls(choices) == 4
    found.planned("plans", choices, 0)
    assert found.calls["calibration: plans"] == {"fp16": 4}
