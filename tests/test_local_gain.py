"""Local error times gain: planted loops whose gains are known, weights read off a table, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted import Counted, PlantedEvaluator
from test_experiments import NUM_STEPS, run, studied  # noqa: F401  (a fixture)
from test_transfer import euler, multistep

from calibration.bisection import adaptive_bisection, default_evaluations
from calibration.journal import Journal
from calibration.measurements import Measurements
from calibration.statistics import error_regret, rank_deviation
from engines.errors import TmpDiffError
from engines.sampler import SamplerRow
from tools.experiments.local_gain import analyse, carried_weights, curve_of, gain_of, roughness, within
from tools.experiments.replay import Curve, bisection, gain_bisection

STEPS = 20


def rough_sizes(seed: int, spread: float = 0.5) -> np.ndarray:
    """Errors of single steps that differ by chance from step to step."""
    return 0.05 * np.exp(spread * np.random.default_rng(seed).normal(size=STEPS))


def loop(seed: int, gain: float = 0.97) -> PlantedEvaluator:
    return PlantedEvaluator({"int8": rough_sizes(seed)}, gains=[gain] * STEPS, num_samples=2, seed=seed)


def measured(evaluator: PlantedEvaluator | Counted) -> tuple[Measurements, dict[str, list[list[float]]]]:
    found = Measurements("calibration", evaluator, Journal.in_memory("key"))
    samples = range(evaluator.num_samples)
    downcast = [[found.changed_error("fp16", k, "int8", s) for k in range(STEPS)] for s in samples]
    local = [[found.local_error(k, "int8", s) for k in range(STEPS)] for s in samples]
    return found, {"downcast": downcast, "local": local}


def test_a_local_error_is_a_single_call_and_what_the_loop_has_not_stretched_yet():
    counted = Counted(loop(0))
    found, values = measured(counted)
    stretched = 0.97 ** (2 * np.arange(STEPS)[::-1])
    for downcast, local in zip(values["downcast"], values["local"], strict=True):
        assert np.array(downcast) == pytest.approx(np.array(local) * stretched, rel=1e-3)
        assert local[-1] == pytest.approx(downcast[-1], rel=1e-12)
    assert found.calls["calibration: local int8"] == {"int8": 2 * STEPS}
    assert sum(sum(stage.values()) for stage in found.calls.values()) == counted.calls.total()


def test_local_errors_are_kept_for_the_next_run(tmp_path):
    def journal():
        return Journal.open(tmp_path / "journal", "key", {})

    first = Measurements("calibration", loop(0), journal()).local_error(3, "int8", 1)
    counted = Counted(loop(0), limit=0)
    assert Measurements("calibration", counted, journal()).local_error(3, "int8", 1) == first


def test_the_gain_is_found_and_is_smooth_where_the_score_is_not():
    for seed in range(5):
        curve = curve_of(measured(loop(seed))[1], np.ones(STEPS))
        assert gain_of(curve) == pytest.approx(0.97 ** (2 * np.arange(STEPS)[::-1]), rel=1e-3)
        assert roughness(gain_of(curve)) < 0.01 < 0.5 < roughness(curve.scores)


def test_fewer_calls_rank_better_where_the_gain_is_smooth():
    for seed in range(5):
        curve = curve_of(measured(loop(seed))[1], np.ones(STEPS))
        plain = bisection(curve, default_evaluations(STEPS))
        limit = 3 * plain.calls // 4
        found = within(curve, gain_bisection, limit)
        assert found is not None
        assert found.calls <= limit
        assert rank_deviation(curve.scores, found.scores) < 0.2 < rank_deviation(curve.scores, plain.scores)
        assert error_regret(curve.scores, found.scores) < 0.01 < error_regret(curve.scores, plain.scores)


def test_local_errors_that_say_nothing_do_harm():
    """The other way round: a smooth score, and local errors that have nothing to do with it."""
    smooth = np.exp(np.linspace(0, 4, STEPS))
    curve = Curve(smooth, rough_sizes(0))
    plain = bisection(curve, default_evaluations(STEPS))
    found = within(curve, gain_bisection, plain.calls)
    assert found is not None
    assert rank_deviation(smooth, found.scores) > rank_deviation(smooth, plain.scores)


def test_calls_include_those_of_the_local_errors():
    curve = Curve(np.ones(STEPS), np.ones(STEPS))
    plain, over_gain = bisection(curve, 5), gain_bisection(curve, 5)
    assert over_gain.calls == plain.calls + STEPS
    assert within(curve, gain_bisection, STEPS) is None
    with pytest.raises(ValueError, match="no local errors"):
        gain_bisection(Curve(np.ones(STEPS)), 5)


@pytest.mark.parametrize("make", [euler, multistep])
def test_weights_carry_a_changed_latent_to_the_end(make):
    """A step's own output changed by d: x_{i+1} moves by the own coefficient, x_T by the weight times that."""
    table = make(7)
    rng = np.random.default_rng(0)
    noise, outputs = rng.normal(size=(2, 3)), rng.normal(size=(7, 2, 3))

    def states(changed=None):
        found = [table.initial(noise)]
        for k in range(7):
            found.append(table.advance(found[-1], outputs[k] + (changed == k)))
        return [state.latents for state in found]

    plain = states()
    for k, weight in enumerate(carried_weights(table)):
        moved = [np.abs(a - b).mean() for a, b in zip(states(k), plain, strict=True)]
        assert moved[-1] == pytest.approx(weight * moved[k + 1], rel=1e-3)


