"""The Gram matrix of error vectors: planted vectors, whose schedules are known on paper."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.planted import Counted, PlantedEvaluator, measurements
from helpers.planted_loops import RoundedLoop, run_errors

from calibration.choose.fit import fit
from calibration.measure.metrics import typical_error
from calibration.records import GramRecord
from calibration.scores.gram import DIGITS, Correlations, Gram, Vectors, correlate, gram, rounding_floor
from calibration.scores.measured_gram import gram_of, measured_gram
from calibration.scores.single_step import measure_downcasts

STEPS = 12
NAMES = ("fp16", "int8", "int4")


def loop(correlation=0.0, **options):
    generator = np.random.default_rng(7)
    errors = {
        "int8": 0.2 * np.exp(1.5 * np.linspace(-1, 1, STEPS) ** 2),
        "int4": generator.uniform(0.2, 1.0, size=STEPS),
    }
    return PlantedEvaluator(
        errors, gains=np.linspace(0.8, 1.1, STEPS), correlation=correlation, **{"num_samples": 3} | options
    )


def measured(evaluator, method="sweep"):
    """The measurements, the curves of every low precision, and their Gram matrix."""
    found = measurements(evaluator)
    curves = [measure_downcasts(found, name, method=method) for name in evaluator.precisions[1:]]
    return found, curves, measured_gram(found, curves)


def random_schedules(count, num_steps=STEPS, precisions=NAMES, seed=0):
    """Of every share of low steps."""
    generator = np.random.default_rng(seed)
    low = generator.random((count, num_steps)) < generator.uniform(0.1, 1, size=(count, 1))
    choices = np.where(low, generator.integers(1, len(precisions), size=(count, num_steps)), 0)
    return [tuple(precisions[k] for k in row) for row in choices]


def planted_vectors(kernel, count, num_samples=1):
    """Unit vectors whose correlations are kernel(i, j), of `num_samples` equal samples: float64 [count, S, count]."""
    wanted = np.array([[kernel(i, j) for j in range(count)] for i in range(count)])
    found = np.linalg.cholesky(wanted + 1e-12 * np.eye(count))
    return np.repeat(found[:, None], num_samples, axis=1)


# every step measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 1.0])
def test_every_schedule_of_a_linear_loop_is_predicted_exactly(correlation):
    """To what correlations of so many decimals, and directions in float16, leave of it."""
    evaluator = loop(correlation)
    _, _, found = measured(evaluator)
    schedules = [*random_schedules(100), *((name,) * STEPS for name in NAMES)]
    truth = [evaluator.true_error(schedule) for schedule in schedules]
    predicted = [found.gram.error(schedule) for schedule in schedules]
    np.testing.assert_allclose(predicted, truth, rtol=STEPS * 10.0**-DIGITS)
    choices = np.array([[NAMES.index(name) for name in schedule] for schedule in schedules])
    np.testing.assert_array_equal(found.gram.errors(choices), predicted)
    assert found.gram.error(("fp16",) * STEPS) == 0


def test_large_latents_are_predicted_within_the_noise_of_their_sketches():
    evaluator = loop(0.6, shape=(4, 32, 32), num_samples=8)
    _, _, found = measured(evaluator)
    assert found.gram.num_steps == STEPS
    for schedule in random_schedules(20):
        assert found.gram.error(schedule) == pytest.approx(evaluator.true_error(schedule), rel=0.05)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_downcast_sum_is_the_plain_sum_of_scores(correlation):
    _, curves, found = measured(loop(correlation))
    plain = found.gram.downcast_sum()
    for schedule in random_schedules(20):
        total = sum(
            curve.search.scores[step] for curve in curves for step in range(STEPS) if schedule[step] == curve.precision
        )
        assert plain.error(schedule) == pytest.approx(total)
    assert plain.diagonal == pytest.approx(found.gram.diagonal, abs=1e-6)


def test_it_costs_one_more_run_of_the_reference_a_sample():
    counted = Counted(loop())
    found = measurements(counted)
    curves = [measure_downcasts(found, name, method="bisection") for name in NAMES[1:]]
    before = dict(counted.calls)
    measured_gram(found, curves)
    assert counted.calls["fp16"] - before["fp16"] == 3 * STEPS
    assert found.calls["calibration: rounding"] == {"fp16": 3 * STEPS}


# some steps measured ----------------------------------------------------------------------------------------------


def test_correlations_between_measured_steps_are_interpolated():
    """Half of an error common to neighbours, half its own; seven of thirteen steps measured."""
    steps = 13

    def kernel(i, j):
        return 1.0 if i == j else 0.6 * float(np.exp(-(((i - j) / 8) ** 2)))

    directions = planted_vectors(kernel, steps)
    scores = 1e-3 * np.exp(0.3 * np.random.default_rng(0).normal(size=steps))
    known = list(range(0, steps, 2))
    vectors = Vectors(scores[known, None], directions[known])
    found = gram({"int8": scores}, correlate({"int8": (known, vectors)}), np.zeros(steps), "fp16")
    plain = found.downcast_sum()
    for schedule in random_schedules(100, steps, ("fp16", "int8")):
        low = np.array([name == "int8" for name in schedule])
        summed = (np.sqrt(scores)[:, None] * directions[:, 0])[low].sum(axis=0)
        assert found.error(schedule) == pytest.approx(summed @ summed, rel=0.04)
    assert plain.error(("int8",) * steps) < 0.3 * found.error(("int8",) * steps)


def test_bisection_finds_nearly_what_the_sweep_finds():
    smooth = {"int8": loop().errors["int8"], "int4": np.linspace(0.4, 0.9, STEPS)}
    evaluator = PlantedEvaluator(smooth, gains=[1.0] * STEPS, correlation=0.6)
    _, curves, found = measured(evaluator, method="bisection")
    assert all(len(curve.steps) < STEPS for curve in curves)
    assert found.correlations.positions["int8"] == tuple(map(float, curves[0].steps))
    schedules = random_schedules(30)
    truth = [evaluator.true_error(schedule) for schedule in schedules]
    record = fit("gram", [found.gram.error(schedule) for schedule in schedules], truth)
    assert record.r2 > 0.99
    assert record.ratio == pytest.approx(1, abs=0.05)


def test_positions_may_be_fractions_and_are_held_constant_beyond_the_ends():
    def between(i, j):
        return 0.05 + 0.01 * i - 0.008 * j + 0.002 * i * j

    positions = {"int8": (0.5, 4.5, 7.25), "int4": (0.0, 3.0, 6.5)}
    values = {("int8", "int4"): np.array([[between(i, j) for j in positions["int4"]] for i in positions["int8"]])}
    values |= {(name, name): np.eye(3) for name in positions}
    scores = {"int8": np.full(9, 4.0), "int4": np.full(9, 9.0)}
    found = gram(scores, Correlations(positions, values), np.zeros(9), "fp16")
    for i, j in product(range(9), repeat=2):
        expected = 6 * between(np.clip(i, 0.5, 7.25), np.clip(j, 0.0, 6.5))
        assert found.values[i, 1, j, 2] == pytest.approx(expected), (i, j)
        assert found.values[j, 2, i, 1] == found.values[i, 1, j, 2]


def test_correlations_with_themselves_say_nothing_about_neighbours():
    values = {("int8", "int8"): np.array([[1.0, 0.2, 0.1], [0.2, 1.0, 0.3], [0.1, 0.3, 1.0]])}
    found = gram({"int8": np.ones(9)}, Correlations({"int8": (0.0, 4.0, 8.0)}, values), np.zeros(9), "fp16")
    block = found.values[:, 1, :, 1]
    np.testing.assert_array_equal(np.diag(block), 1)
    assert block[3, 4] == pytest.approx(0.25 * 0.2 + 0.75 * (0.2 + 0.2 + 0.3 + 0.3) / 4), "not nearly 1"
    assert block[4, 8] == pytest.approx(0.3)


def test_negative_scores_count_as_none():
    found = gram(
        {"int8": np.array([1.0, -2.0, 4.0])},
        Correlations({"int8": (0.0, 1.0, 2.0)}, {("int8", "int8"): np.full((3, 3), 0.5) + 0.5 * np.eye(3)}),
        np.zeros(3),
        "fp16",
    )
    assert found.diagonal[:, 1].tolist() == [1, 0, 4]
    assert found.error(("int8",) * 3) == pytest.approx(1 + 4 + 2 * 0.5 * 1 * 2)


# samples that depart ----------------------------------------------------------------------------------------------


def test_no_sample_weighs_more_than_ten_medians():
    """Two steps err alike on eight samples, against each other on the ninth, which departs in both."""
    errors = np.full((2, 9), 1e-4)
    errors[:, 8] = 0.5
    directions = np.zeros((2, 9, 2))
    directions[:, :, 0] = 1.0
    directions[1, 8, 0] = -1.0
    weighed = Vectors(errors, directions).weighed()
    products = weighed @ weighed.T
    assert products[0, 1] == pytest.approx((8 - 10) / 9 * 1e-4)
    assert np.diag(products) == pytest.approx(np.full(2, (8 + 10) / 9 * 1e-4))
    found = correlate({"int8": ((0, 1), Vectors(errors, directions))})
    assert found.values["int8", "int8"][0, 1] == 0, "samples that disagree so much show no correlation"


def test_correlations_that_few_samples_give_by_chance_are_taken_back():
    """Steps 0 and 1 err alike on every sample, the others at random."""
    rng = np.random.default_rng(0)
    chance, real = [], []
    for _ in range(50):
        directions = rng.normal(size=(5, 3, 12))
        directions[1] = directions[0] + 0.3 * rng.normal(size=(3, 12))
        directions /= np.linalg.norm(directions, axis=2, keepdims=True)
        found = correlate({"int8": (range(5), Vectors(np.full((5, 3), 1e-4), directions))}).values["int8", "int8"]
        plain = np.einsum("isk,jsk->ij", directions, directions) / 3
        chance.append((np.mean(found[2:, :2] ** 2), np.mean(plain[2:, :2] ** 2)))
        real.append((found[0, 1], plain[0, 1]))
    kept, before = np.mean(chance, axis=0)
    assert kept < before / 2
    kept, before = np.mean(real, axis=0)
    assert 0.95 * before < kept < before


# the reference's own rounding -------------------------------------------------------------------------------------


def rounded():
    """A grid so coarse that much of a downcast's E is the rounding of reference and run."""
    evaluator = RoundedLoop()
    found, curves, measured_one = measured(evaluator)
    schedules = random_schedules(40, evaluator.num_steps, evaluator.precisions)
    truth = [typical_error(run_errors(evaluator, schedule)) for schedule in schedules if set(schedule) != {"bf16"}]
    return found, curves, measured_one, [one for one in schedules if set(one) != {"bf16"}], truth


