"""The risk of departures: on planted samples that stand close to where two pictures part."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers.planted import FragileLoop, calibrate_loops

from calibration import HighSteps
from calibration.measure.metrics import limited
from calibration.scores.divergence import DEPARTED, PRICE, affordable, risk_curve, with_risk
from calibration.scores.predictors import Contributions

NAMES = ("fp16", "int8")


def fragile(median: float, samples: int, seed: int | None = None) -> np.ndarray:
    """E of samples at distances spread evenly over (0, 1]: inverse to the distance's square, until the sample parts."""
    spread = (np.arange(samples) + 0.5) / samples
    distance = spread if seed is None else np.random.default_rng(seed).uniform(size=samples)
    return np.minimum(median * (0.5 / distance) ** 2, DEPARTED)


@pytest.mark.parametrize("median", [1e-6, 1e-5, 1e-4])
def test_the_tail_of_some_samples_says_what_all_samples_lose(median: float) -> None:
    everybody = fragile(median, 10**6)
    lost = everybody.mean() - limited(everybody).mean()
    found = [risk_curve({0: fragile(median, 400, seed)}, 1)[0] for seed in range(20)]
    assert np.mean(found) == pytest.approx(lost, rel=0.35)
    plain = [abs(np.log(errors.mean() / everybody.mean())) for errors in (fragile(median, 400, s) for s in range(20))]
    assert np.median(np.abs(np.log(np.array(found) / lost))) < np.median(plain) + 0.35, "a mean hangs on one or two"


def test_even_errors_have_no_risk_and_neighbours_share_theirs() -> None:
    even = np.exp(0.3 * np.random.default_rng(0).normal(size=200)) * 1e-5
    assert risk_curve(dict.fromkeys(range(6), even), 6).tolist() == [0.0] * 6
    found = risk_curve({0: fragile(1e-5, 200), **dict.fromkeys(range(1, 6), even)}, 6)
    assert found[0] > found[1] > 0
    assert found[2:].tolist() == [0.0] * 4
    skipped = risk_curve({0: fragile(1e-5, 200), 3: even, 5: even}, 6)  # steps between are interpolated
    assert skipped[0] > skipped[1] > skipped[2] > 0
    assert skipped[5] == 0
    assert risk_curve({0: np.zeros(5), 1: [0, 0, 0, 0, 1]}, 2).tolist() == [0, 0], "no error, no scale"


def test_one_outlier_of_few_samples_counts_little() -> None:
    few, many = np.full(4, 1e-5), np.full(200, 1e-5)
    few[0], many[:50] = 1e-2, 1e-2
    assert risk_curve({0: few}, 1)[0] < 0.15 * risk_curve({0: many}, 1)[0], "a quarter of either"


@pytest.mark.parametrize("power", [1.0, 1.7])
def test_uniform_schedules_are_predicted_with_their_risk(power: float) -> None:
    values = np.array([[0, 1e-3], [0, 2e-3], [0, 4e-3]])
    risk = np.array([5e-4, 0, 1e-4])
    found = with_risk(Contributions(values, power), NAMES, {"int8": risk})
    assert found.values[:, 1].sum() ** power == pytest.approx(values.sum() ** power + risk.sum())
    assert found.values[:, 0].tolist() == [0, 0, 0]
    assert found.values[1, 1] == values[1, 1]
    assert found.power == power
    assert with_risk(Contributions(values, power), NAMES, {}).values.tolist() == values.tolist()


def test_no_schedule_pays_more_than_the_price() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = np.zeros((15, 2))
        values[:, 1] = np.exp(generator.normal(size=15))
        found = Contributions(values, generator.uniform(1, 2))
        risk = 10 * np.exp(2 * generator.normal(size=15))
        scaled = affordable(found, NAMES, {"int8": risk})["int8"]
        assert any(np.array_equal(scaled, risk / 2**k) for k in range(8)) or not scaled.any()
        weighed = with_risk(found, NAMES, {"int8": scaled}).values[:, 1]
        for count in range(3, 13):
            spent = values[np.argsort(weighed, kind="stable")[: 15 - count], 1].sum() ** found.power
            least = np.sort(values[:, 1])[: 15 - count].sum() ** found.power
            assert spent <= (1 + PRICE) * least * (1 + 1e-12)
    level = Contributions(np.stack([np.zeros(15), np.ones(15)], axis=1))
    risk = np.linspace(1, 0, 15)
    assert np.array_equal(affordable(level, NAMES, {"int8": risk})["int8"], risk), "level steps: it costs nothing"


def test_calibration_spares_the_steps_that_lead_to_departures(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule() -> tuple[str, float]:
        found = calibrate_loops(
            FragileLoop(),
            {"fp16": 2.0, "int8": 1.0},
            method="sweep",
            budget=HighSteps(2),
            refine_calls=0,
            validation=FragileLoop(offset=0.2),
        ).sensitivity
        return "".join("H" if name == "fp16" else "L" for name in found.schedule), found.measured_error or 0.0

    chosen, error = schedule()
    assert chosen == "HHLLLLLL"
    # the module, not the function of the same name that the package exports
    without = lambda found, kept, risks: {name: 0 * risk for name, risk in risks.items()}  # noqa: E731
    monkeypatch.setattr(sys.modules["calibration.run"], "affordable", without)
    by_scores, worse = schedule()
    assert by_scores.startswith("LL"), "limited means do not see it"
    assert worse > 3 * error
