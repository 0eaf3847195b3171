"""Statistics of the experiments: intervals, agreement of predictions, rankings, and what a wrong ranking costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from calibration.statistics import CONFIDENCE, DRAWS


@dataclass(frozen=True)
class Interval:
    """A statistic of all samples, of either sign, and the bounds of its confidence interval; NaN where it has none."""

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


def r_squared(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Share of the variance of `measured` that a straight line through `predicted` explains.

    The squared correlation of two float64 [N]; NaN where either is constant.
    """
    return _correlation(predicted, measured) ** 2


def spearman(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Rank correlation of two float64 [N]; NaN where either is constant."""
    return _correlation(rankdata(predicted), rankdata(measured))


def log_scatter(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Root mean square of log(predicted / measured); NaN where one of the two is not positive."""
    if min(float(predicted.min()), float(measured.min())) <= 0:
        return float("nan")
    return float(np.sqrt(np.mean(np.log(predicted / measured) ** 2)))


def spearman_within(groups: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> float:
    """Mean of the rank correlations within groups, where they are defined; NaN where none is."""
    found = [spearman(predicted[groups == group], measured[groups == group]) for group in np.unique(groups)]
    defined = [value for value in found if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - np.mean(first), second - np.mean(second)
    scale = float(np.sqrt(np.sum(first**2) * np.sum(second**2)))
    return float(np.sum(first * second)) / scale if scale > 0 else float("nan")


def rank_deviations(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Distance between the true and the found rank of each step, float64 [T].

    Scores below 0 count as 0, as they do in use; equal scores share a rank.
    """
    ranks = [rankdata(np.maximum(scores, 0.0)) for scores in (truth, found)]
    return np.asarray(np.abs(ranks[0] - ranks[1]))


def rank_deviation(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean over all steps of `rank_deviations`, in steps."""
    return float(rank_deviations(truth, found).mean())


def rank_deviation_at(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """For K = 1..T the mean rank deviation of the K steps that `found` ranks highest, float64 [T].

    What a schedule of K high-precision steps sees of a wrong ranking. The last entry is `rank_deviation`.
    """
    return _running_mean(rank_deviations(truth, found)[_highest_first(found)])


def error_regret_at(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """For K = 0..T-1 the excess error of giving the high precision to the K steps that look worst, float64 [T].

    (Sum of the true scores left at low precision) / (the least that any K steps would leave) - 1; 0 where nothing
    can be left. Scores below 0 count as 0.
    """
    scores = np.maximum(truth, 0.0)
    left, least = (_left(scores[order]) for order in (_highest_first(found), _highest_first(scores)))
    # what is left is a difference of sums: a few units in the last place are no regret
    certain = least > 1e-12 * scores.sum()
    return np.where(certain, left / np.where(certain, least, 1.0) - 1.0, 0.0)


def error_regret(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean over K = 0..T-1 of `error_regret_at`."""
    return float(error_regret_at(truth, found).mean())


def _highest_first(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")


def _left(scores: np.ndarray) -> np.ndarray:
    """Sum of what follows the first K = 0..T-1 entries."""
    return np.cumsum(scores[::-1])[::-1]


def _running_mean(values: np.ndarray) -> np.ndarray:
    return np.cumsum(values) / np.arange(1, len(values) + 1)
