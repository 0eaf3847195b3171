"""Calibration from end to end: measure, search, allocate, validate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from calibration.choose.allocation import Budget, drop_dominated, require_reachable
from calibration.choose.costs import NO_COSTS, AllocationCosts, LatencyModel
from calibration.choose.pareto import Allocation
from calibration.choose.picture_budget import QualityBudget, meet_quality
from calibration.choose.predictions import Predictions, predicted_best
from calibration.choose.rivals import STAGE, refine_schedule
from calibration.document import (
    ParetoPoint,
    RefinementRecord,
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
from calibration.scores.divergence import affordable, measured_risk, with_risk
from calibration.scores.predictors import PREDICTORS, Contributions, contributions
from calibration.scores.single_step import DIRECTIONS, METHODS, ScoreCurve, measure_scores
from calibration.validation import best_fit, fit_predictors, schedule_errors, validation_rows
from engines.schedule import Schedule

log = logging.getLogger(__name__)

PARETO_POINTS = 200
"""Points of the Pareto front that the document keeps; allocation uses all of them."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a search that settles early stops short of its total."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What is asked of a calibration, and how much it may spend.

    Attributes:
        budget: what the schedule has to meet; None: see `calibration.choose.predictions.DEFAULT_ERROR_FRACTION`. A
            quality budget is met by measurement on the validation samples, and needs those and a decoder.
        method: "bisection" evaluates as few steps as the ranking needs, "sweep" all.
        max_evaluations: evaluations per score curve of the bisection, see `adaptive_bisection`.
        carried: scores of another calibration, which take the place of a search where a few measurements agree
            with them; `method` has then no say.
        costs: what a change of precision costs, and how many precisions a schedule may use.
        refine_calls: denoiser calls the local search may take, None for as many as the scores took, 0 for none.
            A budget in picture quality is met by measurement already, and is not refined.

    Raises:
        ValueError: an unknown method, or fewer calls than none.
    """

    budget: Budget | QualityBudget | None = None
    method: Literal["bisection", "sweep"] = "bisection"
    max_evaluations: int | None = None
    carried: CarriedScores | None = None
    costs: AllocationCosts = NO_COSTS
    refine_calls: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        calls = self.refine_calls
        if calls is not None and calls < 0:
            raise ValueError(f"refine_calls is {calls}, expected 0 or more, or None for as many as the scores take")


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

    Order: uniform runs of every precision; precisions that are no use are dropped before they are scored;
    downcast and upcast scores; the predictor that fits random schedules best (on the validation samples);
    allocation, by its predictions and the risk of departures (`calibration.scores.divergence`); a local search around its
    choice, measured on the calibration samples; the schedule that comes out and the baselines on the validation samples.

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
    calibration = Measurements("calibration", sets.calibration, journal, pool)
    held_out = Measurements("validation", sets.validation, journal, pool) if sets.validation else None

    built = LatencyModel(evaluator.precisions, latencies_ms, options.costs)
    uniform = _uniform_errors(calibration, built.precisions, partial(report, "calibration runs"))
    kept, dropped = drop_dominated(built, uniform)
    for loser in dropped:
        calibration.forget(loser.precision)
    curves, transfer = _measured_curves(calibration, kept, options, report)
    risks = {
        curve.precision: measured_risk(calibration, curve.precision, curve.search)
        for curve in curves
        if curve.direction == "downcast"
    }
    search_calls = sum(sum(curve.calls(calibration).values()) for curve in curves)
    values = _contributions(kept, curves, uniform, calibration.num_steps)

    if held_out:
        _uniform_errors(held_out, built.precisions, partial(report, "validation runs"))
    fits, points = fit_predictors(held_out or calibration, kept, values, partial(report, "fit"))
    predictor = best_fit(fits)
    # what schedules are chosen by: fits are those of limited means, to which the risk of departures is added
    risks = affordable(values[predictor], kept, risks)
    weighed = {name: with_risk(found, kept, risks) for name, found in values.items()}
    records = tuple(curve.record(calibration, risks) for curve in curves)
    predictions = Predictions(replace(built, precisions=kept), predictor, values[predictor], weighed)
    refinement: RefinementRecord | None = None
    if isinstance(options.budget, QualityBudget):
        assert held_out is not None  # checked above
        chosen, wording = meet_quality(predictions, options.budget, held_out, partial(report, "quality"))
    else:
        chosen, wording = predicted_best(predictions, options.budget)
        max_calls = search_calls if options.refine_calls is None else options.refine_calls
        chosen, refinement = refine_schedule(
            calibration, chosen, options.budget, predictions, max_calls, partial(report, STAGE)
        )

    rows: tuple[ValidationRow, ...] = ()
    if held_out:
        rows = validation_rows(held_out, chosen.precisions, built, partial(report, "validation"))
    for measurements in filter(None, (calibration, held_out)):
        if measurements.recomputed:
            log.info("%s: recomputed_calls %s after resuming", measurements.name, dict(measurements.recomputed))
    return CalibrationResult(
        Sensitivity(
            evaluator_key=evaluator.key(),
            validation_key=validation.key() if validation else None,
            method="transfer" if transfer else options.method,
            num_steps=calibration.num_steps,
            num_samples=calibration.num_samples,
            precisions=built.precisions,
            swap_ms=options.costs.by_pair(built.precisions),
            max_engines=options.costs.max_engines,
            latencies_ms={name: float(latencies_ms[name]) for name in built.precisions},
            uniform_errors=uniform,
            dropped=dropped,
            scores=records,
            calls=calibration.calls | (held_out.calls if held_out else {}),
            search_calls=search_calls,
            sweep_calls=sum(record.sweep_calls for record in records),
            predictor=predictor,
            fit=fits,
            fit_points=points,
            fit_samples="validation" if held_out else "calibration",
            budget=wording,
            schedule=chosen.precisions,
            predicted_error=chosen.error,
            predicted_latency=chosen.latency,
            measured_error=rows[0].error if rows else None,
            loses_to=rows[0].loses_to if rows else (),
            pareto=tuple(ParetoPoint(**asdict(point)) for point in _thinned(predictions.front)),
            pareto_size=len(predictions.front),
            validation=rows,
            refinement=refinement,
            transfer=transfer,
        )
    )


def _uniform_errors(
    measurements: Measurements, precisions: tuple[str, ...], report: Callable[[int, int], None]
) -> dict[str, float]:
    """E(all p) by precision, 0 for the reference."""
    schedules = [(precision,) * measurements.num_steps for precision in precisions]
    return dict(zip(precisions, schedule_errors(measurements, "uniform runs", schedules, report), strict=True))


def _measured_curves(
    measurements: Measurements, precisions: tuple[str, ...], options: CalibrationOptions, report: Progress
) -> tuple[list[ScoreCurve], TransferRecord | None]:
    """Scores of every low precision in both directions; carried ones where there are any, and how they were checked."""
    if options.carried:
        return checked_curves(measurements, precisions, options.carried, report)
    return [
        measure_scores(
            measurements,
            precision,
            direction,
            method=options.method,
            max_evaluations=options.max_evaluations,
            on_evaluation=partial(report, f"{direction} {precision}"),
        )
        for precision in precisions[1:]
        for direction in DIRECTIONS
    ], None


def _contributions(
    kept: tuple[str, ...], curves: list[ScoreCurve], uniform: dict[str, float], num_steps: int
) -> dict[str, Contributions]:
    if not curves:
        return {predictor: Contributions(np.zeros((num_steps, 1))) for predictor in PREDICTORS}
    scores: dict[tuple[str, str], np.ndarray] = {
        (curve.direction, curve.precision): curve.search.scores for curve in curves
    }
    return {predictor: contributions(predictor, kept, scores, uniform) for predictor in PREDICTORS}


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
    elif not (sets.validation and sets.validation.decode):
        raise ValueError(f"a budget of {options.budget} needs validation samples and a decoder to be measured with")
