"""Precisions and reuse together: the best schedule over all reuse plans under one budget.

A *plan* says which steps are reused, and how (`calibration.choose.reuse_plans`); its E was measured with the reference at
all other steps. Of those the precisions are chosen as without reuse, over a loop that is shorter by the reused steps:

    E(plan, z) = E(plan) + sum over computed i and j of f[i] f[j] G[i z_i, j z_j]

f[i] is how much more the output of step i counts now, as reused steps are extrapolated from it: the ratio of dx_T / dm_i
with and without the plan, from the sampler table alone. Reuse and precisions are taken to err independently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibration.choose.allocation import (
    BUDGET_TOLERANCE,
    Budget,
    ErrorBudget,
    HighSteps,
    LatencyBudget,
    require_reachable,
)
from calibration.choose.baselines import arrange
from calibration.choose.costs import LatencyModel, step_ns
from calibration.choose.pareto import Allocation
from calibration.choose.quadratic import best_schedule
from calibration.choose.quadratic import front as front_without
from calibration.scores.gram import Gram
from engines.errors import BudgetError
from engines.reuse import computed_choices, engines_of, order_of, reused_steps

LEAST_INFLUENCE = 1e-3
"""An output that counts for less than this fraction of the largest is taken to count for it, in ratios."""


@dataclass(frozen=True, eq=False)
class ReusePlan:
    """Which steps are reused, and how.

    Attributes:
        choices: the reference at computed steps, else a reuse, T of them.
        error: typical E, measured.
        predicted: E as it was predicted when the plan was picked.
        influence: f, float64 [T]: how much more each computed output counts; 0 for reused steps.
        rule: its name, where it is a rule of thumb.
    """

    choices: tuple[str, ...]
    error: float
    predicted: float
    influence: np.ndarray
    rule: str | None = None

    @property
    def reused(self) -> tuple[int, ...]:
        """Step indices."""
        return reused_steps(self.choices)

    @property
    def computed(self) -> np.ndarray:
        """Step indices, int64 [T - N]."""
        return np.array([step for step, choice in enumerate(self.choices) if order_of(choice) is None])

    def schedule(self, precisions: Sequence[str]) -> tuple[str, ...]:
        """The plan with precisions at its computed steps."""
        return arrange(self.choices, precisions)

    def gram(self, whole: Gram) -> Gram:
        """The Gram matrix of its computed steps, and the floor beyond what is in `error` of the reference's own rounding."""
        steps = self.computed
        factors = self.influence[steps]
        values = whole.values[steps][:, :, steps] * factors[:, None, None, None] * factors[:, None]
        first = self.reused[0]
        return Gram(whole.precisions, values, np.maximum(whole.floor[steps] - whole.floor[first], 0.0))

    def of(self, schedule: Sequence[str]) -> bool:
        """Whether a schedule reuses the same steps in the same way."""
        return all(
            choice == own if order_of(own) is not None else order_of(choice) is None
            for choice, own in zip(schedule, self.choices, strict=True)
        )


def influence_ratios(influence: Callable[[Sequence[str]], np.ndarray], choices: Sequence[str]) -> np.ndarray:
    """How much more every computed output counts than without reuse, float64 [T].

    Args:
        influence: `Evaluator.influence`.
        choices: of a plan.
    """
    reference = engines_of(choices)[0]
    without = influence((reference,) * len(choices))
    least = LEAST_INFLUENCE * float(np.abs(without).max())
    floored = np.where(np.abs(without) < least, np.copysign(least, without), without)
    found: np.ndarray = influence(choices) / floored
    return found


def plan_of(plans: Sequence[ReusePlan], schedule: Sequence[str]) -> ReusePlan | None:
    """The plan of a schedule, None where it reuses no step.

    Raises:
        ValueError: it reuses steps as no plan does.
    """
    reused = reused_steps(schedule)
    if not reused:
        return None
    for plan in plans:
        if plan.of(schedule):
            return plan
    raise ValueError(f"schedule reuses steps {', '.join(map(str, reused))}, which was not measured")


def predicted_error(gram: Gram, plans: Sequence[ReusePlan], schedule: Sequence[str]) -> float:
    """Predicted E of a schedule.

    Raises:
        ValueError: it reuses steps as no plan does.
    """
    plan = plan_of(plans, schedule)
    if plan is None:
        return gram.error(schedule)
    return plan.error + plan.gram(gram).error(computed_choices(schedule))


