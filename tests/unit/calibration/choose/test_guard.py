"""The guard: planted loops, where the best candidate and the samples that depart are known."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from helpers.planted import Counted, PlantedEvaluator, PoolHere, calibrate_loops, measurements
from helpers.planted_loops import Blocks, FragileLoop, predicted, run_errors

from calibration import ErrorBudget, HighSteps, LatencyBudget
from calibration.choose.baselines import fixed_rules
from calibration.choose.candidates import Candidate
from calibration.choose.guard import departs_more, expected_errors, fragile_samples, guard
from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import typical_errors

STEPS = 8
LATENCIES_MS = {"fp16": 8.0, "int8": 4.0, "int4": 3.0}


def loop(num_samples=40, *, seed=0, correlation=0.5):
    scale = np.array([0.3, 0.1, 0.12, 0.2, 0.15, 0.25, 0.4, 0.35])
    errors = {"int8": 0.4 * scale, "int4": scale}
    return PlantedEvaluator(errors, gains=[0.97] * STEPS, correlation=correlation, num_samples=num_samples, seed=seed)


def fragile_loop(fragile, *, num_samples=40, **options):
    """Low early steps cost the others next to nothing, the last two ten times what the rest do."""
    sizes = [0.02, 0.02, 0.1, 0.1, 0.1, 0.1, 0.4, 0.4]
    return FragileLoop({"int4": sizes}, gains=[1.0] * STEPS, num_samples=num_samples, fragile=fragile, **options)


def letters(pattern):
    return tuple({"H": "fp16", "L": "int4", "M": "int8"}[letter] for letter in pattern)


def other_candidates(*patterns):
    return [Candidate(letters(pattern), (pattern,), None) for pattern in patterns]


def rule_candidates(count):
    pool = letters("H" * count + "L" * (STEPS - count))
    return [Candidate(schedule, (name,), name) for name, schedule in fixed_rules(pool, tuple(LATENCIES_MS)).items()]


def with_high_steps(count, picked):
    """Some of all schedules of that many steps at the reference."""
    found = [
        "".join("H" if step in high else "L" for step in range(STEPS)) for high in combinations(range(STEPS), count)
    ]
    return [found[k] for k in np.random.default_rng(0).permutation(len(found))[:picked]]


def guarded(evaluator, found, fragile=(), *, on_run=None, measured=None):
    measured = measured or measurements(evaluator)
    predictions, _ = predicted(measured, evaluator.precisions, LATENCIES_MS)
    return guard(measured, found, predictions, fragile, on_run)


# the winner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 2, 9, 40])
def test_the_winner_is_the_candidate_of_least_true_typical_error(num_samples):
    evaluator = loop(num_samples)
    found = [*other_candidates(*with_high_steps(3, 14)), *rule_candidates(3)]
    found = list({candidate.precisions: candidate for candidate in found}.values())
    record = guarded(evaluator, found)
    truth = {one.precisions: run_errors(evaluator, one.precisions) for one in found}
    typical = {schedule: float(typical_errors(errors)) for schedule, errors in truth.items()}
    winner = record.candidates[0]
    assert winner.precisions == min(typical, key=typical.get)
    assert winner.leading == len(winner.samples) == num_samples
    for trial in record.candidates:
        np.testing.assert_allclose(trial.errors, truth[trial.precisions][list(trial.samples)], rtol=1e-12)
        leading = np.array(trial.errors[: trial.leading])
        assert trial.typical.value == pytest.approx(float(typical_errors(leading)))
        assert trial.typical.low <= trial.typical.value <= trial.typical.high
        assert trial.departures.count == 0
    rules = {one.rule: typical[one.precisions] for one in found if one.rule}
    assert record.best_rule == min(rules, key=rules.get)


def test_a_candidate_that_departs_significantly_more_gives_way():
    early_low, early_high = "LLLLLLHH", "HHLLLLLL"
    for fragile, expected in (((3, 8, 17, 30, 31), early_high), ((3, 8, 17), early_low), ((), early_low)):
        evaluator = fragile_loop(fragile)
        errors = {pattern: run_errors(evaluator, letters(pattern)) for pattern in (early_low, early_high)}
        assert (np.flatnonzero(errors[early_low] > 0.05) == fragile).all()
        assert (errors[early_high] < 0.05).all()
        assert typical_errors(errors[early_low]) < 0.5 * typical_errors(errors[early_high])
        record = guarded(evaluator, other_candidates(early_low, early_high))
        assert record.candidates[0].names == (expected,), fragile
        trial = next(trial for trial in record.candidates if trial.names == (early_low,))
        assert (trial.departures.count, trial.departures.samples) == (len(fragile), 40)
        assert trial.departures.low <= len(fragile) / 40 <= trial.departures.high


def test_the_best_rule_is_chosen_as_the_winner_is():
    evaluator = fragile_loop((3, 8, 17, 30, 31))
    first, last = rule_candidates(2)[:2]
    assert run_errors(evaluator, first.precisions).mean() < 0.05 < run_errors(evaluator, last.precisions).max()
    found = [first, last, *other_candidates("HHLLLLLH")]
    assert guarded(evaluator, found).best_rule == "first 2 (int4)"
    assert guarded(fragile_loop(()), found).best_rule == "last 2 (int4)"
    assert guarded(evaluator, found[2:]).best_rule is None


def test_departures_are_looked_for_on_fragile_samples_from_the_first_round():
    fragile = (3, 8, 17, 30, 31, 40, 77)
    evaluator = fragile_loop(fragile, num_samples=80)
    patterns = (
        "HHLLLLLL",
        "HHLLLLLH",
        *(pattern for pattern in with_high_steps(2, 28) if not pattern.startswith("HH")),
    )
    record = guarded(evaluator, other_candidates(*patterns), fragile)
    assert record.candidates[0].names == ("HHLLLLLH",)
    assert record.fragile == fragile
    assert record.rounds[0] == (20, len(patterns))
    for trial in record.candidates:
        assert set(fragile) <= set(trial.samples)
        assert trial.departures.count == (0 if trial.names[0].startswith("HH") else len(fragile)), trial.names
        assert len(set(trial.samples)) == len(trial.samples)
    survivors = [trial.names[0] for trial in record.candidates if trial.leading == 80]
    assert set(survivors) >= {"HHLLLLLL", "HHLLLLLH"}, "although their typical errors are the worst"


def test_a_sample_that_departs_whatever_is_low_counts_against_nobody():
    fragile = (0, 5, 9, 22, 39)
    evaluator = fragile_loop(fragile, early=STEPS)
    record = guarded(evaluator, other_candidates("LLLLLLHH", "HHLLLLLL"))
    assert record.candidates[0].names == ("LLLLLLHH",)
    assert [trial.departures.count for trial in record.candidates] == [5, 5]


def test_significance_is_that_of_a_sign_test():
    def more(mine, other):
        return departs_more(set(mine), set(other))

    assert not more(range(4), ())
    assert more(range(5), ())
    assert more(range(10, 24), range(20, 30)) is more(range(4), range(10, 16)) is False
    assert more(range(15), range(10)), "what both lose tells nothing"
    assert not more((0, 1, 2, 3, 4, 5), (9,))
    assert more((0, 1, 2, 3, 4, 5, 6), (9,))
    assert not more((), range(9))
    assert not more((), ())


# rounds -----------------------------------------------------------------------------------------------------------


def test_rounds_halve_the_candidates_and_keep_the_best_rule():
    evaluator = loop(80)
    rules = [candidate for candidate in rule_candidates(3) if candidate.names[0].startswith(("first", "evenly"))]
    schedules = {letters(pattern): pattern for pattern in with_high_steps(3, 56)}
    truth = loop(1).true_error
    limit = 0.97 * min(truth(rule.precisions) for rule in rules)
    others = other_candidates(*(schedules[one] for one in schedules if truth(one) < limit))[:12]
    assert len(others) == 12
    record = guarded(evaluator, [*others, *rules])
    assert [size for size, _ in record.rounds] == [20, 40, 80]
    assert [count for _, count in record.rounds] == [14, 8, 5], "the better half, and the best rule"
    assert [trial.leading for trial in record.candidates] == [80] * 5 + [40] * 3 + [20] * 6
    last = [trial for trial in record.candidates if trial.leading == 80]
    assert [trial.rule for trial in last if trial.rule] == [record.best_rule]
    for leading in (80, 40, 20):
        values = [trial.typical.value for trial in record.candidates if trial.leading == leading]
        assert values == sorted(values)
    orders = {trial.samples[:20] for trial in record.candidates}
    assert len(orders) == 1, "the same samples, so that they can be compared in pairs"
    assert orders != {tuple(range(20))}, "drawn at random"


@pytest.mark.parametrize(
    ("num_samples", "sizes"),
    [(1, [1]), (7, [7]), (8, [8]), (9, [8, 9]), (33, [9, 18, 33]), (240, [60, 120, 240])],
)
def test_rounds_double_their_samples(num_samples, sizes):
    evaluator = PlantedEvaluator({"int4": [0.1, 0.2]}, gains=[1.0, 1.0], num_samples=num_samples, shape=(1, 2, 2))
    both = [Candidate(("fp16", "int4"), ("b",), None), Candidate(("int4", "fp16"), ("a",), None)]
    record = guarded(evaluator, both)
    assert [size for size, _ in record.rounds] == sizes
    assert record.candidates[0].names == ("a",)


def test_calls_and_runs_are_counted_exactly():
    counted = Counted(loop(33))
    found = [*other_candidates(*with_high_steps(4, 10), "LLLLLLLL", "MMMMLLHH"), *rule_candidates(3)]
    measured = measurements(counted)
    predictions, _ = predicted(measured, counted.precisions, LATENCIES_MS)
    for precision in counted.precisions:  # uniform runs, whose prefixes are shared, are those of every calibration
        for sample in range(33):
            measured.uniform_error(precision, sample)
    before = dict(counted.calls)
    seen = []
    record = guard(measured, found, predictions, (4, 12), lambda done, total: seen.append((done, total)))
    spent = {
        name: counted.calls[name] - before[name] for name in counted.precisions if counted.calls[name] > before[name]
    }
    assert record.calls == spent == measured.calls["calibration: guard"]
    assert sum(trial.calls for trial in record.candidates) == sum(spent.values())
    uniform = next(trial for trial in record.candidates if trial.names == ("LLLLLLLL",))
    assert uniform.calls == 0
    assert len(seen) == sum(len(trial.samples) for trial in record.candidates)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    totals = {total for _, total in seen}
    assert len(totals) == 1
    assert len(seen) <= totals.pop() < 1.2 * len(seen)


def test_what_a_round_measures_is_asked_for_at_once_and_a_pool_changes_nothing():
    evaluator = loop(20)
    found = [*other_candidates(*with_high_steps(3, 8)), *rule_candidates(2)]
    pool = PoolHere(calibration=evaluator)
    pooled = Measurements("calibration", SampleSet(evaluator), Journal.in_memory("key"), pool)
    records = [guarded(evaluator, found), guarded(evaluator, found), guarded(evaluator, found, measured=pooled)]
    assert records[0] == records[1] == records[2]
    record = records[0]
    assert len(record.rounds) == 3
    runs = [
        count * (size - before)
        for (size, count), before in zip(record.rounds, (0, *(s for s, _ in record.rounds)), strict=False)
    ]
    waits = [wait for wait in pool.together if wait]
    # what starts low needs its uniform run on these samples as well
    assert all(runs[k] <= waits[k - 3] <= runs[k] + 20 for k in range(3)), (runs, waits)


# few samples ------------------------------------------------------------------------------------------------------


def noisy(seed, samples, noise, candidates=12):
    """True errors of candidates, and measured ones: samples differ in level, and by noise of their own."""
    generator = np.random.default_rng(seed)
    truth = 1e-4 * np.exp(0.3 * generator.normal(size=candidates))
    levels = generator.lognormal(0, 1, size=samples)
    return truth, truth[:, None] * levels * np.exp(noise * generator.normal(size=(candidates, samples)))


def test_predictions_help_to_choose_where_few_samples_are_noisy():
    lost = {"measured": 0.0, "expected": 0.0}
    for seed in range(60):
        truth, measured = noisy(seed, samples=4, noise=0.5)
        predicted_ones = 1.7 * truth * np.exp(0.1 * np.random.default_rng(seed + 1000).normal(size=12))
        picked = {"measured": typical_errors(measured), "expected": expected_errors(measured, predicted_ones)}
        for name, errors in picked.items():
            lost[name] += float(truth[errors.argmin()] / truth.min() - 1)
    assert lost["expected"] < 0.4 * lost["measured"]


def test_predictions_that_mislead_are_outvoted_by_many_samples():
    for seed in range(20):
        truth, measured = noisy(seed, samples=120, noise=0.2)
        misleading = np.random.default_rng(seed + 1000).permutation(truth) ** 2
        found = expected_errors(measured, misleading)
        np.testing.assert_allclose(found, typical_errors(measured), rtol=0.02)


def test_what_is_expected_does_not_hang_on_the_level_of_predictions():
    truth, measured = noisy(0, samples=5, noise=0.3)
    found = expected_errors(measured, truth)
    np.testing.assert_allclose(expected_errors(measured, 7 * truth), found)
    typical = typical_errors(measured)
    assert (np.minimum(found / typical, 1) > 0.3).all()
    assert np.log(found / typical).mean() == pytest.approx(0, abs=1e-9)


def test_where_there_is_nothing_to_weigh_one_side_counts_alone():
    truth, measured = noisy(0, samples=1, noise=0.3)
    found = expected_errors(measured, truth)
    np.testing.assert_allclose(found / found.sum(), truth / truth.sum(), err_msg="one sample: as predicted")
    np.testing.assert_array_equal(expected_errors(measured[:1], truth[:1]), typical_errors(measured[:1]))
    measured[3] = 0.0
    np.testing.assert_array_equal(expected_errors(measured, truth), typical_errors(measured), "one errs not at all")


def test_errors_decades_apart_are_weighed_without_overflow():
    measured = np.array([[1e-90] * 8, [1e90] * 8])
    with np.errstate(all="raise"):
        np.testing.assert_allclose(expected_errors(measured, np.array([1e-300, 1e90])), [1e-90, 1e90], rtol=1e-6)


# fragile samples --------------------------------------------------------------------------------------------------


def found_fragile(evaluator):
    measured = measurements(evaluator)
    _, curves = predicted(measured, evaluator.precisions, LATENCIES_MS)
    summed = sum(curve.vectors.errors.sum(axis=0) for curve in curves)
    return fragile_samples(measured, evaluator.precisions[1:], summed)


def test_fragile_samples_are_those_with_the_largest_downcasts():
    planted = (2, 11, 12, 30)
    assert found_fragile(fragile_loop(planted, pushes=STEPS + 1)) == planted, "none departs in any run"


def test_fragile_samples_are_those_that_depart_in_uniform_runs():
    planted = (2, 11, 12, 19, 30, 33)
    hidden = found_fragile(fragile_loop(planted, pushes=2, shown=0.0))
    assert set(planted) <= set(hidden)
    assert len(hidden) <= 4 + len(planted)
    assert list(hidden) == sorted(set(hidden))
    shown = found_fragile(fragile_loop(planted, pushes=2))
    assert shown == planted, "four of them by downcasts, all by uniform runs"


# in a calibration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [HighSteps(3), LatencyBudget(0.62)])
def test_it_finds_the_best_where_the_downcast_sum_misleads(budget):
    sizes = np.where(np.arange(STEPS) < STEPS // 2, 0.2, 0.25)
    evaluator = Blocks({"int4": sizes}, gains=[1.0] * STEPS, num_samples=4)
    validation = replace(evaluator, seed=1)
    found = calibrate_loops(
        evaluator, {"fp16": 8.0, "int4": 3.0}, budget=budget, method="sweep", validation=validation
    ).sensitivity
    high = 3 if isinstance(budget, HighSteps) else found.schedule.count("fp16")
    best = min(validation.true_error(letters(pattern)) for pattern in with_high_steps(high, 70))
    assert validation.true_error(found.schedule) == pytest.approx(best)
    trials = {name: trial for trial in found.guard.candidates for name in trial.names}
    assert trials["gram"].precisions == found.schedule
    assert trials["downcast sum"].precisions[: STEPS // 2].count("fp16") == 0, "it sees the larger single errors only"
    assert trials["downcast sum"].typical.value > 1.5 * trials["gram"].typical.value
    assert not found.losses


@pytest.mark.parametrize("budget", [HighSteps(2), LatencyBudget(0.55), ErrorBudget(7e-5)])
def test_a_calibration_holds_the_first_steps_where_samples_depart(budget):
    def calibrated(fragile):
        evaluator = fragile_loop(fragile, pushes=2, num_samples=24)
        validation = replace(evaluator, seed=1)
        latencies_ms = {"fp16": 8.0, "int4": 3.0}
        options = {"budget": budget, "method": "sweep", "validation": validation}
        return calibrate_loops(evaluator, latencies_ms, **options).sensitivity

    calm, parting = calibrated(()), calibrated((2, 5, 11, 19, 23))
    assert calm.schedule[:2] == ("int4", "int4"), "what all samples lose by them is the least"
    assert parting.schedule[0] == "fp16"
    assert parting.predicted_latency <= calm.predicted_latency
    winner = parting.guard.candidates[0]
    assert "gram, first 1 held" in winner.names
    assert winner.departures.count == 0
    plain = next(trial for trial in parting.guard.candidates if "gram" in trial.names)
    assert plain.departures.count == 5
    assert plain.typical.value < winner.typical.value
    assert parting.chosen.departures.count == 0
    assert set(parting.guard.fragile) >= {2, 5, 11, 19, 23}
