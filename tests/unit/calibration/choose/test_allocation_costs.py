"""Allocation with swap costs and a limit on engines, against brute force in exact arithmetic."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace

import numpy as np
import pytest

from calibration.choose import pareto
from calibration.choose.allocation import (
    ErrorBudget,
    HighSteps,
    LatencyBudget,
    allocate,
    drop_dominated,
    require_reachable,
)
from calibration.choose.costs import NO_COSTS, AllocationCosts, LatencyModel
from calibration.choose.pareto import pareto_front
from engines.errors import BudgetError

NAMES = ("fp16", "fp8", "int8", "int4")
FIVE = ("fp16", "bf16", "fp8", "int8", "int4")
FIVE_MS = dict(zip(FIVE, (81.3, 70.1, 52.9, 33.7, 25.3), strict=True))


def pairs(names):
    return list(itertools.permutations(names, 2))


def case(seed, kind):
    """A random problem, latencies and swap costs in multiples of 1e-4 ms and contributions in 2^-20.

    `ties`: few distinct values, so that ties abound; `constant` and `pair` say how swaps are charged.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 5))
    num_steps = int(rng.integers(1, 9 if count < 4 or seed % 4 == 0 else 7))
    names = NAMES[:count]
    if kind == "ties":
        latencies = [1.0, *rng.choice([0.1, 0.2, 0.3, 0.5, 1.0, 1.5], size=count - 1)]
        values = rng.integers(0, 4, size=(num_steps, count)) / 8
        swap_ms = {pair: float(rng.choice([0.0, 0.1, 0.2, 0.5])) for pair in pairs(names)}
    else:
        latencies = [1.0, *np.round(rng.uniform(0.2, 1.3, size=count - 1), 4)]
        values = np.rint(2**20 * np.exp(2 * rng.normal(size=(num_steps, count)))) / 2**20
        draw = {pair: round(float(rng.uniform(0, 0.4)), 4) for pair in pairs(names)}
        swap_ms = draw if kind == "pair" else float(rng.choice([0.0001, 0.05, 0.3]))
    values[:, 0] *= seed % 2  # contributions of the reference need not be zero
    return names, dict(zip(names, map(float, latencies), strict=True)), values, swap_ms


def every_schedule(names, latencies, values, swap_ms):
    """All P^T schedules in the order of ties [P^T, T]; exact latencies (1e-4 ms), errors (2^-20), engines used."""
    choices = np.array(list(itertools.product(range(len(names)), repeat=len(values))))
    swaps = np.zeros((len(names), len(names)), dtype=int)
    for before, after in pairs(range(len(names))):
        cost = swap_ms[names[before], names[after]] if isinstance(swap_ms, dict) else swap_ms
        swaps[before, after] = round(1e4 * cost)
    latency = np.rint(1e4 * np.array([latencies[name] for name in names])).astype(int)[choices].sum(axis=1)
    latency += swaps[choices[:, :-1], choices[:, 1:]].sum(axis=1)
    error = np.rint(2**20 * values).astype(int)[np.arange(len(values)), choices].sum(axis=1)
    return choices, latency, error, np.array([len(set(row)) for row in choices.tolist()])


def brute_front(schedules, max_engines):
    """Rows of the schedules that are not dominated; the first of equals."""
    _, latency, error, engines = schedules
    front, least = [], None
    for k in np.lexsort((error, latency)):  # stable
        if engines[k] <= max_engines and (least is None or error[k] < least):
            least = error[k]
            front.append(k)
    return front


