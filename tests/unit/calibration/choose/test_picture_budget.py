"""Budgets in SSIM and PSNR: the fastest schedule that meets them when it is run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from calibration.choose.baselines import RULES
from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.choose.pareto import Allocation
from calibration.choose.picture_budget import QualityBudget, fastest_meeting, rule_schedules
from calibration.choose.predictions import Predictions
from calibration.scores.gram import Gram
from engines.errors import BudgetError
from tmpdiff_export.report.latency import LOOKS
from tools.experiments.quality_figure import RULE_STYLES

FRONT = tuple(Allocation(("fp16",) * k + ("int8",) * (20 - k), 0.02 * (20 - k) ** 2, 0.5 + k / 40) for k in range(21))


def ssim(allocation: Allocation) -> float:
    return 1.0 - allocation.error / 10


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9, 0.99, 0.9999, 1.0])
def test_it_is_the_fastest_that_meets_the_target(target: float) -> None:
    asked: list[Allocation] = []

    def measure(allocation: Allocation) -> float:
        asked.append(allocation)
        return ssim(allocation)

    found, quality = fastest_meeting(FRONT, (), QualityBudget("ssim", target), measure)
    meeting = [allocation for allocation in FRONT if ssim(allocation) >= target]
    assert found == meeting[0]
    assert quality == ssim(found)
    assert len(asked) == len(set(asked)) <= 6


def test_noise_never_gives_a_schedule_that_falls_short() -> None:
    def measure(allocation: Allocation) -> float:
        return ssim(allocation) + 0.05 * math.sin(1000 * allocation.latency)

    found, quality = fastest_meeting(FRONT, (), QualityBudget("ssim", 0.8), measure)
    assert quality == measure(found) >= 0.8


def test_a_fixed_rule_that_does_with_less_is_taken() -> None:
    rule = [Allocation(("int8",) * (20 - k) + ("fp16",) * k, 0.5, 0.5 + k / 40) for k in range(1, 20)]
    asked: list[Allocation] = []

    def measure(allocation: Allocation) -> float:  # twelve steps of the front do, seven of the rule
        asked.append(allocation)
        return 0.95 if allocation.latency >= (0.675 if allocation in rule else 0.8) - 1e-9 else 0.85

    found, quality = fastest_meeting(FRONT, (rule,), QualityBudget("ssim", 0.9), measure)
    assert found == rule[6]
    assert quality == 0.95
    assert len(asked) == len(set(asked)) <= 11
    worse = [Allocation(item.precisions, item.error, item.latency + 0.4) for item in rule]
    assert fastest_meeting(FRONT, (worse,), QualityBudget("ssim", 0.9), measure)[0] == FRONT[12]


def test_rules_come_with_every_count_and_what_the_gram_predicts() -> None:
    values = np.zeros((4, 2, 4, 2))
    values[:, 1, :, 1] = 1.0  # E is the square of the number of low steps
    gram = Gram(("fp16", "int8"), values, np.zeros(4))
    latency_model = LatencyModel(gram.precisions, {"fp16": 2.0, "int8": 1.0})

    def rules_of(model: LatencyModel) -> dict[str, list[Allocation]]:
        return rule_schedules(Predictions(model, {"gram": gram}, "gram"))

    rules = rules_of(latency_model)
    assert set(rules) == set(RULES)
    assert rules["last K"] == [
        Allocation(("int8",) * (4 - k) + ("fp16",) * k, float((4 - k) ** 2), (4 + k) / 8) for k in (1, 2, 3)
    ]
    assert rules_of(replace(latency_model, costs=AllocationCosts(0.0, 1))) == {}
    assert rules_of(replace(latency_model, latencies_ms={"fp16": 1.0, "int8": 1.5})) == {}


def test_every_rule_has_a_look_where_rules_are_drawn() -> None:
    assert set(RULES) == set(RULE_STYLES)
    assert {*RULES, "random"} == set(LOOKS)


def test_identical_pictures_meet_every_psnr() -> None:
    only = FRONT[-1:]
    assert fastest_meeting(only, (), QualityBudget("psnr", 200.0), lambda _: math.inf) == (only[0], math.inf)


def test_what_cannot_be_reached_names_what_can() -> None:
    with pytest.raises(
        BudgetError, match=r"no schedule reaches psnr at least 50 dB; the most accurate has 41.25, so ask"
    ):
        fastest_meeting(FRONT, (), QualityBudget("psnr", 50.0), lambda allocation: 41.25 - allocation.error)


@pytest.mark.parametrize(
    ("metric", "target"), [("ssim", 0.0), ("ssim", 1.1), ("psnr", math.inf), ("psnr", -1.0), ("lpips", 0.5)]
)
def test_targets_out_of_range_are_refused(metric: str, target: float) -> None:
    with pytest.raises(ValueError, match=r"target is|metric is"):
        QualityBudget(metric, target)  # type: ignore[arg-type]
