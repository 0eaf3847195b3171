"""The schedule of least predicted E by a Gram matrix, under a budget.

Predicted E is a quadratic form over schedules (`calibration.scores.gram`): the sum of G[i z_i, j z_j], and the floor of
the first low step. It is no sum over steps, so that no programme over steps finds its optimum. A local search does, in
nearly all cases: the best change of one step or of two at once (an exchange is such a change), as long as one lowers E
within the budget. It starts from the exact additive optimum, the diagonal's, and from the optima of other additive
readings of the same matrix; the best end counts. Where fewer engines fit than there are precisions, every set of as
many is searched.

Latencies are added in whole nanoseconds, as `calibration.choose.pareto` adds them. Nothing depends on chance: what
perturbs readings has a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations

import numpy as np

from calibration.choose.allocation import BUDGET_TOLERANCE, Budget, ErrorBudget, HighSteps, allocate, require_reachable
from calibration.choose.costs import LatencyModel
from calibration.choose.pareto import Allocation, integers, pareto_front
from calibration.choose.quadratic_search import Form, LocalSearch, additive_optima, readings
from calibration.scores.gram import Gram
from engines.errors import BudgetError

FRONT_POINTS = 64
"""Latencies at which a front is searched."""

STARTS = 8
"""Schedules that a search for the least latency starts from, the fastest."""

NO_LIMIT_NS = 2**62
"""For schedules whose latency does not matter."""

FULL_SETS = 3
"""Sets of precisions that are searched from every start, where engines are limited; the others from one."""


def best_schedule(latency_model: LatencyModel, gram: Gram, budget: Budget, held: int = 0) -> Allocation:
    """The best schedule that is found under a budget.

    Args:
        latency_model: P precisions, the Gram's.
        gram: predicts E.
        budget: what the schedule has to meet; it does.
        held: the first steps that stay at the reference, 0 to T.

    Returns:
        Least predicted error for a latency budget (the fastest such), least latency for an error budget (the most
        accurate such), least predicted error for a number of high-precision steps (with the cheapest changes). Never
        worse than what the diagonal alone would choose, as far as that meets the budget.

        100 steps and 5 precisions take about a second.

    Raises:
        BudgetError: no schedule that holds these steps meets the budget; names the nearest value that one does.
        ValueError: the precisions differ, or values are out of range.
    """
    space = _Space(latency_model, gram, held)
    if isinstance(budget, HighSteps):
        return space.allocation(_high_steps(space, budget))
    if isinstance(budget, ErrorBudget):
        return space.allocation(_least_latency(space, budget.error * (1 + BUDGET_TOLERANCE)))
    require_reachable(budget, int(space.additive_ns[0]) / space.reference_ns, gram.num_steps)
    limit_ns = max(math.floor(budget.ratio * (1 + BUDGET_TOLERANCE) * space.reference_ns), int(space.additive_ns[0]))
    start = space.additive[space.additive_ns <= limit_ns][-1]
    return space.allocation(_least_error(space, limit_ns, [start]).choices)


def front(latency_model: LatencyModel, gram: Gram) -> tuple[Allocation, ...]:
    """Schedules that trade latency for predicted error.

    Args:
        latency_model: P precisions, the Gram's.
        gram: predicts E.

    Returns:
        Fastest first, of strictly rising latency and strictly falling error. The ends have the least latency of all
        schedules, and an error of 0. For every point of the diagonal's exact front there is one that is no slower and
        errs no more.

    Raises:
        ValueError: the precisions differ, or values are out of range.
    """
    space = _Space(latency_model, gram, 0)
    # the first and the last are themselves, the others the nearest from above
    latencies_ns = np.linspace(space.additive_ns[0], space.additive_ns[-1], FRONT_POINTS)
    picked = np.unique(np.searchsorted(space.additive_ns[:-1], latencies_ns))
    found: list[np.ndarray] = []
    for k in picked:
        limit_ns = int(space.additive_ns[k])
        pooled = np.array([start for subset in space.subsets for start in subset.of_least_error(limit_ns)[:1]])
        nearest = [pooled[gram.errors(pooled).argmin()]] if len(pooled) else []
        best = _Best()
        for start in (space.additive[k], *found[-1:], *nearest):
            best.descend(space.subset_of(start), start, limit_ns)
        found.append(best.choices)
    choices = np.concatenate([space.additive, np.array(found), np.zeros((1, gram.num_steps), dtype=np.int64)])
    errors = gram.errors(choices)
    points: list[Allocation] = []
    for k in np.lexsort((*choices.T[::-1], errors, space.total_ns(choices))):
        if not points or errors[k] < points[-1].error:
            points.append(space.allocation(choices[k]))
    return tuple(points)


class _Space:
    """Schedules whose first steps are held, as indices of precisions, and what is predicted of them.

    Attributes:
        additive: the diagonal's exact front, int64 [N, T], fastest first.
        additive_ns: its latencies, int64 [N], strictly rising.
        reference_ns: the latency of the reference.
    """

    def __init__(self, latency_model: LatencyModel, gram: Gram, held: int) -> None:
        if gram.precisions != latency_model.precisions:
            raise ValueError(
                f"the Gram is of {', '.join(gram.precisions)}, the latency model of "
                f"{', '.join(latency_model.precisions)}; expected the same precisions in the same order"
            )
        if not 0 <= held <= gram.num_steps:
            raise ValueError(f"{held} first steps are to be held, expected 0 to {gram.num_steps}")
        self.latency_model, self.gram, self.held = latency_model, gram, held
        self.problem = integers(latency_model, gram.diagonal)
        self.reference_ns = gram.num_steps * int(self.problem.steps_ns[0])

    @cached_property
    def contributions(self) -> np.ndarray:
        """The diagonal, with more than all of it for what held steps must not be, float64 [T, P]."""
        found = self.gram.diagonal
        found[: self.held, 1:] = 2 * found.sum() or 1.0
        return found

    @cached_property
    def additive(self) -> np.ndarray:
        points = pareto_front(self.latency_model, self.contributions)
        found = np.array([self.choices(point) for point in points])
        return found[(found[:, : self.held] == 0).all(axis=1)]

    @cached_property
    def additive_ns(self) -> np.ndarray:
        return self.total_ns(self.additive)

    @cached_property
    def _whole(self) -> Form:
        return self.form(np.arange(len(self.latency_model.precisions)))

    @cached_property
    def subsets(self) -> tuple[_Subset, ...]:
        """One for every set of precisions whose engines fit together."""
        count = len(self.latency_model.precisions)
        fit = min(self.latency_model.costs.max_engines or count, count)
        sets = [found for found in combinations(range(count), fit) if found[0] == 0 or not self.held]
        return tuple(_Subset(self.form(np.array(found)), np.array(found)) for found in sets)

    def subset_of(self, choices: np.ndarray) -> _Subset:
        """The first one that has these precisions."""
        return next(subset for subset in self.subsets if np.isin(choices, subset.columns).all())

    def form(self, columns: np.ndarray, high_steps: bool = False) -> Form:
        """What a search over these precisions minimizes."""
        steps = np.arange(self.gram.num_steps)
        return Form(
            values=self.gram.values[np.ix_(steps, columns, steps, columns)],
            floor=self.gram.floor,
            low=columns > 0,
            steps_ns=self.problem.steps_ns[columns],
            swaps_ns=self.problem.swaps_ns[np.ix_(columns, columns)],
            held=self.held,
            high_steps=high_steps,
        )

    def choices(self, allocation: Allocation) -> np.ndarray:
        return np.array([self.latency_model.precisions.index(name) for name in allocation.precisions])

    def total_ns(self, choices: np.ndarray) -> np.ndarray:
        return self._whole.total_ns(choices)

    def allocation(self, choices: np.ndarray) -> Allocation:
        schedule = tuple(self.latency_model.precisions[choice] for choice in choices)
        return Allocation(schedule, self.gram.error(schedule), self.latency_model.latency(schedule))


class _Subset:
    """A set of precisions to search over, and where searches start: at optima of additive readings.

    Attributes:
        form: what they minimize.
        columns: the set, rising indices of precisions, int64 [Q].
    """

    def __init__(self, form: Form, columns: np.ndarray) -> None:
        self.form, self.columns = form, columns
        self._choices = additive_optima(form, readings(form))
        flat = self._choices.reshape(-1, self._choices.shape[2])
        unique, rows = np.unique(flat, axis=0, return_inverse=True)
        self._errors = form.errors(unique)[rows.reshape(-1)].reshape(self._choices.shape[:2])
        self._total_ns = form.total_ns(flat).reshape(self._choices.shape[:2])

    def of_least_error(self, limit_ns: int) -> list[np.ndarray]:
        """Of every reading the schedule of least E within a latency, the best first."""
        return self._best(np.where(self._total_ns <= limit_ns, self._errors, np.inf))

    def of_least_latency(self, within: float) -> list[np.ndarray]:
        """Of every reading the fastest schedule of E within a bound, the best first."""
        return self._best(np.where(self._errors <= within, self._total_ns, np.inf))

    def of_high_steps(self, count: int) -> list[np.ndarray]:
        """Of every reading the schedule of least sum with `count` steps at the reference, of two precisions."""
        highest = np.argsort(-readings(self.form)[:, :, 1], axis=1, kind="stable")[:, :count]
        choices = np.ones(self._choices[:, 0].shape, dtype=np.int64)
        np.put_along_axis(choices, highest, 0, axis=1)
        return list(self.columns[np.unique(choices, axis=0)])

    def search(self, choices: np.ndarray) -> LocalSearch:
        """A search from a schedule in indices of all precisions."""
        return LocalSearch(self.form, np.searchsorted(self.columns, choices))

    def _best(self, costs: np.ndarray) -> list[np.ndarray]:
        least, order = costs.min(axis=1), costs.argmin(axis=1)
        rows = [k for k in np.argsort(least, kind="stable") if np.isfinite(least[k])]
        found = {self._choices[k, order[k]].tobytes(): self._choices[k, order[k]] for k in rows}
        return [self.columns[choices] for choices in found.values()]


class _Best:
    """The best of searches: least E, then least latency. `choices` are indices of all precisions."""

    def __init__(self) -> None:
        self.choices = np.empty(0, dtype=np.int64)
        self.error = self.total_ns = math.inf

    def descend(self, subset: _Subset, start: np.ndarray, limit_ns: int) -> float:
        """Searches from a start within a latency; returns the E that the search ends at."""
        search = subset.search(start)
        search.descend(limit_ns)
        equal = abs(search.error - self.error) <= subset.form.tolerance
        if (search.total_ns < self.total_ns) if equal else (search.error < self.error):
            self.choices, self.error, self.total_ns = subset.columns[search.choices], search.error, search.total_ns
        return search.error


def _least_error(space: _Space, limit_ns: int, warm: Sequence[np.ndarray]) -> _Best:
    """The schedule of least E within a latency, from all starts and from `warm` ones; infinite E without any."""
    best = _Best()
    for start in warm:
        best.descend(space.subset_of(start), start, limit_ns)
    subsets = [(subset, starts) for subset in space.subsets if (starts := subset.of_least_error(limit_ns))]
    ends = [best.descend(subset, starts[0], limit_ns) for subset, starts in subsets]
    for k in np.argsort(ends, kind="stable")[:FULL_SETS]:
        subset, starts = subsets[k]
        for start in starts[1:]:
            best.descend(subset, start, limit_ns)
    return best


def _least_latency(space: _Space, within: float) -> np.ndarray:
    """The fastest schedule of E within a bound: the fastest starts are tightened, then what is faster is looked for."""
    reference = np.zeros(space.gram.num_steps, dtype=np.int64)
    found = [reference, *space.additive[space.gram.errors(space.additive) <= within][:1]]
    found += [start for subset in space.subsets for start in subset.of_least_latency(within)]
    order = np.argsort(space.total_ns(np.array(found)), kind="stable")[:STARTS]
    best, choices = (math.inf, math.inf), reference
    starts = [found[k] for k in order]
    while True:
        before = best
        for start in starts:
            subset = space.subset_of(start)
            search = subset.search(start)
            search.tighten(within)
            if (search.total_ns, search.error) < best:
                best, choices = (search.total_ns, search.error), subset.columns[search.choices]
        faster = _least_error(space, int(best[0]) - 1, [])
        if best == before or not faster.error <= within:
            return choices
        starts = [faster.choices]


def _high_steps(space: _Space, budget: HighSteps) -> np.ndarray:
    """The schedule of least E with so many steps at the reference."""
    if budget.count < space.held:
        raise BudgetError(
            f"{budget.count} high-precision steps asked for, but the first {space.held} are held at "
            f"{space.latency_model.reference}; ask for at least that"
        )
    start = space.choices(allocate(space.latency_model, space.contributions, budget))
    columns = np.unique(start)
    if len(columns) == 1:
        return start
    subset = _Subset(space.form(columns, high_steps=True), columns)
    best = _Best()
    for choices in (start, *subset.of_high_steps(budget.count)):
        best.descend(subset, choices, NO_LIMIT_NS)
    return best.choices
