"""The stages of a calibration that look for a schedule: score the steps, then choose under a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from calibration.choose.allocation import Budget, HighSteps, LatencyBudget
from calibration.choose.candidates import candidates
from calibration.choose.costs import NO_COSTS, AllocationCosts, LatencyModel
from calibration.choose.fit import best_fit, measure_fit
from calibration.choose.guard import STAGE as GUARD
from calibration.choose.guard import fragile_samples, guard
from calibration.choose.joint import worthwhile
from calibration.choose.pareto import Allocation
from calibration.choose.picture_budget import QualityBudget, meet_quality
from calibration.choose.predictions import Predictions, predicted_best
from calibration.choose.reuse_plans import STAGE as PLANS
from calibration.choose.reuse_plans import most_calls, search_plans
from calibration.measure.evaluator import Evaluator
from calibration.measure.measurements import Measurements
from calibration.records import (
    FitPoint,
    FitRecord,
    GuardRecord,
    Predictor,
    TransferRecord,
)
from calibration.reuse_records import ReusePlanRecord, ReuseRecord
from calibration.scores.carried import CarriedScores, checked_curves
from calibration.scores.gram import Correlations, Gram
from calibration.scores.measured_gram import MeasuredGram, measured_gram
from calibration.scores.reuse import STAGE as SINGLES
from calibration.scores.reuse import measure_reuses
from calibration.scores.single_step import METHODS, Downcasts, measure_downcasts
from engines.reuse import REUSES

MOST_REUSE_SAMPLES = 8

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a search that settles early stops short of its total."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What is asked of a calibration, and how much it may spend.

    Attributes:
        budget: what the schedule has to meet; None: see `calibration.choose.predictions.DEFAULT_ERROR_FRACTION`. A
            quality budget is met by measurement, and needs a decoder.
        method: "bisection" evaluates as few steps as the ranking needs, "sweep" all.
        carried: scores of another calibration, which take the place of a search where a few measurements agree
            with them; `method` has then no say.
        costs: what a change of precision costs, and how many precisions a schedule may use.
        reuse: most steps that may reuse model outputs; 0: none is.

    Raises:
        ValueError: an unknown method, or a negative number of steps.
    """

    budget: Budget | QualityBudget | None = None
    method: Literal["bisection", "sweep"] = "bisection"
    carried: CarriedScores | None = None
    costs: AllocationCosts = NO_COSTS
    reuse: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.reuse < 0:
            raise ValueError(f"reuse is {self.reuse}, expected 0 or more steps")

    def require_fit(self, num_steps: int) -> None:
        """Refuses more reused steps than a loop of T can have.

        Raises:
            ValueError: saying how many it can.
        """
        if self.reuse >= num_steps:
            raise ValueError(
                f"reuse of {self.reuse} steps is asked for; of {num_steps} the first is computed, so allow at most {num_steps - 1}"
            )


DEFAULT_OPTIONS = CalibrationOptions()


@dataclass(frozen=True)
class Scored:
    """What was measured of single steps, and what it predicts.

    Attributes:
        curves: downcasts by low precision, in order.
        gram: made of them.
        fits: both predictors against random schedules, whose figures are `fit_points`.
        predictions: of the precisions that are kept, by the better predictor.
        fragile: samples most likely to depart.
        transfer: where scores were carried from, if they were.
    """

    curves: tuple[Downcasts, ...]
    gram: MeasuredGram
    fits: tuple[FitRecord, ...]
    fit_points: tuple[FitPoint, ...]
    predictions: Predictions
    fragile: tuple[int, ...]
    transfer: TransferRecord | None


