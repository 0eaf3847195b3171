"""The stages of a calibration that look for a schedule: score the steps, then choose under a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from calibration.choose.allocation import Budget, HighSteps, LatencyBudget
from calibration.choose.candidates import candidates
from calibration.choose.costs import NO_COSTS, AllocationCosts, LatencyModel
from calibration.choose.fit import best_fit, measure_fit
from calibration.choose.guard import STAGE as GUARD
from calibration.choose.guard import fragile_samples, guard
from calibration.choose.pareto import Allocation
from calibration.choose.picture_budget import QualityBudget, meet_quality
from calibration.choose.predictions import Predictions, predicted_best
from calibration.measure.measurements import Measurements
from calibration.records import FitPoint, FitRecord, GuardRecord, Predictor, TransferRecord
from calibration.scores.carried import CarriedScores, checked_curves
from calibration.scores.gram import Correlations, Gram
from calibration.scores.measured_gram import MeasuredGram, measured_gram
from calibration.scores.single_step import METHODS, Downcasts, measure_downcasts

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

    Raises:
        ValueError: an unknown method.
    """

    budget: Budget | QualityBudget | None = None
    method: Literal["bisection", "sweep"] = "bisection"
    carried: CarriedScores | None = None
    costs: AllocationCosts = NO_COSTS

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")


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
