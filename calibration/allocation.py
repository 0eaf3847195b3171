"""Allocation: the schedule with the least predicted error, or the least latency, under a budget.

A multiple-choice knapsack: every step picks one precision, latencies and contributions to the error add
up. Solved exactly by a dynamic programme over steps that keeps, at each, every (latency, error) pair that
no other one dominates (Nemhauser and Ullmann, Management Science 15, 1969); the last set is the Pareto
front, and every budget is answered from it.

Latencies are rounded to whole nanoseconds and errors to 2^-50 of the largest contribution (a power of
two, so that binary fractions stay exact), and added as
integers: sums do not depend on their order, ties are ties, and a budget that equals a reachable value is
met. Among schedules equal in both, the one that runs the earliest differing step at the precision listed
first wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.errors import BudgetError

NANOSECONDS_PER_MS = 1_000_000
ERROR_BITS = 50
BUDGET_TOLERANCE = 1e-12
"""Relative rounding of a budget that a caller computed from a reachable value."""


@dataclass(frozen=True)
class LatencyBudget:
    """Mean step latency of at most `ratio` times the reference's."""

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
    """Exactly `count` steps at the reference, the others at the fastest low precision."""

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise ValueError(f"high-precision steps: {self.count!r}, expected a whole number from 0")


Budget = LatencyBudget | ErrorBudget | HighSteps


@dataclass(frozen=True)
class Allocation:
    """A schedule and what is predicted for it.

    Attributes:
        precisions: one name per step index.
        error: predicted E.
        latency: mean step latency relative to the reference.
    """

    precisions: tuple[str, ...]
    error: float
    latency: float


@dataclass(frozen=True)
class Dominated:
    """A precision that `by` beats: no slower, and no larger error."""

    precision: str
    by: str
    reason: str


def drop_dominated(
    precisions: Sequence[str], latencies_ms: Mapping[str, float], errors: Mapping[str, float]
) -> tuple[tuple[str, ...], tuple[Dominated, ...]]:
    """Sorts out the precisions that are no use: another one is no slower and has no larger error.

    Args:
        precisions: the reference first; it is always kept. Of two that are equal the first is kept.
        latencies_ms: step latency by precision.
        errors: E of the uniform schedule by precision, 0 for the reference.

    Returns:
        The precisions left, in order, and the others, each with what beats it.
    """
    left: list[str] = []
    dropped: list[Dominated] = []
    for index, name in enumerate(precisions):

        def beats(other: str, rank: int, name: str = name, index: int = index) -> bool:
            mine, theirs = (latencies_ms[name], errors[name]), (latencies_ms[other], errors[other])
            return theirs[0] <= mine[0] and theirs[1] <= mine[1] and (theirs != mine or rank < index)

        rivals = [other for rank, other in enumerate(precisions) if rank != index and beats(other, rank)]
        if index == 0 or not rivals:
            left.append(name)
            continue
        # the fastest rival, for the most telling reason
        rival = min(rivals, key=lambda other: (latencies_ms[other], errors[other]))
        reason = (
            f"{rival} is no slower ({latencies_ms[rival]:.4g} ms against {latencies_ms[name]:.4g} ms a step) "
            f"and errs no more (E {errors[rival]:.3g} against {errors[name]:.3g})"
        )
        dropped.append(Dominated(name, rival, reason))
    return tuple(left), tuple(dropped)


def relative_latency(schedule: Sequence[str], latencies_ms: Mapping[str, float], reference: str) -> float:
    """Mean step latency of a schedule relative to the reference's."""
    total = sum(_nanoseconds(latencies_ms[name]) for name in schedule)
    return total / (len(schedule) * _nanoseconds(latencies_ms[reference]))