def test_the_floor_of_a_coarse_reference_is_taken_out():
    found, curves, with_floor, schedules, truth = rounded()
    scores = {curve.precision: curve.search.scores for curve in curves}
    without = gram(scores, with_floor.correlations, np.zeros(found.num_steps), "bf16")
    figures = {
        name: fit("gram", [one.error(schedule) for schedule in schedules], truth)
        for name, one in (("with", with_floor.gram), ("without", without), ("sum", without.downcast_sum()))
    }
    assert figures["without"].ratio > 2.5, "every pair of low steps has the reference's rounding"
    assert figures["sum"].ratio > 1.4, "every step has it, and its own"
    assert figures["with"].ratio == pytest.approx(1, abs=0.05)
    assert figures["with"].scatter < 0.06
    assert figures["with"].r2 > 0.98 > 0.96 > figures["sum"].r2 > 0.85 > figures["without"].r2
    for step, precision in ((0, "int8"), (4, "int4"), (found.num_steps - 1, "int4")):
        single = tuple(precision if k == step else "bf16" for k in range(found.num_steps))
        assert with_floor.gram.error(single) == pytest.approx(scores[precision][step], rel=0.05)
    plain = with_floor.gram.downcast_sum()
    assert plain.error(schedules[0]) == pytest.approx(without.downcast_sum().error(schedules[0]), rel=0.05)


