"""The Pareto front of schedules: least predicted error at every latency.

A multiple-choice knapsack: every step picks one precision, latencies and contributions to the error add up. Solved
exactly by a dynamic programme over steps that keeps, at each, every (latency, error) pair that no other one
dominates (Nemhauser and Ullmann, Management Science 15, 1969). Where a change of precision costs something, what
may follow depends on the precision before: the programme keeps one such set for every precision whose changes
cost something else, and a single one where all cost the same. A limit on distinct precisions is met by
solving each choice of that many precisions and merging the fronts.

Latencies and swap costs are rounded to whole nanoseconds and errors to 2^-50 of the largest contribution (a power of
two, so that binary fractions stay exact), and added as integers: sums do not depend on their order, ties are
ties, and a budget that equals a reachable value is met. Among schedules equal in both, the one that runs the
earliest differing step at the precision listed first wins.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from calibration.choose.costs import LatencyModel, step_ns

log = logging.getLogger(__name__)

ERROR_BITS = 50

MAX_POINTS = 50_000
"""Points that a set of the dynamic programme may have before it is thinned to about half as many.

Sets this large arise where all steps are nearly alike and error falls nearly in proportion to latency, so that hardly
any mixture dominates another; 100 steps of 5 precisions can then have millions."""


@dataclass(frozen=True)
class Allocation:
    """A schedule and what is predicted for it.

    Attributes:
        precisions: one name per step index.
        error: predicted E.
        latency: mean step latency, changes of precision included, relative to the reference.
    """

    precisions: tuple[str, ...]
    error: float
    latency: float


@dataclass(frozen=True)
class Problem:
    """An allocation in integers.

    Attributes:
        steps_ns: int64 [P], step latency by precision, in ns.
        swaps_ns: int64 [P, P], cost of a change by precision before and after, in ns; zero on the diagonal.
        errors: int64 [T, P], contributions in units of 2^-50 of the largest, rounded up to a power of two.
    """

    steps_ns: np.ndarray
    swaps_ns: np.ndarray
    errors: np.ndarray


@dataclass(frozen=True)
class _Points:
    """Undominated schedules by rising latency and falling error; `choices` is uint8 [N, T], the others int64 [N]."""

    total_ns: np.ndarray
    error: np.ndarray
    choices: np.ndarray


def integers(latency_model: LatencyModel, contributions: np.ndarray) -> Problem:
    """Rounds an allocation to integers.

    Args:
        latency_model: P precisions.
        contributions: float64 [T, P], what step i at precision p adds to the error.

    Raises:
        ValueError: shapes or values out of range.
    """
    precisions, costs = latency_model.precisions, latency_model.costs
    values = np.asarray(contributions, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] != len(precisions):
        raise ValueError(f"contributions have shape {values.shape}, expected [T, {len(precisions)}]")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("contributions hold negative or non-finite values; clip scores at 0 first")
    steps_ns = [step_ns(latency_model.latencies_ms[name]) for name in precisions]
    swaps_ns = [[costs.swap_ns(before, after) for after in precisions] for before in precisions]
    longest = len(values) * (max(steps_ns) + max(map(max, swaps_ns)))
    if longest >= 2**63:
        raise ValueError(f"a loop may take {longest:.3g} ns; give latencies and swap costs in ms, the whole below 1e12")
    unit = math.ldexp(1.0, math.frexp(float(values.max()))[1] - ERROR_BITS)
    return Problem(
        np.array(steps_ns, dtype=np.int64),
        np.array(swaps_ns, dtype=np.int64),
        np.rint(values / unit).astype(np.int64),
    )


def pareto_front(latency_model: LatencyModel, contributions: np.ndarray) -> tuple[Allocation, ...]:
    """Every schedule that no other one beats in latency and predicted error, fastest first.

    Args:
        latency_model: P precisions.
        contributions: float64 [T, P], what step i at precision p adds to the error; its values are not negative.

    Returns:
        Allocations of strictly rising latency and strictly falling error, one for each such pair.

        The front of 100 steps and 5 precisions has some thousand points and takes a fraction of a second. It is
        exact unless a set of the programme grows beyond `MAX_POINTS`; such a set is thinned, and a warning is logged
        with a bound: for every schedule the front holds one of no larger error that is slower by at most that.

    Raises:
        ValueError: shapes or values out of range.
    """
    problem = integers(latency_model, contributions)
    num_steps, count = problem.errors.shape
    reference_ns = num_steps * int(problem.steps_ns[0])
    limit = min(latency_model.costs.max_engines or count, count)
    solved = [_solve(problem, np.array(allowed, dtype=np.uint8)) for allowed in combinations(range(count), limit)]
    slack_ns = max(given_up_ns for _, given_up_ns in solved)
    if slack_ns:
        log.warning(
            "the Pareto front has more than %d points and was thinned: for every schedule it holds one of no larger "
            "predicted error that is slower by at most %.1e of the reference's latency",
            MAX_POINTS,
            slack_ns / reference_ns,
        )
    points = _merged([front for front, _ in solved])
    picked = np.asarray(contributions, dtype=np.float64)[np.arange(num_steps), points.choices]
    return tuple(
        Allocation(tuple(map(latency_model.precisions.__getitem__, row)), math.fsum(parts), total / reference_ns)
        for row, parts, total in zip(points.choices.tolist(), picked.tolist(), points.total_ns.tolist(), strict=True)
    )


def _solve(problem: Problem, allowed: np.ndarray) -> tuple[_Points, int]:
    """The front of schedules of the allowed precisions, and the latency in ns that thinning may have given up."""
    steps_ns, swaps_ns, errors = problem.steps_ns[allowed], problem.swaps_ns[allowed][:, allowed], problem.errors
    num_steps, count = len(errors), len(allowed)
    # precisions whose changes cost the same share what may follow them
    rows, row_of = np.unique(swaps_ns, axis=0, return_inverse=True)
    row_of = row_of.reshape(-1)  # numpy 2.0 gives it another shape
    follow_ns = [np.zeros(1, dtype=np.int64)] * len(rows)
    follow_error = list(follow_ns)
    # per step the choice and the entry it continues with; last step first, so that ties fall to early steps
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    slack_ns = 0
    for step in reversed(range(num_steps)):
        sizes = np.array([len(follow) for follow in follow_ns])
        starts = np.cumsum(sizes) - sizes
        total_ns = np.concatenate([steps_ns[p] + follow_ns[row_of[p]] for p in range(count)])
        total_error = np.concatenate([errors[step, allowed[p]] + follow_error[row_of[p]] for p in range(count)])
        choice = np.repeat(allowed, sizes[row_of])
        parent = np.concatenate([starts[row] + np.arange(sizes[row], dtype=np.int32) for row in row_of])
        follow_ns, follow_error, kept_entries, widths = [], [], [], [0]
        for row in rows if step else np.zeros_like(rows[:1]):  # nothing is before the first step
            behind_ns = total_ns + np.repeat(row, sizes[row_of])
            kept = _undominated(behind_ns, total_error)
            if len(kept) > MAX_POINTS:
                kept, width = _thinned(kept, behind_ns)
                widths.append(width)
            follow_ns.append(behind_ns[kept])
            follow_error.append(total_error[kept])
            kept_entries.append(kept)
        slack_ns += max(widths)
        entries = np.concatenate(kept_entries)
        trail.append((choice[entries], parent[entries].astype(np.int32)))
    entries = np.arange(len(follow_ns[0]))
    choices = np.empty((len(entries), num_steps), dtype=np.uint8)
    for step, (choice, parent) in enumerate(reversed(trail)):
        choices[:, step] = choice[entries]
        entries = parent[entries]
    return _Points(follow_ns[0], follow_error[0], choices), slack_ns


def _undominated(total_ns: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Indices of the pairs that no other one dominates, by rising latency; of equal pairs the first."""
    order = np.argsort(total_ns, kind="stable")  # a merge: the input is made of sorted runs
    least = np.minimum.accumulate(error[order])
    falls = np.flatnonzero(np.concatenate(([True], least[1:] < least[:-1])))
    latency = total_ns[order[falls]]
    return order[falls[np.concatenate((latency[1:] > latency[:-1], [True]))]]


def _thinned(kept: np.ndarray, total_ns: np.ndarray) -> tuple[np.ndarray, int]:
    """One entry per interval of latency, the one of least error, and the fastest; and the interval in ns."""
    latency = total_ns[kept]
    width = -(-int(latency[-1] - latency[0] + 1) // (MAX_POINTS // 2))
    interval = (latency - latency[0]) // width
    last = np.concatenate((interval[1:] > interval[:-1], [True]))
    last[0] = True
    return kept[last], width


def _merged(fronts: Sequence[_Points]) -> _Points:
    if len(fronts) == 1:
        return fronts[0]
    total_ns = np.concatenate([front.total_ns for front in fronts])
    error = np.concatenate([front.error for front in fronts])
    choices = np.concatenate([front.choices for front in fronts])
    # rows as byte strings, which sort like their numbers: of schedules equal in both the first of these is kept
    order = np.argsort(choices.view(f"S{choices.shape[1]}")[:, 0], kind="stable")
    kept = order[_undominated(total_ns[order], error[order])]
    return _Points(total_ns[kept], error[kept], choices[kept])
