"""Confidence intervals over samples: of typical errors, of their ratios, and of counts of departures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

from calibration.measure.metrics import LIMIT_MEDIANS, departed
from calibration.records import DepartureRecord, IntervalRecord

DRAWS = 1000
MOST_WIDENED = math.log(1e100)
"""Farthest that a bound is moved from its figure, in logarithms; two samples 34 decades apart would overflow."""
CONFIDENCE = 0.95
"""Probability that an interval is to cover."""


@dataclass(frozen=True)
class Interval:
    """A statistic of all samples, and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(statistic: Callable[..., float], *sizes: int, draws: int = DRAWS) -> Interval:
    """Percentile bootstrap (Efron, Annals of Statistics 7, 1979) over samples.

    What was measured on the same samples stays paired: the statistic gets indices, and picks with them from as many
    arrays as it likes. With few samples the interval is too narrow, as the extremes are hardly ever drawn alone.

    Args:
        statistic: called with one int64 [n] array of sample indices per entry of `sizes`. May return NaN where it is
            not defined for a draw; such draws are left out.
        sizes: number of samples of each set; sets are drawn from independently.
        draws: number of resampled sets; equal arguments give equal ones.

    Raises:
        ValueError: no set, or one of fewer than two samples.
    """
    if not sizes or min(sizes) < 2:
        raise ValueError(f"a confidence interval over {sizes} samples was asked for, expected 2 or more in every set")
    generator = np.random.default_rng(0)
    values = np.array([statistic(*(generator.integers(size, size=size) for size in sizes)) for _ in range(draws)])
    value = float(statistic(*(np.arange(size) for size in sizes)))
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def typical_errors(errors: np.ndarray) -> np.ndarray:
    """Limited means of E over the last axis; float64 [..., S] -> [...]."""
    medians = np.median(errors, axis=-1, keepdims=True)
    found: np.ndarray = np.minimum(errors, np.where(medians > 0, LIMIT_MEDIANS * medians, np.inf)).mean(axis=-1)
    return found


def typical_interval(errors: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """Typical error of samples float64 [S], or of draws [N, S] by their weights (None: their mean); for a single sample
    the bounds are the figure itself."""
    draws = np.atleast_2d(errors)
    return _resampled(lambda picked: _mean_of_draws(draws[:, picked], weights), draws.shape[1])


def ratio_interval(errors: np.ndarray, others: np.ndarray, weights: np.ndarray | None = None) -> Interval | None:
    """Typical error of a schedule over that of another one on the same samples, which stay paired.

    Args:
        errors: float64 [S].
        others: float64 [N, S], of N draws.
        weights: float64 [N] of the draws, which add up to 1; None for their mean.

    Returns:
        None where the other one has no error.
    """

    def ratio(picked: np.ndarray) -> np.ndarray:
        below = _mean_of_draws(others[:, picked], weights)
        found: np.ndarray = np.divide(
            typical_errors(errors[picked]), below, out=np.full_like(below, np.nan), where=below > 0
        )
        return found

    found = _resampled(ratio, len(errors))
    return None if np.isnan(found.value) else found


def interval_record(found: Interval) -> IntervalRecord:
    """An interval as documents hold it."""
    return IntervalRecord(value=found.value, low=found.low, high=found.high)


def departure_record(errors: np.ndarray) -> DepartureRecord:
    """Departures of runs, E float64 [S] or [N, S], each measured by the median of its own row."""
    rows = np.atleast_2d(errors)
    return share_record(int(sum(departed(row, float(np.median(row))).sum() for row in rows)), rows.size)


def share_record(count: int, samples: int) -> DepartureRecord:
    """A count of departures with the exact interval of its share (Clopper and Pearson, Biometrika 26, 1934)."""
    bounds = binomtest(count, samples).proportion_ci(CONFIDENCE, method="exact")
    return DepartureRecord(count=count, samples=samples, low=float(bounds.low), high=float(bounds.high))


def _mean_of_draws(errors: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Typical errors of draws float64 [N, ..., S], their mean by weights, float64 [...]."""
    shares = np.full(len(errors), 1 / len(errors)) if weights is None else weights
    found: np.ndarray = np.tensordot(shares, typical_errors(errors), axes=1)
    return found


def _resampled(statistic: Callable[[np.ndarray], np.ndarray], size: int) -> Interval:
    """A positive statistic of sample indices int64 [..., S], and its percentile bootstrap interval.

    With few samples the bounds are too near to the figure. They are moved away from it, in logarithms, by what a normal
    mean would need (t quantile and sqrt(n / (n - 1)): Hesterberg, The American Statistician 69, 2015, section 4.3.3).
    """
    value = float(statistic(np.arange(size)))
    if size < 2:
        return Interval(value, value, value)
    values = statistic(np.random.default_rng(0).integers(size, size=(DRAWS, size)))
    values = values[np.isfinite(values)]
    if not len(values) or not value > 0:
        return Interval(value, value, value)
    tail = (1 - CONFIDENCE) / 2
    wider = float(student_t.ppf(tail, size - 1) / norm.ppf(tail)) * math.sqrt(size / (size - 1))
    bounds = np.quantile(values, [tail, 1 - tail])
    apart = [wider * (math.log(bound) - math.log(value)) if bound > 0 else -math.inf for bound in bounds.tolist()]
    low, high = (value * math.exp(min(found, MOST_WIDENED)) for found in apart)
    return Interval(value, min(low, value), max(high, value))
