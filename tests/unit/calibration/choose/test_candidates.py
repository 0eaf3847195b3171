"""What the guard compares: every budget kept, every rule at its largest K, names as they are printed."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from calibration.choose.allocation import Budget, ErrorBudget, HighSteps, LatencyBudget
from calibration.choose.baselines import RULES
from calibration.choose.candidates import candidates
from calibration.choose.costs import NO_COSTS, AllocationCosts, LatencyModel
from calibration.choose.predictions import Predictions, predicted_best
from calibration.choose.quadratic import best_schedule
from calibration.scores.gram import Correlations, Gram, gram
from engines.errors import BudgetError

STEPS = 12
NAMES = ("fp16", "fp8", "int4")
LATENCIES_MS = {"fp16": 4.0, "fp8": 2.0, "int4": 1.0}
SWAPS = AllocationCosts(swap_ms=0.3)
TWO_ENGINES = AllocationCosts(swap_ms=0.1, max_engines=2)


def planted_gram(num_steps: int, names: tuple[str, ...], *, correlation: float = 0.6, seed: int = 0) -> Gram:
    """Scores at random, correlations that fall with distance."""
    generator = np.random.default_rng(seed)
    low = names[1:]
    scores = {name: 1e-4 * (1 + k) ** 3 * np.exp(generator.normal(size=num_steps)) for k, name in enumerate(low)}
    steps = np.arange(num_steps)
    alike = np.exp(-(((steps[:, None] - steps) / 3) ** 2)) * correlation
    values = {(a, b): alike for k, a in enumerate(low) for b in low[k:]}
    return gram(
        scores,
        Correlations({name: tuple(map(float, steps)) for name in low}, values),
        np.linspace(1e-5, 0, num_steps),
        names[0],
    )


def predictions_of(
    costs: AllocationCosts = NO_COSTS, names: tuple[str, ...] = NAMES, num_steps: int = STEPS
) -> Predictions:
    found = planted_gram(num_steps, names)
    model = LatencyModel(names, {name: LATENCIES_MS[name] for name in names}, costs)
    return Predictions(model, {"gram": found, "downcast sum": found.downcast_sum()}, "gram")


def found(predictions: Predictions, budget: Budget | None):
    chosen, _ = predicted_best(predictions, budget)
    return chosen, candidates(predictions, chosen, budget)


BUDGETS: list[Budget | None] = [
    LatencyBudget(0.3),
    LatencyBudget(0.5),
    LatencyBudget(0.8),
    LatencyBudget(1.0),
    HighSteps(0),
    HighSteps(1),
    HighSteps(5),
    HighSteps(12),
    ErrorBudget(2e-3),
    ErrorBudget(0.0),
    None,
]


@pytest.mark.parametrize("costs", [NO_COSTS, SWAPS, TWO_ENGINES, AllocationCosts(max_engines=1)])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_all_keep_to_the_budget_and_the_costs(budget: Budget | None, costs: AllocationCosts) -> None:
    predictions = predictions_of(costs)
    model = predictions.latency_model
    if costs.max_engines == 1 and isinstance(budget, HighSteps) and 0 < budget.count < STEPS:
        with pytest.raises(BudgetError):
            found(predictions, budget)
        return
    chosen, tried = found(predictions, budget)
    assert tried[0].precisions == chosen.precisions
    assert len({one.precisions for one in tried}) == len(tried)
    for one in tried:
        assert len(one.precisions) == STEPS
        assert set(one.precisions) <= set(NAMES)
        assert len(set(one.precisions)) <= (costs.max_engines or 3)
        if isinstance(budget, HighSteps):
            assert one.precisions.count("fp16") == budget.count
            assert one.precisions.count("int4") == STEPS - budget.count
        elif isinstance(budget, LatencyBudget):
            assert model.latency(one.precisions) <= budget.ratio * (1 + 1e-9)
        else:
            assert model.latency(one.precisions) <= chosen.latency * (1 + 1e-9)
        assert one.names
        assert len(set(one.names)) == len(one.names)
        assert (one.rule is not None) == any(name.split()[0] in RULE_WORDS for name in one.names)
        assert one.rule is None or one.rule in one.names
    named = [name for one in tried for name in one.names]
    assert len(set(named)) == len(named), "a name stands for one schedule"
    assert candidates(predictions, chosen, budget) == tried


RULE_WORDS = {"first", "last", "both", "evenly", "uniform"}


@pytest.mark.parametrize("costs", [NO_COSTS, SWAPS, TWO_ENGINES])
@pytest.mark.parametrize("ratio", [0.3, 0.45, 0.5, 0.71, 0.97])
def test_every_rule_stands_for_every_precision_with_as_many_steps_as_the_budget_allows(
    ratio: float, costs: AllocationCosts
) -> None:
    predictions = predictions_of(costs)
    model = predictions.latency_model
    _, tried = found(predictions, LatencyBudget(ratio))
    schedules = {one.precisions for one in tried if one.rule}
    for low, (name, rule) in product(NAMES[1:], RULES.items()):
        allowed = [
            schedule
            for count in range(STEPS + 1)
            if model.latency(schedule := rule(("fp16",) * count + (low,) * (STEPS - count))) <= ratio
        ]
        assert not allowed or max(allowed, key=lambda one: one.count("fp16")) in schedules, (low, name)
        if not allowed:
            assert not [one for one in schedules if set(one) == {"fp16", low}]


def test_names_are_those_that_are_printed() -> None:
    chosen, tried = found(predictions_of(), LatencyBudget(0.5))
    names = {name: one.precisions for one in tried for name in one.names}
    counts = {name: chosen.precisions.count(name) for name in NAMES}
    assert all(counts.values()), "it mixes, so that rules of its own counts are tried as well"
    mixed = f"({counts['fp8']} fp8, {counts['int4']} int4)"
    held = ("gram, first 1 held", "gram, first 2 held", "gram, first 3 held")
    rules = [f"{rule} 4 (int4)" for rule in ("first", "last", "both ends", "evenly spread")]
    rules += [f"{rule} {counts['fp16']} {mixed}" for rule in ("first", "last", "both ends", "evenly spread")]
    assert names.keys() == {"gram", "downcast sum", *held, *rules, "uniform fp8"}
    assert names["last 4 (int4)"] == ("int4",) * 8 + ("fp16",) * 4
    assert names["uniform fp8"] == ("fp8",) * 12
    last = names[f"last {counts['fp16']} {mixed}"]
    assert last == ("int4",) * counts["int4"] + ("fp8",) * counts["fp8"] + ("fp16",) * counts["fp16"]


@pytest.mark.parametrize("budget", [LatencyBudget(0.45), HighSteps(4), HighSteps(2), None], ids=str)
@pytest.mark.parametrize("num_steps", [4, 12, 30])
def test_variants_hold_the_first_steps(num_steps: int, budget: Budget | None) -> None:
    predictions = predictions_of(num_steps=num_steps)
    chosen, tried = found(predictions, budget)
    held = {
        int(name.split()[2]): one.precisions for one in tried for name in one.names if name.startswith("gram, first")
    }
    assert set(held) <= {1, 2, -(-num_steps // 10), -(-num_steps // 5)}
    assert 1 in held
    for count, schedule in held.items():
        assert schedule[:count] == ("fp16",) * count
        same = budget if isinstance(budget, (HighSteps, LatencyBudget)) else LatencyBudget(chosen.latency)
        best = best_schedule(predictions.latency_model, predictions.gram, same, count)
        assert schedule == best.precisions
    if isinstance(budget, HighSteps):
        assert max(held) <= budget.count


def test_held_variants_are_of_the_better_predictor() -> None:
    plain = predictions_of()
    predictions = Predictions(plain.latency_model, plain.grams, "downcast sum")
    _, tried = found(predictions, LatencyBudget(0.5))
    names = {name for one in tried for name in one.names}
    assert {"gram", "downcast sum", "downcast sum, first 1 held"} <= names
    assert not [name for name in names if name.startswith("gram,")]


def test_where_everything_may_stay_at_the_reference_there_is_nothing_to_compare() -> None:
    for budget in (LatencyBudget(1.0), HighSteps(STEPS)):
        chosen, tried = found(predictions_of(), budget)
        assert [one.precisions for one in tried] == [chosen.precisions] == [("fp16",) * STEPS]
        assert "uniform fp16" in tried[0].names
    only = Predictions(
        LatencyModel(("fp16",), {"fp16": 4.0}),
        dict.fromkeys(("gram", "downcast sum"), planted_gram(5, ("fp16",))),
        "gram",
    )
    assert [one.precisions for one in found(only, None)[1]] == [("fp16",) * 5]