def test_a_step_that_does_not_use_its_own_output_is_refused():
    table = euler(4)
    rows = (*table.rows[:2], SamplerRow(((2, 1.0),), ((1, -0.2),)), table.rows[3])
    with pytest.raises(TmpDiffError, match=r"step 2 of FlowMatchEuler.* does not use its own model output"):
        carried_weights(replace(table, rows=rows))


def test_a_known_shape_is_found_from_three_evaluations():
    shape = rough_sizes(1)
    search = adaptive_bisection((3.0 * shape).__getitem__, STEPS, max_evaluations=3, shape=shape)
    assert search.scores == pytest.approx(3.0 * shape)
    for wrong in (np.zeros(STEPS), np.ones(STEPS - 1), np.full(STEPS, np.nan)):
        with pytest.raises(ValueError, match="numbers, expected 20 positive ones, one per step"):
            adaptive_bisection(shape.__getitem__, STEPS, shape=wrong)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, "met"), (3.0, "missed")])
def test_the_goal_follows_the_regret_of_both_searches(noise, expected):
    """Ten samples whose local errors are exact, or noise against smooth scores."""
    rng = np.random.default_rng(0)
    samples = np.exp(0.1 * rng.normal(size=(10, 1)))
    local = rough_sizes(2) if noise == 0 else np.exp(noise * rng.normal(size=STEPS))
    downcast = rough_sizes(2) if noise == 0 else np.exp(np.linspace(0, 4, STEPS))
    content = {
        "setting": {"num_steps": STEPS, "backend": "onnxruntime"},
        "data": {
            "weights": [1.0] * STEPS,
            "precisions": {"int8": {"downcast": samples * downcast, "local": samples * local}},
        },
    }
    found = analyse(content)
    assert [goal.verdict for goal in found.goals] == [expected]
    assert (found.findings["int8"]["regret difference"]["value"] < 0) == (expected == "met")


def test_the_command(studied: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    found = run("local_gain", studied, tmp_path / "gain")
    data = found["data"]["precisions"]["int8"]
    assert np.shape(data["downcast"]) == np.shape(data["local"]) == (2, NUM_STEPS)
    for downcast, local in zip(data["downcast"], data["local"], strict=True):
        assert local[-1] == pytest.approx(downcast[-1], rel=1e-4)
    assert found["data"]["weights"][-1] == pytest.approx(1.0)
    assert found["findings"]["int8"]["points"]["bisection over the gain"][-1]["deviation"] == 0
    (goal,) = found["goals"]
    assert goal["subject"] == "int8"
    assert str(tmp_path) not in json.dumps(found)
