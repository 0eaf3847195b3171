"""Allocation: the schedule with the least predicted error, or the least latency, under a budget.

Latency and error budgets are answered from the exact Pareto front, see `calibration.choose.pareto`; changes of
precision and the engines that fit into memory are described by `calibration.choose.costs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.choose.costs import NO_COSTS, AllocationCosts, LatencyModel
from calibration.choose.pareto import Allocation, integers, pareto_front
from calibration.records import DroppedRecord
from engines.errors import BudgetError

BUDGET_TOLERANCE = 1e-12
"""Relative rounding of a budget that a caller computed from a reachable value."""


@dataclass(frozen=True)
class LatencyBudget:
    """Mean step latency, changes of precision included, of at most `ratio` times the reference's."""

    ratio: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise ValueError(f"latency ratio is {self.ratio}, expected a positive number (reference: 1)")


@dataclass(frozen=True)
class ErrorBudget:
    """Predicted E of at most `error`."""

    error: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.error) and self.error >= 0):
            raise ValueError(f"error budget is {self.error}, expected zero or a positive number")


@dataclass(frozen=True)
class HighSteps:
    """Exactly `count` steps at the reference, the others at the fastest low precision.

    Which steps is a matter of predicted error alone, as a count leaves the latency open; of schedules equal in it, the
    one with the cheapest changes of precision. To weigh changes against error give a latency budget.
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise ValueError(f"high-precision steps: {self.count!r}, expected a whole number from 0")


Budget = LatencyBudget | ErrorBudget | HighSteps


def drop_dominated(
    latency_model: LatencyModel, errors: Mapping[str, float]
) -> tuple[tuple[str, ...], tuple[DroppedRecord, ...]]:
    """Sorts out the precisions that are no use: putting another one in their place is no slower and errs no more.

    Where changes cost differently by pair, the other precision must not be costlier to change to or from.

    Args:
        latency_model: the reference is always kept; of two that are equal the first is.
        errors: E of the uniform schedule by precision, 0 for the reference.

    Returns:
        The precisions left, in order, and the others, each with what beats it.
    """
    precisions, latencies_ms = latency_model.precisions, latency_model.latencies_ms
    left: list[str] = []
    dropped: list[DroppedRecord] = []
    for index, name in enumerate(precisions):

        def beats(other: str, rank: int, name: str = name, index: int = index) -> bool:
            mine, theirs = (
                (latencies_ms[one], errors[one], *_changes_ns(one, {name, other}, latency_model))
                for one in (name, other)
            )
            no_worse = all(their <= my for their, my in zip(theirs, mine, strict=True))
            return no_worse and (theirs != mine or rank < index)

        better = [other for rank, other in enumerate(precisions) if rank != index and beats(other, rank)]
        if index == 0 or not better:
            left.append(name)
            continue
        # the fastest of them, for the most telling reason
        by = min(better, key=lambda other: (latencies_ms[other], errors[other]))
        reason = (
            f"{by} is no slower ({latencies_ms[by]:.4g} ms against {latencies_ms[name]:.4g} ms a step) "
            f"and errs no more (E {errors[by]:.3g} against {errors[name]:.3g})"
        )
        dropped.append(DroppedRecord(precision=name, by=by, reason=reason))
    return tuple(left), tuple(dropped)


def _changes_ns(name: str, pair: set[str], latency_model: LatencyModel) -> list[int]:
    """What changes between `name` and every precision outside `pair` cost, both ways."""
    others = [other for other in latency_model.precisions if other not in pair]
    return [latency_model.costs.swap_ns(*change) for other in others for change in ((name, other), (other, name))]


def allocate(
    latency_model: LatencyModel, contributions: np.ndarray, budget: Budget, front: Sequence[Allocation] | None = None
) -> Allocation:
    """The best schedule under a budget.

    Args:
        latency_model: see `pareto_front`.
        contributions: see `pareto_front`.
        budget: what the schedule has to meet.
        front: what `pareto_front` returned for the same arguments, if it is at hand.

    Returns:
        Least predicted error for a latency budget (the fastest such), least latency for an error budget (the
        most accurate such), least predicted error for a number of high-precision steps (the fastest such).

    Raises:
        BudgetError: no schedule meets the budget; names the nearest value that one does.
        ValueError: shapes or values out of range.
    """
    if isinstance(budget, HighSteps):
        return _high_steps(latency_model, contributions, budget)
    front = front or pareto_front(latency_model, contributions)
    if isinstance(budget, LatencyBudget):
        require_reachable(budget, front[0].latency, len(front[0].precisions))
        return [entry for entry in front if entry.latency <= budget.ratio * (1 + BUDGET_TOLERANCE)][-1]
    within = [entry for entry in front if entry.error <= budget.error * (1 + BUDGET_TOLERANCE)]
    if not within:
        raise BudgetError(
            f"no schedule has a predicted error of {budget.error:g} or less; the most accurate has "
            f"{_at_least(front[-1].error)}, so ask for that or more"
        )
    return within[0]


def require_reachable(budget: Budget | None, fastest: float, num_steps: int, costs: AllocationCosts = NO_COSTS) -> None:
    """Refuses a latency or step budget that no schedule can meet, which needs no scores to know.

    Args:
        budget: None and error budgets pass.
        fastest: mean step latency of the fastest schedule, relative to the reference. It is uniform, whatever
            changes of precision cost.
        num_steps: T.
        costs: a schedule of both high and low steps takes two engines.

    Raises:
        BudgetError: names the nearest value that can be met.
    """
    if isinstance(budget, LatencyBudget) and fastest > budget.ratio * (1 + BUDGET_TOLERANCE):
        raise BudgetError(
            f"no schedule runs in {budget.ratio:g} of the reference's latency; the fastest takes "
            f"{_at_least(fastest)}, so ask for that or more"
        )
    if isinstance(budget, HighSteps) and budget.count > num_steps:
        raise BudgetError(
            f"no schedule has {budget.count} high-precision steps; the loop has {num_steps}, so ask for at most that"
        )
    if isinstance(budget, HighSteps) and 0 < budget.count < num_steps and costs.max_engines == 1:
        raise BudgetError(
            f"{budget.count} high-precision steps of {num_steps} take two engines, but max_engines is 1; ask for 0 or "
            f"{num_steps} steps, or allow two engines"
        )


def _high_steps(latency_model: LatencyModel, contributions: np.ndarray, budget: HighSteps) -> Allocation:
    precisions, problem = latency_model.precisions, integers(latency_model, contributions)
    num_steps = len(problem.errors)
    require_reachable(budget, 0.0, num_steps, latency_model.costs)
    if len(precisions) == 1 and budget.count < num_steps:
        raise BudgetError(
            f"{budget.count} high-precision steps asked for, but no low precision is faster than "
            f"{precisions[0]}; the nearest that can be met is {num_steps}"
        )
    low = min(range(1, len(precisions)), key=lambda p: (problem.steps_ns[p], problem.errors[:, p].sum()), default=0)
    pair = [0, low]
    picked = _place_high_steps(problem.errors[:, pair].tolist(), problem.swaps_ns[pair][:, pair].tolist(), budget.count)
    choices = [pair[choice] for choice in picked]
    schedule = tuple(precisions[choice] for choice in choices)
    error = math.fsum(float(contributions[step, choice]) for step, choice in enumerate(choices))
    return Allocation(schedule, error, latency_model.latency(schedule))


def _place_high_steps(errors: list[list[int]], swaps_ns: list[list[int]], count: int) -> list[int]:
    """Per step 0 (high) or 1 (low), `count` of them high: least error, then least cost of changes, then high first.

    A dynamic programme from the last step to the first.

    Args:
        errors: [T][2], by step and choice.
        swaps_ns: [2][2], by choice before and after.
        count: at most T.
    """
    # [choice before][high steps left]: the best of the steps from here on, and the choice it begins with
    best: list[list[tuple[float, float, int]]] = [[(0, 0, 0)] + [(math.inf, math.inf, 0)] * count] * 2
    trail = []
    for step in reversed(range(len(errors))):
        # nothing is before the first step
        best = [
            [_best_option(errors[step], changes_ns, best, left) for left in range(count + 1)]
            for changes_ns in (swaps_ns if step else [[0, 0]])
        ]
        trail.append(best)
    choices: list[int] = []
    left = count
    for table in reversed(trail):
        choice = table[choices[-1] if choices else 0][left][2]
        choices.append(choice)
        left -= choice == 0
    return choices


def _best_option(
    errors: list[int], changes_ns: list[int], follow: list[list[tuple[float, float, int]]], left: int
) -> tuple[float, float, int]:
    """The best of both choices for a step, with what follows it."""
    options = []
    for choice in (0, 1) if left else (1,):
        error, cost_ns, _ = follow[choice][left - (choice == 0)]
        options.append((error + errors[choice], cost_ns + changes_ns[choice], choice))
    return min(options)


def _at_least(value: float) -> str:
    """`value` rounded up to four digits: asking for what is printed succeeds."""
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit * (1 - BUDGET_TOLERANCE)) * unit:.4g}"
