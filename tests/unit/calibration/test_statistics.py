"""Typical errors, their intervals and ratios, and departures with exact intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from calibration.measure.metrics import DEPARTED, LIMIT_MEDIANS, typical_error, typical_errors
from calibration.records import IntervalRecord
from calibration.statistics import (
    CONFIDENCE,
    DRAWS,
    departure_record,
    ratio_interval,
    share_record,
    sign_test,
    typical_interval,
)


def lognormal(shape, spread=1.0, seed=0):
    return 1e-4 * np.random.default_rng(seed).lognormal(0, spread, size=shape)


# typical errors ---------------------------------------------------------------------------------------------------


def test_typical_errors_are_the_levels_of_every_row():
    errors = lognormal((3, 4, 21), spread=2)
    errors[0, 0, 5] = 0.7
    found = typical_errors(errors)
    assert found.shape == (3, 4)
    for row in np.ndindex(3, 4):
        assert found[row] == pytest.approx(typical_error(errors[row]))
    assert found[0, 0] < errors[0, 0].mean() / 10, "no sample counts for more than ten medians"
    assert float(typical_errors(np.array([0.0, 0.0, 0.0, 8.0]))) == 2, "no median, no limit"


def test_the_interval_of_a_typical_error_is_that_of_a_bootstrap_and_a_little_wider():
    errors = lognormal(200)
    found = typical_interval(errors)
    assert found == typical_interval(errors)
    exact = stats.bootstrap((errors,), typical_errors, confidence_level=0.95, method="percentile", random_state=1)
    assert found.low == pytest.approx(exact.confidence_interval.low, rel=0.03)
    assert found.high == pytest.approx(exact.confidence_interval.high, rel=0.03)
    assert found.low < found.value < found.high
    np.testing.assert_array_equal(errors, lognormal(200), err_msg="left as they were")


@pytest.mark.parametrize("samples", [2, 4, 8, 60])
def test_few_samples_have_wider_intervals_than_their_extremes_say(samples):
    errors = lognormal(samples)
    drawn = np.random.default_rng(0).integers(samples, size=(DRAWS, samples))
    low, high = np.quantile(typical_errors(errors[drawn]), [0.025, 0.975])
    found = typical_interval(errors)
    assert found.value == pytest.approx(typical_error(errors))
    assert 0 < found.low <= low * 1.02
    assert found.high >= high * 0.98
    assert (found.high / found.low) / (high / low) > (1.2 if samples <= 4 else 1.0)


@pytest.mark.parametrize(("samples", "most_missed"), [(4, 0.15), (8, 0.15), (60, 0.12)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(samples, most_missed):
    truth = float(typical_errors(lognormal(10**6, spread=0.5, seed=1)))
    found = [typical_interval(lognormal(samples, spread=0.5, seed=k)) for k in range(2, 122)]
    missed = 1 - np.mean([one.low <= truth <= one.high for one in found])
    assert missed <= most_missed


def test_draws_are_averaged_and_stay_paired_by_sample():
    draws = lognormal((2, 30), spread=1.5)
    weights = np.array([0.25, 0.75])
    assert typical_interval(draws).value == pytest.approx(np.mean([typical_error(row) for row in draws]))
    assert typical_interval(draws, weights).value == pytest.approx(
        0.25 * typical_error(draws[0]) + 0.75 * typical_error(draws[1])
    )
    opposite = np.stack([np.where(np.arange(30) % 2, 1.0, 3.0), np.where(np.arange(30) % 2, 3.0, 1.0)])
    found = typical_interval(opposite)
    assert (found.low, found.value, found.high) == pytest.approx((2, 2, 2)), "what one draw has, the other lacks"


def test_the_bounds_of_a_single_sample_are_the_figure_itself():
    assert typical_interval(np.array([0.3])) == IntervalRecord(value=0.3, low=0.3, high=0.3)
    found = ratio_interval(np.array([0.3]), np.array([[0.1]]))
    assert (found.low, found.value, found.high) == pytest.approx((3, 3, 3))


# ratios -----------------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_samples():
    """Samples differ a hundredfold, both schedules on each of them by a tenth."""
    levels = lognormal(40, spread=1.2)
    first = 0.9 * levels * np.random.default_rng(1).lognormal(0, 0.01, size=40)
    paired = ratio_interval(first, levels[None])
    assert paired.value == pytest.approx(typical_error(first) / typical_error(levels))
    assert 0.88 < paired.low < paired.value < paired.high < 0.92
    shuffled = ratio_interval(np.random.default_rng(2).permutation(first), levels[None])
    assert shuffled.low < 0.75
    assert shuffled.high > 1.1


def test_a_ratio_to_several_draws_is_that_to_their_mean():
    errors, draws = lognormal(20), lognormal((3, 20), seed=1)
    found = ratio_interval(errors, draws)
    assert found.value == pytest.approx(typical_error(errors) / np.mean([typical_error(row) for row in draws]))
    weights = np.array([0.5, 0.0, 0.5])
    weighed = ratio_interval(errors, draws, weights)
    assert weighed.value == pytest.approx(
        2 * typical_error(errors) / (typical_error(draws[0]) + typical_error(draws[2]))
    )
    assert weighed.low < weighed.value < weighed.high


def test_there_is_no_ratio_to_no_error():
    assert ratio_interval(np.array([1.0, 2.0]), np.zeros((1, 2))) is None
    some = ratio_interval(np.ones(6), np.array([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]))
    assert some.value == pytest.approx(3)
    assert np.isfinite([some.low, some.high]).all(), f"of the {DRAWS} draws those without any are left out"


# departures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "samples", "low", "high"),
    [
        (0, 10, 0.0, 0.30850),
        (1, 10, 0.00253, 0.44502),
        (5, 10, 0.18709, 0.81291),
        (10, 10, 0.69150, 1.0),
        (0, 240, 0.0, 0.015253),
        (3, 160, 0.003882, 0.053834),
    ],
)
def test_shares_have_the_interval_of_clopper_and_pearson(count, samples, low, high):
    """Against tables, and the quantiles of the beta distribution that define it."""
    found = share_record(count, samples)
    assert (found.count, found.samples) == (count, samples)
    assert (found.low, found.high) == pytest.approx((low, high), rel=2e-3, abs=1e-9)
    tail = (1 - CONFIDENCE) / 2
    if count:
        assert found.low == pytest.approx(stats.beta.ppf(tail, count, samples - count + 1))
    if count < samples:
        assert found.high == pytest.approx(stats.beta.ppf(1 - tail, count + 1, samples - count))


def test_departures_are_far_above_the_median_and_above_the_limit():
    errors = np.full(20, 1e-3)
    errors[3] = DEPARTED * 1.01
    errors[7] = DEPARTED * 0.99
    assert departure_record(errors).count == 1
    errors[:] = 0.02
    errors[3] = 0.02 * LIMIT_MEDIANS * 0.99
    assert departure_record(errors).count == 0, "above the limit, but all of them err much"
    errors[3] = 0.02 * LIMIT_MEDIANS * 1.01
    found = departure_record(errors)
    assert (found.count, found.samples) == (1, 20)
    assert 0 < found.low < 1 / 20 < found.high
    assert departure_record(np.zeros(4)).count == 0


def test_departures_of_draws_are_measured_by_their_own_medians():
    low, high = np.full(10, 1e-3), np.full(10, 1e-1)
    low[0] = high[0] = 0.5
    found = departure_record(np.stack([low, high]))
    assert (found.count, found.samples) == (1, 20)


def test_sign_test_is_that_of_scipy():
    for more, fewer in ((0, 0), (4, 0), (5, 1), (1, 5)):
        exact = stats.binomtest(more, more + fewer, alternative="greater").pvalue if more + fewer else 1.0
        assert sign_test(more, fewer) == pytest.approx(exact)


def test_samples_decades_apart_have_finite_intervals():
    found = ratio_interval(np.array([1e16, 1e20]), np.array([[1e-20, 1e20]]))
    assert found is not None
    assert 0 < found.low <= found.value <= found.high < 1e200
    wide = typical_interval(np.array([1e90, 1e-30, 1e-30]))
    assert 0 <= wide.low <= wide.value <= wide.high < 1e200
    assert typical_interval(np.array([0.0, 0.0, 1e-3])).low == 0
