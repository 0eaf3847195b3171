"""Allocation against brute force in exact arithmetic."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from calibration.choose.allocation import ErrorBudget, HighSteps, LatencyBudget, allocate, drop_dominated
from calibration.choose.costs import LatencyModel
from calibration.choose.pareto import pareto_front
from engines.errors import BudgetError

NAMES = ("fp16", "fp8", "int8", "int4")


def case(seed, *, coarse):
    """A random problem; `coarse` ones have few distinct values, so that ties abound."""
    rng = np.random.default_rng(seed)
    num_steps, count = int(rng.integers(1, 8)), int(rng.integers(2, 5))
    names = NAMES[:count]
    if coarse:
        latencies = [1.0, *rng.choice([0.1, 0.2, 0.3, 0.5, 1.0, 1.5], size=count - 1)]
        values = rng.integers(0, 4, size=(num_steps, count)) / 8
    else:
        latencies = [1.0, *np.round(rng.uniform(0.2, 1.3, size=count - 1), 4)]
        values = np.rint(2**20 * np.exp(2 * rng.normal(size=(num_steps, count)))) / 2**20
    values[:, 0] = 0
    return LatencyModel(names, dict(zip(names, map(float, latencies), strict=True))), values


def every_schedule(latency_model, found):
    """All P^T schedules as indices [P^T, T], and their exact latencies (1e-4 ms) and errors (2^-20).

    In the order of ties: the first differing step at the precision listed first.
    """
    names, values = latency_model.precisions, found
    choices = np.array(list(itertools.product(range(len(names)), repeat=len(values))))
    steps = np.array([latency_model.latencies_ms[name] for name in names])
    latency = np.rint(1e4 * steps).astype(int)[choices].sum(axis=1)
    error = np.rint(2**20 * values).astype(int)[np.arange(len(values)), choices].sum(axis=1)
    return choices, latency, error


def brute_front(latency_model, found):
    """(relative latency, error, schedule) of every schedule that is not dominated; the first of equals."""
    names, latencies = latency_model.precisions, latency_model.latencies_ms
    choices, latency, error = every_schedule(latency_model, found)
    front, least = [], None
    for k in np.lexsort((error, latency)):  # stable
        if least is None or error[k] < least:
            least = error[k]
            schedule = tuple(names[choice] for choice in choices[k])
            ratio = float(latency[k] / (len(found) * round(1e4 * latencies[names[0]])))
            front.append((ratio, float(error[k] / 2**20), schedule))
    return front


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_front_and_budgets_agree_with_brute_force(seed, coarse):
    latency_model, found = case(seed, coarse=coarse)
    expected = brute_front(latency_model, found)
    front = pareto_front(latency_model, found)
    assert [entry.precisions for entry in front] == [schedule for _, _, schedule in expected]
    np.testing.assert_allclose([entry.latency for entry in front], [entry[0] for entry in expected], rtol=1e-12)
    np.testing.assert_allclose([entry.error for entry in front], [entry[1] for entry in expected], rtol=1e-12)
    for k, (latency, error, schedule) in enumerate(expected):
        # exactly at a reachable value, however the caller came by it
        for ratio in (latency, latency_model.latency(schedule)):
            assert allocate(latency_model, found, LatencyBudget(ratio)).precisions == schedule
        assert allocate(latency_model, found, ErrorBudget(error)).precisions == schedule
        if k > 0:  # just short of it
            before = expected[k - 1]
            faster = LatencyBudget(latency * (1 - 1e-9))
            assert allocate(latency_model, found, faster).precisions == before[2]
            better = ErrorBudget(before[1] * (1 - 1e-9))
            assert allocate(latency_model, found, better).precisions == schedule


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_high_steps_agree_with_brute_force(seed, coarse):
    latency_model, contributions = case(seed, coarse=coarse)
    names, values = latency_model.precisions, contributions
    low = min(names[1:], key=lambda name: (latency_model.latencies_ms[name], values[:, names.index(name)].sum()))
    choices, _, errors = every_schedule(latency_model, contributions)
    for count in range(len(values) + 1):
        high, rest = choices == 0, choices == names.index(low)
        allowed = np.flatnonzero((high | rest).all(axis=1) & (high.sum(axis=1) == count))
        best = allowed[np.argmin(errors[allowed])]  # the first of equals
        found = allocate(latency_model, contributions, HighSteps(count))
        assert found.precisions == tuple(names[choice] for choice in choices[best])
        assert found.error == pytest.approx(errors[best] / 2**20, rel=1e-12)


def test_budget_no_schedule_meets_names_one_that_does():
    latency_model = LatencyModel(("fp16", "int8"), {"fp16": 3.0, "int8": 1.0})
    found = np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    with pytest.raises(BudgetError, match=r"in 0\.2 of the reference's latency; the fastest takes 0\.3334"):
        allocate(latency_model, found, LatencyBudget(0.2))
    assert allocate(latency_model, found, LatencyBudget(0.3334)).precisions == ("int8",) * 3
    biased = found + 0.1
    with pytest.raises(BudgetError, match=r"error of 0\.2 or less; the most accurate has 0\.3,"):
        allocate(latency_model, biased, ErrorBudget(0.2))
    assert allocate(latency_model, biased, ErrorBudget(0.3)).precisions == ("fp16",) * 3
    with pytest.raises(
        BudgetError, match="no schedule has 4 high-precision steps; the loop has 3, so ask for at most that"
    ):
        allocate(latency_model, found, HighSteps(4))
    with pytest.raises(BudgetError, match=r"1 high-precision steps asked for, .* the nearest that can be met is 3"):
        allocate(LatencyModel(("fp16",), {"fp16": 3.0}), found[:, :1], HighSteps(1))


@pytest.mark.parametrize("seed", range(20))
def test_value_named_by_a_refusal_can_be_met(seed):
    latency_model, found = case(seed, coarse=False)
    found[:] += 0.01
    for budget, text in ((LatencyBudget, "the fastest takes "), (ErrorBudget, "the most accurate has ")):
        with pytest.raises(BudgetError) as refusal:
            allocate(latency_model, found, budget(1e-9))
        allocate(latency_model, found, budget(float(str(refusal.value).split(text)[1].split(",")[0])))


def test_slower_and_worse_is_never_picked_and_dropping_says_why():
    rng = np.random.default_rng(0)
    names = ("fp16", "fp8", "int8", "int4")
    latencies = {"fp16": 10.0, "fp8": 12.0, "int8": 4.0, "int4": 4.0}
    errors = {"fp16": 0.0, "fp8": 0.1, "int8": 0.2, "int4": 0.5}
    values = rng.uniform(0.5, 1.5, size=(12, 1)) * np.array([0.0, 0.1, 0.2, 0.5])
    latency_model = LatencyModel(names, latencies)
    picked = {name for entry in pareto_front(latency_model, values) for name in entry.precisions}
    assert picked == {"fp16", "int8"}
    left, dropped = drop_dominated(latency_model, errors)
    assert left == ("fp16", "int8")
    assert [(loser.precision, loser.by) for loser in dropped] == [("fp8", "fp16"), ("int4", "int8")]
    assert "int8 is no slower (4 ms against 4 ms a step) and errs no more (E 0.2 against 0.5)" in dropped[1].reason


def test_reference_counts_when_dropping_and_is_itself_kept():
    latencies = {"fp16": 1.0, "fp8": 1.0, "int8": 0.5, "int4": 0.5}
    left, dropped = drop_dominated(LatencyModel(tuple(latencies), latencies), dict.fromkeys(latencies, 0.0))
    assert left == ("fp16", "int8"), "of equals the first; the reference stays even where int8 beats it"
    assert [loser.precision for loser in dropped] == ["fp8", "int4"]


def test_hundred_steps_five_precisions_in_a_second():
    rng = np.random.default_rng(0)
    names = ("fp16", "bf16", "fp8", "int8", "int4")
    latency_model = LatencyModel(names, dict(zip(names, (81.3, 70.1, 52.9, 33.7, 25.3), strict=True)))
    values = np.exp(1.5 * rng.normal(size=(100, 1))) * np.array([0, 0.02, 0.1, 0.3, 1.0])
    values *= np.exp(0.3 * rng.normal(size=values.shape))
    found = values
    started = time.process_time()  # which other work does not lengthen
    front = pareto_front(latency_model, found)
    assert time.process_time() - started < 1
    assert front[0].precisions == ("int4",) * 100
    assert front[-1].precisions == ("fp16",) * 100
    again = allocate(latency_model, found, LatencyBudget(0.6))
    assert again == allocate(latency_model, found, LatencyBudget(0.6), front=front)
    assert again.latency <= 0.6


def test_wrong_arguments_are_refused():
    values = np.zeros((3, 2))
    with pytest.raises(ValueError, match="latency ratio is 0"):
        LatencyBudget(0)
    with pytest.raises(ValueError, match="error budget is -1"):
        ErrorBudget(-1)
    with pytest.raises(ValueError, match=r"high-precision steps: 2\.5"):
        HighSteps(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected \[T, 1\]"):
        pareto_front(LatencyModel(("fp16",), {"fp16": 1.0}), values)
    with pytest.raises(ValueError, match="negative"):
        pareto_front(LatencyModel(("fp16", "int8"), {"fp16": 1.0, "int8": 1.0}), values - 1)
    with pytest.raises(ValueError, match="step latency is 0 ms"):
        pareto_front(LatencyModel(("fp16", "int8"), {"fp16": 1.0, "int8": 0}), values)