@pytest.mark.parametrize("kind", ["constant", "pair", "ties"])
@pytest.mark.parametrize("seed", range(16))
def test_front_and_budgets_agree_with_brute_force(seed, kind):
    names, latencies, values, swap_ms = case(seed, kind)
    schedules = every_schedule(names, latencies, values, swap_ms)
    choices, latency, error, _ = schedules
    reference = len(values) * round(1e4 * latencies[names[0]])
    for max_engines in (None, *range(1, len(names) + 1)):
        costs = AllocationCosts(swap_ms, max_engines)
        problem = LatencyModel(names, latencies, costs), values
        rows = brute_front(schedules, max_engines or len(names))
        expected = [tuple(names[choice] for choice in choices[row]) for row in rows]
        front = pareto_front(*problem)
        assert [entry.precisions for entry in front] == expected
        np.testing.assert_allclose([entry.latency for entry in front], latency[rows] / reference, rtol=1e-12)
        np.testing.assert_allclose([entry.error for entry in front], error[rows] / 2**20, rtol=1e-12)
        for k, entry in enumerate(front):
            assert entry.latency == problem[0].latency(entry.precisions)
            assert allocate(*problem, LatencyBudget(entry.latency), front) == entry
            assert allocate(*problem, ErrorBudget(entry.error), front) == entry
            if k > 0:  # just short of it
                assert allocate(*problem, LatencyBudget(entry.latency * (1 - 1e-9)), front) == front[k - 1]
                assert allocate(*problem, ErrorBudget(front[k - 1].error * (1 - 1e-9)), front) == entry
        middle = front[len(front) // 2]
        assert allocate(*problem, LatencyBudget(middle.latency)) == middle


@pytest.mark.parametrize("kind", ["constant", "pair", "ties"])
@pytest.mark.parametrize("seed", range(16))
def test_high_steps_agree_with_brute_force(seed, kind):
    names, latencies, values, swap_ms = case(seed, kind)
    choices, latency, error, _ = every_schedule(names, latencies, values, swap_ms)
    low = min(names[1:], key=lambda name: (latencies[name], values[:, names.index(name)].sum()))
    for count, max_engines in itertools.product(range(len(values) + 1), (None, 1, 2)):
        latency_model = LatencyModel(names, latencies, AllocationCosts(swap_ms, max_engines))
        high = choices == 0
        allowed = np.flatnonzero((high | (choices == names.index(low))).all(axis=1) & (high.sum(axis=1) == count))
        if max_engines == 1 and 0 < count < len(values):
            with pytest.raises(BudgetError, match="take two engines, but max_engines is 1"):
                allocate(latency_model, values, HighSteps(count))
            continue
        best = min(allowed, key=lambda row: (error[row], latency[row], row))
        found = allocate(latency_model, values, HighSteps(count))
        assert found.precisions == tuple(names[choice] for choice in choices[best])
        assert found.error == pytest.approx(error[best] / 2**20, rel=1e-12)
        assert found.latency == latency_model.latency(found.precisions)


def test_equal_high_steps_go_where_changes_are_cheapest():
    contributions = np.array([[0.0, 1.0]] * 6)
    latency_model = LatencyModel(("fp16", "int8"), {"fp16": 2.0, "int8": 1.0})
    free = allocate(latency_model, contributions, HighSteps(2))
    assert free.precisions == ("fp16",) * 2 + ("int8",) * 4
    costs = AllocationCosts({("fp16", "int8"): 0.5, ("int8", "fp16"): 0.25})
    found = allocate(replace(latency_model, costs=costs), contributions, HighSteps(2))
    assert found.precisions == ("int8",) * 4 + ("fp16",) * 2
    assert found.latency == (4 * 1.0 + 2 * 2.0 + 0.25) / 12


def test_latency_charges_every_change_in_its_direction():
    latencies = {"fp16": 2.0, "int8": 1.0, "int4": 0.5}
    costs = AllocationCosts(dict.fromkeys(pairs(latencies), 0.0) | {("fp16", "int8"): 0.3, ("int8", "fp16"): 0.1})
    schedule = ("int8", "fp16", "fp16", "int8", "int4")
    for charged, expected in ((costs, 6.5 + 0.1 + 0.3), (AllocationCosts(0.2), 7.1), (NO_COSTS, 6.5)):
        found = LatencyModel(("fp16", "int8", "int4"), latencies, charged).latency(schedule)
        assert found == pytest.approx(expected / 10, rel=1e-12)


@pytest.mark.parametrize("kind", ["constant", "ties"])
@pytest.mark.parametrize("seed", range(8))
def test_free_swaps_and_room_for_all_engines_change_no_bit(seed, kind):
    names, latencies, values, _ = case(seed, kind)
    free, found = LatencyModel(names, latencies), values
    plain = pareto_front(free, found)
    for costs in (AllocationCosts(0.0, len(names)), AllocationCosts(dict.fromkeys(pairs(names), 0.0), 9)):
        latency_model = replace(free, costs=costs)
        assert pareto_front(latency_model, found) == plain
        for count in range(len(values) + 1):
            assert allocate(latency_model, found, HighSteps(count)) == allocate(free, found, HighSteps(count))


def changes(schedule):
    return sum(before != after for before, after in itertools.pairwise(schedule))


@pytest.mark.parametrize("seed", range(5))
def test_swaps_that_cost_more_than_they_gain_are_not_made(seed):
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.5, 2, size=(12, 4)) * np.array([0.0, 0.8, 0.9, 1.0])
    values[0] *= 50
    latencies = dict(zip(NAMES, (10.0, 7.0, 5.0, 4.0), strict=True))
    gain_ms = 12 * (latencies["fp16"] - latencies["int4"])

    def made(swap_ms):
        front = pareto_front(LatencyModel(NAMES, latencies, AllocationCosts(swap_ms)), values)
        return {changes(entry.precisions) for entry in front}

    assert max(made(0.0)) > 2
    assert made(gain_ms / 2) == {0, 1}
    assert made(gain_ms) == {0}


