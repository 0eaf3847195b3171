"""Calibration from end to end: uniform runs, scores, choice, validation, and the document of it all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from calibration.choose.allocation import drop_dominated, require_reachable
from calibration.choose.costs import LatencyModel
from calibration.choose.fewer_steps import STAGE as FEWER
from calibration.choose.fewer_steps import Runs, fewer_steps, fewer_steps_row
from calibration.choose.joint import fastest_latency, reuse_needed
from calibration.choose.pareto import Allocation, integers
from calibration.choose.picture_budget import QualityBudget
from calibration.document import Sensitivity
from calibration.measure.evaluator import SampleSets
from calibration.measure.journal import Journal, journal_key
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import typical_errors
from calibration.measure.requests import Pool
from calibration.measure.sample_batches import SampleBatches
from calibration.records import GuardRecord, ParetoPoint, QualityRecord, ValidationRow
from calibration.reuse_records import ReuseRecord
from calibration.stages import DEFAULT_OPTIONS, CalibrationOptions, Progress, choose, score_reuse, score_steps
from calibration.statistics import departure_record, typical_interval
from calibration.validation import validation_rows
from engines.errors import BudgetError
from engines.schedule import Schedule

log = logging.getLogger(__name__)

REUSE = "reuse"
"""What latencies name a reused step by."""

PARETO_POINTS = 200
"""Points of the Pareto front that the document keeps."""


@dataclass(frozen=True)
class CalibrationResult:
    """What `calibrate` found; the same for equal arguments, whether it was interrupted or not.

    Attributes:
        sensitivity: all of it, ready to be saved as `sensitivity.json`.
    """

    sensitivity: Sensitivity

    def schedule(self, bundle_id: str, setting: str) -> Schedule:
        """The chosen schedule, bound to a setting of a bundle."""
        found = self.sensitivity
        return Schedule(
            bundle_id=bundle_id,
            setting=setting,
            precisions=found.schedule,
            origin=f"{found.method}, {found.budget}"
            + (f": {found.guard.candidates[0].names[-1]}" if found.guard else ""),
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

    On the calibration samples: uniform runs of every precision; precisions that are no use are dropped before they are
    scored; downcasts, whose error vectors make the Gram matrix; random schedules, which say whether it or its diagonal
    alone predicts better; the schedule of least predicted error; the guard, in which it has to win against rules of thumb. A
    budget in picture quality is met by measurement instead. On the validation samples: how the schedule compares.

    Args:
        sets: what is measured on.
        latencies_ms: measured step latency of every precision, and of a reused step as `REUSE` where steps may be reused;
            keep them in the journal (`Journal.remember`), so that a resumed run has the same.
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

    built = LatencyModel(evaluator.precisions, latencies_ms, options.costs, latencies_ms.get(REUSE))
    uniform = _uniform_runs(calibration, built.precisions, partial(report, "calibration runs"))
    kept, dropped = drop_dominated(built, {name: float(typical_errors(found)) for name, found in uniform.items()})
    for loser in dropped:
        calibration.forget(loser.precision)
    scored = score_steps(calibration, replace(built, precisions=kept), options, report)
    reuse: ReuseRecord | None = None
    if options.reuse:
        predictions, reuse = score_reuse(calibration, evaluator, scored.predictions, options.reuse, report)
        scored = replace(scored, predictions=predictions)
    predictions = scored.predictions
    chosen, wording, guarded = choose(calibration, scored, options.budget, report)
    shorter: Runs = []
    if reuse and sets.shorter:
        shorter = fewer_steps(calibration, sets.shorter, chosen, predictions.latency_model, partial(report, FEWER))
    counted = [calibration]
    rows: tuple[ValidationRow, ...] = ()
    if sets.validation:
        counted.append(Measurements("validation", sets.validation, journal, pool))
        rule = best_rule_of(guarded)
        also = reuse_rows(guarded)
        rows = validation_rows(counted[-1], chosen.precisions, built, rule, partial(report, "validation"), also)
        if shorter and shorter[0][1].reason is None:
            rows = (*rows, fewer_steps_row(counted[-1], *shorter[0], rows[0]))
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
            uniform={name: typical_interval(errors) for name, errors in uniform.items()},
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
            quality=QualityRecord(metric=options.budget.metric, target=options.budget.target)
            if isinstance(options.budget, QualityBudget)
            else None,
            schedule=chosen.precisions,
            predicted_error=chosen.error,
            predicted_latency=chosen.latency,
            pareto=tuple(ParetoPoint(**asdict(point)) for point in _thinned(predictions.front)),
            guard=guarded,
            validation=rows,
            transfer=scored.transfer,
            reuse=reuse,
            fewer_steps=tuple(record for _, record in shorter),
        )
    )


def best_rule_of(guarded: GuardRecord | None) -> tuple[str, tuple[str, ...]] | None:
    """Name and schedule of the rule that was best on the calibration samples."""
    if guarded is None or guarded.best_rule is None:
        return None
    trial = next(trial for trial in guarded.candidates if trial.rule == guarded.best_rule)
    return guarded.best_rule, trial.precisions


def reuse_rows(guarded: GuardRecord | None) -> dict[str, tuple[str, ...]]:
    """Schedules of the guard beside one that reuses steps, by name: without reuse, and the best rule that reuses."""
    trials = guarded.candidates if guarded else ()
    found = {}
    for kind, wanted in (("no reuse", ", no reuse"), ("best reuse rule", "every ")):
        named = [(trial, name) for trial in trials for name in trial.names if wanted in name]
        trial, name = min(named, key=lambda pair: pair[0].expected, default=(None, ""))
        if trial and guarded and name != guarded.best_rule:
            found[kind if kind == "no reuse" else f"{kind}: {name}"] = trial.precisions
    return found


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
    if options.reuse and REUSE not in latencies_ms:
        raise ValueError(f"latencies_ms lacks {REUSE}, the step latency of a reused step; give it, or allow no reuse")
    options.require_fit(evaluator.num_steps)
    built = LatencyModel(evaluator.precisions, latencies_ms, options.costs, latencies_ms.get(REUSE))
    integers(built, np.zeros((evaluator.num_steps, len(built.precisions))))  # refuses latencies and costs out of range
    if not isinstance(options.budget, QualityBudget):
        fastest = min(fastest_latency(built, reused, evaluator.num_steps) for reused in (0, options.reuse))
        try:
            require_reachable(options.budget, fastest, evaluator.num_steps, options.costs)
        except BudgetError as error:
            enough = reuse_needed(built, options.budget, evaluator.num_steps) if options.reuse else None
            if enough is None:
                raise
            raise BudgetError(
                f"{error}, or allow more than {options.reuse} reused steps: --reuse {enough} can meet it"
            ) from None
    elif not sets.calibration.decode:
        raise ValueError(f"a budget of {options.budget} needs a decoder of the calibration samples to be measured with")
