"""Scores against a linear loop whose errors are known on paper, and the calls they cost."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.planted import Counted, PlantedEvaluator, measurements

from calibration.scores.predictors import PREDICTORS, contributions, predict
from calibration.scores.single_step import measure_scores, sweep_calls
from engines.errors import TmpDiffError
from tools.experiments.statistics import r_squared

STEPS = 12


def loop(correlation=0.0, **options):
    rng = np.random.default_rng(7)
    errors = {
        "int8": 0.2 * np.exp(1.5 * np.linspace(-1, 1, STEPS) ** 2),
        "int4": rng.uniform(0.2, 1.0, size=STEPS),
    }
    return PlantedEvaluator(
        errors, gains=np.linspace(0.8, 1.1, STEPS), correlation=correlation, **{"num_samples": 3} | options
    )


def measured(evaluator, **options):
    """The measurements and both curves of every low precision."""
    found = measurements(evaluator)
    curves = {
        (direction, precision): measure_scores(found, precision, direction, **options)
        for precision in evaluator.precisions[1:]
        for direction in ("downcast", "upcast")
    }
    return found, curves


def changed(base, step, precision):
    return tuple(precision if k == step else base for k in range(STEPS))


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_sweep_gives_the_scores_worked_out_on_paper(correlation, precision):
    evaluator = loop(correlation)
    _, curves = measured(evaluator, method="sweep")
    whole = evaluator.true_error((precision,) * STEPS)
    down = [evaluator.true_error(changed("fp16", step, precision)) for step in range(STEPS)]
    up = [whole - evaluator.true_error(changed(precision, step, "fp16")) for step in range(STEPS)]
    np.testing.assert_allclose(curves["downcast", precision].search.scores, down, rtol=1e-4)
    np.testing.assert_allclose(curves["upcast", precision].search.scores, up, rtol=1e-4)


def test_uncorrelated_errors_add_up():
    evaluator = loop()
    found, curves = measured(evaluator, method="sweep")
    whole = np.mean([found.uniform_error("int8", sample)["error"] for sample in range(3)])
    for direction in ("downcast", "upcast"):
        assert curves[direction, "int8"].search.scores.sum() == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("method", ["sweep", "bisection"])
def test_calls_are_counted_exactly(method):
    counted = Counted(loop())
    found, curves = measured(counted, method=method, max_evaluations=None)
    expected = {"calibration: uniform runs": dict.fromkeys(counted.precisions, 3 * STEPS)}
    for (direction, precision), curve in curves.items():
        steps = curve.search.order
        after = 3 * sum(STEPS - step - 1 for step in steps)
        base, other = ("fp16", precision) if direction == "downcast" else (precision, "fp16")
        calls = {base: after, other: 3 * len(steps)}
        expected[f"calibration: {direction} {precision}"] = calls
        if method == "sweep":
            assert sum(calls.values()) == sweep_calls(STEPS, 3) == 3 * STEPS * (STEPS + 1) / 2
        else:
            assert sum(calls.values()) < sweep_calls(STEPS, 3)
    assert found.calls == expected
    assert sum(sum(calls.values()) for calls in expected.values()) == counted.calls.total()
    assert not found.recomputed


def test_schedules_share_prefixes_and_are_run_once():
    counted = Counted(loop(num_samples=1))
    found = measurements(counted)
    schedule = ("fp16",) * 5 + ("int8",) * (STEPS - 5)
    for _ in range(2):
        error = found.schedule_error("schedules", schedule, 0, pictures=False)["error"]
    assert error == pytest.approx(counted.inner.true_error(schedule), rel=1e-4)
    assert counted.calls == {"fp16": STEPS, "int8": STEPS - 5}, "the reference run, and the steps after it is left"


def test_bisection_measures_what_the_sweep_measures():
    sweep, bisection = measured(loop(), method="sweep")[1], measured(loop(), method="bisection")[1]
    for key, curve in bisection.items():
        known = curve.search.measured
        assert 3 <= known.sum() < STEPS
        np.testing.assert_array_equal(curve.search.scores[known], sweep[key].search.scores[known])


def test_predictors_are_exact_where_they_say():
    names = ("fp16", "int8", "int4")
    rng = np.random.default_rng(0)
    curves = {(d, p): rng.uniform(0.1, 1, size=STEPS) for d in ("downcast", "upcast") for p in names[1:]}
    totals = {"fp16": 0.0, "int8": 3.0, "int4": 7.0}
    mixed = tuple(names[step % 3] for step in range(STEPS))
    plain = contributions("downcast", names, curves, totals)
    assert predict(plain, names, mixed) == pytest.approx(
        sum(curves["downcast", name][step] for step, name in enumerate(mixed) if name != "fp16")
    )
    for predictor in ("downcast-rescaled", "upcast", "upcast-power"):
        found = contributions(predictor, names, curves, totals)
        for name in names:
            assert predict(found, names, (name,) * STEPS) == pytest.approx(totals[name])
        shares = found.values[:, 2] / found.values[0, 2]
        scores = curves[predictor.partition("-")[0], "int4"]
        np.testing.assert_allclose(shares, scores / scores[0], err_msg="the ranking stays")
    found = contributions("mixed-power", names, curves, totals)
    for name in names:
        assert predict(found, names, (name,) * STEPS) == pytest.approx(totals[name])


def test_power_predictor_follows_correlated_and_uncorrelated_errors():
    schedule = tuple("fp16" if step % 3 else "int4" for step in range(STEPS))
    for correlation, power, accuracy in ((0.0, 1.0, 1e-3), (1.0, 1.9, 0.25)):
        evaluator = loop(correlation, num_samples=1)
        names = evaluator.precisions
        curves = {key: curve.search.scores for key, curve in measured(evaluator, method="sweep")[1].items()}
        totals = {name: evaluator.true_error((name,) * STEPS) for name in names}
        found = contributions("upcast-power", names, curves, totals)
        assert found.power == pytest.approx(power, abs=0.06)
        truth = evaluator.true_error(schedule)
        assert predict(found, names, schedule) == pytest.approx(truth, rel=accuracy)
    plain = contributions("upcast", names, curves, totals)
    assert predict(plain, names, schedule) > 2 * truth, "what the power puts right"


def second_order(generator, floor, coupling):
    """E by bool [N, T] (True: low) of a denoiser that is exactly of second order; its scores, own terms and E(all low)."""
    own, partner = generator.uniform(0.5, 2, STEPS), coupling * generator.uniform(0.5, 2, STEPS)
    couplings = np.outer(partner, partner)
    np.fill_diagonal(couplings, 0)

    def error(low):  # nothing rounds otherwise after the last step
        return floor * low[:, :-1].any(axis=1) + low @ own + ((low @ couplings) * low).sum(axis=1) / 2

    downcast = error(np.eye(STEPS, dtype=bool))
    total = float(error(np.ones((1, STEPS), dtype=bool))[0])
    upcast = total - error(~np.eye(STEPS, dtype=bool))
    return error, {("downcast", "int8"): downcast, ("upcast", "int8"): upcast}, own, total


def test_mixed_predictor_finds_the_floor_and_the_levels_between_the_ends():
    generator = np.random.default_rng(0)
    names = ("fp16", "int8")
    for floor, coupling in ((0.0, 0.0), (3.0, 0.0), (0.0, 0.5), (3.0, 0.3)):
        error, curves, own, total = second_order(generator, floor, coupling)
        found = contributions("mixed-power", names, curves, {"fp16": 0.0, "int8": total})
        middle = (own + curves["upcast", "int8"]) / 2
        assert found.power == pytest.approx(float(curves["upcast", "int8"].sum() / middle.sum()))
        np.testing.assert_allclose(found.values[:, 1] / found.values[:, 1].sum(), middle / middle.sum(), rtol=1e-9)
        low = generator.random((200, STEPS)) < generator.uniform(0.2, 0.8, (200, 1))
        low = low[low.any(axis=1)]
        truth = error(low)
        agreement = {}
        for predictor in PREDICTORS:
            found = contributions(predictor, names, curves, {"fp16": 0.0, "int8": total})
            agreement[predictor] = r_squared((low @ found.values[:, 1]) ** found.power, truth)
        assert agreement["mixed-power"] > 0.995, (floor, coupling, agreement)
        assert agreement["mixed-power"] >= max(agreement.values()) - 2e-3, (floor, coupling, agreement)
        if floor == 3.0:
            assert agreement["downcast"] < agreement["mixed-power"], "the floor is in every downcast"


def test_the_floor_keeps_to_what_can_be_one():
    names, downcast, upcast = ("fp16", "int8"), np.array([4.0, 3, 5, 2, 6, 1]), np.array([4.0, 3, 5, 2, 6, 1])

    def shares(total, downcast=downcast, upcast=upcast):
        curves = {("downcast", "int8"): downcast, ("upcast", "int8"): upcast}
        found = contributions("mixed-power", names, curves, {"fp16": 0.0, "int8": total}).values[:, 1]
        return found / found.sum()

    plain = downcast / downcast.sum()
    np.testing.assert_allclose(shares(21.0), plain, err_msg="no excess, no floor")
    np.testing.assert_allclose(shares(30.0), plain, err_msg="nor a negative one")
    halves = np.array([2.0, 1, 3, 0, 4, 1]) + upcast  # all but the last less 2, the least of them
    np.testing.assert_allclose(shares(1.0), halves / halves.sum(), err_msg="at most the least downcast")
    noisy = upcast - np.array([0, 5, 0, 5, 0, 0])  # negative scores are noise, and take part in the balance
    middle = (downcast + np.maximum(noisy, 0)) / 2
    np.testing.assert_allclose(shares(16.0, upcast=noisy), middle / middle.sum())
    few = (downcast[:4] + upcast[:4]) / 2
    np.testing.assert_allclose(shares(1.0, downcast[:4], upcast[:4]), few / few.sum(), err_msg="too few steps")


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_all_zero_scores_are_shared_out_evenly(num_steps):
    names, zeros = ("fp16", "int8", "int4"), np.zeros(num_steps)
    curves = {(direction, name): zeros for direction in ("downcast", "upcast") for name in names[1:]}
    found = contributions("mixed-power", names, curves, {"fp16": 0.0, "int8": 2.0, "int4": 0.0})
    assert found.power == 1.0
    np.testing.assert_allclose(found.values[:, 1], 2.0 / num_steps)
    np.testing.assert_array_equal(found.values[:, 2], zeros)


def test_floors_are_those_of_each_precision():
    names, generator = ("fp16", "int8", "int4"), np.random.default_rng(1)
    curves, totals, middles = {}, {"fp16": 0.0}, {}
    for name, floor in (("int8", 0.5), ("int4", 3.0)):
        _, found, own, totals[name] = second_order(generator, floor, 0.2)
        curves |= {(direction, name): found[direction, "int8"] for direction in ("downcast", "upcast")}
        middles[name] = (own + curves["upcast", name]) / 2
    found = contributions("mixed-power", names, curves, totals)
    for column, middle in zip(found.values.T[1:], middles.values(), strict=True):
        np.testing.assert_allclose(column / column.sum(), middle / middle.sum(), rtol=1e-9)


def test_mixed_predictor_of_uncorrelated_errors_is_that_of_downcasts():
    names, scores = ("fp16", "int8"), np.linspace(1, 4, STEPS)
    curves = {(direction, "int8"): scores for direction in ("downcast", "upcast")}
    totals = {"fp16": 0.0, "int8": float(scores.sum())}
    found = contributions("mixed-power", names, curves, totals)
    assert found.power == pytest.approx(1)
    np.testing.assert_allclose(found.values[:, 1], scores)


def test_negative_scores_pay_nothing():
    names = ("fp16", "int8")
    curves = {
        ("downcast", "int8"): np.array([1.0, -2.0, 3.0]),
        ("upcast", "int8"): np.array([-1.0, -2.0, -3.0]),
    }
    totals = {"fp16": 0.0, "int8": 6.0}
    np.testing.assert_array_equal(contributions("downcast", names, curves, totals).values[:, 1], [1, 0, 3])
    np.testing.assert_allclose(contributions("downcast-rescaled", names, curves, totals).values[:, 1], [1.5, 0, 4.5])
    np.testing.assert_allclose(contributions("upcast", names, curves, totals).values[:, 1], [2, 2, 2])
    assert contributions("mixed-power", names, curves, totals).values[1, 1] == 0


@pytest.mark.filterwarnings("ignore:invalid value")
def test_run_that_overflows_is_named():
    broken = PlantedEvaluator({"int8": [0.1, float("inf")]}, gains=[1.0, 1.0])
    found = measurements(broken)
    with pytest.raises(TmpDiffError, match="uniform int8 run of calibration sample 0 gave latents that are not"):
        found.uniform_error("int8", 0)


def test_unknown_names_are_refused():
    found = measurements(loop())
    with pytest.raises(ValueError, match="direction is 'sideways', expected one of downcast, upcast"):
        measure_scores(found, "int8", "sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method is 'guess', expected one of bisection, sweep"):
        measure_scores(found, "int8", "downcast", method="guess")
    with pytest.raises(ValueError, match="predictor is 'guess'"):
        contributions("guess", ("fp16",), {}, {})


class Departing(PlantedEvaluator):
    """Sample 0 ends far away as soon as steps 3 to 5 are not all at the reference."""

    def step(self, sample, state, precision):
        index, x = super().step(sample, state, precision)
        away = sample == 0 and index - 1 in (3, 4, 5) and precision != "fp16"
        return index, x + 40.0 * self._direction(self.num_steps + 1) if away else x


def test_a_departure_does_not_set_the_scores():
    options = {"errors": loop().errors, "gains": loop().gains, "num_samples": 9}
    plain, departing = PlantedEvaluator(**options), Departing(**options)
    found, curves = measured(departing, method="sweep")
    far = [found.uniform_error("int8", sample)["error"] for sample in range(9)]
    assert far[0] > 50 * np.median(far)  # its plain mean would say little about the others
    for name, expected in measured(plain, method="sweep")[1].items():
        ratio = curves[name].search.scores / expected.search.scores
        assert (ratio > 0.9).all(), name
        assert (ratio < 2.5).all(), name  # it counts as ten medians; in a plain mean it would be 100 times the others
