"""Which predictor fits, and what the validation samples say of the chosen schedule; planted loops."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.planted_calibration import STEPS, loop, run

from calibration.document import FitRecord
from calibration.validation import best_fit, fit


def rows(result):
    return {row.name: row for row in result.sensitivity.validation}


def test_correlated_errors_are_predicted_by_powers():
    found = run(loop(correlation=1.0), validation=loop(seed=1, correlation=1.0), method="sweep").sensitivity
    figures = {record.predictor: record for record in found.fit}
    assert found.predictor == "mixed-power"
    assert figures["upcast"].r2 > figures["downcast"].r2
    for predictor in ("upcast-power", "mixed-power"):
        assert figures[predictor].r2 > 0.98
        assert figures[predictor].ratio == pytest.approx(1, abs=0.2)
    assert figures["downcast"].ratio < 0.6, "the plain sum is too low"
    assert 0.5 < found.predicted_error / found.measured_error < 2
    assert len(found.fit_points) == 8
    assert found.fit_samples == "validation"


@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_partly_correlated_errors_are_predicted_by_both_scores_together(correlation):
    validation = loop(seed=1, correlation=correlation)
    found = run(loop(correlation=correlation), validation=validation, method="sweep").sensitivity
    figures = {record.predictor: record for record in found.fit}
    assert found.predictor == "mixed-power"
    assert figures["mixed-power"].r2 > 0.998
    assert figures["mixed-power"].ratio == pytest.approx(1, abs=0.05)
    assert all(figure.r2 < 0.995 for name, figure in figures.items() if name != "mixed-power")


def test_uncorrelated_errors_are_predicted_exactly():
    found = run(loop(correlation=0), validation=loop(correlation=0, seed=1, num_samples=4), method="sweep").sensitivity
    for record in found.fit:
        assert record.r2 == pytest.approx(1, abs=1e-6)
        assert record.spearman == pytest.approx(1)
        assert record.ratio == pytest.approx(1, rel=0.2), "other samples have other norms"


def test_best_fit_goes_by_r2_then_level():
    measured = [1.0, 2.0, 3.0, 5.0]
    noisy, low, level = [1.2, 1.9, 3.4, 4.4], [0.25, 0.5, 0.75, 1.25], [1.0, 2.0, 3.0, 5.0]
    predictions = {"noisy": noisy, "low": low, "level": level}
    records = [fit(name, values, measured) for name, values in predictions.items()]
    assert [record.ratio for record in records] == pytest.approx([10.9 / 11, 0.25, 1])
    assert best_fit(records) == "level"
    assert best_fit(records[:2]) == "low"
    falling = fit("falling", [5.0, 3.0, 2.0, 1.0], measured)
    assert falling.spearman == pytest.approx(-1)
    assert best_fit([falling, records[0]]) == "noisy"
    assert fit("constant", [1.0, 1.0, 1.0], measured[:3]).r2 is None
    unknown = [FitRecord(predictor=name, r2=None, spearman=None, ratio=None) for name in ("first", "second")]
    assert best_fit(unknown) == "first"
    assert best_fit([*unknown, records[0]]) == "noisy"


def test_schedule_that_loses_on_validation_says_so():
    reversed_loop = loop(seed=1, scale=np.exp(np.linspace(2, 0, STEPS)))
    result = run(loop(scale=np.exp(np.linspace(0, 2, STEPS))), validation=reversed_loop)
    assert result.sensitivity.schedule == ("int4",) * 6 + ("fp16",) * 4
    losers = result.sensitivity.loses_to
    assert "first 4" in losers
    assert "last 4" not in losers, "it is the schedule itself"
    assert "uniform fp16" not in losers, "more accurate but slower"
    assert rows(result)["schedule"].loses_to == losers
    assert all(rows(result)[name].error < rows(result)["schedule"].error for name in losers)


def test_without_validation_nothing_is_claimed_about_it():
    found = run(validation=None).sensitivity
    assert found.validation == ()
    assert found.measured_error is None
    assert found.validation_key is None
    assert found.fit_samples == "calibration"