def test_a_reference_that_rounds_finely_has_next_to_no_floor():
    _, curves, found = measured(loop(0.3))
    assert (found.floor <= 2e-3 * curves[0].search.scores.max()).all()


def test_the_floor_falls_and_is_at_most_the_downcasts_themselves():
    generator = np.random.default_rng(3)
    directions = generator.normal(size=(7, 5, 30))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    nudged = Vectors(np.full((1, 5), 2.0), directions[:1])
    steps = (0, 2, 5, 6, 8, 11)
    for share in (0.0, 0.5, 1.0, -1.0):
        mixed = share * directions[:1] + directions[1:]
        vectors = Vectors(np.full((6, 5), 1.0), mixed / np.linalg.norm(mixed, axis=2, keepdims=True))
        floor = rounding_floor(nudged, {"int8": (steps, vectors), "int4": (steps, vectors)}, STEPS)
        assert floor.shape == (STEPS,)
        assert (floor >= 0).all()
        assert (np.diff(floor) <= 0).all()
        assert (floor <= 1 + 1e-12).all()
    assert not rounding_floor(nudged, {}, STEPS).any(), "no low precision"
    same = Vectors(np.full((6, 5), 1.0), np.repeat(directions[:1], 6, axis=0))
    alike = rounding_floor(nudged, {"int8": (steps, same)}, STEPS)
    np.testing.assert_allclose(alike, np.ones(STEPS), err_msg="as much as there is: both halves of every downcast")


