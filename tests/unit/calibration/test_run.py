"""Calibration from end to end on a planted loop: choice, validation, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.planted import Counted, Interrupted, PlantedEvaluator, calibrate_loops
from helpers.planted_calibration import LATENCIES_MS, STEPS, U_SHAPE, loop, pictures, run

from calibration import (
    ErrorBudget,
    HighSteps,
    LatencyBudget,
    QualityBudget,
    Sensitivity,
    open_journal,
)
from calibration.choose import baselines
from calibration.choose.costs import AllocationCosts, Candidates
from calibration.document import FitRecord
from calibration.measure.journal import Journal, JournalError
from calibration.validation import best_fit, fit
from engines.errors import BudgetError, TmpDiffError


def rows(result):
    return {row.name: row for row in result.sensitivity.validation}


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
    assert rows(run())["uniform fp8"].latency > 1, "still shown beside the others"


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
    plain = Candidates(tuple(LATENCIES_MS), LATENCIES_MS).latency(found.schedule)
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


def test_correlated_errors_are_predicted_by_powers():
    found = run(loop(correlation=1.0), validation=loop(seed=1, correlation=1.0), method="sweep").sensitivity
    figures = {record.predictor: record for record in found.fit}
    assert found.predictor == "mixed-power"
    assert figures["upcast"].r2 > figures["downcast"].r2
    for predictor in ("upcast-power", "mixed-power"):
        assert figures[predictor].r2 > 0.98
        assert figures[predictor].ratio == pytest.approx(1, abs=0.2)
    assert figures["downcast"].ratio < 0.6, "the plain sum is too low"
    assert 0.5 < found.predicted_error / found.measured_error < 2
    assert len(found.fit_points) == 8
    assert found.fit_samples == "validation"


@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_partly_correlated_errors_are_predicted_by_both_scores_together(correlation):
    validation = loop(seed=1, correlation=correlation)
    found = run(loop(correlation=correlation), validation=validation, method="sweep").sensitivity
    figures = {record.predictor: record for record in found.fit}
    assert found.predictor == "mixed-power"
    assert figures["mixed-power"].r2 > 0.998
    assert figures["mixed-power"].ratio == pytest.approx(1, abs=0.05)
    assert all(figure.r2 < 0.995 for name, figure in figures.items() if name != "mixed-power")


def test_uncorrelated_errors_are_predicted_exactly():
    found = run(loop(correlation=0), validation=loop(correlation=0, seed=1, num_samples=4), method="sweep").sensitivity
    for record in found.fit:
        assert record.r2 == pytest.approx(1, abs=1e-6)
        assert record.spearman == pytest.approx(1)
        assert record.ratio == pytest.approx(1, rel=0.2), "other samples have other norms"


def test_best_fit_goes_by_r2_then_level():
    measured = [1.0, 2.0, 3.0, 5.0]
    noisy, low, level = [1.2, 1.9, 3.4, 4.4], [0.25, 0.5, 0.75, 1.25], [1.0, 2.0, 3.0, 5.0]
    predictions = {"noisy": noisy, "low": low, "level": level}
    records = [fit(name, values, measured) for name, values in predictions.items()]
    assert [record.ratio for record in records] == pytest.approx([10.9 / 11, 0.25, 1])
    assert best_fit(records) == "level"
    assert best_fit(records[:2]) == "low"
    falling = fit("falling", [5.0, 3.0, 2.0, 1.0], measured)
    assert falling.spearman == pytest.approx(-1)
    assert best_fit([falling, records[0]]) == "noisy"
    assert fit("constant", [1.0, 1.0, 1.0], measured[:3]).r2 is None
    unknown = [FitRecord(predictor=name, r2=None, spearman=None, ratio=None) for name in ("first", "second")]
    assert best_fit(unknown) == "first"
    assert best_fit([*unknown, records[0]]) == "noisy"


def test_schedule_that_loses_on_validation_says_so():
    reversed_loop = loop(seed=1, scale=np.exp(np.linspace(2, 0, STEPS)))
    result = run(loop(scale=np.exp(np.linspace(0, 2, STEPS))), validation=reversed_loop)
    assert result.sensitivity.schedule == ("int4",) * 6 + ("fp16",) * 4
    losers = result.sensitivity.loses_to
    assert "first 4" in losers
    assert "last 4" not in losers, "it is the schedule itself"
    assert "uniform fp16" not in losers, "more accurate but slower"
    assert rows(result)["schedule"].loses_to == losers
    assert all(rows(result)[name].error < rows(result)["schedule"].error for name in losers)


def test_without_validation_nothing_is_claimed_about_it():
    found = run(validation=None).sensitivity
    assert found.validation == ()
    assert found.measured_error is None
    assert found.validation_key is None
    assert found.fit_samples == "calibration"


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


# baselines


def test_baselines_arrange_what_the_schedule_has():
    pool = ["h"] * 3 + ["l"] * 5
    assert "".join(baselines.first(pool)) == "hhhlllll"
    assert "".join(baselines.last(pool)) == "lllllhhh"
    assert "".join(baselines.both_ends(pool)) == "hhlllllh"
    assert "".join(baselines.evenly_spread(pool)) == "hlllhllh"
    three = ["a"] * 2 + ["b"] * 3 + ["c"] * 4
    for arrange in (baselines.first, baselines.last, baselines.both_ends, baselines.evenly_spread):
        assert sorted(arrange(three)) == three
    assert sorted(baselines.shuffled(three, np.random.default_rng(0))) == three


@pytest.mark.parametrize("size", range(1, 15))
def test_evenly_spread_is_even(size):
    for count in range(size + 1):
        spread = baselines.evenly_spread(["h"] * count + ["l"] * (size - count))
        places = [k for k, name in enumerate(spread) if name == "h"]
        assert len(places) == count
        gaps = np.diff(places)
        assert count < 2 or gaps.max() - gaps.min() <= 1


# interruption


def document(result):
    return json.dumps(result.sensitivity.model_dump(mode="json"))


def calls_in_all():
    evaluator, validation = Counted(loop()), Counted(loop(seed=1))
    whole = run(evaluator, validation=validation, decode=pictures)
    return document(whole), evaluator.calls.total(), validation.calls.total()


def interrupted_run(path, calibration_limit, validation_limit=None):
    evaluator = Counted(loop(), calibration_limit)
    validation = Counted(loop(seed=1), validation_limit)
    journal = open_journal(path, evaluator, validation)
    return run(evaluator, validation=validation, decode=pictures, journal=journal)


def test_killed_after_any_number_of_calls_and_resumed_is_the_same(tmp_path):
    expected, calibration_calls, validation_calls = calls_in_all()
    limits: list[tuple[int | None, int | None]] = [(n, None) for n in range(0, calibration_calls, 41)]
    limits += [(None, n) for n in range(0, validation_calls, 41)]
    for k, (calibration_limit, validation_limit) in enumerate(limits):
        path = tmp_path / str(k)
        with pytest.raises(Interrupted):
            interrupted_run(path, calibration_limit, validation_limit)
        assert document(interrupted_run(path, None)) == expected


def test_killed_again_and_again_gets_done(tmp_path):
    expected, *_ = calls_in_all()
    path = tmp_path / "journal"
    attempts = 0
    while True:
        attempts += 1
        sizes = path.stat().st_size if path.exists() else 0
        try:
            result = interrupted_run(path, 70, 70)
            break
        except Interrupted:
            assert path.stat().st_size > sizes, "every attempt gets further"
    assert attempts > 3
    assert document(result) == expected


def test_finished_run_is_repeated_without_a_call(tmp_path):
    expected, *_ = calls_in_all()
    interrupted_run(tmp_path / "journal", None)
    assert document(interrupted_run(tmp_path / "journal", 0, 0)) == expected


def test_resumed_run_does_not_measure_again_what_it_has(tmp_path):
    path = tmp_path / "journal"
    _, whole, _ = calls_in_all()
    with pytest.raises(Interrupted):
        interrupted_run(path, whole - 1)
    evaluator = Counted(loop())
    run(evaluator, validation=loop(seed=1), decode=pictures, journal=open_journal(path, loop(), loop(seed=1)))
    assert evaluator.calls.total() <= 3 * STEPS, "one sample's trajectories and the measurement cut off"


def test_journal_torn_at_any_byte_of_its_last_line(tmp_path):
    expected, *_ = calls_in_all()
    interrupted_run(tmp_path / "whole", None)
    whole = (tmp_path / "whole").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in [*range(last, len(whole), 9), len(whole) - 1]:
        path = tmp_path / "torn"
        path.write_bytes(whole[:cut])
        assert document(interrupted_run(path, None)) == expected
        assert path.read_bytes() == whole, "the torn line is gone, the same measurement in its place"
    header = whole.index(b"\n")
    for cut in (0, 1, header // 2, header):
        path.write_bytes(whole[:cut])
        assert open_journal(path, loop(), loop(seed=1)).get("calibration/uniform/fp16/0") is None


def test_damaged_or_foreign_journal_is_refused(tmp_path):
    path = tmp_path / "journal"
    interrupted_run(path, None)
    whole = path.read_bytes()
    with pytest.raises(JournalError, match=r"belongs to another calibration: its key .* start afresh"):
        open_journal(path, loop(seed=5), loop(seed=1))
    assert path.read_bytes() == whole
    line = whole.split(b"\n")[4]
    path.write_bytes(whole.replace(line, line.replace(b"1", b"2", 1)))
    with pytest.raises(JournalError, match="damaged at line 5"):
        open_journal(path, loop(), loop(seed=1))
    path.write_text("a letter to a friend")
    with pytest.raises(JournalError, match="no calibration journal"):
        open_journal(path, loop(), loop(seed=1))
    fresh = open_journal(path, loop(seed=5), loop(seed=1), restart=True)
    assert path.read_bytes().count(b"\n") == 1
    assert fresh.get("calibration/uniform/fp16/0") is None


def test_named_measurements_are_remembered_bit_for_bit(tmp_path):
    path = tmp_path / "journal"
    value = {"fp16": 0.1 + 0.2, "int8": 1e-17 / 3}
    journal = open_journal(path, loop())
    assert journal.remember("latencies_ms", lambda: value) == value
    again = open_journal(path, loop())
    assert again.remember("latencies_ms", lambda: pytest.fail("measured twice")) == value
    with pytest.raises(ValueError, match="recorded already"):
        again.record("latencies_ms", {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        again.record("broken", float("nan"))
    assert open_journal(path, loop()).get("broken") is None


CHILD = """
import sys, time
from pathlib import Path
from helpers.planted_calibration import loop, pictures, run
from calibration import open_journal
from helpers.planted import Counted

class Slow(Counted):
    def step(self, *arguments):
        time.sleep(0.002)
        return super().step(*arguments)

evaluator, validation = Slow(loop()), Slow(loop(seed=1))
journal = open_journal(Path(sys.argv[1]), evaluator, validation)
run(evaluator, validation=validation, decode=pictures, journal=journal)
"""


@pytest.mark.parametrize("lines", [12, 90])
def test_killed_process_goes_on_where_it_was(tmp_path, lines):
    path = tmp_path / "journal"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
            assert child.poll() is None, "the child ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL
    before = path.read_bytes()
    expected, *_ = calls_in_all()
    assert document(interrupted_run(path, None)) == expected
    assert path.read_bytes().startswith(before[: before.rindex(b"\n") + 1])


def test_relative_latency_is_the_mean_step():
    candidates = Candidates(("fp16", "int8"), {"fp16": 3.0, "int8": 1.5})
    assert candidates.latency(("fp16", "int8", "int8")) == pytest.approx(2 / 3)
