"""Statistics of the experiments: intervals, agreement, rank deviation and regret."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tools.experiments.statistics import (
    bootstrap_interval,
    error_regret,
    error_regret_at,
    log_scatter,
    r_squared,
    rank_deviation,
    rank_deviation_at,
    rank_deviations,
    spearman,
    spearman_within,
)


def test_interval_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = generator.normal(3.0, 1.0, size=30)
        interval = bootstrap_interval(lambda rows, v=values: float(v[rows].mean()), 30, draws=200)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 3.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_paired_differences_are_tighter_than_independent_ones():
    generator = np.random.default_rng(1)
    level = generator.lognormal(0, 2, size=20)
    first, second = level, 0.9 * level * generator.normal(1, 0.01, size=20)

    def ratio(rows: np.ndarray, others: np.ndarray) -> float:
        return float(second[rows].mean() / first[others].mean())

    paired = bootstrap_interval(lambda rows: ratio(rows, rows), 20)
    independent = bootstrap_interval(ratio, 20, 20)
    assert 0.88 < paired.low < paired.high < 0.92
    assert independent.low < 0.7
    assert independent.high > 1.1


def test_undefined_draws_are_left_out_and_equal_arguments_give_equal_intervals():
    values = np.array([0.0, 0.0, 1.0, 2.0])

    def statistic(rows: np.ndarray) -> float:
        total = values[rows].sum()
        return float(values[rows].max() / total) if total > 0 else float("nan")

    first, again = (bootstrap_interval(statistic, 4) for _ in range(2))
    assert first == again
    assert 0 < first.low <= first.value <= first.high <= 1


@pytest.mark.parametrize("sizes", [(1,), (), (5, 1)])
def test_intervals_that_cannot_be_are_refused(sizes):
    with pytest.raises(ValueError, match="expected"):
        bootstrap_interval(lambda *rows: 0.0, *sizes)


def test_agreement_is_that_of_scipy_and_undefined_for_constants():
    generator = np.random.default_rng(2)
    predicted = generator.integers(0, 9, size=40).astype(float)  # with ties
    measured = predicted**2 + generator.normal(0, 5, size=40)
    assert r_squared(predicted, measured) == pytest.approx(stats.pearsonr(predicted, measured).statistic ** 2)
    assert spearman(predicted, measured) == pytest.approx(stats.spearmanr(predicted, measured).statistic)
    assert np.isnan(r_squared(np.ones(4), np.arange(4)))


def test_scatter_and_agreement_within_groups():
    measured = np.array([1.0, 2.0, 10.0, 20.0, 7.0])
    groups = np.array([1, 1, 2, 2, 3])  # one alone says nothing
    assert log_scatter(3 * measured, measured) == pytest.approx(np.log(3))
    assert np.isnan(log_scatter(0 * measured, measured))
    assert spearman_within(groups, np.array([1.0, 2.0, 20.0, 10.0, 0.0]), measured) == 0
    assert spearman_within(groups, measured, measured) == pytest.approx(1)
    assert np.isnan(spearman_within(np.arange(5), measured, measured))


def test_rank_deviation_of_two_exchanged_steps():
    truth, found = np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 2.0, 3.0, 1.0])
    assert rank_deviations(truth, found).tolist() == [0, 1, 1, 0]
    assert rank_deviation(truth, found) == 0.5
    assert rank_deviation_at(truth, found).tolist() == pytest.approx([0, 0.5, 2 / 3, 0.5])
    assert rank_deviation(truth, 7 * truth) == 0
    # negative scores are all alike: their order does not count
    assert rank_deviation(np.array([1.0, -1.0, -2.0]), np.array([1.0, -2.0, -1.0])) == 0


def test_regret_is_what_the_wrong_steps_cost():
    truth, found = np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 2.0, 3.0, 1.0])
    # K = 2 keeps 3 + 1 where 2 + 1 was possible; every other K is right
    assert error_regret_at(truth, found).tolist() == pytest.approx([0, 0, 1 / 3, 0])
    assert error_regret(truth, found) == pytest.approx(1 / 12)
    assert error_regret_at(np.array([1.0, 0.0, -1.0]), np.array([1.0, 2.0, 3.0]))[2] == 0
    assert error_regret(truth, truth) == 0
