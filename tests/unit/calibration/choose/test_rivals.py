"""The local search: planted interactions that scores cannot see, chance that must not decide, calls, resumption."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations

import numpy as np
import pytest
from helpers.planted import Counted, Interrupted, PlantedEvaluator, PoolHere, calibrate_loops, measurements

from calibration import ErrorBudget, HighSteps, LatencyBudget, open_journal
from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.choose.race import Runs, beats, refine

STEPS = 8
LATENCIES_MS = {"fp16": 8.0, "int8": 4.0, "int4": 3.0}


@dataclass(frozen=True)
class Blocks(PlantedEvaluator):
    """Errors of the first half of the steps point the same way, those of the second half each its own way.

    A single downcast looks worse in the second half; many at once are worse in the first.
    """

    def _direction(self, index: int) -> np.ndarray:
        direction = np.zeros(self._size)
        direction[0 if index < self.num_steps // 2 else 1 + index] = 1.0
        return direction


def loop(*, seed=0, num_samples=4, kind=Blocks):
    sizes = np.where(np.arange(STEPS) < STEPS // 2, 0.2, 0.25)
    return kind({"int8": 0.6 * sizes, "int4": sizes}, gains=[1.0] * STEPS, num_samples=num_samples, seed=seed)


def run(evaluator=None, **options):
    options = {"validation": loop(seed=1), "budget": HighSteps(3)} | options
    return calibrate_loops(evaluator or loop(), LATENCIES_MS, **options).sensitivity


def true_error(schedule):
    return loop(seed=1).true_error(schedule)


def best_of_all(count):
    schedules = [
        tuple("fp16" if step in high else "int4" for step in range(STEPS)) for high in combinations(range(STEPS), count)
    ]
    return min(map(true_error, schedules))


def allocate_by(monkeypatch, predictor="downcast"):
    """Whatever the fit says; "downcast" is what these interactions mislead."""
    monkeypatch.setattr(import_module("calibration.run"), "best_fit", lambda records: predictor)


def test_finds_the_best_where_scores_mislead(monkeypatch):
    allocate_by(monkeypatch)
    plain, refined = run(refine_calls=0), run()
    assert plain.schedule[: STEPS // 2] == ("int4",) * 4, "the scores see the larger single errors only"
    assert true_error(plain.schedule) > 1.5 * best_of_all(3)
    assert true_error(refined.schedule) == pytest.approx(best_of_all(3))
    assert plain.loses_to
    assert not refined.loses_to
    record = refined.refinement
    assert record.trials[0].precisions == plain.schedule
    assert record.trials[0].origin == "scores"
    assert record.rounds >= 1
    winner = next(trial for trial in record.trials if trial.precisions == refined.schedule)
    assert winner.origin == record.origin != "scores"
    assert len(winner.errors) == 4
    assert winner.errors == pytest.approx(
        [loop(num_samples=s + 1).true_error(refined.schedule) * (s + 1) - sum(winner.errors[:s]) for s in range(4)],
        rel=1e-3,
    )
    assert refined.predicted_error == winner.predicted_error > plain.predicted_error


def test_fixed_rules_and_other_predictors_are_among_the_rivals(monkeypatch):
    budget = LatencyBudget(0.65)
    allocate_by(monkeypatch, "upcast")
    other = run(refine_calls=0, budget=budget)
    allocate_by(monkeypatch)
    found = run(refine_calls=10_000, budget=budget)
    tried = {trial.origin: trial for trial in found.refinement.trials}
    assert {"scores", "exchange", "front"} <= tried.keys()
    assert {origin.split(maxsplit=1)[0] for origin in tried} >= {"first", "last", "both"}
    assert other.schedule in {trial.precisions for trial in found.refinement.trials[1:]}


def test_scores_that_are_right_stand(monkeypatch):
    allocate_by(monkeypatch)
    errors = {"int4": 0.1 * 1.5 ** np.arange(STEPS)}
    plain = PlantedEvaluator(errors, gains=[1.0] * STEPS, num_samples=4)
    found = calibrate_loops(plain, {"fp16": 8.0, "int4": 3.0}, budget=HighSteps(3)).sensitivity
    assert found.schedule == ("int4",) * 5 + ("fp16",) * 3
    assert found.refinement.origin == "scores"
    assert len(found.refinement.trials) > 4, "it was put to the test"
    measured = {trial.precisions: sum(trial.errors) for trial in found.refinement.trials if len(trial.errors) == 4}
    assert min(measured, key=measured.get) == found.schedule


@pytest.mark.parametrize(
    "budget", [HighSteps(3), LatencyBudget(0.7), LatencyBudget(0.55), ErrorBudget(1e-4), ErrorBudget(3e-4), None]
)
def test_rivals_keep_to_the_budget_and_the_costs(budget):
    costs = AllocationCosts(swap_ms=0.1, max_engines=2)
    latency_model = LatencyModel(tuple(LATENCIES_MS), LATENCIES_MS, costs)
    plain, found = (run(budget=budget, costs=costs, refine_calls=calls) for calls in (0, 2000))
    assert plain.refinement.trials == ()
    for trial in found.refinement.trials:
        assert trial.latency == latency_model.latency(trial.precisions)
        assert len(set(trial.precisions)) <= 2
        if isinstance(budget, HighSteps):
            assert (trial.precisions.count("fp16"), trial.precisions.count("int4")) == (3, 5)
        else:
            assert trial.latency <= (budget.ratio if isinstance(budget, LatencyBudget) else plain.predicted_latency)
    assert len(found.refinement.trials) > 4
    assert found.predicted_latency == latency_model.latency(found.schedule)


def test_calls_are_counted_and_stay_within_the_limit():
    for limit in (0, 30, 64, 100, 300, 5000):
        evaluator = Counted(loop())
        found = run(evaluator, refine_calls=limit)
        spent = sum(found.refinement.calls.values())
        assert found.refinement.max_calls == limit >= spent
        assert found.calls.get("calibration: refinement", {}) == found.refinement.calls
        stages = [calls for stage, calls in found.calls.items() if stage.startswith("calibration")]
        assert sum(sum(calls.values()) for calls in stages) == evaluator.calls.total()
        assert (spent == 0) == (found.refinement.rounds == 0) == (limit < 60)
    by_default = run()
    assert by_default.refinement.max_calls == by_default.search_calls > 0


def test_schedule_calls_says_what_a_run_takes():
    for schedule in (("int4",) * 3 + ("fp16",) * 5, ("fp16",) * 7 + ("int8",), ("fp16", "int4") * 4, ("int4",) * 8):
        evaluator = Counted(loop(num_samples=1))
        found = measurements(evaluator)
        for precision in ("fp16", "int4"):
            found.uniform_error(precision, 0)
        before = evaluator.calls.total()
        found.schedule_error("refinement", schedule, 0, pictures=False)
        assert evaluator.calls.total() - before == found.schedule_calls(schedule)


def test_interrupted_anywhere_goes_on_to_the_same_end(tmp_path):
    whole = Counted(loop())
    expected = run(whole)
    before = whole.calls.total() - sum(expected.refinement.calls.values())
    for k, limit in enumerate(range(before, whole.calls.total(), 37)):
        path = tmp_path / str(k)
        with pytest.raises(Interrupted):
            run(Counted(loop(), limit), journal=open_journal(path, loop(), loop(seed=1)))
        again = run(journal=open_journal(path, loop(), loop(seed=1)))
        assert json.dumps(again.model_dump(mode="json")) == json.dumps(expected.model_dump(mode="json"))


# the race itself


def race(errors, *, start="a", max_calls=10_000, cost=1):
    """Refines among named schedules with given errors [samples]; returns the result and what was measured."""
    measured = []

    def measure(schedule, sample):
        measured.append((schedule[0], sample))
        return errors[schedule[0]][sample]

    num_samples = len(errors[start])
    rivals = [(name, (name,)) for name in errors]
    runs = Runs(measure, lambda schedule: cost, num_samples, lambda *announced: None, lambda schedule: 1.0)
    return refine((start,), lambda schedule: rivals, runs, max_calls, ()), measured


def test_worse_half_stops_early_and_nothing_is_measured_twice():
    errors = {name: [1.0 + k + 0.01 * s for s in range(8)] for k, name in enumerate("cabdefghij")}
    found, measured = race(errors)
    assert found.best.precisions == ("c",)
    assert len(set(measured)) == len(measured)
    ran = {trial.precisions[0]: len(trial.errors) for trial in found.trials}
    assert ran["a"] == ran["c"] == 8
    assert sorted(ran.values()) == [2] * 4 + [4] * 2 + [8] * 4
    assert found.rounds == 1, "the winner has no rivals left"


def test_advantage_on_a_single_sample_is_no_win():
    steady = {"a": [1.0, 1.0, 1.0, 1.0], "b": [0.9, 0.9, 0.9, 0.9]}
    lucky = {"a": [1.0, 1.0, 1.0, 10.0], "b": [1.05, 1.05, 1.05, 6.0]}
    assert race(steady)[0].best.precisions == ("b",)
    assert np.mean(lucky["b"]) < np.mean(lucky["a"])
    assert race(lucky)[0].best.precisions == ("a",)
    assert beats([0.9, 0.8], [1.0, 1.0])
    assert not beats([1.0, 1.0], [1.0, 1.0])
    assert not beats([0.5, 1.4], [1.0, 1.0])
    assert beats([0.0, 0.0], [1.0, 1.0])
    # 1.5 standard errors: enough of eight samples, not of two
    assert beats(np.exp([-0.1, -0.5] * 4), [1.0] * 8)
    assert not beats(np.exp([-0.1, -0.5]), [1.0] * 2)


def test_no_better_than_chance_rarely_replaces():
    rng = np.random.default_rng(0)
    replaced = 0
    for _ in range(100):
        scale = np.exp(rng.normal(size=8))
        errors = {name: (scale * np.exp(0.05 * rng.normal(size=8))).tolist() for name in "ab"}
        replaced += race(errors)[0].best.precisions != ("a",)
    assert replaced < 30


def test_one_sample_proves_nothing():
    found, measured = race({"a": [1.0], "b": [0.1]})
    assert found.best.precisions == ("a",)
    assert measured == []
    assert found.trials == ()


@pytest.mark.parametrize("samples", [2, 3, 5, 8])
@pytest.mark.parametrize("limit", range(0, 200, 13))
def test_race_never_exceeds_its_calls(samples, limit):
    rng = np.random.default_rng(limit)
    errors = {name: rng.uniform(size=samples).tolist() for name in "abcdefghijklmnopqrstuvwxyz"}
    _, measured = race(errors, max_calls=limit, cost=3)
    assert 3 * len(measured) <= limit
    assert bool(measured) == (limit >= 6 * samples), "the one to beat and a rival, on every sample"


def test_what_a_heat_measures_is_announced_at_once():
    """So that the workers of a pool can share it out."""
    announced, unmeasured, heats = set(), set(), []

    def expect(schedules, samples):
        assert not unmeasured, "everything announced before was measured"
        now = {(schedule, sample) for schedule in schedules for sample in samples}
        assert not now & announced
        announced.update(now)
        unmeasured.update(now)
        heats.append(len(now))

    def measure(schedule, sample):
        unmeasured.remove((schedule, sample))
        return 1.0 + int(schedule[0]) * 0.1

    rivals = [("some", (str(index),)) for index in range(1, 7)]
    runs = Runs(measure, lambda schedule: 1, 8, expect, lambda schedule: 1.0)
    refine(("0",), lambda schedule: rivals, runs, 1000, ())
    assert not unmeasured
    assert heats == [8, 6 * 2, 3 * 2, 2 * 4], "the one to beat on all samples, then half of the rivals on twice as many"


def test_a_pool_changes_nothing(monkeypatch):
    allocate_by(monkeypatch)
    alone = run()
    assert alone.refinement.rounds > 1
    assert run(pool=PoolHere(calibration=loop(), validation=loop(seed=1))) == alone
