"""Budgets in picture quality: the fastest schedule whose pictures, measured, are good enough.

Scores predict latent error, not SSIM or PSNR. So the Pareto front says in which order to try schedules, and each one
that matters is run: a bisection over the front, since quality rises along it but for noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from calibration.pareto import Allocation
from engines.errors import BudgetError

QualityMetric = Literal["ssim", "psnr"]
METRICS: tuple[QualityMetric, ...] = ("ssim", "psnr")


@dataclass(frozen=True)
class QualityBudget:
    """Mean SSIM, or PSNR in dB, against the reference's pictures of at least `target`.

    Raises:
        ValueError: an unknown metric, or a target outside its range.
    """

    metric: QualityMetric
    target: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"quality metric is {self.metric!r}, expected one of {', '.join(METRICS)}")
        highest = 1.0 if self.metric == "ssim" else math.inf
        if not (math.isfinite(self.target) and 0 < self.target <= highest):
            raise ValueError(
                f"{self.metric} target is {self.target}, expected a number above 0 and at most {highest:g}"
            )

    def __str__(self) -> str:
        return f"ssim at least {self.target:g}" if self.metric == "ssim" else f"psnr at least {self.target:g} dB"


def fastest_meeting(
    front: Sequence[Allocation], budget: QualityBudget, measure: Callable[[Allocation], float]
) -> tuple[Allocation, float]:
    """The fastest schedule of a Pareto front that meets a quality budget when it is run.

    Args:
        front: fastest first, as `pareto_front` returns it.
        budget: what has to be met.
        measure: quality of a schedule; asked for about log2(len(front)) schedules, each once. Infinite for pictures
            that are identical to the reference's.

    Returns:
        The schedule and its measured quality. Every faster schedule that was measured falls short; where quality
        does not rise along the front, a faster one that was not measured might do.

    Raises:
        BudgetError: not even the most accurate schedule does; names its quality.
    """
    best = front[-1]
    quality = measure(best)
    if quality < budget.target:
        raise BudgetError(f"no schedule reaches {budget}; the most accurate has {quality:.4g}, so ask for that or less")
    low, high = 0, len(front) - 1  # front[high] meets the budget
    while low < high:
        middle = (low + high) // 2
        found = measure(front[middle])
        if found >= budget.target:
            best, quality, high = front[middle], found, middle
        else:
            low = middle + 1
    return best, quality