def pareto_front(
    precisions: Sequence[str],
    latencies_ms: Mapping[str, float],
    contributions: np.ndarray,
    power: float = 1.0,
) -> tuple[Allocation, ...]:
    """Every schedule that no other one beats in latency and predicted error, fastest first.

    Args:
        precisions: P names, the reference first.
        latencies_ms: step latency by precision.
        contributions: float64 [T, P], what step i at precision p adds; non-negative.
        power: the predicted error is the sum of contributions to this power; positive.

    Returns:
        Allocations of strictly rising latency and strictly falling error, one for each such pair.

    Raises:
        ValueError: shapes or values out of range.

    The front of 100 steps and 5 precisions has a few thousand points and takes a tenth of a second. Errors
    that are nearly a linear function of latency at every step make it a hundred times larger.
    """
    steps_ns, errors = _integers(precisions, latencies_ms, contributions)
    num_steps = len(errors)
    total_ns = np.zeros(1, dtype=np.int64)
    total_error = np.zeros(1, dtype=np.int64)
    # per step the choice and the entry it continues with; last step first, so that ties fall to early steps
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for step in reversed(range(num_steps)):
        next_ns = (steps_ns[:, None] + total_ns).ravel()
        next_error = (errors[step][:, None] + total_error).ravel()
        order = np.lexsort((next_error, next_ns))
        least = np.minimum.accumulate(next_error[order])
        kept = order[np.concatenate(([True], least[1:] < least[:-1]))]
        trail.append((kept // len(total_ns), kept % len(total_ns)))
        total_ns, total_error = next_ns[kept], next_error[kept]
    entries = np.arange(len(total_ns))
    choices = np.empty((len(entries), num_steps), dtype=np.int64)
    for step, (choice, parent) in enumerate(reversed(trail)):
        choices[:, step] = choice[entries]
        entries = parent[entries]
    names = np.array(precisions)
    picked = np.asarray(contributions, dtype=np.float64)[np.arange(num_steps), choices]
    reference_ns = num_steps * int(steps_ns[0])
    return tuple(
        Allocation(tuple(names[row].tolist()), math.fsum(parts) ** power, int(total) / reference_ns)
        for row, parts, total in zip(choices, picked, total_ns, strict=True)
    )


def allocate(
    precisions: Sequence[str],
    latencies_ms: Mapping[str, float],
    contributions: np.ndarray,
    budget: Budget,
    power: float = 1.0,
    front: Sequence[Allocation] | None = None,
) -> Allocation:
    """The best schedule under a budget; arguments as in `pareto_front`.

    Args:
        front: what `pareto_front` returned for the same arguments, if it is at hand.

    Returns:
        Least predicted error for a latency budget (the fastest such), least latency for an error budget (the
        most accurate such), least predicted error for a number of high-precision steps.

    Raises:
        BudgetError: no schedule meets the budget; names the nearest value that one does.
        ValueError: shapes or values out of range.
    """
    if isinstance(budget, HighSteps):
        return _high_steps(precisions, latencies_ms, contributions, budget.count, power)
    front = front or pareto_front(precisions, latencies_ms, contributions, power)
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


def require_reachable(budget: Budget | None, fastest: float, num_steps: int) -> None:
    """Refuses a latency or step budget that no schedule can meet, which needs no scores to know.

    Args:
        budget: None and error budgets pass.
        fastest: mean step latency of the fastest schedule, relative to the reference.
        num_steps: T.

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


def _high_steps(
    precisions: Sequence[str],
    latencies_ms: Mapping[str, float],
    contributions: np.ndarray,
    count: int,
    power: float,
) -> Allocation:
    steps_ns, errors = _integers(precisions, latencies_ms, contributions)
    num_steps = len(errors)
    if count > num_steps:
        raise BudgetError(f"{count} high-precision steps asked for in a loop of {num_steps}; {num_steps} is the most")
    if len(precisions) == 1 and count < num_steps:
        raise BudgetError(
            f"{count} high-precision steps asked for, but no low precision is faster than "
            f"{precisions[0]}; the nearest that can be met is {num_steps}"
        )
    low = min(range(1, len(precisions)), key=lambda p: (steps_ns[p], errors[:, p].sum()), default=0)
    gain = errors[:, low] - errors[:, 0]
    high = set(np.argsort(-gain, kind="stable")[:count].tolist())
    choices = [0 if step in high else low for step in range(num_steps)]
    schedule = tuple(precisions[choice] for choice in choices)
    error = math.fsum(float(contributions[step, choice]) for step, choice in enumerate(choices))
    return Allocation(schedule, error**power, relative_latency(schedule, latencies_ms, precisions[0]))


def _integers(
    precisions: Sequence[str], latencies_ms: Mapping[str, float], contributions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Latencies in ns, int64 [P], and contributions in units of 2^-50 of the largest, int64 [T, P]."""
    values = np.asarray(contributions, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] != len(precisions):
        raise ValueError(f"contributions have shape {values.shape}, expected [T, {len(precisions)}]")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("contributions hold negative or non-finite values; clip scores at 0 first")
    steps_ns = np.array([_nanoseconds(latencies_ms[name]) for name in precisions], dtype=np.int64)
    unit = math.ldexp(1.0, math.frexp(float(values.max()))[1] - ERROR_BITS)
    return steps_ns, np.rint(values / unit).astype(np.int64)


def _nanoseconds(latency_ms: float) -> int:
    if not (math.isfinite(latency_ms) and latency_ms * NANOSECONDS_PER_MS >= 1):
        raise ValueError(f"step latency is {latency_ms} ms, expected a number of at least one nanosecond")
    return round(latency_ms * NANOSECONDS_PER_MS)


def _at_least(value: float) -> str:
    """`value` rounded up to four digits: asking for what is printed succeeds."""
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit * (1 - BUDGET_TOLERANCE)) * unit:.4g}"