def five_precisions(seed=0):
    rng = np.random.default_rng(seed)
    values = np.exp(1.5 * rng.normal(size=(100, 1))) * np.array([0, 0.02, 0.1, 0.3, 1.0])
    swap_ms = {pair: float(rng.uniform(0.2, 2)) for pair in pairs(FIVE)}
    return values * np.exp(0.3 * rng.normal(size=values.shape)), swap_ms


def test_dearer_swaps_and_fewer_engines_never_lower_the_error():
    found = five_precisions(1)[0][:40]
    rows = []
    for costs in [AllocationCosts(swap_ms) for swap_ms in (0.0, 0.05, 1.0, 20.0)]:
        latency_model = LatencyModel(FIVE, FIVE_MS, costs)
        front = pareto_front(latency_model, found)
        ratios = np.linspace(0.32, 1, 30)
        rows.append([allocate(latency_model, found, LatencyBudget(ratio), front).error for ratio in ratios])
    assert (np.diff(rows, axis=0) >= 0).all()
    assert (np.diff(rows, axis=1) <= 0).all()
    assert rows[0] != rows[-1]
    sizes = []
    for max_engines in range(1, 6):
        latency_model = LatencyModel(FIVE, FIVE_MS, AllocationCosts(0.5, max_engines))
        front = pareto_front(latency_model, found)
        used = {len(set(entry.precisions)) for entry in front}
        assert max(used) == max_engines
        sizes.append(allocate(latency_model, found, LatencyBudget(0.6), front).error)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


