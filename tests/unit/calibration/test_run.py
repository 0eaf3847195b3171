"""Calibration from end to end on a planted loop: what it chooses, counts and refuses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers.planted import Counted, PlantedEvaluator, calibrate_loops
from helpers.planted_calibration import LATENCIES_MS, STEPS, U_SHAPE, loop, pictures, run

from calibration import (
    ErrorBudget,
    HighSteps,
    LatencyBudget,
    QualityBudget,
    Sensitivity,
    open_journal,
)
from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.measure.journal import Journal
from engines.errors import BudgetError, TmpDiffError


def test_chosen_schedule_is_right_and_beats_every_baseline():
    found = run(decode=pictures).sensitivity
    assert [name for name, p in enumerate(found.schedule) if p == "fp16"] == [0, 7, 8, 9]
    assert set(found.schedule) == {"fp16", "int4"}
    chosen, *others = found.validation
    assert chosen.name == "schedule"
    assert chosen.counts == {"fp16": 4, "int4": 6}
    assert chosen.latency == pytest.approx((4 * 8 + 6 * 3) / 80) == found.predicted_latency
    assert chosen.error == pytest.approx(loop(seed=1).true_error(found.schedule), rel=1e-3) == found.measured_error
    assert [row.name for row in others] == [
        *(f"uniform {name}" for name in LATENCIES_MS),
        "first 4",
        "last 4",
        "both ends 4",
        "evenly spread 4",
        "random 4",
    ]
    assert chosen.loses_to == found.loses_to == ()
    for row in others[4:]:
        assert row.latency == chosen.latency
        assert row.error > chosen.error
    uniform = others[list(LATENCIES_MS).index("int4")]
    assert uniform.error > 3 * chosen.error
    assert uniform.ssim < chosen.ssim < 1
    assert uniform.psnr_db + 4 < chosen.psnr_db
    reference, random = others[0], others[-1]
    assert (reference.error, reference.ssim, reference.psnr_db) == (0, 1, None)
    draws = [loop(seed=1).true_error(schedule) for schedule in random.schedules]
    assert len(draws) == 3
    assert random.error == pytest.approx(np.mean(draws), rel=1e-3)
    assert random.error_spread == pytest.approx(np.std(draws, ddof=1), rel=1e-2)


def test_sweep_and_bisection_choose_alike_for_fewer_calls():
    bisection, sweep = (run(method=method).sensitivity for method in ("bisection", "sweep"))
    assert bisection.schedule == sweep.schedule
    assert sweep.search_calls == sweep.sweep_calls == bisection.sweep_calls == 2 * 2 * 2 * 55
    assert bisection.search_calls < sweep.sweep_calls
    assert all(all(record.measured) for record in sweep.scores)


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
    assert found.measured_error <= 1.1 * best


def test_error_budget_and_default_budget():
    found = run(budget=ErrorBudget(1e-3)).sensitivity
    assert 0 < found.predicted_error <= 1e-3
    cheaper = [point for point in found.pareto if point.latency < found.predicted_latency]
    assert cheaper
    assert all(point.error > 1e-3 for point in cheaper)
    default = run(budget=None).sensitivity
    assert default.predicted_error <= 0.25 * default.pareto[0].error
    assert default.pareto[0].precisions == ("int4",) * STEPS
    assert default.budget == "default budget: at most 0.25 of the error of uniform int4"
    assert 0.375 < default.predicted_latency < 1


@pytest.mark.parametrize("metric", ["ssim", "psnr"])
def test_quality_budget_is_met_by_measurement_on_unseen_samples(metric):
    def quality(result):
        row = result.validation[0]
        return row.ssim if metric == "ssim" else row.psnr_db

    options = {"validation": loop(seed=1), "decode": pictures}
    known = run(budget=LatencyBudget(0.75), **options).sensitivity
    result = run(budget=QualityBudget(metric, quality(known)), **options).sensitivity
    assert quality(result) >= quality(known)
    assert result.predicted_latency <= known.predicted_latency
    assert result.predicted_latency > result.pareto[0].latency  # the fastest schedule falls short
    assert result.budget.startswith(f"{metric} at least ")
    assert "validation: quality" in result.calls


def test_quality_budget_takes_a_fixed_rule_where_scores_mislead():
    options = {"validation": loop(seed=1, scale=np.geomspace(8, 0.1, STEPS)), "decode": pictures}
    others_err_early = run(budget=HighSteps(4), **options).sensitivity
    rule = next(row for row in others_err_early.validation if row.name == "first 4")
    found = run(budget=QualityBudget("ssim", rule.ssim), **options).sensitivity
    assert "by the rule 'first K'" in found.budget
    high = [name == "fp16" for name in found.schedule]
    assert high == sorted(high, reverse=True), "first steps at the reference"
    assert found.validation[0].ssim >= rule.ssim
    assert found.predicted_latency <= rule.latency
    plain = LatencyModel(tuple(LATENCIES_MS), LATENCIES_MS).latency(found.schedule)
    assert found.predicted_latency == pytest.approx(plain)
    assert found.refinement is None


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
    with pytest.raises(ValueError, match=r"a budget of ssim at least 0\.9 needs validation samples and a decoder"):
        run(budget=QualityBudget("ssim", 0.9))


def test_a_latency_or_step_budget_out_of_reach_is_refused_before_measuring():
    for budget, words in (
        (LatencyBudget(0.3), r"the fastest takes 0\.375"),
        (HighSteps(10_000), "ask for at most that"),
    ):
        with pytest.raises(BudgetError, match=words):
            run(Counted(loop(), limit=0), budget=budget)


def test_an_error_budget_that_cannot_be_met_keeps_the_measurements(tmp_path):
    path = tmp_path / "journal"
    run(budget=ErrorBudget(1.0), journal=open_journal(path, loop(), loop(seed=1)), refine_calls=0)
    evaluator = Counted(loop(), limit=0)
    journal = open_journal(path, loop(), loop(seed=1))
    result = run(evaluator, budget=LatencyBudget(0.4), journal=journal, refine_calls=0)
    assert result.sensitivity.scores == run(budget=LatencyBudget(0.4)).sensitivity.scores


def test_loop_where_no_low_precision_is_any_use():
    latencies = {"fp16": 1.0, "fp8": 2.0, "int8": 3.0, "int4": 1.0}
    found = calibrate_loops(loop(), latencies, validation=loop(seed=1)).sensitivity
    assert found.schedule == ("fp16",) * STEPS
    assert found.scores == ()
    assert [loser.precision for loser in found.dropped] == ["fp8", "int8", "int4"]
    assert found.predicted_error == found.measured_error == 0


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_loops(num_steps):
    short = PlantedEvaluator({"int8": [0.1] * num_steps}, gains=[1.0] * num_steps)
    found = calibrate_loops(short, {"fp16": 2.0, "int8": 1.0}, validation=short, budget=HighSteps(1)).sensitivity
    assert found.schedule.count("fp16") == 1
    assert len(found.validation) == 8


def test_equal_arguments_give_equal_results_and_progress_ends():
    seen: dict[str, list[tuple[int, int]]] = {}
    first = run(progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    assert first == run()
    assert {"calibration runs", "downcast int4", "upcast int8", "fit", "validation"} <= set(seen)
    for stage, calls in seen.items():
        assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
        # searches may stop short of what they are allowed
        assert calls[-1][0] == calls[-1][1] or "cast" in stage or stage == "refinement"


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
    found = calibrate_loops(long, latencies, budget=LatencyBudget(0.6)).sensitivity
    assert len(found.pareto) == 200 < found.pareto_size
    assert found.pareto[0].precisions == ("int4",) * 50
    assert found.pareto[-1].precisions == ("fp16",) * 50
    assert 0.599 < found.predicted_latency <= 0.6


def test_schedule_and_document_survive_the_disk(tmp_path):
    result = run(decode=pictures)
    path = tmp_path / "sensitivity.json"
    result.sensitivity.save(path)
    assert Sensitivity.load(path) == result.sensitivity
    schedule = result.schedule("bundle")
    schedule.check(bundle_id="bundle", num_steps=STEPS, precisions=loop().precisions)
    assert schedule.precisions == result.sensitivity.schedule
    assert schedule.origin == "bisection, 4 steps at fp16"
    path.write_text(path.read_text().replace('"method": "bisection"', '"method": "sweep"'))
    with pytest.raises(TmpDiffError, match="altered"):
        Sensitivity.load(path)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="latencies_ms lacks int8, int4"):
        calibrate_loops(loop(), {"fp16": 1.0, "fp8": 1.0})
    with pytest.raises(ValueError, match="method is 'guess'"):
        run(method="guess")
    with pytest.raises(ValueError, match="another number of steps or other precisions"):
        run(validation=PlantedEvaluator({"int8": [1.0]}, gains=[1.0]))
    with pytest.raises(ValueError, match="no samples"):
        run(loop(num_samples=0))
    with pytest.raises(ValueError, match="other evaluators"):
        run(journal=Journal.in_memory("another"))
