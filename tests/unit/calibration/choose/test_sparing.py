"""Sparing the first steps where samples depart: planted loops, and the search among named schedules."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest
from helpers.planted import FragileLoop, FragileState, calibrate_loops

from calibration import ErrorBudget, HighSteps, LatencyBudget, Sensitivity
from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.choose.race import Refinement, Runs, refine
from calibration.choose.sparing import sparing
from calibration.measure.metrics import departed
from calibration.scores.predictors import Contributions

LATENCIES_MS = {"fp16": 2.0, "int8": 1.0}
OTHER = 0.4


@dataclass(frozen=True)
class Parting(FragileLoop):
    """Either a push makes a sample depart, or it does next to nothing.

    Every low step but the first two costs all samples many times more than these do, so that scores spare it first, and the
    risk of departures is more than they afford.
    """

    num_steps: int = 10
    push: float = 4e-6
    other: float = 3e-4

    def pushed(self, push: float, distance: float) -> float:
        return OTHER if push > distance**2 else push


def found(kind: Parting, *, validation: Parting | None = None, **options) -> Sensitivity:
    options = {"method": "sweep", "budget": HighSteps(6)} | options
    return calibrate_loops(kind, LATENCIES_MS, validation=validation, **options).sensitivity


def letters(schedule: tuple[str, ...]) -> str:
    return "".join("H" if name == "fp16" else "L" for name in schedule)


@pytest.mark.parametrize("budget", [HighSteps(6), LatencyBudget(0.8), ErrorBudget(8e-4)])
def test_a_departure_makes_the_search_spare_the_first_steps(
    budget: HighSteps | LatencyBudget | ErrorBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = Parting(offset=0.05, push=7.5e-7)
    others = Parting(offset=0.051, push=7.5e-7)
    spares = found(near, validation=others, budget=budget)
    # the module, not the function of the same name that the package exports
    monkeypatch.setattr(sys.modules["calibration.choose.rivals"], "sparing", lambda *_: iter(()))
    plain = found(near, validation=others, budget=budget)
    assert letters(plain.schedule).startswith("LL"), "what all samples lose by them is the least"
    assert letters(spares.schedule).startswith("HH")
    assert spares.predicted_latency <= plain.predicted_latency
    assert spares.refinement is not None
    assert spares.refinement.origin == "spares the first 2"
    assert departed(np.array(spares.refinement.trials[0].errors)) == 1
    tried = {trial.origin: trial for trial in spares.refinement.trials}
    assert departed(np.array(tried["spares the first 1"].errors)) == 1, "one step is not enough"
    assert "spares the first 3" not in tried, "two are"
    assert len(tried["spares the first 2"].errors) == near.num_samples
    assert spares.measured_error is not None
    assert plain.measured_error is not None
    assert plain.measured_error > 4 * spares.measured_error
    assert plain.loses_to
    assert not spares.loses_to


def test_where_none_departs_nothing_more_is_run() -> None:
    far = found(Parting(push=1e-9))
    assert letters(far.schedule).startswith("LL")
    assert far.refinement is not None
    assert not [trial for trial in far.refinement.trials if trial.origin.startswith("spares")]


def test_a_loss_that_the_first_steps_do_not_cause_is_not_paid_for() -> None:
    """A sample is lost whatever the first steps do: sparing them costs the others, and the mean of E says so."""

    @dataclass(frozen=True)
    class Doomed(Parting):
        def latents(self, state: FragileState) -> np.ndarray:
            if state[0] == 7 and state[3] > 0:
                return np.array([1.0, np.sqrt(OTHER)]).reshape(2, 1, 1)
            return super().latents(state)

    doomed = found(Doomed(push=1e-9))
    assert letters(doomed.schedule).startswith("LL")
    assert doomed.refinement is not None
    assert [trial.origin for trial in doomed.refinement.trials if trial.origin.startswith("spares")]


@pytest.mark.parametrize("budget", [HighSteps(9), LatencyBudget(0.5)])
@pytest.mark.parametrize("max_engines", [None, 2])
def test_all_that_spare_meet_the_budget(budget: HighSteps | LatencyBudget, max_engines: int | None) -> None:
    names, latencies_ms = ("fp16", "fp8", "int4"), {"fp16": 4.0, "fp8": 3.0, "int4": 1.0}
    values = np.zeros((20, 3))
    values[:, 1:] = np.exp(np.random.default_rng(0).normal(size=(20, 1))) * [0.2, 1.0]
    latency_model = LatencyModel(names, latencies_ms, AllocationCosts(swap_ms=0.05, max_engines=max_engines))
    schedules = dict(sparing(latency_model, Contributions(values, 1.4), budget))
    assert list(schedules) == ([1, 2, 3, 4, 6, 8] if isinstance(budget, HighSteps) else [1, 2, 3, 4, 6])
    for first, schedule in schedules.items():
        assert set(schedule[:first]) == {"fp16"}
        assert len(set(schedule)) <= (max_engines or 3)
        if isinstance(budget, HighSteps):
            assert schedule.count("fp16") == 9
        else:
            assert latency_model.latency(schedule) <= budget.ratio


def test_a_higher_median_hides_nobody() -> None:
    one, five = np.array([1.0, 1.0, 1.0, 40.0]), np.array([5.0, 5.0, 5.0, 40.0])
    assert departed(one) == departed(five, one) == 1
    assert departed(five) == 0
    assert departed(one, np.zeros(4)) == departed(np.array([0.0, 0.0, 0.0, 1.0])) == 0, "no error, no measure"


# among named schedules


def race(
    errors: dict[str, list[float]], spares: list[tuple[int, str]], *, max_calls: int = 10_000
) -> tuple[Refinement, int]:
    """Refines "LLH" among schedules with given errors; what came out, and how many were measured."""
    measured = 0

    def measure(schedule: tuple[str, ...], sample: int) -> float:
        nonlocal measured
        measured += 1
        return errors["".join(schedule)][sample]

    rivals = [("rival", tuple(name)) for name in errors]
    runs = Runs(measure, lambda _: 1, 6, lambda *_: None, lambda _: 1.0)
    given = [(first, tuple(name)) for first, name in spares]
    result = refine(tuple("LLH"), lambda _: rivals, runs, max_calls, given)
    return result, measured


def steady(level: float, *lost: int) -> list[float]:
    return [0.5 if sample in lost else level * (1 + 0.01 * sample) for sample in range(6)]


def test_rivals_leave_spared_steps_alone_and_make_nobody_depart() -> None:
    errors = {"LLH": steady(1e-4, 3), "HLL": steady(3e-4), "LHL": steady(0.5e-4), "HLH": steady(2e-4, 5)}
    result, _ = race(errors, [(1, "HLL")])
    assert "".join(result.best.precisions) == "HLL"
    ran = {"".join(trial.precisions) for trial in result.trials}
    assert ran == {"LLH", "HLL", "HLH"}, "LHL gives up the spared step"
    result, _ = race(errors | {"HHL": steady(1.5e-4)}, [(1, "HLL")])
    assert "".join(result.best.precisions) == "HHL"
    # without a spared step, too, a rival that loses a sample does not win by being better on the others
    result, _ = race({"LLH": steady(1e-4), "LHL": steady(0.5e-4, 1), "HLL": steady(0.9e-4)}, [])
    assert "".join(result.best.precisions) == "HLL"


def test_the_least_mean_is_kept_and_the_first_that_loses_none_ends_it() -> None:
    errors = {"LLH": steady(1e-4, 3), "HLL": steady(1e-4, 3, 4), "HHL": steady(2e-4), "HHH": steady(1e-6)}
    result, measured = race(
        {name: errors[name] for name in ("LLH", "HLL", "HHL")}, [(1, "HLL"), (2, "HHL"), (3, "HHH")]
    )
    assert "".join(result.best.precisions) == "HHL"
    assert measured == 18, "HHH was not run"
    worse = {"LLH": steady(1e-4, 3), "HLL": steady(1e-4, 3, 4), "HHL": steady(0.9)}
    result, _ = race(worse, [(1, "HLL"), (2, "HHL")])
    assert "".join(result.best.precisions) == "LLH"


@pytest.mark.parametrize("limit", range(0, 40, 3))
def test_calls_are_never_exceeded(limit: int) -> None:
    errors = {"LLH": steady(1e-4, 3), "HLL": steady(1e-4, 2), "HHL": steady(2e-4), "LHH": steady(1e-4)}
    _, measured = race(errors, [(1, "HLL"), (2, "HHL")], max_calls=limit)
    assert measured <= limit
    assert bool(measured) == (limit >= 12), "the one to beat and another, on every sample"
