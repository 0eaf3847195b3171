"""Calibration from end to end: measure, search, allocate, validate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from calibration.choose.allocation import Budget, drop_dominated, require_reachable
from calibration.choose.candidates import candidates
from calibration.choose.costs import NO_COSTS, AllocationCosts, LatencyModel
from calibration.choose.fit import best_fit, measure_fit
from calibration.choose.guard import STAGE as GUARD
from calibration.choose.guard import fragile_samples, guard
from calibration.choose.pareto import Allocation
from calibration.choose.picture_budget import QualityBudget, meet_quality
from calibration.choose.predictions import Predictions, predicted_best
from calibration.document import (
    FitPoint,
    FitRecord,
    GuardRecord,
    ParetoPoint,
    Predictor,
    Sensitivity,
    TransferRecord,
    ValidationRow,
)
from calibration.measure.evaluator import SampleSets
from calibration.measure.journal import Journal, journal_key
from calibration.measure.measurements import Measurements
from calibration.measure.requests import Pool
from calibration.measure.sample_batches import SampleBatches
from calibration.scores.carried import CarriedScores, checked_curves
from calibration.scores.gram import Correlations, Gram
from calibration.scores.measured_gram import MeasuredGram, measured_gram
from calibration.scores.single_step import METHODS, Downcasts, measure_downcasts
from calibration.statistics import departure_record, interval_record, typical_errors, typical_interval
from calibration.validation import validation_rows
from engines.schedule import Schedule

log = logging.getLogger(__name__)

PARETO_POINTS = 200
"""Points of the Pareto front that the document keeps."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a search that settles early stops short of its total."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What is asked of a calibration, and how much it may spend.

    Attributes:
        budget: what the schedule has to meet; None: see `calibration.choose.predictions.DEFAULT_ERROR_FRACTION`. A
            quality budget is met by measurement, and needs a decoder.
        method: "bisection" evaluates as few steps as the ranking needs, "sweep" all.
        max_evaluations: evaluations per score curve of the bisection, see `adaptive_bisection`.
        carried: scores of another calibration, which take the place of a search where a few measurements agree
            with them; `method` has then no say.
        costs: what a change of precision costs, and how many precisions a schedule may use.

    Raises:
        ValueError: an unknown method.
    """

    budget: Budget | QualityBudget | None = None
    method: Literal["bisection", "sweep"] = "bisection"
    max_evaluations: int | None = None
    carried: CarriedScores | None = None
    costs: AllocationCosts = NO_COSTS

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")


DEFAULT_OPTIONS = CalibrationOptions()


@dataclass(frozen=True)
class CalibrationResult:
    """What `calibrate` found; the same for equal arguments, whether it was interrupted or not.

    Attributes:
        sensitivity: all of it, ready to be saved as `sensitivity.json`.
    """

    sensitivity: Sensitivity

    def schedule(self, bundle_id: str) -> Schedule:
        """The chosen schedule, bound to a bundle."""
        found = self.sensitivity
        return Schedule(
            bundle_id=bundle_id,
            precisions=found.schedule,
            origin=f"{found.method}, {found.budget}",
            predicted_error=found.predicted_error,
            predicted_latency=found.predicted_latency,
        )


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
        options: `method`, `max_evaluations` and `carried` say how.
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
            measure_downcasts(
                measurements,
                precision,
                method=options.method,
                max_evaluations=options.max_evaluations,
                on_evaluation=partial(report, f"downcast {precision}"),
            )
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
    measurements: Measurements, scored: Scored, budget: Budget | None, report: Progress
) -> tuple[Allocation, str, GuardRecord | None]:
    """The schedule under a budget that the guard holds for the best, the budget in words, and the guard's record.

    Raises:
        BudgetError: no schedule meets it.
    """
    predictions = scored.predictions
    chosen, wording = predicted_best(predictions, budget)
    found = candidates(predictions, chosen, budget)
    if len(found) < 2:
        return chosen, wording, None
    record = guard(measurements, found, predictions, scored.fragile, partial(report, GUARD))
    return predictions.allocation(record.trials[0].precisions), wording, record


def calibrate(
    sets: SampleSets,
    latencies_ms: Mapping[str, float],
    options: CalibrationOptions = DEFAULT_OPTIONS,
    *,
    journal: Journal | None = None,
    pool: Pool | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Measures how each step suffers from each precision and finds a schedule under a budget.

    On the calibration samples: uniform runs of every precision; precisions that are no use are dropped before they are
    scored; downcasts, whose error vectors make the Gram matrix; random schedules, which say whether it or its diagonal
    alone predicts better; the schedule of least predicted error; the guard, in which it has to win against rules of thumb. A
    budget in picture quality is met by measurement instead. On the validation samples: how the schedule compares.

    Args:
        sets: what is measured on.
        latencies_ms: measured step latency of every precision; keep them in the journal
            (`Journal.remember`), so that a resumed run has the same.
        options: what is asked for.
        journal: from `open_journal`, to survive interruption; None keeps measurements in memory.
        pool: takes the measurements, of sets of samples named as those of `sets`, which are then asked for no step and
            no picture. None: `SampleBatches`, one sample at a time. The result is the same.
        progress: see `Progress`.

    Raises:
        BudgetError: no schedule meets the budget. A latency or step budget is refused before anything is measured; an
            error budget afterwards, and what was measured stays in the journal.
        TransferError: the carried scores do not hold; what was measured stays in the journal.
        TmpDiffError: a run gave latents that are not finite.
        ValueError: the arguments do not fit together.
    """
    _check(sets, latencies_ms, options, journal)
    evaluator, validation = sets.evaluators
    journal = journal or Journal.in_memory(journal_key(evaluator, validation))
    report = progress or (lambda stage, done, total: None)
    pool = pool or SampleBatches(sets.named())
    by_pictures = isinstance(options.budget, QualityBudget)
    calibration = Measurements("calibration", sets.calibration, journal, pool, pictures=by_pictures)

    built = LatencyModel(evaluator.precisions, latencies_ms, options.costs)
    uniform = _uniform_runs(calibration, built.precisions, partial(report, "calibration runs"))
    kept, dropped = drop_dominated(built, {name: float(typical_errors(found)) for name, found in uniform.items()})
    for loser in dropped:
        calibration.forget(loser.precision)
    scored = score_steps(calibration, replace(built, precisions=kept), options, report)
    predictions = scored.predictions
    guarded: GuardRecord | None = None
    if isinstance(options.budget, QualityBudget):
        chosen, wording = meet_quality(
            predictions.latency_model,
            predictions.gram,
            predictions.front,
            options.budget,
            calibration,
            partial(report, "quality"),
        )
    else:
        chosen, wording, guarded = choose(calibration, scored, options.budget, report)
    counted = [calibration]
    rows: tuple[ValidationRow, ...] = ()
    if sets.validation:
        counted.append(Measurements("validation", sets.validation, journal, pool))
        rule = best_rule_of(guarded)
        rows = validation_rows(counted[-1], chosen.precisions, built, rule, partial(report, "validation"))
    for measurements in counted:
        if measurements.recomputed:
            log.info("%s: recomputed_calls %s after resuming", measurements.name, dict(measurements.recomputed))
    records = tuple(curve.record(calibration) for curve in scored.curves)
    return CalibrationResult(
        Sensitivity(
            evaluator_key=evaluator.key(),
            validation_key=validation.key() if validation else None,
            method="transfer" if scored.transfer else options.method,
            num_steps=calibration.num_steps,
            num_samples=calibration.num_samples,
            precisions=built.precisions,
            swap_ms=options.costs.by_pair(built.precisions),
            max_engines=options.costs.max_engines,
            latencies_ms={name: float(latencies_ms[name]) for name in built.precisions},
            uniform={name: interval_record(typical_interval(errors)) for name, errors in uniform.items()},
            uniform_departures={name: departure_record(errors) for name, errors in uniform.items()},
            dropped=dropped,
            scores=records,
            gram=scored.gram.record() if records else None,
            calls={stage: calls for measurements in counted for stage, calls in measurements.calls.items()},
            search_calls=sum(sum(record.calls.values()) for record in records),
            sweep_calls=sum(record.sweep_calls for record in records),
            predictor=predictions.predictor,
            fit=scored.fits,
            fit_points=scored.fit_points,
            budget=wording,
            schedule=chosen.precisions,
            predicted_error=chosen.error,
            predicted_latency=chosen.latency,
            pareto=tuple(ParetoPoint(**asdict(point)) for point in _thinned(predictions.front)),
            guard=guarded,
            validation=rows,
            transfer=scored.transfer,
        )
    )


