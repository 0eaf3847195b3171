"""Downcasts of a linear loop whose errors are known on paper, and the calls they cost."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.planted import Counted, PlantedEvaluator, PoolHere, measurements

from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.sketch import direction
from calibration.scores.bisection import default_evaluations
from calibration.scores.single_step import measure_downcasts, sweep_calls
from engines.errors import TmpDiffError

STEPS = 12


def loop(correlation=0.0, **options):
    rng = np.random.default_rng(7)
    errors = {
        "int8": 0.2 * np.exp(1.5 * np.linspace(-1, 1, STEPS) ** 2),
        "int4": rng.uniform(0.2, 1.0, size=STEPS),
    }
    return PlantedEvaluator(
        errors, gains=np.linspace(0.8, 1.1, STEPS), correlation=correlation, **{"num_samples": 3} | options
    )


def measured(evaluator, **options):
    """The measurements and the curve of every low precision."""
    found = measurements(evaluator)
    return found, {name: measure_downcasts(found, name, **options) for name in evaluator.precisions[1:]}


def changed(base, step, precision):
    return tuple(precision if k == step else base for k in range(STEPS))


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_sweep_gives_the_scores_worked_out_on_paper(correlation, precision):
    evaluator = loop(correlation)
    _, curves = measured(evaluator, method="sweep")
    down = [evaluator.true_error(changed("fp16", step, precision)) for step in range(STEPS)]
    np.testing.assert_allclose(curves[precision].search.scores, down, rtol=1e-4)
    assert curves[precision].precision == precision


@pytest.mark.parametrize("method", ["sweep", "bisection"])
def test_vectors_are_those_of_the_steps_measured(method):
    """The error of step i grows by the gains after it, and keeps its direction."""
    evaluator = loop(0.3)
    _, curves = measured(evaluator, method=method)
    for name, curve in curves.items():
        assert curve.steps == tuple(np.flatnonzero(curve.search.measured))
        assert sorted(curve.search.order) == list(curve.steps)
        assert curve.vectors.errors.shape == (len(curve.steps), 3)
        assert curve.vectors.directions.shape == (len(curve.steps), 3, 192)
        for row, step in enumerate(curve.steps):
            expected = direction(evaluator._direction(step), 0).astype(np.float64)
            for sample in range(3):
                np.testing.assert_allclose(curve.vectors.directions[row, sample], expected, atol=1e-3)
            size = evaluator.errors[name][step] * np.prod(evaluator.gains[step + 1 :])
            for sample in range(3):
                state = evaluator.start(sample)
                for _ in range(STEPS):
                    state = evaluator.step(sample, state, "fp16")
                norm = float(np.sum(state[1] ** 2))
                assert curve.vectors.errors[row, sample] == pytest.approx(size**2 / norm, rel=1e-4)


def test_uncorrelated_errors_add_up():
    evaluator = loop()
    found, curves = measured(evaluator, method="sweep")
    whole = np.mean([found.uniform_error("int8", sample)["error"] for sample in range(3)])
    assert curves["int8"].search.scores.sum() == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("method", ["sweep", "bisection"])
def test_calls_are_counted_exactly(method):
    counted = Counted(loop())
    found, curves = measured(counted, method=method)
    expected = {"calibration: uniform runs": {"fp16": 3 * STEPS}}
    for precision, curve in curves.items():
        steps = curve.search.order
        calls = {"fp16": 3 * sum(STEPS - step - 1 for step in steps), precision: 3 * len(steps)}
        expected[f"calibration: downcast {precision}"] = calls
        assert curve.calls(found) == calls
        if method == "sweep":
            assert sum(calls.values()) == sweep_calls(STEPS, 3) == 3 * STEPS * (STEPS + 1) / 2
        else:
            assert sum(calls.values()) < sweep_calls(STEPS, 3)
    assert found.calls == expected
    assert sum(sum(calls.values()) for calls in expected.values()) == counted.calls.total()
    assert not found.recomputed


def test_a_record_says_what_was_measured_and_what_it_cost():
    found, curves = measured(loop(), method="bisection")
    for precision, curve in curves.items():
        record = curve.record(found)
        assert record.precision == precision
        assert record.scores == tuple(curve.search.scores)
        assert record.measured == tuple(curve.search.measured)
        assert (record.order, record.settled) == (curve.search.order, curve.search.settled)
        assert record.calls == curve.calls(found)
        assert record.sweep_calls == sweep_calls(STEPS, 3)


def test_progress_counts_samples_up_to_what_is_allowed():
    seen = []
    found = measurements(loop())
    curve = measure_downcasts(found, "int8", on_evaluation=lambda done, most: seen.append((done, most)))
    allowed = default_evaluations(STEPS)
    assert len(curve.steps) <= allowed
    assert seen == [(done, 3 * allowed) for done in range(1, 3 * len(curve.steps) + 1)]


def test_all_samples_of_an_evaluation_are_asked_for_at_once():
    evaluator = loop()
    pool = PoolHere(calibration=evaluator)
    pooled = Measurements("calibration", SampleSet(evaluator), Journal.in_memory("key"), pool)
    curve = measure_downcasts(pooled, "int8", method="sweep")
    alone = measured(evaluator, method="sweep")[1]["int8"]
    np.testing.assert_array_equal(curve.search.scores, alone.search.scores)
    np.testing.assert_array_equal(curve.vectors.directions, alone.vectors.directions)
    assert sum(pool.together) == 3 * (STEPS + 1)
    assert min(wait for wait in pool.together if wait) == 3


def test_schedules_share_prefixes_and_are_run_once():
    counted = Counted(loop(num_samples=1))
    found = measurements(counted)
    schedule = ("fp16",) * 5 + ("int8",) * (STEPS - 5)
    for _ in range(2):
        error = found.schedule_error("schedules", schedule, 0, pictures=False)["error"]
    assert error == pytest.approx(counted.inner.true_error(schedule), rel=1e-4)
    assert counted.calls == {"fp16": STEPS, "int8": STEPS - 5}, "the reference run, and the steps after it is left"


def test_bisection_measures_what_the_sweep_measures():
    sweep, bisection = measured(loop(), method="sweep")[1], measured(loop(), method="bisection")[1]
    for precision, curve in bisection.items():
        known = curve.search.measured
        assert 3 <= known.sum() < STEPS
        np.testing.assert_array_equal(curve.search.scores[known], sweep[precision].search.scores[known])
        np.testing.assert_array_equal(curve.vectors.directions, sweep[precision].vectors.directions[known])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_run_that_overflows_is_named():
    broken = PlantedEvaluator({"int8": [0.1, float("inf")]}, gains=[1.0, 1.0])
    found = measurements(broken)
    with pytest.raises(TmpDiffError, match="uniform int8 run of calibration sample 0 gave latents that are not"):
        found.uniform_error("int8", 0)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method is 'guess', expected one of bisection, sweep"):
        measure_downcasts(measurements(loop()), "int8", method="guess")


class Departing(PlantedEvaluator):
    """Sample 0 ends far away as soon as steps 3 to 5 are not all at the reference."""

    def step(self, sample, state, precision):
        index, x = super().step(sample, state, precision)
        away = sample == 0 and index - 1 in (3, 4, 5) and precision != "fp16"
        return index, x + 40.0 * self._direction(self.num_steps + 1) if away else x


def test_a_departure_does_not_set_the_scores():
    options = {"errors": loop().errors, "gains": loop().gains, "num_samples": 9}
    plain, departing = PlantedEvaluator(**options), Departing(**options)
    found, curves = measured(departing, method="sweep")
    far = [found.uniform_error("int8", sample)["error"] for sample in range(9)]
    assert far[0] > 50 * np.median(far)  # its plain mean would say little about the others
    for name, expected in measured(plain, method="sweep")[1].items():
        ratio = curves[name].search.scores / expected.search.scores
        assert (ratio > 0.9).all(), name
        assert (ratio < 2.5).all(), name  # it counts as ten medians; in a plain mean it would be 100 times the others