# always -----------------------------------------------------------------------------------------------------------


def inconsistent(seed, names=("int8", "int4"), steps=10):
    """Correlations that no vectors have, and a floor."""
    generator = np.random.default_rng(seed)
    positions = {name: tuple(np.sort(generator.uniform(0, steps - 1, size=4))) for name in names}
    pairs = [(a, b) for k, a in enumerate(names) for b in names[k:]]
    values = {pair: generator.uniform(-1, 1, size=(4, 4)) for pair in pairs}
    for name in names:
        values[name, name] = (values[name, name] + values[name, name].T) / 2
    scores = {name: np.exp(generator.normal(size=steps)) for name in names}
    floor = np.sort(generator.uniform(0, 0.5, size=steps))[::-1]
    return scores, Correlations(positions, values), floor


def test_no_schedule_has_a_negative_error_whatever_the_correlations():
    for seed in range(30):
        scores, correlations, floor = inconsistent(seed)
        found = gram(scores, correlations, floor * (seed % 2), "fp16")
        flat = found.values.reshape(30, 30)
        np.testing.assert_allclose(flat, flat.T, atol=1e-12)
        assert np.linalg.eigvalsh(flat).min() > -1e-10
        assert not found.values[:, 0].any()
        own = np.stack([np.zeros(10), *scores.values()], axis=1)
        own[:, 1:] = np.maximum(own[:, 1:] - (floor * (seed % 2))[:, None], 0)
        np.testing.assert_allclose(found.diagonal, own, rtol=1e-9, err_msg="what a step adds by itself stays")
        for schedule in random_schedules(20, 10):
            choices = [NAMES.index(name) for name in schedule]
            form = sum(found.values[i, p, j, q] for i, p in enumerate(choices) for j, q in enumerate(choices))
            first = next((i for i, p in enumerate(choices) if p), None)
            whole = form + (0 if first is None else found.floor[first])
            assert whole > -1e-10
            assert found.error(schedule) == pytest.approx(whole, abs=1e-10)


@pytest.mark.parametrize("method", ["sweep", "bisection"])
def test_what_is_stored_gives_the_same_matrix_bit_for_bit(method):
    for evaluator in (loop(0.6), RoundedLoop(num_samples=4, size=48, num_steps=9)):
        found, curves, made = measured(evaluator, method)
        record = GramRecord.model_validate_json(made.record().model_dump_json())
        again = gram_of(evaluator.precisions[0], [curve.record(found) for curve in curves], record)
        assert again.precisions == made.gram.precisions
        for first, second in ((again.values, made.gram.values), (again.floor, made.gram.floor)):
            assert first.tobytes() == second.tobytes()
        assert {tuple(len(row) for row in item.values) for item in record.correlations} != set()


def test_without_low_precisions_there_is_only_the_reference():
    found = gram({}, Correlations({}, {}), np.zeros(4), "fp16")
    assert isinstance(found, Gram)
    assert found.error(("fp16",) * 4) == 0
    assert found.downcast_sum().values.shape == (4, 1, 4, 1)


def test_one_step():
    _, _, found = measured(PlantedEvaluator({"int8": [0.1]}, gains=[1.0]))
    truth = PlantedEvaluator({"int8": [0.1]}, gains=[1.0]).true_error(("int8",))
    assert found.gram.error(("int8",)) == pytest.approx(truth, rel=1e-3)
