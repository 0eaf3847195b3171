"""Calibration with reuse from end to end, on a planted diffusion: budgets, predictions, resuming, batches, what it beats."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.planted import Counted, Interrupted, OneByOne, PoolHere, calibrate_loops
from helpers.planted_loops import run_errors
from helpers.planted_reuse import ReuseLoop, shorter_loop

from calibration import ErrorBudget, HighSteps, LatencyBudget, QualityBudget, Sensitivity, open_journal
from calibration.choose.costs import AllocationCosts
from calibration.choose.stored_prediction import StoredPrediction
from calibration.measure.evaluator import SampleSet
from calibration.measure.metrics import typical_error
from calibration.measure.sample_batches import SampleBatches
from calibration.scores.carried import carried_scores
from calibration.scores.transfer import step_axes
from engines.errors import BudgetError
from engines.reuse import order_of, reused_steps
from engines.sampler_state import SamplerState

STEPS = 12
LATENCIES_MS = {"fp16": 8.0, "int8": 4.5, "int4": 3.0, "reuse": 0.02}


def loop(seed: int = 0, num_steps: int = STEPS) -> ReuseLoop:
    return ReuseLoop(num_steps, num_samples=4, seed=seed)


def pictures(latents: np.ndarray) -> np.ndarray:
    picture = latents.reshape(len(latents), 4, 4, 3).repeat(2, 1).repeat(2, 2)
    return np.clip(128 + 40 * picture, 0, 255).astype(np.uint8)


def run(evaluator: Any = None, **options: Any) -> Sensitivity:
    options = {"reuse": 6, "budget": LatencyBudget(0.4), "validation": loop(5), "shorter": shorter_loop} | options
    return calibrate_loops(evaluator or loop(), LATENCIES_MS, **options).sensitivity


@cache
def usual() -> Sensitivity:
    return run()


def stored(found: Sensitivity) -> str:
    return json.dumps(found.model_dump(mode="json"))


def computed(schedule: tuple[str, ...]) -> list[str]:
    return [choice for choice in schedule if order_of(choice) is None]


class RunsAway(ReuseLoop):
    """A line overflows, and so does every step behind it."""

    def step(self, sample: int, state: SamplerState, choice: str) -> SamplerState:
        after = super().step(sample, state, choice)
        return replace(after, latents=np.full_like(after.latents, np.inf)) if choice == "reuse1" else after


def test_an_extrapolation_that_runs_away_is_a_choice_that_is_not_made() -> None:
    found = run(RunsAway(STEPS, num_samples=4))
    assert "reuse1" not in found.schedule
    assert {"reuse0", "reuse2"} & set(found.schedule)
    assert found.predicted_error < 0.1
    assert found.predicted_latency <= 0.4


def test_reuse_meets_a_latency_budget_with_less_error_than_without() -> None:
    found, without = usual(), run(reuse=0)
    assert 0 < len(reused_steps(found.schedule)) <= 6
    assert found.predicted_latency <= 0.4
    names = [LATENCIES_MS["reuse" if order_of(choice) is not None else choice] for choice in found.schedule]
    assert found.predicted_latency == pytest.approx(sum(names) / (8 * STEPS))
    assert found.chosen is not None
    assert without.chosen is not None
    assert found.chosen.typical.value < 0.5 * without.chosen.typical.value
    assert (without.reuse, without.fewer_steps) == (None, ())
    names_of = [name for trial in found.guard.candidates for name in trial.names] if found.guard else []
    assert "gram, no reuse" in names_of or "downcast sum, no reuse" in names_of
    assert any(name.startswith("every 2nd step reuse") for name in names_of)
    rows = [row.name for row in found.validation]
    assert "no reuse" in rows
    assert any(name.startswith("fewer steps: ") for name in rows)


def test_an_error_budget_holds_and_latency_falls() -> None:
    found, without = (run(budget=ErrorBudget(3e-4), reuse=reuse) for reuse in (6, 0))
    assert found.pareto[0].latency < without.pareto[0].latency
    assert found.predicted_latency < without.predicted_latency
    assert np.median(run_errors(loop(), found.schedule)) <= 2 * 3e-4, "one of the four departs"
    for first, second in pairwise(found.pareto):
        assert first.latency < second.latency
        assert first.error > second.error


def test_other_budgets_take_reuse_into_account() -> None:
    default = run(budget=None)
    assert default.predicted_error <= 0.25 * StoredPrediction(default).error(("int4",) * STEPS)
    assert reused_steps(default.schedule)
    high = run(budget=HighSteps(3))
    assert high.schedule.count("fp16") == 3
    assert high.predicted_latency < run(budget=HighSteps(3), reuse=0).predicted_latency
    quality = run(budget=QualityBudget("ssim", 0.98), decode=pictures)
    assert (
        quality.predicted_latency <= run(budget=QualityBudget("ssim", 0.98), decode=pictures, reuse=0).predicted_latency
    )


def test_swaps_and_engines_count_computed_steps_only() -> None:
    found = run(costs=AllocationCosts(1.0, 1), budget=LatencyBudget(0.45))
    assert len(set(computed(found.schedule))) == 1
    assert reused_steps(found.schedule)
    dear = run(costs=AllocationCosts(1.0), budget=LatencyBudget(0.45))
    inner = computed(dear.schedule)
    changes = sum(a != b for a, b in pairwise(inner))
    total = sum(LATENCIES_MS[name] for name in inner) + changes + 0.02 * (STEPS - len(inner))
    assert dear.predicted_latency == pytest.approx(total / (8 * STEPS))


def test_predictions_of_reuse_and_precisions_together_are_right_within_a_factor_of_four() -> None:
    """At up to 30 % reuse of T = 20: those of plans alone are closer (test_reuse_plans)."""
    long = ReuseLoop(20, num_samples=16)
    for ratio in (0.3, 0.5, 0.7):
        found = run(long, validation=None, reuse=6, budget=LatencyBudget(ratio))
        assert reused_steps(found.schedule)
        measured = typical_error(run_errors(long, found.schedule))
        assert 0.25 <= found.predicted_error / measured <= 4


def test_a_stored_calibration_predicts_as_the_calibration_did(tmp_path: Path) -> None:
    usual().save(tmp_path / "sensitivity.json")
    found = Sensitivity.load(tmp_path / "sensitivity.json")
    assert found == usual()
    prediction = StoredPrediction(found)
    assert prediction.error(found.schedule) == pytest.approx(found.predicted_error, rel=1e-12)
    assert prediction.latency(found.schedule) == found.predicted_latency
    for point in found.pareto:
        assert prediction.error(point.precisions) == pytest.approx(point.error, rel=1e-9)
        assert prediction.latency(point.precisions) == point.latency
    assert found.reuse is not None
    for plan in found.reuse.plans:
        assert prediction.error(plan.choices) == plan.measured
    assert not prediction.predicts(("fp16",) * 11 + ("reuse0",)) or any(
        plan.choices == ("fp16",) * 11 + ("reuse0",) for plan in found.reuse.plans
    )


def test_calls_are_counted_and_stay_below_what_was_said() -> None:
    evaluator, validation = Counted(loop()), Counted(loop(5))
    found = run(evaluator, validation=validation)
    assert stored(found) == stored(usual())
    for counted, name in ((evaluator, "calibration"), (validation, "validation")):
        stages = [calls for stage, calls in found.calls.items() if stage.startswith(name)]
        for precision in evaluator.precisions:
            assert sum(calls.get(precision, 0) for calls in stages) == counted.calls[precision]
    assert found.reuse is not None
    assert found.reuse.calls == {
        "fp16": sum(found.calls[f"calibration: {stage}"]["fp16"] for stage in ("reuse scores", "reuse plans"))
    }
    assert sum(found.reuse.calls.values()) <= found.reuse.most_calls


def test_interrupted_anywhere_and_resumed_is_the_same(tmp_path: Path) -> None:
    whole = Counted(loop())
    expected = stored(run(whole))
    for limit in range(50, whole.calls.total(), 397):
        path = tmp_path / str(limit)
        with pytest.raises(Interrupted):
            run(Counted(loop(), limit), journal=open_journal(path, loop(), loop(5)))
        again = Counted(loop())
        assert stored(run(again, journal=open_journal(path, loop(), loop(5)))) == expected
        assert again.calls.total() < whole.calls.total() + 200


@pytest.mark.parametrize("at_once", [2, 4])
def test_batches_and_pools_give_the_same(at_once: int) -> None:
    sets = {"calibration": SampleSet(loop()), "validation": SampleSet(loop(5))}
    assert stored(run(pool=SampleBatches(sets, at_once))) == stored(usual())
    assert stored(run(pool=PoolHere(calibration=loop(), validation=loop(5)))) == stored(usual())


def test_carried_scores_leave_reuse_to_be_measured_anew() -> None:
    source = run(validation=None)
    settings = {
        "bundle_id": "a" * 64, "setting": "x", "machine": "m", "guidance_scale": 1.0, "seed": 0,
        "calibration_prompts": ["a"], "validation_prompts": [],
    }  # fmt: skip
    source = Sensitivity.model_validate(source.model_dump() | {"settings": settings})
    target = ReuseLoop(16, num_samples=4)
    carried = carried_scores(source, *step_axes(loop().table, target.table))
    evaluator = Counted(target)
    found = run(evaluator, validation=None, carried=carried)
    assert found.method == "transfer"
    assert found.reuse is not None
    assert all(len(plan.choices) == 16 for plan in found.reuse.plans)
    assert found.calls["calibration: reuse scores"]["fp16"] > 0
    assert found.predicted_latency <= 0.4


def test_fewer_steps_that_do_better_are_recorded_and_judged() -> None:
    """A scheduler that ends next to the reference run however few its steps are."""

    class Jump(OneByOne):
        def __init__(self, inner: ReuseLoop, num_steps: int) -> None:
            self.inner, self.num_steps = inner, num_steps

        def start(self, sample: int, nudged: bool = False) -> tuple[int, Any]:
            return 0, self.inner.start(sample)

        def step(self, sample: int, state: tuple[int, Any], choice: str) -> tuple[int, Any]:
            step, inner = state
            for _ in range(STEPS if step == self.num_steps - 1 else 0):
                inner = self.inner.step(sample, inner, "fp16")
            return step + 1, inner

        def latents(self, state: tuple[int, Any]) -> np.ndarray:
            return self.inner.latents(state[1]) * np.float32(1.0001)

    class Jumping(ReuseLoop):
        def shorter(self, loop: str) -> Any:
            return Jump(self, json.loads(loop))

    loops = (Jumping(STEPS, num_samples=4, seed=seed) for seed in (0, 5))
    found = run(next(loops), budget=LatencyBudget(0.3), validation=next(loops))
    best = found.fewer_steps[0]
    assert best.beats
    assert best.typical is not None
    assert best.latency <= found.predicted_latency
    assert [row.name for row in found.losses if row.name.startswith("fewer")] == [best.name]


def test_a_loop_that_cannot_be_made_is_left_out_with_a_reason() -> None:
    found = run(budget=LatencyBudget(0.22), validation=None)
    reasons = {record.precision: record.reason for record in found.fewer_steps}
    assert reasons["fp16"] == "planted cannot make 2 steps"
    assert any(reason is None for reason in reasons.values())


def test_what_reuse_needs_is_said() -> None:
    with pytest.raises(ValueError, match="latencies_ms lacks reuse"):
        calibrate_loops(loop(), {"fp16": 8.0, "int8": 4.5, "int4": 3.0}, reuse=2)
    with pytest.raises(ValueError, match="reuse of 12 steps is asked for; of 12 the first is computed"):
        run(reuse=12)
    with pytest.raises(ValueError, match="reuse is -1"):
        run(reuse=-1)
    with pytest.raises(BudgetError, match=r"the fastest takes 0\.1"):
        run(Counted(loop(), 0), budget=LatencyBudget(0.1))


def test_a_budget_that_more_reuse_could_meet_names_how_many_steps() -> None:
    words = (
        r"in 0\.15 of the reference's latency; the fastest takes .*, or allow more than 6 reused steps: --reuse (\d+)"
    )
    with pytest.raises(BudgetError, match=words) as refusal:
        run(Counted(loop(), 0), budget=LatencyBudget(0.15), reuse=6)
    enough = int(str(refusal.value).partition("--reuse ")[2].split()[0])
    with pytest.raises(BudgetError, match=f"--reuse {enough} can meet it"):
        run(Counted(loop(), 0), budget=LatencyBudget(0.15), reuse=enough - 1)
    assert run(budget=LatencyBudget(0.15), reuse=enough, validation=None).predicted_latency <= 0.15
    for reuse, budget in ((0, 0.15), (6, 0.001)):  # not allowed to reuse; beyond any number
        with pytest.raises(BudgetError, match=r"so ask for that or more$"):
            run(Counted(loop(), 0), budget=LatencyBudget(budget), reuse=reuse)


@pytest.mark.parametrize("num_steps", [2, 3])
def test_short_loops(num_steps: int) -> None:
    found = run(loop(num_steps=num_steps), validation=loop(5, num_steps), reuse=1, budget=LatencyBudget(0.6))
    assert found.predicted_latency <= 0.6


def test_documents_that_contradict_themselves_are_refused() -> None:
    data = usual().model_dump(mode="json")
    for change, words in (
        ({"plans": [data["reuse"]["plans"][0] | {"choices": ["fp16"] * STEPS}]}, "or reuses none"),
        ({"plans": [data["reuse"]["plans"][0] | {"choices": ["fp16"] * 3}]}, "a plan of reuse is not of 12 steps"),
        ({"scores": {"reuse0": [None]}}, "scores of reuse are not of"),
        ({"samples": [4]}, "reuse has a sample 4, expected less than 4"),
    ):
        with pytest.raises(ValueError, match=words):
            Sensitivity.model_validate(data | {"reuse": data["reuse"] | change})
    with pytest.raises(ValueError, match=r"fewer steps were compared without reuse|a schedule has"):
        Sensitivity.model_validate(data | {"reuse": None})
    row = next(row for row in data["validation"] if row["name"].startswith("fewer steps: "))
    others = [other for other in data["validation"] if other is not row]
    for schedules in ([["odd"] * len(row["schedules"][0])], [[]], [row["schedules"][0][1:]]):
        with pytest.raises(ValueError, match="is of another run"):
            Sensitivity.model_validate(data | {"validation": [*others, row | {"schedules": schedules}]})
