"""Budgets in picture quality: the fastest schedule whose pictures, measured, are good enough.

Scores predict latent error, not SSIM or PSNR. So the Pareto front says in which order to try schedules, and each one
that matters is run: a bisection over the front, since quality rises along it but for noise. The fixed rules are tried
in the same way: where predictions mislead, one of them may do with fewer steps at the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from calibration.choose.baselines import RULES
from calibration.choose.pareto import Allocation
from calibration.choose.predictions import Predictions
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import mean, psnr_db
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


def meet_quality(
    predictions: Predictions,
    budget: QualityBudget,
    measurements: Measurements,
    on_run: Callable[[int, int], None],
) -> tuple[Allocation, str]:
    """The fastest schedule that meets a quality budget when it is run, of the Pareto front and the fixed rules.

    Args:
        predictions: of the kept precisions; the front says in which order to try.
        budget: what has to be met.
        measurements: of the calibration samples, with pictures.
        on_run: called after every run of a schedule on a sample with (done, at most).

    Returns:
        The schedule, and the budget in words.

    Raises:
        BudgetError: see `fastest_meeting`.
    """
    front, rules = predictions.front, rule_schedules(predictions)
    done, total = 0, (sum(len(tried).bit_length() for tried in (front, *rules.values())) + 1) * measurements.num_samples

    def measure(allocation: Allocation) -> float:
        nonlocal done
        measurements.expect([allocation.precisions], pictures=True)
        results = []
        for sample in range(measurements.num_samples):
            results.append(measurements.schedule_error("quality", allocation.precisions, sample, pictures=True))
            done += 1
            on_run(done, total)
        if budget.metric == "ssim":
            return mean([result["ssim"] for result in results])
        found = psnr_db([result["mse"] for result in results])
        return math.inf if found is None else found

    chosen, quality = fastest_meeting(front, rules.values(), budget, measure)
    name = next((name for name, rule in rules.items() if chosen in rule and chosen not in front), None)
    by_rule = f", by the rule {name!r}" if name else ""
    return chosen, f"{budget} on the calibration samples (measured: {quality:.4g}{by_rule})"


def rule_schedules(predictions: Predictions) -> dict[str, list[Allocation]]:
    """The fixed rules by name, with every number of steps at the reference and the others at the fastest precision.

    Returns:
        Schedules fastest first; no rules where no precision is faster than the reference, or none may join it.
    """
    latency_model, num_steps = predictions.latency_model, predictions.gram.num_steps
    reference, low = latency_model.reference, min(latency_model.precisions, key=latency_model.latencies_ms.__getitem__)
    rules: dict[str, list[Allocation]] = {}
    if low == reference or latency_model.costs.max_engines == 1:
        return rules
    for count in range(1, num_steps):
        pool = (reference,) * count + (low,) * (num_steps - count)
        for name, rule in RULES.items():
            rules.setdefault(name, []).append(predictions.allocation(rule(pool)))
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
        measure: quality of a schedule; asked for about log2(len(front)) schedules, each once, and as many of every
            rule. Infinite for pictures that are identical to the reference's.

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
