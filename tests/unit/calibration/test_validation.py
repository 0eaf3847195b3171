"""What the validation samples say of a schedule, and what it is compared with; planted loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from helpers.planted import Counted, PlantedEvaluator
from helpers.planted_calibration import LATENCIES_MS, STEPS, loop, pictures, run
from helpers.planted_loops import FragileLoop, run_errors

from calibration.choose.baselines import fixed_rules
from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import mean, typical_error
from calibration.measure.sample_batches import SampleBatches
from calibration.statistics import ratio_interval
from calibration.validation import MIXED, RANDOM_DRAWS, validation_rows

NAMES = tuple(LATENCIES_MS)
MODEL = LatencyModel(NAMES, LATENCIES_MS)
CHOSEN = ("fp16",) * 1 + ("int4",) * 6 + ("fp16",) * 3
BEST_RULE = ("last 4 (int4)", ("int4",) * 6 + ("fp16",) * 4)


def validated(evaluator, chosen=CHOSEN, *, model=MODEL, best_rule=BEST_RULE, decode=None, on_run=None):
    samples = SampleSet(evaluator, decode)
    pool = SampleBatches({"validation": samples})
    measured = Measurements("validation", samples, Journal.in_memory("key"), pool)
    found = validation_rows(measured, chosen, model, best_rule, on_run)
    return {row.name: row for row in found}


@dataclass(frozen=True)
class Differing(PlantedEvaluator):
    """Even samples err more in the first half of the steps, odd ones in the second, `odds` times as much."""

    odds: float = 3.0

    def step(self, sample, state, precision):
        index = state[0]
        plain = super().step(sample, state, "fp16")[1]
        early = index < self.num_steps // 2
        factor = self.odds if early == (sample % 2 == 0) else 1.0
        return index + 1, plain + factor * (super().step(sample, state, precision)[1] - plain)


# rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_those_that_a_schedule_has_to_be_compared_with():
    found = validated(loop(num_samples=3))
    assert list(found) == [
        "schedule",
        "best rule: last 4 (int4)",
        "uniform fp16",
        "uniform fp8",
        "uniform int8",
        "uniform int4",
        MIXED,
        "first 4 (int4)",
        "last 4 (int4)",
        "both ends 4 (int4)",
        "evenly spread 4 (int4)",
        "random 4",
    ]
    rules = {name: (schedule,) for name, schedule in fixed_rules(CHOSEN, NAMES).items()}
    assert {name: found[name].schedules for name in rules} == rules
    assert found["best rule: last 4 (int4)"].schedules == (BEST_RULE[1],)
    for name in (*rules, "schedule", "best rule: last 4 (int4)"):
        row = found[name]
        errors = run_errors(loop(num_samples=3), row.schedules[0])
        assert row.sample_errors == pytest.approx(errors)
        assert row.error == pytest.approx(errors.mean())
        assert row.typical.value == pytest.approx(typical_error(errors))
        assert row.typical.low < row.typical.value < row.typical.high
        assert (row.departures.count, row.departures.samples) == (0, 3)
        assert row.latency == MODEL.latency(row.schedules[0]) == found["schedule"].latency
        assert row.counts == {"fp16": 4, "int4": 6}
        assert (row.ssim, row.psnr_db) == (None, None)
    reference = found["uniform fp16"]
    assert (reference.error, reference.typical.value, reference.against) == (0, 0, None)
    assert found["schedule"].against is None


def test_a_uniform_schedule_has_no_rules_of_its_own():
    found = validated(loop(), ("int8",) * STEPS, best_rule=None)
    assert list(found) == ["schedule", *(f"uniform {name}" for name in NAMES), MIXED]
    assert found["uniform int8"].against.value == 1
    mixed = found[MIXED]
    assert mixed.latency == 0.5
    assert mixed.typical.value <= found["uniform int8"].typical.value


def test_a_schedule_of_several_precisions_is_compared_with_its_own_counts():
    chosen = ("fp16", "int8", "int8", "int4", "int4", "int4", "int8", "fp16", "fp16", "fp16")
    found = validated(loop(), chosen)
    assert {name for name in found if "(3 int8, 3 int4)" in name} == {
        f"{rule} 4 (3 int8, 3 int4)" for rule in ("first", "last", "both ends", "evenly spread")
    }
    assert all(sorted(one) == sorted(chosen) for one in found["random 4"].schedules)


def test_random_is_a_mean_over_draws_of_all_runs():
    row = validated(loop(num_samples=3))["random 4"]
    assert len(set(row.schedules)) == RANDOM_DRAWS
    draws = np.array([run_errors(loop(num_samples=3), schedule) for schedule in row.schedules])
    assert row.sample_errors == pytest.approx(draws.mean(axis=0))
    assert row.typical.value == pytest.approx(np.mean([typical_error(errors) for errors in draws]))
    assert row.departures.samples == 3 * RANDOM_DRAWS
    assert row.schedules == validated(loop(num_samples=2))["random 4"].schedules


def test_pictures_are_compared_where_there_is_a_decoder():
    found = validated(loop(), decode=pictures)
    reference, schedule, uniform = (found[name] for name in ("uniform fp16", "schedule", "uniform int4"))
    assert (reference.ssim, reference.psnr_db) == (1, None)
    assert uniform.ssim < schedule.ssim < 1
    assert uniform.psnr_db + 4 < schedule.psnr_db


def test_a_schedule_of_several_names_runs_once_and_progress_ends():
    counted, seen = Counted(loop()), []
    found = validated(counted, on_run=lambda done, total: seen.append((done, total)))
    distinct = {schedule for row in found.values() for schedule in row.schedules}
    most = sum(2 * STEPS for _ in distinct)
    shared = sum(2 * next(k for k in range(STEPS + 1) if len(set(one[: k + 1])) > 1 or k == STEPS) for one in distinct)
    assert counted.calls.total() == most - shared + 2 * STEPS * len(NAMES), "prefixes are those of uniform runs"
    total = seen[-1][1]
    assert seen == [(done, total) for done in range(1, total + 1)]
    # names, and the draws of random
    assert total == 2 * (len(found) - 1 + RANDOM_DRAWS - 1)


# uniform precisions, mixed ----------------------------------------------------------------------------------------


def test_uniform_precisions_are_mixed_to_the_same_latency_as_on_paper():
    """At 0.625: 3 of 4 pictures at int8 (0.5), the others at fp16 (1), or 6 of 10 at int4 (0.375)."""
    evaluator = loop(num_samples=5)
    found = validated(evaluator, decode=pictures)
    mixed, eight, reference = (found[name] for name in (MIXED, "uniform int8", "uniform fp16"))
    assert found["schedule"].latency == 0.625 == mixed.latency
    expected = 0.75 * typical_error(run_errors(evaluator, ("int8",) * STEPS))
    assert expected < 0.6 * found["uniform int4"].typical.value
    assert mixed.typical.value == pytest.approx(expected)
    assert mixed.typical.low == pytest.approx(0.75 * eight.typical.low)
    assert mixed.schedules == (("int8",) * STEPS, ("fp16",) * STEPS)
    assert mixed.sample_errors == pytest.approx(0.75 * np.array(eight.sample_errors))
    assert mixed.error == pytest.approx(mean(mixed.sample_errors))
    assert mixed.ssim == pytest.approx(0.75 * eight.ssim + 0.25 * reference.ssim)
    assert mixed.psnr_db == pytest.approx(eight.psnr_db - 10 * np.log10(0.75))
    assert mixed.departures is None, "which picture departs depends on the shares"
    assert mixed.against.value == pytest.approx(found["schedule"].typical.value / expected)


def test_the_least_error_of_all_mixtures_counts():
    """Where int8 errs as much as int4, pictures at int4 and fp16 are the better mixture."""
    sizes = [0.1] * STEPS
    evaluator = PlantedEvaluator({"fp8": sizes, "int8": sizes, "int4": sizes}, gains=[1.0] * STEPS)
    mixed = validated(evaluator)[MIXED]
    assert mixed.schedules == (("int4",) * STEPS, ("fp16",) * STEPS)
    assert mixed.typical.value == pytest.approx(0.6 * typical_error(run_errors(evaluator, ("int4",) * STEPS)))


def test_nothing_is_mixed_to_a_latency_that_none_has():
    dear = replace(MODEL, costs=AllocationCosts(swap_ms=25.0))
    found = validated(loop(), model=dear)
    assert found["schedule"].latency > 1.125
    assert MIXED not in found


# judgement --------------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_samples():
    evaluator = Differing(loop().errors, gains=loop().gains, num_samples=24, odds=1.3)
    found = validated(evaluator)
    own = run_errors(evaluator, CHOSEN)
    for name, row in found.items():
        if row.against is None:
            continue
        others = np.array([run_errors(evaluator, schedule) for schedule in row.schedules])
        weights = np.array([0.75, 0.25]) if name == MIXED else None
        expected = ratio_interval(own, others, weights)
        assert (row.against.low, row.against.value, row.against.high) == pytest.approx(
            (expected.low, expected.value, expected.high)
        ), name


def calibrated(evaluator, **options):
    """Calibrated where late steps err most: the last four are held."""
    found = run(loop(scale=np.exp(np.linspace(0, 2, STEPS)), correlation=0.0), validation=evaluator, **options)
    assert found.sensitivity.schedule == ("int4",) * 6 + ("fp16",) * 4
    return found.sensitivity


def test_schedule_that_loses_on_validation_says_so():
    found = calibrated(loop(seed=1, scale=np.exp(np.linspace(2, 0, STEPS)), num_samples=4))
    losers = {row.name: row for row in found.losses}
    assert "first 4 (int4)" in losers
    assert "last 4 (int4)" not in losers, "it is the schedule itself"
    assert found.best_rule.name == "best rule: last 4 (int4)"
    assert found.best_rule.against.value == 1
    assert "uniform fp16" not in losers, "more accurate but slower"
    assert all(row.error < found.chosen.error and row.standing == "worse" for row in losers.values())


def test_it_loses_only_beyond_the_interval():
    """On nearly half of the samples "first 4" is better by far, on the others worse: 25 samples tell no difference."""
    sizes = np.full(STEPS, 0.1)
    evaluator = Differing(
        {"fp8": sizes, "int8": 2 * sizes, "int4": 3 * sizes}, gains=[1.0] * STEPS, num_samples=25, odds=1.6
    )
    found = calibrated(evaluator)
    first = next(row for row in found.validation if row.name == "first 4 (int4)")
    assert first.latency == found.chosen.latency
    assert first.against.value > 1
    assert first.against.low < 1 < first.against.high
    assert first.standing == "not distinguishable"
    assert first not in found.losses


def test_one_sample_tells_no_difference():
    found = calibrated(loop(seed=1, scale=np.exp(np.linspace(2, 0, STEPS)), num_samples=1))
    first = next(row for row in found.validation if row.name == "first 4 (int4)")
    assert first.against.low == first.against.value == first.against.high > 1
    assert first.typical.low == first.typical.value == first.typical.high == pytest.approx(first.error)
    assert first.standing == "not distinguishable"
    assert found.losses == ()


def test_departures_are_counted_and_do_not_set_typical_errors():
    fragile = (1, 4, 6)
    sizes = [0.02, 0.02, *[0.1] * (STEPS - 2)]
    evaluator = FragileLoop(
        {"fp8": sizes, "int8": sizes, "int4": sizes}, gains=[1.0] * STEPS, num_samples=40, fragile=fragile
    )
    found = validated(evaluator)
    assert found["schedule"].departures.count == 3, "its second step is low"
    assert found["last 4 (int4)"].departures.count == 3
    assert found["first 4 (int4)"].departures.count == 0
    row = found["last 4 (int4)"]
    assert row.departures.low < 3 / 40 < row.departures.high
    assert row.error > 5 * row.typical.value
    errors = np.array(row.sample_errors)
    calm = np.delete(errors, fragile)
    assert calm.mean() < row.typical.value < 1.8 * calm.mean()


def test_without_validation_nothing_is_claimed_about_it():
    found = run(validation=None).sensitivity
    assert found.validation == ()
    assert found.losses == ()
    assert (found.chosen, found.best_rule, found.validation_key) == (None, None, None)
    assert not [stage for stage in found.calls if stage.startswith("validation")]