def score_steps(
    measurements: Measurements, latency_model: LatencyModel, options: CalibrationOptions, report: Progress
) -> Scored:
    """Measures downcasts of every low precision, and random schedules to test what they predict.

    Args:
        measurements: of the calibration samples.
        latency_model: of the precisions to score.
        options: `method` and `carried` say how.
        report: see `Progress`.

    Raises:
        TransferError: the carried scores do not hold.
    """
    precisions = latency_model.precisions
    transfer: TransferRecord | None = None
    correlations: Correlations | None = None
    if options.carried:
        curves, transfer = checked_curves(measurements, precisions, options.carried, report)
        correlations = options.carried.correlations_of(precisions[1:])
    else:
        curves = [
            measure_downcasts(measurements, precision, options.method, partial(report, f"downcast {precision}"))
            for precision in precisions[1:]
        ]
    found = measured_gram(measurements, curves, correlations)
    grams: dict[Predictor, Gram] = {"gram": found.gram, "downcast sum": found.gram.downcast_sum()}
    fits, points = measure_fit(measurements, grams, partial(report, "fit"))
    summed = sum((curve.vectors.errors.sum(axis=0) for curve in curves), np.zeros(measurements.num_samples))
    fragile = fragile_samples(measurements, precisions[1:], summed)
    return Scored(
        tuple(curves), found, fits, points, Predictions(latency_model, grams, best_fit(fits)), fragile, transfer
    )


def score_reuse(
    measurements: Measurements, evaluator: Evaluator, predictions: Predictions, most: int, report: Progress
) -> tuple[Predictions, ReuseRecord]:
    """Measures single reuses, and plans of which steps to reuse.

    Args:
        measurements: of the calibration samples.
        evaluator: of the same.
        predictions: without reuse; its latency model knows what a reused step takes.
        most: reused steps, at most.
        report: see `Progress`; the name of the stage has the most calls that it may take.

    Returns:
        The predictions with plans, and the record of these.
    """
    step_ms = predictions.latency_model.reuse_ms
    assert step_ms is not None
    samples = reuse_samples(measurements.num_samples)
    limit = most_calls(measurements.num_steps, most, len(samples))
    words = f"at most {limit} calls"
    reuses = measure_reuses(
        measurements, evaluator.timesteps(), samples, partial(report, f"single reuses ({words} with plans)")
    )
    tried = search_plans(measurements, reuses, evaluator.influence, most, samples, partial(report, "reuse plans"))
    plans = worthwhile(tried, predictions.gram)
    calls = Counter[str]()
    for stage in (SINGLES, PLANS):
        calls.update(measurements.calls.get(f"{measurements.name}: {stage}", {}))
    record = ReuseRecord(
        most=most,
        step_ms=step_ms,
        samples=samples,
        scores={
            REUSES[order]: tuple(None if math.isinf(error) else error for error in reuses.errors[:, order].tolist())
            for order in reuses.orders
        },
        plans=tuple(
            ReusePlanRecord(
                choices=plan.choices,
                predicted=plan.predicted,
                measured=plan.error,
                influence=tuple(plan.influence.tolist()),
                rule=plan.rule,
            )
            for plan in plans
        ),
        calls=dict(calls),
        most_calls=limit,
    )
    return replace(predictions, plans=plans), record


def reuse_samples(num_samples: int) -> tuple[int, ...]:
    """The samples on which reuse is looked for, ascending: half of few, as its errors are systematic."""
    count = min(MOST_REUSE_SAMPLES, max(num_samples // 2, min(num_samples, 2)))
    return tuple(sorted(np.random.default_rng(0).permutation(num_samples)[:count].tolist()))


def choose(
    measurements: Measurements, scored: Scored, budget: Budget | QualityBudget | None, report: Progress
) -> tuple[Allocation, str, GuardRecord | None]:
    """The schedule under a budget, the budget in words, and the record of the guard.

    There is none where there was nothing to compare, and for a budget in picture quality: that is met by measurement.

    Under an error budget, or none, the guard goes by what it measures, among schedules no slower than the predicted best: one that
    errs less may have a higher predicted error, even above the budget, and the words then say so.

    Raises:
        BudgetError: no schedule meets it.
    """
    predictions = scored.predictions
    if isinstance(budget, QualityBudget):
        return *meet_quality(predictions, budget, measurements, partial(report, "quality")), None
    chosen, wording = predicted_best(predictions, budget)
    found = candidates(predictions, chosen, budget)
    if len(found) < 2:
        return chosen, wording, None
    record = guard(measurements, found, predictions, scored.fragile, partial(report, GUARD))
    winner = predictions.allocation(record.candidates[0].precisions)
    if not isinstance(budget, (HighSteps, LatencyBudget)) and winner.error > chosen.error:
        wording += f"; the guard measured less with a schedule no slower, predicted {winner.error:.3g}"
    return winner, wording, record
