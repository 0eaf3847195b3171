"""The search for steps to reuse, against all plans of short loops, and what its predictions are worth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.planted import Counted, measurements
from helpers.planted_reuse import ReuseLoop

from calibration.choose.joint import ReusePlan
from calibration.choose.reuse_plans import RUNGS, TRIED, most_calls, reuse_rules, rungs, search_plans
from calibration.measure.metrics import relative_error, typical_error
from calibration.scores.reuse import measure_reuses
from engines.reuse import REUSES, order_of, reused_steps


def found(loop: ReuseLoop, most: int) -> tuple[ReusePlan, ...]:
    counted = Counted(loop)
    taken, samples = measurements(counted), range(loop.num_samples)
    singles = measure_reuses(taken, loop.timesteps(), samples, lambda done, total: None)
    seen: list[tuple[int, int]] = []
    plans = search_plans(taken, singles, loop.influence, most, samples, lambda *at: seen.append(at))
    assert [done for done, _ in seen] == list(range(1, len(plans) + 1))
    assert all(done <= total for done, total in seen)
    uniform = loop.num_samples * loop.num_steps
    assert counted.calls["fp16"] - uniform <= most_calls(loop.num_steps, most, loop.num_samples)
    return plans


def best(plans: tuple[ReusePlan, ...], count: int) -> ReusePlan:
    return min((plan for plan in plans if len(plan.reused) == count), key=lambda plan: plan.error)


def true_error(loop: ReuseLoop, choices: tuple[str, ...]) -> float:
    errors = []
    for sample in range(loop.num_samples):
        ends = []
        for schedule in (choices, ("fp16",) * loop.num_steps):
            state = loop.start(sample)
            for choice in schedule:
                state = loop.step(sample, state, choice)
            ends.append(loop.latents(state))
        errors.append(relative_error(*ends))
    return typical_error(errors)


def all_errors(loop: ReuseLoop, most: int) -> dict[int, list[float]]:
    """E of every plan by its number of reused steps."""
    errors = {}
    for count in range(1, most + 1):
        every = errors[count] = []
        for steps in itertools.combinations(range(1, 9), count):
            for orders in itertools.product(range(3), repeat=count):
                choices = ["fp16"] * 9
                for step, order in zip(steps, orders, strict=True):
                    choices[step] = REUSES[order]
                computed = [sum(order_of(c) is None for c in choices[:step]) for step in steps]
                if all(order < before for order, before in zip(orders, computed, strict=True)):
                    every.append(true_error(loop, tuple(choices)))
    return errors


@pytest.mark.parametrize("second_order", [True, False])
def test_the_search_finds_the_best_of_all_plans_where_vectors_add_up(second_order: bool) -> None:
    loop = ReuseLoop(9, num_samples=1, response=False, second_order=second_order)
    plans = found(loop, 4)
    for count, every in all_errors(loop, 4).items():
        assert best(plans, count).error <= (1.05 if count < 4 else 2) * min(every)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("seed", [1, 3, 4])
def test_the_search_finds_a_plan_of_the_best_few_where_outputs_answer(seed: int, second_order: bool) -> None:
    """Nine steps are few: what one reuse does to the next is as large as itself, and a third of them is reused."""
    loop = ReuseLoop(9, num_samples=2, seed=seed, second_order=second_order)
    plans = found(loop, 3)
    for count, every in all_errors(loop, 3).items():
        assert best(plans, count).error <= np.quantile(every, 0.05)
        assert best(plans, count).error <= (1.2 if count < 3 else 5) * min(every)


@pytest.mark.parametrize("second_order", [True, False])
def test_predictions_at_30_percent_of_20_steps_are_right_within_a_factor_of_two(second_order: bool) -> None:
    loop = ReuseLoop(20, second_order=second_order)
    plans = found(loop, 10)
    for count in range(1, 7):
        plan = best(plans, count)
        assert plan.error == pytest.approx(true_error(loop, plan.choices), rel=2e-3)
    plan = best(plans, 6)
    assert 0.5 <= plan.predicted / plan.error <= 2
    rules = {len(plan.reused): plan.error for plan in plans if plan.rule}
    assert rules
    for count, error in rules.items():
        assert best(plans, count).error <= error


def test_errors_rise_with_reused_steps_and_plans_are_told_apart() -> None:
    plans = found(ReuseLoop(20), 10)
    assert len({plan.choices for plan in plans}) == len(plans)
    counts = [len(plan.reused) for plan in plans]
    assert counts == sorted(counts)
    assert max(counts) == 10
    errors = [best(plans, count).error for count in rungs(10)]
    assert errors[-1] > 10 * errors[0]
    for plan in plans:
        assert plan.influence[list(plan.reused)].tolist() == [0.0] * len(plan.reused)
        assert plan.choices[0] == "fp16"


def test_a_ladder_has_few_rungs() -> None:
    assert rungs(1) == (1,)
    assert rungs(10) == tuple(range(1, 11))
    assert len(rungs(50)) == RUNGS
    assert rungs(50)[-1] == 50
    loop = ReuseLoop(30, num_samples=1)
    plans = found(loop, 15)
    assert len(plans) <= 6 + TRIED * RUNGS


def test_rules_reuse_every_nth_step_from_a_tenth_on_but_for_the_last() -> None:
    loop = ReuseLoop(20)
    rules = reuse_rules("fp16", loop.timesteps(), 10)
    assert reused_steps(rules["every 2nd step reuse0"]) == tuple(range(3, 19, 2))
    assert reused_steps(rules["every 4th step reuse1"]) == (5, 9, 13, 17)
    assert set(rules["every 3rd step reuse1"]) == {"fp16", "reuse1"}
    assert list(reuse_rules("fp16", loop.timesteps(), 4)) == ["every 4th step reuse0", "every 4th step reuse1"]
    assert reuse_rules("fp16", ReuseLoop(2).timesteps(), 1) == {}


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_short_loops(num_steps: int) -> None:
    plans = found(ReuseLoop(num_steps, num_samples=1), 1)
    assert {len(plan.reused) for plan in plans} == {1}
