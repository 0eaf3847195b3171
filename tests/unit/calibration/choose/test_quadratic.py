"""The search over the quadratic form, against brute force over all schedules of planted Gram matrices."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from calibration.choose import quadratic
from calibration.choose.allocation import Budget, ErrorBudget, HighSteps, LatencyBudget, allocate
from calibration.choose.costs import AllocationCosts, LatencyModel, step_ns
from calibration.choose.pareto import pareto_front
from calibration.choose.quadratic import best_schedule
from calibration.scores.gram import Gram
from engines.errors import BudgetError

NAMES = ("fp16", "fp8", "int8")
FIVE = ("fp16", "bf16", "fp8", "int8", "int4")
FIVE_MS = dict(zip(FIVE, (81.3, 70.1, 52.9, 33.7, 25.3), strict=True))
KINDS = ("random", "neighbours", "floor", "singular", "zero")
ROUNDING = 1e-9


def planted(seed: int, kind: str, num_steps: int, names: tuple[str, ...] = NAMES) -> Gram:
    """A Gram matrix of planted error vectors; those of neighbouring steps are alike for `neighbours` and `floor`."""
    rng = np.random.default_rng(seed)
    size = num_steps if kind == "singular" else 4 * num_steps
    drift = rng.normal(size=(num_steps, size))
    if kind in ("neighbours", "floor"):
        drift = np.cumsum(drift, axis=0)
    drift /= np.linalg.norm(drift, axis=1, keepdims=True)
    vectors = np.zeros((num_steps, len(names), size))
    for p in range(1, len(names)):
        own = rng.normal(size=(num_steps, size)) / np.sqrt(size)
        vectors[:, p] = (rng.uniform(0.2, 1) * drift + own / 2) * 2.0**p * np.exp(rng.normal(size=(num_steps, 1))) / 50
    return gram_of(vectors * (kind != "zero"), names, rng if kind == "floor" else None)


def few_directions(seed: int, num_steps: int) -> Gram:
    """Vectors in two to eight dimensions, which cancel each other nearly: the worst for a local search."""
    rng = np.random.default_rng(seed)
    size = (2, 3, 5, 8)[seed % 4]
    drift = rng.normal(size=(num_steps, size))
    if seed % 2:
        drift = np.cumsum(drift, axis=0)
    vectors = np.zeros((num_steps, 3, size))
    for p in (1, 2):
        vectors[:, p] = (drift + 0.3 * rng.normal(size=(num_steps, size))) * 2.0**p
    return gram_of(vectors, NAMES, None)


def gram_of(vectors: np.ndarray, names: tuple[str, ...], floor_by: np.random.Generator | None) -> Gram:
    num_steps, count, _ = vectors.shape
    flat = vectors.reshape(num_steps * count, -1)
    values = (flat @ flat.T).reshape(num_steps, count, num_steps, count)
    floor = np.zeros(num_steps)
    if floor_by is not None:
        scale = float(np.median(np.einsum("ipip->ip", values)[:, 1:]))
        floor[:-1] = np.sort(floor_by.uniform(0, scale, size=num_steps - 1))[::-1]
    return Gram(names, values, floor)


@dataclass(frozen=True)
class Every:
    """All schedules [N, T], their E, latencies in nanoseconds and numbers of engines."""

    choices: np.ndarray
    error: np.ndarray
    total_ns: np.ndarray
    engines: np.ndarray

    @classmethod
    def of(cls, gram: Gram) -> Callable[[LatencyModel], Every]:
        """By latency model, E being the same for all."""
        choices = np.array(list(itertools.product(range(len(gram.precisions)), repeat=gram.num_steps)))
        return partial(cls._timed, choices, gram.errors(choices))

    @classmethod
    def _timed(cls, choices: np.ndarray, error: np.ndarray, latency_model: LatencyModel) -> Every:
        names = latency_model.precisions
        steps_ns = np.array([step_ns(latency_model.latencies_ms[name]) for name in names])
        swaps_ns = np.array([[latency_model.costs.swap_ns(a, b) for b in names] for a in names])
        total_ns = steps_ns[choices].sum(axis=1) + swaps_ns[choices[:, :-1], choices[:, 1:]].sum(axis=1)
        engines = sum((choices == p).any(axis=1).astype(int) for p in range(len(names)))
        return cls(choices, error, total_ns, np.asarray(engines))

    def allowed(self, latency_model: LatencyModel, held: int) -> np.ndarray:
        limit = latency_model.costs.max_engines or len(latency_model.precisions)
        found: np.ndarray = (self.choices[:, :held] == 0).all(axis=1) & (self.engines <= limit)
        return found


def models(seed: int) -> list[LatencyModel]:
    """Latency models with and without a cost of changes, and with every limit on engines."""
    rng = np.random.default_rng(1000 + seed)
    latencies = dict(zip(NAMES, (1.0, *np.round(rng.uniform(0.3, 0.9, size=2), 3).tolist()), strict=True))
    swap_ms = {pair: round(float(rng.uniform(0, 0.1)), 4) for pair in itertools.permutations(NAMES, 2)}
    return [
        LatencyModel(NAMES, latencies, AllocationCosts(swaps, limit))
        for swaps in (0.0, swap_ms)
        for limit in (None, 1, 2)
    ]


def compare(latency_model: LatencyModel, gram: Gram, every: Every, held: int) -> list[tuple[Budget, float]]:
    """Excess of what the search finds over the optimum under latency and error budgets; asserts that they are met."""
    allowed = every.allowed(latency_model, held)
    reference_ns = gram.num_steps * step_ns(latency_model.latencies_ms["fp16"])
    fastest = every.total_ns[allowed].min() / reference_ns
    highest = every.error.max()
    budgets = [LatencyBudget(fastest + share * (1 - fastest)) for share in (0.2, 0.7)]
    found: list[tuple[Budget, float]] = []
    for budget in (*budgets, ErrorBudget(0.03 * highest), ErrorBudget(0.3 * highest)):
        chosen = best_schedule(latency_model, gram, budget, held)
        assert (chosen.error, chosen.latency) == (
            gram.error(chosen.precisions),
            latency_model.latency(chosen.precisions),
        )
        assert chosen.precisions[:held] == ("fp16",) * held
        assert len(set(chosen.precisions)) <= (latency_model.costs.max_engines or 3)
        if isinstance(budget, ErrorBudget):
            assert chosen.error <= budget.error * (1 + 1e-12)
            within = allowed & (every.error <= budget.error * (1 + 1e-12))
            found.append((budget, chosen.latency / (every.total_ns[within].min() / reference_ns) - 1))
            continue
        assert chosen.latency <= budget.ratio * (1 + 1e-12)
        within = allowed & (every.total_ns <= budget.ratio * reference_ns * (1 + 1e-12))
        best = every.error[within].min()
        found.append((budget, chosen.error / best - 1 if best > 0 else chosen.error))
        if found[-1][1] <= ROUNDING:  # of equals the fastest
            equal = within & (every.error <= best * (1 + ROUNDING))
            assert chosen.latency == pytest.approx(every.total_ns[equal].min() / reference_ns, rel=1e-12)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_latency_and_error_budgets_agree_with_brute_force(seed: int, kind: str) -> None:
    gram = planted(seed, kind, 10 if seed == 0 else 7 + seed % 3)
    timed = Every.of(gram)
    for k, latency_model in enumerate(models(seed)):
        every = timed(latency_model)
        for budget, excess in compare(latency_model, gram, every, held=(0, 1, 3)[(k + k // 3 + seed) % 3]):
            assert excess <= ROUNDING, (latency_model.costs, budget)


def test_where_vectors_nearly_cancel_a_hundredth_of_the_optima_may_be_missed() -> None:
    missed, total = [], 0
    for seed in range(12):
        gram = few_directions(seed, 8)
        timed = Every.of(gram)
        for latency_model in models(seed):
            found = compare(latency_model, gram, timed(latency_model), held=seed % 2)
            total += len(found)
            missed += [(seed, latency_model.costs, *item) for item in found if item[1] > ROUNDING]
    assert len(missed) <= total / 100, missed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_high_steps_agree_with_brute_force(seed: int, kind: str) -> None:
    gram = planted(seed, kind, 10 if seed == 0 else 7 + seed % 3)
    timed = Every.of(gram)
    for latency_model in models(seed):
        if latency_model.costs.max_engines == 1:
            with pytest.raises(BudgetError, match="take two engines, but max_engines is 1"):
                best_schedule(latency_model, gram, HighSteps(2))
            continue
        every = timed(latency_model)
        low = min((1, 2), key=lambda p: latency_model.latencies_ms[NAMES[p]])
        high = every.choices == 0
        for count, held in itertools.product((0, 1, 3, 5, gram.num_steps), (0, 1, 3)):
            if held > count:
                with pytest.raises(BudgetError, match=f"the first {held} are held at fp16; ask for at least that"):
                    best_schedule(latency_model, gram, HighSteps(count), held)
                continue
            allowed = (high | (every.choices == low)).all(axis=1) & (high.sum(axis=1) == count)
            allowed &= every.allowed(latency_model, held)
            best = every.error[allowed].min()
            equal = allowed & (every.error <= best * (1 + ROUNDING))
            chosen = best_schedule(latency_model, gram, HighSteps(count), held)
            assert chosen.precisions.count("fp16") == count
            assert set(chosen.precisions) <= {"fp16", NAMES[low]}
            assert chosen.precisions[:held] == ("fp16",) * held
            assert chosen.error <= best * (1 + ROUNDING)
            cheapest = every.total_ns[equal].min() / 1e6 / gram.num_steps
            assert chosen.latency == pytest.approx(cheapest, rel=1e-12)


def test_steps_that_err_alike_are_set_apart() -> None:
    num_steps = 12
    pairs = np.repeat(np.eye(num_steps // 2), 2, axis=0)  # steps 2k and 2k + 1 err in the same direction
    vectors = np.stack([0 * pairs, pairs * np.linspace(1, 1.2, num_steps)[:, None]], axis=1)
    gram = gram_of(vectors, ("fp16", "int8"), None)
    latency_model = LatencyModel(gram.precisions, {"fp16": 2.0, "int8": 1.0})
    additive = allocate(latency_model, gram.diagonal, HighSteps(6))
    assert additive.precisions == ("int8",) * 6 + ("fp16",) * 6, "alone, early steps err least"
    for budget in (HighSteps(6), LatencyBudget(0.75)):
        chosen = best_schedule(latency_model, gram, budget)
        assert all(set(chosen.precisions[k : k + 2]) == {"fp16", "int8"} for k in range(0, num_steps, 2))
        assert chosen.error < 0.6 * gram.error(additive.precisions)
    assert best_schedule(latency_model, gram, ErrorBudget(chosen.error)).latency == chosen.latency


def test_the_floor_is_paid_once() -> None:
    """Alone the second step is the better one; but the floor is paid for the first low step only."""
    values = np.zeros((3, 2, 3, 2))
    values[[0, 1, 2], 1, [0, 1, 2], 1] = (1.0, 0.9, 0.8)
    gram = Gram(("fp16", "int8"), values, np.array([5.0, 0.3, 0.0]))
    latency_model = LatencyModel(gram.precisions, {"fp16": 2.0, "int8": 1.0})
    assert best_schedule(latency_model, gram, HighSteps(1)).precisions == ("fp16", "int8", "int8")
    assert best_schedule(latency_model, gram, HighSteps(1)).error == pytest.approx(2.0)
    assert best_schedule(latency_model, gram, LatencyBudget(5 / 6)).precisions == ("fp16", "fp16", "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_front_is_a_front_and_never_worse_than_the_additive_one(seed: int, kind: str) -> None:
    gram = planted(seed, kind, 12)
    for latency_model in models(seed):
        front = quadratic.front(latency_model, gram)
        assert all(a.latency < b.latency and a.error > b.error for a, b in itertools.pairwise(front))
        for point in front:
            assert (point.error, point.latency) == (
                gram.error(point.precisions),
                latency_model.latency(point.precisions),
            )
            assert len(set(point.precisions)) <= (latency_model.costs.max_engines or 3)
        additive = pareto_front(latency_model, gram.diagonal)
        assert front[0].latency == additive[0].latency
        assert front[-1].error == 0
        for point in additive:
            within = [other for other in front if other.latency <= point.latency]
            assert within[-1].error <= gram.error(point.precisions)


def test_front_follows_the_optima() -> None:
    gram, latency_model = planted(0, "neighbours", 8), models(0)[0]
    every = Every.of(gram)(latency_model)
    for point in quadratic.front(latency_model, gram):
        assert point.error <= every.error[every.total_ns <= point.latency * 8e6 * (1 + 1e-12)].min() * 1.05


def test_of_one_step_or_one_precision() -> None:
    one = planted(3, "neighbours", 1)
    latency_model = models(3)[0]
    fastest = min(NAMES, key=latency_model.latencies_ms.__getitem__)
    assert quadratic.front(latency_model, one)[0].precisions == (fastest,)
    assert best_schedule(latency_model, one, LatencyBudget(1.0)).precisions == ("fp16",)
    only = planted(3, "neighbours", 6, ("fp16",))
    latency_model = LatencyModel(("fp16",), {"fp16": 1.0})
    for budget in (LatencyBudget(1.0), ErrorBudget(0.0), HighSteps(6)):
        assert best_schedule(latency_model, only, budget).precisions == ("fp16",) * 6
    assert [point.precisions for point in quadratic.front(latency_model, only)] == [("fp16",) * 6]


def test_what_cannot_be_met_is_refused() -> None:
    gram, latency_model = planted(0, "neighbours", 8), LatencyModel(NAMES, {"fp16": 1.0, "fp8": 0.6, "int8": 0.4})
    with pytest.raises(BudgetError, match=r"in 0\.3 of the reference's latency; the fastest takes 0\.4, so"):
        best_schedule(latency_model, gram, LatencyBudget(0.3))
    with pytest.raises(BudgetError, match=r"in 0\.5 of the reference's latency; the fastest takes 0\.625, so"):
        best_schedule(latency_model, gram, LatencyBudget(0.5), held=3)
    assert best_schedule(latency_model, gram, LatencyBudget(0.625), held=3).precisions == ("fp16",) * 3 + ("int8",) * 5
    with pytest.raises(BudgetError, match="no schedule has 9 high-precision steps; the loop has 8"):
        best_schedule(latency_model, gram, HighSteps(9))
    with pytest.raises(ValueError, match="9 first steps are to be held, expected 0 to 8"):
        best_schedule(latency_model, gram, HighSteps(8), held=9)
    with pytest.raises(ValueError, match="the Gram is of fp16, fp8, int8, the latency model of fp16, int8; expected"):
        best_schedule(LatencyModel(("fp16", "int8"), {"fp16": 1.0, "int8": 0.4}), gram, HighSteps(2))


def test_the_same_every_time() -> None:
    gram = planted(0, "floor", 20, FIVE)
    latency_model = LatencyModel(FIVE, FIVE_MS, AllocationCosts(0.4, 3))
    for budget in (LatencyBudget(0.6), ErrorBudget(0.1), HighSteps(7)):
        assert best_schedule(latency_model, gram, budget) == best_schedule(latency_model, gram, budget)
    assert quadratic.front(latency_model, gram) == quadratic.front(latency_model, gram)


@pytest.mark.parametrize("kind", ["neighbours", "floor"])
@pytest.mark.parametrize("costs", [AllocationCosts(), AllocationCosts(0.5, 3)])
def test_hundred_steps_five_precisions_in_two_seconds(kind: str, costs: AllocationCosts) -> None:
    gram, latency_model = planted(1, kind, 100, FIVE), LatencyModel(FIVE, FIVE_MS, costs)
    within = gram.error(("int4",) * 100) / 10
    for budget in (LatencyBudget(0.6), ErrorBudget(within), HighSteps(40)):
        taken_s: list[float] = []
        while not taken_s or (min(taken_s) >= 2 and len(taken_s) < 3):  # other work also takes the caches
            started = time.process_time()
            chosen = best_schedule(latency_model, gram, budget)
            taken_s.append(time.process_time() - started)
        assert min(taken_s) < 2, budget
        additive = allocate(latency_model, gram.diagonal, budget)
        assert isinstance(budget, ErrorBudget) or chosen.error < gram.error(additive.precisions)


def test_front_of_twenty_steps_and_five_precisions_in_a_second() -> None:
    for costs in (AllocationCosts(), AllocationCosts(0.5), AllocationCosts(0.5, 3)):
        gram, latency_model = planted(1, "floor", 20, FIVE), LatencyModel(FIVE, FIVE_MS, costs)
        started = time.process_time()
        front = quadratic.front(latency_model, gram)
        assert time.process_time() - started < 1
        assert len(front) > 40
