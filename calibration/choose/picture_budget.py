"""Budgets in picture quality: the fastest schedule whose pictures, measured, are good enough.

Scores predict latent error, not SSIM or PSNR. So the Pareto front says in which order to try schedules, and each one
that matters is run: a bisection over the front, since quality rises along it but for noise. The fixed rules are tried in
the same way: where predictions mislead, one of them may do with fewer steps at the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from calibration.choose.baselines import RULES
from calibration.choose.costs import AllocationCosts, relative_latency
from calibration.choose.pareto import Allocation
from calibration.scores.predictors import Contributions, predict
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


def rule_schedules(
    precisions: tuple[str, ...], latencies_ms: Mapping[str, float], found: Contributions, costs: AllocationCosts
) -> dict[str, list[Allocation]]:
    """The fixed rules by name, each with every number of steps at the reference and the others at the fastest precision.

    Args:
        precisions: the reference first.
        latencies_ms: step latency by precision.
        found: contributions, for what is predicted of them.
        costs: of changes of precision, and the limit on precisions.

    Returns:
        Schedules fastest first; no rules where no precision is faster than the reference, or none may join it.
    """
    reference, low = precisions[0], min(precisions, key=latencies_ms.__getitem__)
    rules: dict[str, list[Allocation]] = {}
    if low == reference or costs.max_engines == 1:
        return rules
    num_steps = len(found.values)
    for count in range(1, num_steps):
        pool = (reference,) * count + (low,) * (num_steps - count)
        for name, rule in RULES.items():
            schedule = rule(pool)
            latency = relative_latency(schedule, latencies_ms, reference, costs)
            allocation = Allocation(schedule, predict(found, precisions, schedule), latency)
            rules.setdefault(name, []).append(allocation)
    return {name: sorted(schedules, key=lambda allocation: allocation.latency) for name, schedules in rules.items()}


def fastest_meeting(
    front: Sequence[Allocation],
    rules: Iterable[Sequence[Allocation]],
    budget: QualityBudget,
    measure: Callable[[Allocation], float],
) -> tuple[Allocation, float]:
    """The fastest schedule of a Pareto front and of fixed rules that meets a quality budget when it is run.

    Args:
        front: fastest first, as `pareto_front` returns it.
        rules: the schedules of each rule, fastest first; only those faster than the best so far are tried.
        budget: what has to be met.
        measure: quality of a schedule; asked for about log2(len(front)) schedules, each once, and as many of every rule.
            Infinite for pictures that are identical to the reference's.

    Returns:
        The schedule and its measured quality. Every faster schedule that was measured falls short; where quality
        does not rise along the front or a rule, a faster one that was not measured might do.

    Raises:
        BudgetError: not even the most accurate schedule does; names its quality.
    """
    best = front[-1]
    quality = measure(best)
    if quality < budget.target:
        raise BudgetError(f"no schedule reaches {budget}; the most accurate has {quality:.4g}, so ask for that or less")
    for schedules in (front[:-1], *rules):
        faster = [schedule for schedule in schedules if schedule.latency < best.latency]
        low, high = 0, len(faster)  # what stands at `high` and behind it is not needed
        while low < high:
            middle = (low + high) // 2
            found = measure(faster[middle])
            if found >= budget.target:
                best, quality, high = faster[middle], found, middle
            else:
                low = middle + 1
    return best, quality
