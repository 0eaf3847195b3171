"""Confidence intervals of typical errors, of their ratios and of counts of departures; a sign test."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import binom, binomtest, norm
from scipy.stats import t as student_t

from calibration.measure.metrics import departed, typical_errors
from calibration.records import DepartureRecord, IntervalRecord

DRAWS = 1000
MOST_WIDENED = math.log(1e100)
"""Farthest that a bound is moved from its figure, in logarithms; two samples 34 decades apart would overflow."""
CONFIDENCE = 0.95
"""Probability that an interval is to cover."""


def typical_interval(errors: np.ndarray, weights: np.ndarray | None = None) -> IntervalRecord:
    """Typical error of samples float64 [S], or of draws [N, S] by their weights (None: their mean); for a single sample
    the bounds are the figure itself."""
    draws = np.atleast_2d(errors)
    return _resampled(lambda picked: _mean_of_draws(draws[:, picked], weights), draws.shape[1])


def ratio_interval(errors: np.ndarray, others: np.ndarray, weights: np.ndarray | None = None) -> IntervalRecord | None:
    """Typical error of a schedule over that of another one on the same samples, which stay paired.

    Args:
        errors: float64 [S].
        others: float64 [N, S], of N draws.
        weights: float64 [N] of the draws, which add up to 1; None for their mean.

    Returns:
        None where the other one has no error.
    """
    if not _mean_of_draws(others, weights) > 0:
        return None

    def ratio(picked: np.ndarray) -> np.ndarray:
        below = _mean_of_draws(others[:, picked], weights)
        found: np.ndarray = np.divide(
            typical_errors(errors[picked]), below, out=np.full_like(below, np.nan), where=below > 0
        )
        return found

    return _resampled(ratio, len(errors))


def departure_record(errors: np.ndarray) -> DepartureRecord:
    """Departures of runs, E float64 [S] or [N, S], each measured by the median of its own row."""
    rows = np.atleast_2d(errors)
    return share_record(int(sum(departed(row).sum() for row in rows)), rows.size)


def share_record(count: int, samples: int) -> DepartureRecord:
    """A count of departures with the exact interval of its share (Clopper and Pearson, Biometrika 26, 1934)."""
    bounds = binomtest(count, samples).proportion_ci(CONFIDENCE, method="exact")
    return DepartureRecord(count=count, samples=samples, low=float(bounds.low), high=float(bounds.high))


def sign_test(more: int, fewer: int) -> float:
    """Probability that of `more` + `fewer` pairs that differ, chance alone gives so many of one sign; one-sided."""
    return float(binom.sf(more - 1, more + fewer, 0.5))


def _mean_of_draws(errors: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Typical errors of draws float64 [N, ..., S], their mean by weights, float64 [...]."""
    shares = np.full(len(errors), 1 / len(errors)) if weights is None else weights
    found: np.ndarray = np.tensordot(shares, typical_errors(errors), axes=1)
    return found


def _resampled(statistic: Callable[[np.ndarray], np.ndarray], size: int) -> IntervalRecord:
    """A positive statistic of sample indices int64 [..., S], and its percentile bootstrap interval.

    With few samples the bounds are too near to the figure. They are moved away from it, in logarithms, by what a normal
    mean would need (t quantile and sqrt(n / (n - 1)): Hesterberg, The American Statistician 69, 2015, section 4.3.3).
    """
    value = float(statistic(np.arange(size)))
    if size < 2:
        return IntervalRecord(value=value, low=value, high=value)
    values = statistic(np.random.default_rng(0).integers(size, size=(DRAWS, size)))
    values = values[np.isfinite(values)]
    if not len(values) or not value > 0:
        return IntervalRecord(value=value, low=value, high=value)
    tail = (1 - CONFIDENCE) / 2
    wider = float(student_t.ppf(tail, size - 1) / norm.ppf(tail)) * math.sqrt(size / (size - 1))
    bounds = np.quantile(values, [tail, 1 - tail])
    apart = [wider * (math.log(bound) - math.log(value)) if bound > 0 else -math.inf for bound in bounds.tolist()]
    low, high = (value * math.exp(min(found, MOST_WIDENED)) for found in apart)
    return IntervalRecord(value=value, low=min(low, value), high=max(high, value))