def best_rule_of(guarded: GuardRecord | None) -> tuple[str, tuple[str, ...]] | None:
    """Name and schedule of the rule that was best on the calibration samples."""
    if guarded is None or guarded.best_rule is None:
        return None
    trial = next(trial for trial in guarded.trials if trial.rule == guarded.best_rule)
    return guarded.best_rule, trial.precisions


def _uniform_runs(
    measurements: Measurements, precisions: tuple[str, ...], report: Callable[[int, int], None]
) -> dict[str, np.ndarray]:
    """E(all p) of every sample by precision, float64 [S]; 0 for the reference."""
    count = measurements.num_samples
    measurements.expect([(precision,) * measurements.num_steps for precision in precisions], pictures=False)
    found = {}
    for row, precision in enumerate(precisions):
        errors = []
        for sample in range(count):
            errors.append(measurements.uniform_error(precision, sample)["error"])
            report(row * count + sample + 1, len(precisions) * count)
        found[precision] = np.array(errors)
    return found


def _thinned(front: tuple[Allocation, ...]) -> tuple[Allocation, ...]:
    """At most `PARETO_POINTS` of the front, spread over it, both ends among them."""
    if len(front) <= PARETO_POINTS:
        return front
    return tuple(front[round(k)] for k in np.linspace(0, len(front) - 1, PARETO_POINTS))


def _check(
    sets: SampleSets, latencies_ms: Mapping[str, float], options: CalibrationOptions, journal: Journal | None
) -> None:
    evaluator, validation = sets.evaluators
    missing = [name for name in evaluator.precisions if name not in latencies_ms]
    if missing:
        raise ValueError(f"latencies_ms lacks {', '.join(missing)}; give the step latency of every precision")
    for samples in sets.named().values():
        if samples.evaluator.num_samples < 1:
            raise ValueError("an evaluator has no samples; give it at least one prompt")
    if validation and (validation.num_steps, validation.precisions) != (evaluator.num_steps, evaluator.precisions):
        raise ValueError("validation runs another number of steps or other precisions than calibration")
    if journal and journal.key != journal_key(evaluator, validation):
        raise ValueError("the journal was opened for other evaluators; open it with open_journal")
    if not isinstance(options.budget, QualityBudget):
        fastest = min(latencies_ms[name] for name in evaluator.precisions) / latencies_ms[evaluator.precisions[0]]
        require_reachable(options.budget, fastest, evaluator.num_steps, options.costs)
    elif not sets.calibration.decode:
        raise ValueError(f"a budget of {options.budget} needs a decoder of the calibration samples to be measured with")
