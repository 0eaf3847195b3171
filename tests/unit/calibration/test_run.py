"""Calibration from end to end on a planted loop: what it chooses, counts and refuses."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.planted import Counted, PlantedEvaluator, calibrate_loops, measurements
from helpers.planted_calibration import LATENCIES_MS, STEPS, U_SHAPE, loop, pictures, run
from helpers.planted_loops import predicted, run_errors

from calibration import (
    CalibrationOptions,
    ErrorBudget,
    HighSteps,
    LatencyBudget,
    QualityBudget,
    Sensitivity,
    calibrate,
    open_journal,
)
from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.choose.stored_prediction import StoredPrediction
from calibration.document import OutdatedCalibrationError
from calibration.measure.evaluator import SampleSet, SampleSets
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import mean, psnr_db, typical_error
from calibration.measure.sample_batches import SampleBatches
from engines.errors import BudgetError, TmpDiffError


def test_chosen_schedule_is_right_and_beats_every_baseline():
    found = run(decode=pictures).sensitivity
    assert [name for name, p in enumerate(found.schedule) if p == "fp16"] == [0, 7, 8, 9]
    assert set(found.schedule) == {"fp16", "int4"}
    chosen, *others = found.validation
    assert found.chosen == chosen
    assert chosen.counts == {"fp16": 4, "int4": 6}
    assert chosen.latency == pytest.approx((4 * 8 + 6 * 3) / 80) == found.predicted_latency
    assert chosen.error == pytest.approx(loop(seed=1).true_error(found.schedule), rel=1e-3)
    assert found.predicted_error == pytest.approx(loop().true_error(found.schedule), rel=0.05)
    assert [row.name for row in others] == [
        "best rule: last 4 (int4)",
        *(f"uniform {name}" for name in LATENCIES_MS),
        "uniform, mixed",
        "first 4 (int4)",
        "last 4 (int4)",
        "both ends 4 (int4)",
        "evenly spread 4 (int4)",
        "random 4",
    ]
    assert found.losses == ()
    for row in others:
        if row.latency == chosen.latency:
            assert row.typical.value > chosen.typical.value
            assert row.against.high < 1
            assert row.standing == "better"
    uniform = others[1 + list(LATENCIES_MS).index("int4")]
    assert uniform.error > 3 * chosen.error
    assert uniform.ssim < chosen.ssim < 1
    assert uniform.psnr_db + 4 < chosen.psnr_db
    reference, random = others[1], others[-1]
    assert (reference.error, reference.ssim, reference.psnr_db) == (0, 1, None)
    draws = [loop(seed=1).true_error(schedule) for schedule in random.schedules]
    assert len(draws) == 3
    assert random.error == pytest.approx(np.mean(draws), rel=1e-3)


def test_calibration_samples_choose_and_validation_samples_judge_only():
    """Other validation samples, of whatever truth, change nothing but what is said of the schedule."""
    expected = run(budget=LatencyBudget(0.6)).sensitivity
    worlds = [
        None,
        loop(seed=2),
        loop(seed=1, num_samples=5),
        loop(seed=1, correlation=1.0),
        loop(seed=1, scale=np.geomspace(8, 0.1, STEPS)),
    ]
    for validation in worlds:
        found = run(validation=validation, budget=LatencyBudget(0.6)).sensitivity
        kept = {"validation", "validation_key", "calls"}
        assert found.model_dump(exclude=kept) == expected.model_dump(exclude=kept)
        calls = [
            {stage: spent for stage, spent in one.calls.items() if stage.startswith("calibration")}
            for one in (found, expected)
        ]
        assert calls[0] == calls[1]
    assert "first 2 (int8)" in {row.name for row in found.losses}, "the last of them contradicts the schedule"


def test_typical_errors_of_uniform_schedules_are_those_of_the_calibration_samples():
    found = run(loop(num_samples=5)).sensitivity
    assert list(found.uniform) == list(found.uniform_departures) == list(LATENCIES_MS)
    for name, interval in found.uniform.items():
        truth = run_errors(loop(num_samples=5), (name,) * STEPS)
        assert interval.value == pytest.approx(typical_error(truth))
        assert interval.low <= interval.value <= interval.high
        assert (found.uniform_departures[name].count, found.uniform_departures[name].samples) == (0, 5)


def test_sweep_and_bisection_choose_alike_for_fewer_calls():
    bisection, sweep = (run(method=method).sensitivity for method in ("bisection", "sweep"))
    assert bisection.schedule == sweep.schedule
    assert sweep.search_calls == sweep.sweep_calls == bisection.sweep_calls == 2 * 2 * 55
    assert bisection.search_calls < sweep.sweep_calls
    assert all(all(record.measured) for record in sweep.scores)
    assert all(positions == tuple(range(STEPS)) for positions in sweep.gram.positions.values())


def test_dominated_precision_is_named_and_costs_no_scores():
    evaluator = Counted(loop())
    found = run(evaluator).sensitivity
    assert [(loser.precision, loser.by) for loser in found.dropped] == [("fp8", "fp16")]
    assert {record.precision for record in found.scores} == {"int8", "int4"}
    assert evaluator.calls["fp8"] == 2 * STEPS, "its uniform runs, by which it was judged"
    assert not any("fp8" in point.precisions for point in found.pareto)
    row = next(row for row in found.validation if row.name == "uniform fp8")
    assert row.latency > 1, "still shown beside the others"


def test_every_call_is_counted():
    evaluator, validation = Counted(loop()), Counted(loop(seed=1))
    found = run(evaluator, validation=validation).sensitivity
    for counted, name in ((evaluator, "calibration"), (validation, "validation")):
        stages = [calls for stage, calls in found.calls.items() if stage.startswith(name)]
        for precision in evaluator.precisions:
            assert sum(calls.get(precision, 0) for calls in stages) == counted.calls[precision]
    assert {stage.removeprefix("calibration: ") for stage in found.calls if stage.startswith("calibration")} == {
        "uniform runs",
        "downcast int8",
        "downcast int4",
        "rounding",
        "fit",
        "guard",
    }
    assert found.search_calls == sum(sum(found.calls[f"calibration: downcast {p}"].values()) for p in ("int8", "int4"))
    assert found.guard.calls == found.calls["calibration: guard"]


@pytest.mark.parametrize("ratio", [0.4, 0.55, 0.8])
def test_latency_budget_finds_nearly_the_best_of_all_schedules(ratio):
    found = run(budget=LatencyBudget(ratio), method="sweep").sensitivity
    assert found.predicted_latency <= ratio
    truth = loop(seed=1)
    # errors of a precision differ by a factor between steps only: best of all is searched over few
    counts = [
        (a, b, STEPS - a - b)
        for a in range(STEPS + 1)
        for b in range(STEPS + 1 - a)
        if a * 8 + b * 4 + (STEPS - a - b) * 3 <= ratio * 80 + 1e-9
    ]
    worst_first = np.argsort(-U_SHAPE * 0.95 ** np.arange(STEPS)[::-1], kind="stable")
    best = min(
        truth.true_error([name for _, name in sorted(zip(worst_first, names, strict=True))])
        for a, b, c in counts
        for names in [("fp16",) * a + ("int8",) * b + ("int4",) * c]
    )
    assert found.chosen.error <= 1.02 * best
    for trial in found.guard.candidates:
        assert trial.latency <= ratio


def test_error_budget_and_default_budget():
    found = run(budget=ErrorBudget(1e-3)).sensitivity
    assert 0 < found.predicted_error <= 1e-3
    cheaper = [point for point in found.pareto if point.latency < found.predicted_latency]
    assert cheaper
    assert all(point.error > 1e-3 for point in cheaper)
    default = run(budget=None).sensitivity
    assert default.predicted_error <= 0.25 * default.pareto[0].error
    assert default.pareto[0].precisions == ("int4",) * STEPS
    assert default.budget == "by default, predicted error at most 0.25 of uniform int4's"
    assert 0.375 < default.predicted_latency < 1


@pytest.mark.parametrize("metric", ["ssim", "psnr"])
def test_quality_budget_is_met_by_measurement_on_calibration_samples(metric):
    def quality(schedule):
        """On the calibration samples, as a validation of the same ones has it."""
        samples = SampleSet(loop(), pictures)
        measured = Measurements("again", samples, Journal.in_memory("key"), SampleBatches({"again": samples}))
        values = [measured.schedule_error("again", schedule, sample, pictures=True) for sample in range(2)]
        return mean([one["ssim"] for one in values]) if metric == "ssim" else psnr_db([one["mse"] for one in values])

    known = run(budget=LatencyBudget(0.75)).sensitivity
    target = quality(known.schedule)
    for validation in (loop(seed=1), loop(seed=3, scale=np.geomspace(8, 0.1, STEPS)), None):
        found = run(budget=QualityBudget(metric, target), decode=pictures, validation=validation).sensitivity
        assert quality(found.schedule) >= target
        assert found.predicted_latency <= known.predicted_latency
        assert found.predicted_latency > found.pareto[0].latency, "the fastest schedule falls short"
        assert found.budget.startswith(f"{metric} at least ")
        assert f"on the calibration samples (measured: {quality(found.schedule):.4g}" in found.budget
        assert "calibration: quality" in found.calls
        assert found.guard is None
        assert not [row.name for row in found.validation if row.name.startswith("best rule")]


def test_pictures_of_calibration_samples_are_decoded_for_a_quality_budget_only():
    def refuse(latents):
        pytest.fail("decoded for nothing")

    sets = SampleSets(SampleSet(loop(), refuse), SampleSet(loop(seed=1), pictures))
    found = calibrate(sets, LATENCIES_MS, CalibrationOptions(HighSteps(4))).sensitivity
    assert found == run(decode=pictures).sensitivity


def test_quality_budget_takes_a_fixed_rule_where_predictions_mislead(monkeypatch):
    """Predicted by another loop's Gram, whose last steps err most; the samples' first ones do."""
    early = loop(scale=np.geomspace(8, 0.1, STEPS))
    rule = run(early, budget=HighSteps(4), validation=early, decode=pictures).sensitivity
    target = next(row for row in rule.validation if row.name == "first 4 (int4)").ssim
    others = measurements(loop(scale=np.geomspace(0.1, 8, STEPS)))
    misled, _ = predicted(others, ("fp16", "int8", "int4"), LATENCIES_MS)
    monkeypatch.setattr(sys.modules["calibration.stages"], "Predictions", lambda model, grams, predictor: misled)
    found = run(early, budget=QualityBudget("ssim", target), validation=early, decode=pictures).sensitivity
    assert "by the rule 'first K'" in found.budget
    high = [name == "fp16" for name in found.schedule]
    assert high == sorted(high, reverse=True), "first steps at the reference"
    assert found.chosen.ssim >= target
    assert found.predicted_latency <= 0.625
    assert found.predicted_latency == pytest.approx(
        LatencyModel(tuple(LATENCIES_MS), LATENCIES_MS).latency(found.schedule)
    )


def test_swaps_are_charged_and_engines_limited():
    free = run(budget=LatencyBudget(0.7)).sensitivity
    assert len(set(free.schedule)) == 2
    assert (free.swap_ms, free.max_engines) == ({}, None)
    one = run(budget=LatencyBudget(0.7), costs=AllocationCosts(max_engines=1)).sensitivity
    assert set(one.schedule) == {"int8"}
    assert one.max_engines == 1
    assert one.predicted_error > free.predicted_error
    dear = run(budget=LatencyBudget(0.7), costs=AllocationCosts(swap_ms=2.0)).sensitivity
    swaps = [sum(a != b for a, b in pairwise(found.schedule)) for found in (free, dear)]
    assert swaps[1] < swaps[0]
    assert dear.swap_ms["fp16 int8"] == 2.0
    charged = sum(LATENCIES_MS[name] for name in dear.schedule) + 2.0 * swaps[1]
    assert dear.predicted_latency == pytest.approx(charged / (STEPS * LATENCIES_MS["fp16"]))
    assert dear.validation[0].latency == pytest.approx(dear.predicted_latency)


def test_quality_budget_needs_something_to_measure_with():
    with pytest.raises(ValueError, match=r"a budget of ssim at least 0\.9 needs a decoder of the calibration samples"):
        run(budget=QualityBudget("ssim", 0.9))


def test_a_latency_or_step_budget_out_of_reach_is_refused_before_measuring():
    for budget, words in (
        (LatencyBudget(0.3), r"the fastest takes 0\.375"),
        (HighSteps(10_000), "ask for at most that"),
    ):
        with pytest.raises(BudgetError, match=words):
            run(Counted(loop(), limit=0), budget=budget)


def test_another_budget_measures_its_candidates_only(tmp_path):
    path = tmp_path / "journal"
    run(budget=ErrorBudget(1.0), journal=open_journal(path, loop(), loop(seed=1)))
    evaluator = Counted(loop())
    journal = open_journal(path, loop(), loop(seed=1))
    found = run(evaluator, budget=LatencyBudget(0.6), journal=journal).sensitivity
    alone = run(budget=LatencyBudget(0.6)).sensitivity
    assert found == alone
    # states of uniform runs are kept in memory only
    guard_calls = sum(alone.guard.calls.values())
    uniform_calls = sum(alone.calls["calibration: uniform runs"].values())
    assert (
        evaluator.calls.total()
        <= guard_calls + uniform_calls
        < sum(sum(calls.values()) for stage, calls in alone.calls.items() if stage.startswith("calibration"))
    )


def test_loop_where_no_low_precision_is_any_use():
    latencies = {"fp16": 1.0, "fp8": 2.0, "int8": 3.0, "int4": 1.0}
    found = calibrate_loops(loop(), latencies, validation=loop(seed=1)).sensitivity
    assert found.schedule == ("fp16",) * STEPS
    assert found.scores == found.fit_points == ()
    assert (found.gram, found.guard) == (None, None)
    assert "calibration: rounding" not in found.calls, "nothing is left to take the floor of rounding off"
    assert [loser.precision for loser in found.dropped] == ["fp8", "int8", "int4"]
    assert found.predicted_error == found.chosen.error == 0
    assert found.chosen.against is None
    assert StoredPrediction(found).error(found.schedule) == 0


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_loops(num_steps):
    short = PlantedEvaluator({"int8": [0.1] * num_steps}, gains=[1.0] * num_steps)
    found = calibrate_loops(short, {"fp16": 2.0, "int8": 1.0}, validation=short, budget=HighSteps(1)).sensitivity
    assert found.schedule.count("fp16") == 1
    rows = [row.name for row in found.validation]
    uniform = ["uniform fp16", "uniform int8"]
    if num_steps == 1:
        assert rows == ["schedule", *uniform, "uniform, mixed"]
        assert found.guard is None
        return
    assert [name for name in rows if name in uniform] == uniform
    assert [name for name in rows if name.endswith(" 1 (int8)")] == [
        *(f"best rule: {name} 1 (int8)" for name in ("first", "last") if found.guard.best_rule.startswith(name)),
        *(f"{rule} 1 (int8)" for rule in ("first", "last", "both ends", "evenly spread")),
    ]
    assert len(rows) == 10


def test_equal_arguments_give_equal_results_and_progress_ends():
    seen: dict[str, list[tuple[int, int]]] = {}
    first = run(progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    assert first == run()
    assert list(seen) == ["calibration runs", "downcast int8", "downcast int4", "fit", "guard", "validation"]
    for stage, calls in seen.items():
        assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
        # searches may stop short of what they are allowed
        assert calls[-1][0] == calls[-1][1] or ("cast" in stage and calls[-1][0] < calls[-1][1])


def test_large_front_is_thinned_in_the_document_only():
    long = PlantedEvaluator(
        {
            "int8": 0.1 * np.random.default_rng(1).uniform(1, 9, size=50),
            "int4": 0.2 * np.random.default_rng(0).uniform(1, 9, size=50),
        },
        gains=[0.99] * 50,
        num_samples=1,
    )
    latencies = {"fp16": 8.0, "int8": 4.1, "int4": 3.03}
    found = calibrate_loops(long, latencies, budget=LatencyBudget(0.6), method="sweep").sensitivity
    assert len(found.pareto) == 200
    assert found.pareto[0].precisions == ("int4",) * 50
    assert found.pareto[-1].precisions == ("fp16",) * 50
    for first, second in pairwise(found.pareto):
        assert first.latency < second.latency
        assert first.error > second.error
    assert 0.597 < found.predicted_latency <= 0.6


@pytest.mark.parametrize("budget", [LatencyBudget(0.6), HighSteps(4)])
def test_a_stored_calibration_predicts_as_the_calibration_did(budget, tmp_path):
    run(budget=budget).sensitivity.save(tmp_path / "sensitivity.json")
    found = Sensitivity.load(tmp_path / "sensitivity.json")
    prediction = StoredPrediction(found)
    assert prediction.precisions == ("fp16", "int8", "int4")
    for point in found.pareto:
        assert prediction.error(point.precisions) == pytest.approx(point.error, rel=1e-9)
        assert prediction.latency(point.precisions) == point.latency
    for point in found.fit_points:
        assert prediction.error(point.precisions) == point.predicted[found.predictor]
    for trial in found.guard.candidates:
        assert prediction.error(trial.precisions) == trial.predicted_error
        assert prediction.latency(trial.precisions) == trial.latency
    assert prediction.error(found.schedule) == found.predicted_error
    with pytest.raises(ValueError, match="schedule has steps at fp8; scores are of fp16, int8, int4"):
        prediction.error(("fp8",) * STEPS)


def test_schedule_and_document_survive_the_disk(tmp_path):
    result = run(decode=pictures)
    path = tmp_path / "sensitivity.json"
    result.sensitivity.save(path)
    assert Sensitivity.load(path) == result.sensitivity
    schedule = result.schedule("bundle", "quick")
    setting: Any = SimpleNamespace(name="quick", num_steps=STEPS)
    schedule.check(bundle_id="bundle", setting=setting, precisions=loop().precisions)
    assert schedule.setting == "quick"
    assert schedule.precisions == result.sensitivity.schedule
    assert schedule.origin == f"bisection, 4 steps at fp16: {result.sensitivity.guard.candidates[0].names[-1]}"
    path.write_text(path.read_text().replace('"method": "bisection"', '"method": "sweep"'))
    with pytest.raises(TmpDiffError, match="altered"):
        Sensitivity.load(path)
    assert json.loads(path.read_text())["version"] == 4
    path.write_text(path.read_text().replace('"version": 4', '"version": 2'))
    with pytest.raises(
        OutdatedCalibrationError, match=r"format version 2, which holds no error vectors; calibrate the"
    ):
        Sensitivity.load(path)


def test_an_error_budget_that_the_guard_goes_beyond_is_said(monkeypatch):
    """The guard goes by what it measures: here by a schedule no slower, whose predicted error is higher."""
    scale = 0.3 * np.exp(np.random.default_rng(1).normal(size=STEPS))
    evaluator = loop(seed=1, correlation=0.5, scale=scale, num_samples=3)
    exact = max(figure.value for figure in run(evaluator).sensitivity.uniform.values()) / 20
    beyond = run(evaluator, budget=ErrorBudget(exact)).sensitivity
    assert beyond.predicted_error > exact
    words = f"predicted error at most {exact:g}"
    measured = f"; the guard measured less with a schedule no slower, predicted {beyond.predicted_error:.3g}"
    assert beyond.budget == words + measured
    monkeypatch.setattr("calibration.choose.guard.expected_errors", lambda measured, predicted: predicted)
    within = run(evaluator, budget=ErrorBudget(exact)).sensitivity
    assert within.predicted_error <= exact
    assert within.budget == words
    assert beyond.predicted_latency <= within.predicted_latency


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="latencies_ms lacks int8, int4"):
        calibrate_loops(loop(), {"fp16": 1.0, "fp8": 1.0})
    for latencies_ms, options, words in (
        ({"fp16": 1.0, "fp8": 1.0, "int8": 1.0, "int4": 0.0}, {}, "step latency is 0.0 ms"),
        (LATENCIES_MS, {"costs": AllocationCosts(1e300)}, "a loop may take"),
    ):
        evaluator = Counted(loop(), 0)
        with pytest.raises(ValueError, match=words):
            calibrate_loops(evaluator, latencies_ms, **options)  # before any call
    with pytest.raises(ValueError, match="method is 'guess'"):
        run(method="guess")
    with pytest.raises(ValueError, match="another number of steps or other precisions"):
        run(validation=PlantedEvaluator({"int8": [1.0]}, gains=[1.0]))
    with pytest.raises(ValueError, match="no samples"):
        run(loop(num_samples=0))
    with pytest.raises(ValueError, match="other evaluators"):
        run(journal=Journal.in_memory("another"))
