"""What the guard compares: schedules of equal budget, by predictions and by rule of thumb."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from calibration.choose.allocation import BUDGET_TOLERANCE, Budget, HighSteps, LatencyBudget
from calibration.choose.baselines import RULES, fixed_rules, rule_name
from calibration.choose.joint import reduced_budget
from calibration.choose.pareto import Allocation
from calibration.choose.predictions import Predictions
from calibration.choose.quadratic import best_schedule
from engines.errors import BudgetError
from engines.reuse import engines_of, reused_steps

HELD_SHARES = (0.1, 0.2)
"""Shares of the loop whose steps are held at the reference, beside the first one and the first two."""

Schedule = tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A schedule that the guard measures.

    Attributes:
        precisions: one name per step.
        names: where it comes from, one or more.
        rule: the one of its names that is of a fixed rule or a uniform precision, if any.
    """

    precisions: Schedule
    names: tuple[str, ...]
    rule: str | None


def candidates(predictions: Predictions, chosen: Allocation, budget: Budget | None) -> tuple[Candidate, ...]:
    """Schedules that keep to a budget, `chosen` first.

    - The choice of either predictor, and of the better one with the first steps held at the reference: errors there can
      make runs depart, which no prediction of typical error sees.
    - The choice without reuse.
    - Every fixed rule, for every low precision with as many steps at the reference as the budget allows, and for the
      precisions of `chosen` where it mixes several; uniform precisions. Every rule that reuses every n-th step, with the
      best precisions for it.

    Args:
        predictions: of the kept precisions.
        chosen: what predictions choose.
        budget: of `chosen`; where it is not of latency or steps, others may be no slower than `chosen`.
    """
    same = budget if isinstance(budget, (HighSteps, LatencyBudget)) else LatencyBudget(chosen.latency)
    rules: dict[Schedule, str] = {}
    for name, schedule in _by_rule(predictions, chosen, same):
        rules.setdefault(schedule, name)
    found: dict[Schedule, list[str]] = {chosen.precisions: []}
    for name, schedule in (*_predicted(predictions, same), *((name, schedule) for schedule, name in rules.items())):
        found.setdefault(schedule, []).append(name)
    return tuple(
        Candidate(schedule, tuple(names) or (predictions.predictor,), rules.get(schedule))
        for schedule, names in found.items()
    )


def _predicted(predictions: Predictions, budget: HighSteps | LatencyBudget) -> Iterator[tuple[str, Schedule]]:
    for name in predictions.grams:
        yield name, predictions.best(budget, predictor=name).precisions
    if predictions.plans:
        with suppress(BudgetError):
            yield f"{predictions.predictor}, no reuse", replace(predictions, plans=()).best(budget).precisions
    num_steps = predictions.gram.num_steps
    for held in sorted({1, 2, *(math.ceil(share * num_steps) for share in HELD_SHARES)} & set(range(num_steps))):
        try:
            schedule = predictions.best(budget, held).precisions
        except BudgetError:
            return
        yield f"{predictions.predictor}, first {held} held", schedule


def _by_rule(
    predictions: Predictions, chosen: Allocation, budget: HighSteps | LatencyBudget
) -> Iterator[tuple[str, Schedule]]:
    latency_model, num_steps = predictions.latency_model, predictions.gram.num_steps
    reference, *low = latency_model.precisions
    limit = latency_model.costs.max_engines or len(latency_model.precisions)
    if isinstance(budget, HighSteps):
        low = [min(low, key=latency_model.latencies_ms.__getitem__)] if low else []
        counts = range(budget.count, budget.count + 1)
    else:
        counts = range(num_steps, -1, -1)

    def allowed(schedule: Schedule) -> bool:
        if len(engines_of(schedule)) > limit:
            return False
        if isinstance(budget, HighSteps):
            return schedule.count(reference) == budget.count
        return latency_model.latency(schedule) <= budget.ratio * (1 + BUDGET_TOLERANCE)

    for precision in low:
        for name, rule in RULES.items():
            pools = ((reference,) * count + (precision,) * (num_steps - count) for count in counts)
            schedule = next((found for found in map(rule, pools) if allowed(found)), None)
            if schedule is not None:
                yield rule_name(name, schedule, latency_model.precisions), schedule
    for plan in predictions.plans:
        if plan.rule:
            reduced = reduced_budget(latency_model, plan, budget)
            with suppress(BudgetError):
                if reduced is not None:
                    names = best_schedule(latency_model, plan.gram(predictions.gram), reduced).precisions
                    yield plan.rule, plan.schedule(names)
    if not reused_steps(chosen.precisions) and len(set(chosen.precisions) - {reference}) > 1:
        for name, mixed in fixed_rules(chosen.precisions, latency_model.precisions).items():
            if allowed(mixed):
                yield name, mixed
