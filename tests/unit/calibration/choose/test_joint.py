"""Precisions and reuse under one budget, against all schedules of all plans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from calibration.choose.allocation import Budget, ErrorBudget, HighSteps, LatencyBudget
from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.choose.joint import (
    ReusePlan,
    best_joint,
    influence_ratios,
    joint_front,
    plan_of,
    predicted_error,
    worthwhile,
)
from calibration.choose.quadratic import best_schedule
from calibration.scores.gram import Gram
from engines.errors import BudgetError
from engines.reuse import order_of

NAMES = ("fp16", "fp8", "int8")
STEPS = 6
MS = {"fp16": 10.0, "fp8": 6.0, "int8": 4.0}


def gram(seed: int = 0, floor: float = 0.0) -> Gram:
    rng = np.random.default_rng(seed)
    vectors = np.zeros((STEPS, 3, 12))
    for p in (1, 2):
        vectors[:, p] = 0.01 * 3.0**p * rng.normal(size=(STEPS, 12)) * np.exp(rng.normal(size=(STEPS, 1)))
    flat = vectors.reshape(STEPS * 3, -1)
    falls = floor * np.linspace(1, 0, STEPS)
    return Gram(NAMES, (flat @ flat.T).reshape(STEPS, 3, STEPS, 3), falls)


def plan(error: float, factor: float = 1.0, **reused: str) -> ReusePlan:
    choices = tuple(reused.get(f"s{step}", "fp16") for step in range(STEPS))
    influence = np.array([factor if order_of(choice) is None else 0.0 for choice in choices])
    return ReusePlan(choices, error, error, influence)


PLANS = (
    plan(1e-5, s3="reuse1"),
    plan(3e-4, 1.5, s2="reuse0", s4="reuse1"),
    plan(4e-3, 2.0, s1="reuse0", s3="reuse0", s5="reuse1"),
)


def model(**costs: object) -> LatencyModel:
    return LatencyModel(NAMES, MS, AllocationCosts(**costs), 0.1)  # type: ignore[arg-type]


def every(costs: LatencyModel, whole: Gram, held: int = 0) -> list[tuple[float, float, tuple[str, ...]]]:
    """(error, latency, schedule) of all, with and without reuse."""
    found = []
    for names in itertools.product(NAMES, repeat=STEPS):
        for chosen in (None, *PLANS):
            if chosen is not None and any(names[step] != "fp16" for step in chosen.reused):
                continue
            if chosen is not None and chosen.reused[0] < held:
                continue
            schedule = (
                names
                if chosen is None
                else tuple(
                    own if order_of(own) is not None else name for own, name in zip(chosen.choices, names, strict=True)
                )
            )
            if any(name != "fp16" for name in schedule[:held]):
                continue
            if len({name for name in schedule if order_of(name) is None}) > (costs.costs.max_engines or 3):
                continue
            found.append((predicted_error(whole, PLANS, schedule), costs.latency(schedule), schedule))
    return found


@pytest.mark.parametrize("costs", [{}, {"swap_ms": 0.7}, {"max_engines": 2}, {"swap_ms": 0.4, "max_engines": 1}])
@pytest.mark.parametrize("held", [0, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_of_all_schedules_is_found(costs: dict[str, object], held: int, seed: int) -> None:
    latency_model, whole = model(**costs), gram(seed, floor=1e-5 * seed)
    options = every(latency_model, whole, held)
    for ratio in (0.35, 0.5, 0.75):
        within = [entry for entry in options if entry[1] <= ratio * (1 + 1e-12)]
        if not within:
            with pytest.raises(BudgetError):
                best_joint(latency_model, whole, PLANS, LatencyBudget(ratio), held)
            continue
        chosen = best_joint(latency_model, whole, PLANS, LatencyBudget(ratio), held)
        assert chosen.latency <= ratio * (1 + 1e-12)
        assert chosen.error == pytest.approx(min(within)[0], rel=1e-9)
        assert chosen.error == pytest.approx(predicted_error(whole, PLANS, chosen.precisions), rel=1e-12)
    for error in (2e-5, 1e-3, 1e-1):
        within = [entry for entry in options if entry[0] <= error]
        chosen = best_joint(latency_model, whole, PLANS, ErrorBudget(error), held)
        assert chosen.error <= error * (1 + 1e-9)
        assert chosen.latency == pytest.approx(min(entry[1] for entry in within), rel=1e-9)


def test_a_number_of_high_steps_takes_reuse_that_costs_no_error() -> None:
    latency_model, whole = model(), gram()
    without = best_schedule(latency_model, whole, HighSteps(2))
    chosen = best_joint(latency_model, whole, PLANS, HighSteps(2))
    assert chosen.precisions.count("fp16") == 2
    assert chosen.error <= without.error
    assert chosen.latency < without.latency
    assert best_joint(latency_model, whole, PLANS, HighSteps(STEPS)).precisions == ("fp16",) * STEPS


def test_the_front_is_that_of_all_plans() -> None:
    latency_model, whole = model(), gram()
    points = joint_front(latency_model, whole, PLANS)
    assert [point.latency for point in points] == sorted({point.latency for point in points})
    assert all(first.error > second.error for first, second in itertools.pairwise(points))
    options = every(latency_model, whole)
    for point in points:
        better = [entry for entry in options if entry[1] <= point.latency and entry[0] < point.error * (1 - 1e-9)]
        assert len(better) == 0
    assert points[-1].precisions == ("fp16",) * STEPS
    assert len([name for name in points[0].precisions if order_of(name) is not None]) == 3


def test_the_front_has_plans_that_err_more_themselves_and_multiply_less() -> None:
    """A plan of fewer reused steps and more error, which leaves low precisions as they are."""
    latency_model, whole = model(), gram()
    fragile, sturdy = plan(1e-5, 9.0, s2="reuse0", s4="reuse1"), plan(1e-4, 1.0, s3="reuse1")
    points = joint_front(latency_model, whole, (fragile, sturdy))
    for ratio in (0.4, 0.5, 0.6):
        best = best_joint(latency_model, whole, (fragile, sturdy), LatencyBudget(ratio))
        assert [point for point in points if point.latency <= ratio][-1].error == pytest.approx(best.error, rel=1e-9)


def test_budgets_out_of_reach_name_what_is_in_reach() -> None:
    with pytest.raises(BudgetError, match=r"the fastest takes 0\.205"):
        best_joint(model(), gram(), PLANS, LatencyBudget(0.1))
    tight: Budget = LatencyBudget(0.205)
    assert best_joint(model(), gram(), PLANS, tight).latency <= 0.205


def test_errors_of_computed_steps_count_by_their_influence() -> None:
    whole = gram()
    alone = tuple("int8" if step == 1 else own for step, own in enumerate(PLANS[1].choices))
    added = predicted_error(whole, PLANS, alone) - PLANS[1].error
    assert added == pytest.approx(1.5**2 * whole.error(("fp16", "int8", *("fp16",) * 4)))
    with pytest.raises(ValueError, match="schedule reuses steps 2, which was not measured"):
        predicted_error(whole, PLANS, ("fp16", "fp16", "reuse0", "fp16", "fp16", "fp16"))
    with pytest.raises(ValueError, match="not measured"):
        plan_of(PLANS, ("fp16", "fp16", "fp16", "reuse0", "fp16", "fp16"))
    assert plan_of(PLANS, ("int8",) * STEPS) is None


def test_the_floor_of_rounding_is_counted_once() -> None:
    whole = gram(floor=1e-4)
    computed = ("fp16", "int8", "fp16", "reuse1", "fp16", "fp16")
    alone = whole.error(("fp16", "int8", *("fp16",) * 4))
    more = predicted_error(whole, PLANS, computed) - PLANS[0].error
    assert more == pytest.approx(alone - whole.floor[3])
    later = predicted_error(whole, PLANS, ("fp16", "fp16", "fp16", "reuse1", "int8", "fp16")) - PLANS[0].error
    assert later == pytest.approx(whole.values[4, 2, 4, 2])


def test_plans_that_err_most_are_left_out_but_for_rules() -> None:
    exact, calm = plan(1e-6, 9.0, s2="reuse2"), plan(5e-6, 1.0, s4="reuse0")
    poor = plan(1e-2, 9.0, s1="reuse0")
    rule = ReusePlan((*poor.choices[:4], "fp16", "reuse1"), 1e-2, 1e-2, poor.influence, "every 5th step reuse1")
    assert worthwhile((exact, calm, poor), gram()) == (exact, calm)
    assert worthwhile((exact, calm, rule), gram())[-1] is rule


def test_ratios_of_influence_hold_off_from_outputs_that_count_for_nothing() -> None:
    def influence(choices: object) -> np.ndarray:
        reused = any(order_of(choice) is not None for choice in choices)  # type: ignore[attr-defined]
        return np.array([0.5, 3.0, 0.0, 1.0]) if reused else np.array([1.0, -2.0, 1e-9, 1.0])

    found = influence_ratios(influence, ("fp16", "fp16", "reuse0", "fp16"))
    assert found.tolist() == [0.5, -1.5, 0.0, 1.0]
