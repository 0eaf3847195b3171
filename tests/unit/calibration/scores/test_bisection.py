"""The search against curves whose ranking is known."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.planted import ROUGH_CURVES, SMOOTH_CURVES, rank_deviation, regret

from calibration.scores.bisection import adaptive_bisection, default_evaluations, full_sweep

ALL_CURVES = SMOOTH_CURVES | ROUGH_CURVES


def draws(name, num_steps, count=60):
    return [ALL_CURVES[name](np.random.default_rng(seed), num_steps) for seed in range(count)]


def searched(truth, **options):
    """The search and the step indices it asked for, in order."""
    asked = []

    def evaluate(step):
        asked.append(step)
        return truth[step]

    return adaptive_bisection(evaluate, len(truth), **options), asked


@pytest.mark.parametrize("name", SMOOTH_CURVES)
def test_twenty_steps_are_ranked_from_at_most_ten(name):
    curves = draws(name, 20)
    found = [searched(curve)[0] for curve in curves]
    assert max(len(search.order) for search in found) <= 10
    pairs = list(zip(curves, found, strict=True))
    assert np.mean([rank_deviation(curve, search.scores) for curve, search in pairs]) <= 0.3
    assert np.mean([regret(curve, search.scores) for curve, search in pairs]) <= 0.02


@pytest.mark.parametrize("name", SMOOTH_CURVES)
@pytest.mark.parametrize("num_steps", [10, 50, 100])
def test_other_lengths_are_ranked_from_half(name, num_steps):
    curves = draws(name, num_steps, 20)
    found = [searched(curve)[0] for curve in curves]
    pairs = list(zip(curves, found, strict=True))
    assert np.mean([rank_deviation(curve, search.scores) for curve, search in pairs]) <= 1
    assert np.mean([regret(curve, search.scores) for curve, search in pairs]) <= 0.03
    if num_steps == 100:
        assert np.mean([len(search.order) for search in found]) <= 30, "smooth curves settle early"


@pytest.mark.parametrize(("name", "deviation"), [("noisy", 1.0), ("plateau", 1.3), ("interior_spike", 1.5)])
def test_rough_curves_are_ranked_roughly(name, deviation):
    curves = draws(name, 20)
    assert np.mean([rank_deviation(curve, searched(curve)[0].scores) for curve in curves]) <= deviation


@pytest.mark.parametrize("name", ALL_CURVES)
@pytest.mark.parametrize("num_steps", [*range(1, 13), 20, 33, 100])
def test_evaluations_are_counted_exactly_and_never_repeated(name, num_steps):
    truth = ALL_CURVES[name](np.random.default_rng(3), num_steps)
    search, asked = searched(truth)
    assert list(search.order) == asked
    assert len(set(asked)) == len(asked)
    assert len(asked) <= default_evaluations(num_steps)
    assert len(asked) == default_evaluations(num_steps) or search.settled
    assert {0, num_steps - 1, (num_steps - 1) // 2} == set(asked[:3])
    assert np.flatnonzero(search.measured).tolist() == sorted(asked)
    np.testing.assert_array_equal(search.scores[search.measured], truth[search.measured])
    assert np.isfinite(search.scores).all()


@pytest.mark.parametrize("budget", [3, 4, 7, 12])
def test_budget_is_used_up_and_kept_where_the_ranking_is_open(budget):
    truth = np.random.default_rng(0).uniform(0.01, 1, size=20)  # pure noise never settles
    search, asked = searched(truth, max_evaluations=budget)
    assert len(asked) == budget
    assert not search.settled


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_few_steps_are_all_evaluated(num_steps):
    truth = np.random.default_rng(1).uniform(0.01, 1, size=num_steps)
    search, asked = searched(truth, max_evaluations=num_steps + 5)
    assert len(asked) == num_steps
    np.testing.assert_array_equal(search.scores, truth)
    assert search.settled


def test_budget_of_every_step_is_left_when_settled():
    deviations = []
    for seed in range(20):
        truth = np.random.default_rng(seed).uniform(0.01, 1, size=20)
        search, asked = searched(truth, max_evaluations=20)
        assert 15 <= len(asked) <= 20, "noise needs nearly all"
        assert search.settled
        deviations.append(rank_deviation(truth, search.scores))
    assert np.mean(deviations) <= 1.6
    assert max(deviations) <= 3.5


@pytest.mark.parametrize("num_steps", [20, 50])
def test_spike_before_the_last_step_does_not_lift_the_step_before_it(num_steps):
    """Flow matching in few steps: level, then ten times as much, then a last step that hardly matters."""
    truth = np.full(num_steps, 1.5e-4)
    truth[-3:] = 1.7e-4, 1.3e-3, 2.3e-4
    search, asked = searched(truth)
    assert num_steps - 3 in asked
    np.testing.assert_allclose(search.scores, truth, rtol=0.1)


def test_flat_curve_settles_at_once():
    search, asked = searched(np.full(100, 2.0), max_evaluations=100)
    assert len(asked) < 20
    assert search.settled
    np.testing.assert_allclose(search.scores, 2.0)


@pytest.mark.parametrize("mirror", [False, True])
def test_spike_at_an_end_does_not_lift_its_neighbours(mirror):
    truth = np.geomspace(1, 0.01, 20)
    truth[-1] = 1.0
    truth = truth[::-1].copy() if mirror else truth
    search, asked = searched(truth, max_evaluations=6)
    assert (1 if mirror else 18) in asked
    np.testing.assert_allclose(search.scores, truth, rtol=0.4)


def test_the_step_before_the_last_is_the_fourth_evaluated():
    for curve in draws("short_last_step", 20):
        search, asked = searched(curve)
        assert asked[3] == 18
        assert int(np.argmax(search.scores)) == 18
        assert searched(curve, max_evaluations=3)[1] == asked[:3], "a smaller budget is kept"


def test_the_second_step_is_asked_for_where_the_first_towers():
    level = np.linspace(1.0, 1.5, 20)
    spiked = np.concatenate(([20.0], level[1:]))
    assert searched(spiked)[1][4] == 1
    assert 1 not in searched(level)[1][:5]


def test_spike_of_one_interior_step_is_for_the_full_sweep():
    truth = np.geomspace(1, 0.1, 20)
    truth[7] = 5.0
    search = full_sweep(truth.__getitem__, 20)
    assert search.order == tuple(range(20))
    assert search.settled
    assert int(np.argmax(search.scores)) == 7
    assert not searched(truth, max_evaluations=5)[0].measured[7], "what the module says it cannot promise"


def test_zero_negative_and_all_zero_scores():
    truth = np.geomspace(1, 1e-3, 20)
    truth[12:] = [-1e-4, 0, 2e-5, -3e-5, 0, 0, 1e-5, -1e-6]
    search, _ = searched(truth)
    assert rank_deviation(np.maximum(truth, 1e-4), np.maximum(search.scores, 1e-4)) <= 1
    np.testing.assert_array_equal(search.scores[search.measured], truth[search.measured])
    for value in (0.0, -1e-3):
        search, asked = searched(np.full(20, value))
        assert search.settled
        assert len(asked) <= 10
        assert (search.scores <= 0).all()


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_noise_between_evaluations_of_a_u_leaves_its_ends_on_top(noise):
    rng = np.random.default_rng(5)
    truth = np.exp(4 * np.linspace(-1, 1, 20) ** 2)
    search = adaptive_bisection(lambda step: truth[step] * np.exp(noise * rng.normal()), 20)
    assert set(np.argsort(-search.scores)[:6].tolist()) == {0, 1, 2, 17, 18, 19}


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        adaptive_bisection(lambda step: 1.0, 0)
    with pytest.raises(ValueError, match="max_evaluations is 2, expected 3 or more"):
        adaptive_bisection(lambda step: 1.0, 20, max_evaluations=2)
    with pytest.raises(ValueError, match="score of step 0 is nan"):
        full_sweep(lambda step: float("nan"), 4)
