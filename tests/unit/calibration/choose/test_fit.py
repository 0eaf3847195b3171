"""Random schedules of calibration samples, and which predictor describes them better."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.planted import PlantedEvaluator, measurements
from helpers.planted_loops import RoundedLoop, predicted, run_errors

from calibration.choose.fit import FIT_SAMPLES, FIT_SCHEDULES, best_fit, fit, measure_fit, random_schedules
from calibration.measure.metrics import typical_error
from calibration.records import FitRecord

STEPS = 10
NAMES = ("fp16", "int8", "int4")


def loop(correlation, num_samples=2):
    sizes = 0.1 * np.exp(2 * np.linspace(-0.7, 1.1, STEPS) ** 2)
    return PlantedEvaluator(
        {"int8": sizes, "int4": 3 * sizes}, gains=[0.95] * STEPS, correlation=correlation, num_samples=num_samples
    )


def measured_fit(evaluator, on_run=None):
    found = measurements(evaluator)
    predictions, _ = predicted(found, evaluator.precisions, dict.fromkeys(evaluator.precisions, 1.0))
    return *measure_fit(found, predictions.grams, on_run), found


@pytest.mark.parametrize("correlation", [0.3, 0.6, 1.0])
def test_correlated_errors_are_predicted_by_the_gram(correlation):
    records, points, _ = measured_fit(loop(correlation))
    figures = {record.predictor: record for record in records}
    assert list(figures) == ["gram", "downcast sum"]
    assert best_fit(records) == "gram"
    assert figures["gram"].r2 > 0.9999
    assert figures["gram"].ratio == pytest.approx(1, abs=0.005)
    assert figures["gram"].scatter < 0.02
    assert figures["downcast sum"].ratio < 1 - correlation / 2, "the plain sum is too low"
    assert figures["downcast sum"].scatter > 0.2
    assert len(points) == FIT_SCHEDULES
    for point in points:
        assert point.measured == pytest.approx(typical_error(run_errors(loop(correlation), point.precisions)))


def test_uncorrelated_errors_are_predicted_by_both_and_the_first_is_taken():
    records, _, _ = measured_fit(loop(0.0))
    for record in records:
        assert record.r2 == pytest.approx(1, abs=1e-6)
        assert record.spearman == pytest.approx(1)
        assert record.ratio == pytest.approx(1, rel=1e-3)
    assert best_fit(records) == "gram"


def test_a_coarse_reference_does_not_mislead_the_gram():
    records, _, _ = measured_fit(RoundedLoop())
    figures = {record.predictor: record for record in records}
    assert best_fit(records) == "gram"
    assert figures["gram"].r2 > 0.98 > figures["downcast sum"].r2
    assert figures["gram"].ratio == pytest.approx(1, abs=0.1)
    assert figures["downcast sum"].ratio > 1.3


def test_as_many_samples_as_are_needed_run():
    seen = []
    _, _, found = measured_fit(loop(0.3, num_samples=FIT_SAMPLES + 5), lambda done, total: seen.append((done, total)))
    runs = FIT_SCHEDULES * FIT_SAMPLES
    assert seen == [(done, runs) for done in range(1, runs + 1)]
    assert sum(found.calls["calibration: fit"].values()) <= runs * STEPS


def test_random_schedules_are_mixed_and_the_same_each_time():
    found = random_schedules(NAMES, STEPS)
    assert len(set(found)) == FIT_SCHEDULES
    assert found == random_schedules(NAMES, STEPS)
    for schedule in found:
        assert 0 < schedule.count("fp16") < STEPS
    assert random_schedules(NAMES, 1) == random_schedules(("fp16",), STEPS) == ()
    assert set(random_schedules(("fp16", "int8"), 2)) == {("fp16", "int8"), ("int8", "fp16")}


def test_figures():
    found = fit("gram", [2.0, 4.0, 6.0, 10.0], [1.0, 2.0, 3.0, 5.0])
    assert (found.r2, found.spearman, found.ratio) == pytest.approx((1, 1, 2))
    assert found.scatter == pytest.approx(math.log(2))
    assert fit("gram", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).r2 is None
    assert fit("gram", [1.0, 2.0], [1.0, 2.0]).spearman is None, "two are no relation"
    assert fit("gram", [0.0, 2.0, 1.0], [1.0, 2.0, 3.0]).scatter is None
    none = fit("gram", [], [])
    assert (none.r2, none.spearman, none.ratio, none.scatter) == (None,) * 4


def test_the_best_fit_goes_by_r2():
    measured = [1.0, 2.0, 3.0, 5.0]
    noisy, low, level_one = [1.2, 1.9, 3.4, 4.4], [0.25, 0.5, 0.75, 1.25], [1.0, 2.0, 3.0, 5.0]
    assert best_fit([fit("gram", noisy, measured), fit("downcast sum", low, measured)]) == "downcast sum"
    assert best_fit([fit("gram", low, measured), fit("downcast sum", noisy, measured)]) == "gram"
    assert best_fit([fit("gram", low, measured), fit("downcast sum", level_one, measured)]) == "gram", "as good"
    falling = fit("gram", [5.0, 3.0, 2.0, 1.0], measured)
    assert falling.spearman == pytest.approx(-1)
    assert best_fit([falling, fit("downcast sum", noisy, measured)]) == "downcast sum"
    unknown = [
        FitRecord(predictor=name, r2=None, spearman=None, ratio=None, scatter=None) for name in ("gram", "downcast sum")
    ]
    assert best_fit(unknown) == "gram"
    assert best_fit([unknown[0], fit("downcast sum", noisy, measured)]) == "downcast sum"