@pytest.mark.parametrize("max_engines", [None, 2, 3, 4])
@pytest.mark.parametrize("per_pair", [False, True])
def test_hundred_steps_five_precisions_in_a_second(per_pair, max_engines, caplog):
    values, swap_ms = five_precisions()
    latency_model = LatencyModel(FIVE, FIVE_MS, AllocationCosts(swap_ms if per_pair else 0.1, max_engines))
    taken_s = []
    while not taken_s or (min(taken_s) >= 1 and len(taken_s) < 3):  # other work on the machine also takes its caches
        started = time.process_time()
        front = pareto_front(latency_model, values)
        taken_s.append(time.process_time() - started)
    assert min(taken_s) < 1, taken_s
    assert not caplog.records, "exact, so nothing to warn of"
    assert front[0].precisions == ("int4",) * 100
    assert front[-1].precisions == ("fp16",) * 100
    assert all(a.latency < b.latency and a.error > b.error for a, b in itertools.pairwise(front))
    for entry in front[:: len(front) // 50]:
        assert len(set(entry.precisions)) <= (max_engines or 5)
        assert entry.latency == latency_model.latency(entry.precisions)
        terms = [values[step, FIVE.index(name)] for step, name in enumerate(entry.precisions)]
        assert entry.error == pytest.approx(sum(terms), rel=1e-12)


@pytest.mark.parametrize("costs", [AllocationCosts(), AllocationCosts(0.5), AllocationCosts(0.5, 3)])
def test_front_too_large_is_thinned_within_the_bound_it_warns_of(costs, caplog, monkeypatch):
    latencies = {name: FIVE_MS[name] + offset for name, offset in zip(FIVE, (0, 0.017, 0.0231, 0.0057, 0), strict=True)}
    linear = np.array([1 - latencies[name] / latencies["fp16"] for name in FIVE])
    values = linear * np.exp(0.01 * np.random.default_rng(0).normal(size=(25, 1)))
    problem = LatencyModel(FIVE, latencies, costs), values
    exact = pareto_front(*problem)
    assert not caplog.records
    monkeypatch.setattr(pareto, "MAX_POINTS", 400)
    with caplog.at_level(logging.WARNING):
        front = pareto_front(*problem)
    (record,) = caplog.records
    bound = float(record.getMessage().split("at most ")[1].split(" of")[0])
    assert 0 < bound < 0.1
    assert len(front) < len(exact)
    assert (front[0].latency, front[-1].error) == (exact[0].latency, exact[-1].error)
    for entry in exact:
        stand_in = next(other for other in front if other.error <= entry.error * (1 + 1e-12))
        assert stand_in.latency <= entry.latency + 1.05 * bound  # printed with two digits
    for entry in front:
        assert entry.latency == problem[0].latency(entry.precisions)


def test_dominated_precision_stays_where_it_is_cheaper_to_change_to():
    names = ("fp16", "fp8", "int8")
    latencies, errors = {"fp16": 3.0, "fp8": 2.0, "int8": 1.5}, {"fp16": 0.0, "fp8": 0.2, "int8": 0.1}
    for costs in (AllocationCosts(), AllocationCosts(5.0, 2), AllocationCosts(dict.fromkeys(pairs(names), 1.0))):
        assert drop_dominated(LatencyModel(names, latencies, costs), errors)[0] == ("fp16", "int8")
    dear = dict.fromkeys(pairs(names), 1.0)
    for change in (("fp16", "int8"), ("int8", "fp16")):
        costs = AllocationCosts(dear | {change: 1.5})
        left, dropped = drop_dominated(LatencyModel(names, latencies, costs), errors)
        assert (left, dropped) == (names, ())
    # what changes between the two of them cost does not matter
    costs = AllocationCosts(dear | {("fp8", "int8"): 9.0})
    assert drop_dominated(LatencyModel(names, latencies, costs), errors)[0] == ("fp16", "int8")


def test_wrong_costs_are_refused():
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"the swap cost is .* ms, expected zero or a positive number"):
            AllocationCosts(value)
    with pytest.raises(ValueError, match=r"the swap cost from fp16 to int8 is -0\.1 ms"):
        AllocationCosts({("fp16", "int8"): -0.1})
    with pytest.raises(ValueError, match="from fp16 to fp16 is given, but staying is no swap"):
        AllocationCosts({("fp16", "fp16"): 0.0})
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"max_engines is .*, expected a whole number from 1, or None"):
            AllocationCosts(0.0, limit)  # type: ignore[arg-type]
    found, free = np.ones((3, 2)), LatencyModel(("fp16", "int8"), {"fp16": 2.0, "int8": 1.0})
    one_way = replace(free, costs=AllocationCosts({("fp16", "int8"): 0.1}))
    with pytest.raises(ValueError, match="swap_ms lacks int8 to fp16; give every ordered pair of precisions"):
        pareto_front(one_way, found)
    with pytest.raises(ValueError, match="swap_ms lacks int8 to fp16"):
        one_way.latency(("int8", "fp16"))
    with pytest.raises(ValueError, match="give latencies and swap costs in ms"):
        pareto_front(replace(free, costs=AllocationCosts(1e13)), found)
    with pytest.raises(
        BudgetError, match="2 high-precision steps of 3 take two engines, but max_engines is 1; ask for 0 or 3"
    ):
        require_reachable(HighSteps(2), 0.5, 3, AllocationCosts(0.0, 1))
    require_reachable(HighSteps(3), 0.5, 3, AllocationCosts(0.0, 1))