def best_joint(
    latency_model: LatencyModel, gram: Gram, plans: Sequence[ReusePlan], budget: Budget, held: int = 0
) -> Allocation:
    """The best schedule under a budget, with and without reuse.

    Args:
        latency_model: P precisions, the Gram's.
        gram: predicts E without reuse.
        plans: to choose from.
        budget: what the schedule has to meet.
        held: the first steps that stay at the reference, and are not reused.

    Returns:
        As `calibration.choose.quadratic.best_schedule`. Under a number of high-precision steps, which leaves the latency open:
        the fastest schedule that has so many and no higher predicted error than without reuse.

    Raises:
        BudgetError: no schedule meets the budget; names the nearest value that one does.
    """
    found: list[Allocation] = []
    try:
        found.append(best_schedule(latency_model, gram, budget, held))
    except BudgetError:
        if not plans:
            raise
    for plan in plans:
        reduced = reduced_budget(latency_model, plan, budget)
        if reduced is None or (plan.reused[0] < held):
            continue
        try:
            chosen = best_schedule(latency_model, plan.gram(gram), reduced, held)
        except BudgetError:
            continue
        found.append(_whole(latency_model, plan, chosen))
    if not found:
        fastest = min(fastest_latency(latency_model, len(plan.reused), gram.num_steps) for plan in plans)
        require_reachable(budget, fastest, gram.num_steps, latency_model.costs)
        raise BudgetError(f"no schedule whose first {held} steps are held meets the budget; ask for less speed")
    if isinstance(budget, HighSteps):
        within = [entry for entry in found if entry.error <= found[0].error * (1 + BUDGET_TOLERANCE)]
        return min(within, key=lambda entry: (entry.latency, entry.error))
    if isinstance(budget, ErrorBudget):
        return min(found, key=lambda entry: (entry.latency, entry.error))
    return min(found, key=lambda entry: (entry.error, entry.latency))


def joint_front(latency_model: LatencyModel, gram: Gram, plans: Sequence[ReusePlan]) -> tuple[Allocation, ...]:
    """Schedules that trade latency for predicted error, fastest first; the union over all plans, and without reuse."""
    points = [*front_without(latency_model, gram)]
    for plan in plans:
        points += [_whole(latency_model, plan, point) for point in front_without(latency_model, plan.gram(gram))]
    found: list[Allocation] = []
    for point in sorted(points, key=lambda entry: (entry.latency, entry.error)):
        if not found or (point.error < found[-1].error and point.latency > found[-1].latency):
            found.append(point)
    return tuple(found)


def worthwhile(plans: Sequence[ReusePlan], gram: Gram) -> tuple[ReusePlan, ...]:
    """Of every number of reused steps the plans of least E, with the reference and with each low precision elsewhere.

    A plan that errs least by itself may multiply the errors of computed steps. Rules stay as well.
    """
    kept: list[ReusePlan] = []
    for count in sorted({len(plan.reused) for plan in plans}):
        rivals = [plan for plan in plans if len(plan.reused) == count]
        costs = np.array(
            [
                [predicted_error(gram, [plan], plan.schedule((name,) * len(plan.choices))) for name in gram.precisions]
                for plan in rivals
            ]
        )
        best = set(costs.argmin(axis=0).tolist())
        kept += [plan for k, plan in enumerate(rivals) if k in best or plan.rule]
    return tuple(kept)


def fastest_latency(latency_model: LatencyModel, reused: int, num_steps: int) -> float:
    """Mean step latency of the fastest schedule with so many reused steps, relative to the reference."""
    fastest = min(step_ns(latency_model.latencies_ms[name]) for name in latency_model.precisions)
    total = (num_steps - reused) * fastest + (reused * latency_model.reuse_ns if reused else 0)
    return total / (num_steps * step_ns(latency_model.latencies_ms[latency_model.reference]))


def reuse_needed(latency_model: LatencyModel, budget: Budget | None, num_steps: int) -> int | None:
    """The least number of reused steps with which a latency budget can be met; None: no number of them is enough."""
    if not isinstance(budget, LatencyBudget):
        return None
    limit = budget.ratio * (1 + BUDGET_TOLERANCE)
    return next((n for n in range(num_steps) if fastest_latency(latency_model, n, num_steps) <= limit), None)


def reduced_budget(latency_model: LatencyModel, plan: ReusePlan, budget: Budget) -> Budget | None:
    """What a budget leaves for the computed steps of a plan; None where it leaves nothing."""
    computed = len(plan.choices) - len(plan.reused)
    if isinstance(budget, ErrorBudget):
        left = budget.error * (1 + BUDGET_TOLERANCE) - plan.error
        return ErrorBudget(left) if left >= 0 else None
    if isinstance(budget, LatencyBudget):
        reference_ns = step_ns(latency_model.latencies_ms[latency_model.reference])
        left_ns = budget.ratio * len(plan.choices) * reference_ns - len(plan.reused) * latency_model.reuse_ns
        return LatencyBudget(left_ns / (computed * reference_ns)) if left_ns > 0 else None
    return budget if budget.count <= computed else None


def _whole(latency_model: LatencyModel, plan: ReusePlan, reduced: Allocation) -> Allocation:
    schedule = plan.schedule(reduced.precisions)
    return replace(
        reduced,
        precisions=schedule,
        error=plan.error + reduced.error,
        latency=latency_model.latency(schedule),
    )
