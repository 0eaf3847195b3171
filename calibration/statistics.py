"""Confidence intervals over samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
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
