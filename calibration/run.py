"""Calibration from end to end: measure, search, allocate, validate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from calibration.choose.allocation import (
    Allocation,
    Budget,
    ErrorBudget,
    HighSteps,
    LatencyBudget,
    allocate,
    drop_dominated,
    pareto_front,
    require_reachable,
)
from calibration.choose.costs import NO_COSTS, AllocationCosts
from calibration.choose.picture_budget import QualityBudget, fastest_meeting, rule_schedules
from calibration.choose.rivals import STAGE, refine_schedule
from calibration.document import (
    DroppedRecord,
    ParetoPoint,
    ScoreRecord,
    Sensitivity,
    TransferRecord,
    ValidationRow,
)
from calibration.measure.evaluator import Decode, Evaluator, SampleSet
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import level, mean, psnr_db
from calibration.measure.requests import Pool
from calibration.measure.sample_batches import SampleBatches
from calibration.scores.carried import CarriedScores, checked_curves
from calibration.scores.divergence import affordable, measured_risk, with_risk
from calibration.scores.predictors import PREDICTORS, Contributions, contributions, predict
from calibration.scores.single_step import DIRECTIONS, METHODS, ScoreCurve, measure_scores, sweep_calls
from calibration.validation import best_fit, fit_predictors, validation_rows
from engines.files import sha256_bytes
from engines.schedule import Schedule

log = logging.getLogger(__name__)

DEFAULT_ERROR_FRACTION = 0.25
"""Without a budget: the fastest schedule with at most this fraction of the error predicted for the fastest
uniform precision. A quarter of the squared error is half the amplitude, 6 dB, what one more bit would give:
clearly better than uniform, and where few steps carry most of the error, close to its speed."""

PARETO_POINTS = 200
"""Points of the Pareto front that the document keeps; allocation uses all of them."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a search that settles early stops short of its total."""


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


def open_journal(
    path: Path, evaluator: Evaluator, validation: Evaluator | None = None, *, restart: bool = False
) -> Journal:
    """The journal for a calibration with these evaluators; pass it to `calibrate`.

    Method and budget are no part of its key: a measurement does not depend on them, so another budget or a
    full sweep after a bisection reuses what is there (and counts it as its own).

    Raises:
        JournalError: the file belongs to other evaluators, or is damaged; `restart` replaces it.
    """
    parameters = {
        "num_steps": evaluator.num_steps,
        "num_samples": evaluator.num_samples,
        "validation_samples": validation.num_samples if validation else 0,
        "precisions": list(evaluator.precisions),
    }
    return Journal.open(path, _journal_key(evaluator, validation), parameters, restart=restart)


def calibrate(
    evaluator: Evaluator,
    latencies_ms: Mapping[str, float],
    *,
    method: Literal["bisection", "sweep"] = "bisection",
    budget: Budget | QualityBudget | None = None,
    validation: Evaluator | None = None,
    decode: Decode | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
    max_evaluations: int | None = None,
    costs: AllocationCosts = NO_COSTS,
    pool: Pool | None = None,
    carried: CarriedScores | None = None,
    refine_calls: int | None = None,
) -> CalibrationResult:
    """Measures how each step suffers from each precision and finds a schedule under a budget.

    Order: uniform runs of every precision; precisions that are no use are dropped before they are scored;
    downcast and upcast scores; the predictor that fits random schedules best (on the validation samples);
    allocation, by its predictions and the risk of another picture (`calibration.scores.divergence`); a local search around its choice,
    measured on the calibration samples; the schedule that comes out and the baselines on the validation samples.

    Args:
        evaluator: the loop over the calibration samples.
        latencies_ms: measured step latency of every precision; keep them in the journal
            (`Journal.remember`), so that a resumed run has the same.
        method: "bisection" evaluates as few steps as the ranking needs, "sweep" all.
        budget: what the schedule has to meet; None: see `DEFAULT_ERROR_FRACTION`. A quality budget is met by
            measurement on the validation samples, and needs those and `decode`.
        validation: the loop over samples that calibration does not use. None: predictors are compared on the
            calibration samples, and no schedule is validated.
        decode: final latents of the validation samples to pictures, for SSIM and PSNR.
        journal: from `open_journal`, to survive interruption; None keeps measurements in memory.
        progress: see `Progress`.
        max_evaluations: evaluations per score curve of the bisection, see `adaptive_bisection`.
        costs: what a change of precision costs, and how many precisions a schedule may use.
        pool: takes the measurements, of sets of samples named "calibration" and "validation"; `evaluator` and
            `validation` are then asked for no step, nor `decode` for a picture. None: `SampleBatches`, one sample
            at a time. The result is the same.
        carried: scores of another calibration, which take the place of a search where a few measurements agree
            with them; `method` has then no say.
        refine_calls: denoiser calls the local search may take, None for as many as the scores took, 0 for none.
            A budget in picture quality is met by measurement already, and is not refined.

    Raises:
        BudgetError: no schedule meets the budget. A latency or step budget is refused before anything is measured; an
            error budget afterwards, and what was measured stays in the journal.
        TransferError: the carried scores do not hold; what was measured stays in the journal.
        TmpDiffError: a run gave latents that are not finite.
        ValueError: the arguments do not fit together.
    """
    _check(evaluator, latencies_ms, method, validation, journal)
    if refine_calls is not None and refine_calls < 0:
        raise ValueError(f"refine_calls is {refine_calls}, expected 0 or more, or None for as many as the scores take")
    if isinstance(budget, QualityBudget) and not (validation and decode):
        raise ValueError(f"a budget of {budget} needs validation samples and a decoder to be measured with")
    fastest = min(latencies_ms[name] for name in evaluator.precisions) / latencies_ms[evaluator.precisions[0]]
    if not isinstance(budget, QualityBudget):
        require_reachable(budget, fastest, evaluator.num_steps, costs)
    journal = journal or Journal.in_memory(_journal_key(evaluator, validation))
    report = progress or (lambda stage, done, total: None)
    sets = {"calibration": SampleSet(evaluator)}
    if validation:
        sets["validation"] = SampleSet(validation, decode)
    pool = pool or SampleBatches(sets)
    calibration = Measurements("calibration", sets["calibration"], journal, pool)
    held_out = Measurements("validation", sets["validation"], journal, pool) if validation else None

    uniform = _uniform_errors(calibration, evaluator.precisions, partial(report, "calibration runs"))
    kept, dropped = drop_dominated(evaluator.precisions, latencies_ms, uniform, costs)
    for loser in dropped:
        calibration.forget(loser.precision)
    transfer: TransferRecord | None = None
    if carried:
        curves, transfer = checked_curves(calibration, kept, carried, report)
    else:
        curves = [
            measure_scores(
                calibration,
                precision,
                direction,
                method=method,
                max_evaluations=max_evaluations,
                on_evaluation=partial(report, f"{direction} {precision}"),
            )
            for precision in kept[1:]
            for direction in DIRECTIONS
        ]
    risks = {
        curve.precision: measured_risk(calibration, curve.precision, curve.search)
        for curve in curves
        if curve.direction == "downcast"
    }
    search_calls = sum(sum(_score_calls(curve, calibration).values()) for curve in curves)
    values = _contributions(kept, curves, uniform, evaluator.num_steps)

    if held_out:
        _uniform_errors(held_out, evaluator.precisions, partial(report, "validation runs"))
    fits, points = fit_predictors(held_out or calibration, kept, values, partial(report, "fit"))
    predictor = best_fit(fits)
    # what schedules are chosen by: fits are those of limited means, to which the risk of another picture is added
    risks = affordable(values[predictor], kept, risks)
    weighed = {name: with_risk(found, kept, risks) for name, found in values.items()}
    records = tuple(_score_record(curve, calibration, risks) for curve in curves)
    front = pareto_front(kept, latencies_ms, weighed[predictor].values, weighed[predictor].power, costs)
    if isinstance(budget, QualityBudget):
        assert held_out is not None  # checked above
        rules = rule_schedules(kept, latencies_ms, weighed[predictor], costs)
        chosen, wording = _meet_quality(front, rules, budget, held_out, partial(report, "quality"))
        refinement = None
    else:
        chosen, wording = _choose(kept, latencies_ms, weighed[predictor], budget, front, costs)
        chosen, refinement = refine_schedule(
            calibration,
            chosen,
            budget,
            kept,
            latencies_ms,
            costs,
            weighed,
            values[predictor],
            predictor,
            front,
            search_calls if refine_calls is None else refine_calls,
            partial(report, STAGE),
        )

    rows: tuple[ValidationRow, ...] = ()
    if held_out:
        rows = validation_rows(
            held_out, chosen.precisions, evaluator.precisions, latencies_ms, partial(report, "validation"), costs
        )
    for measurements in filter(None, (calibration, held_out)):
        if measurements.recomputed:
            log.info("%s: recomputed_calls %s after resuming", measurements.name, dict(measurements.recomputed))
    return CalibrationResult(
        Sensitivity(
            evaluator_key=evaluator.key(),
            validation_key=validation.key() if validation else None,
            method="transfer" if transfer else method,
            num_steps=evaluator.num_steps,
            num_samples=evaluator.num_samples,
            precisions=evaluator.precisions,
            swap_ms=costs.by_pair(evaluator.precisions),
            max_engines=costs.max_engines,
            latencies_ms={name: float(latencies_ms[name]) for name in evaluator.precisions},
            uniform_errors=uniform,
            dropped=tuple(DroppedRecord(**asdict(loser)) for loser in dropped),
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
            pareto=tuple(ParetoPoint(**asdict(point)) for point in _thinned(front)),
            pareto_size=len(front),
            validation=rows,
            refinement=refinement,
            transfer=transfer,
        )
    )


def _uniform_errors(
    measurements: Measurements, precisions: tuple[str, ...], report: Callable[[int, int], None]
) -> dict[str, float]:
    """E(all p) by precision, 0 for the reference."""
    errors: dict[str, float] = {}
    done, total = 0, len(precisions) * measurements.num_samples
    measurements.expect([(precision,) * measurements.num_steps for precision in precisions], pictures=True)
    for precision in precisions:
        samples = []
        for sample in range(measurements.num_samples):
            samples.append(measurements.uniform_error(precision, sample)["error"])
            done += 1
            report(done, total)
        errors[precision] = level(samples)
    return errors


def _contributions(
    kept: tuple[str, ...], curves: list[ScoreCurve], uniform: dict[str, float], num_steps: int
) -> dict[str, Contributions]:
    if not curves:
        return {predictor: Contributions(np.zeros((num_steps, 1))) for predictor in PREDICTORS}
    scores: dict[tuple[str, str], np.ndarray] = {
        (curve.direction, curve.precision): curve.search.scores for curve in curves
    }
    return {predictor: contributions(predictor, kept, scores, uniform) for predictor in PREDICTORS}


def _choose(
    kept: tuple[str, ...],
    latencies_ms: Mapping[str, float],
    found: Contributions,
    budget: Budget | None,
    front: tuple[Allocation, ...],
    costs: AllocationCosts,
) -> tuple[Allocation, str]:
    """The schedule under the budget, and the budget in words."""
    if budget is None:
        fastest = min(range(len(kept)), key=lambda p: latencies_ms[kept[p]])
        budget = ErrorBudget(DEFAULT_ERROR_FRACTION * predict(found, kept, (kept[fastest],) * len(found.values)))
        wording = f"default budget: at most {DEFAULT_ERROR_FRACTION:g} of the error of uniform {kept[fastest]}"
    elif isinstance(budget, LatencyBudget):
        wording = f"latency at most {budget.ratio:g} of {kept[0]}"
    elif isinstance(budget, ErrorBudget):
        wording = f"predicted error at most {budget.error:g}"
    elif isinstance(budget, HighSteps):
        wording = f"{budget.count} step{'s' * (budget.count != 1)} at {kept[0]}"
    return allocate(kept, latencies_ms, found.values, budget, found.power, front, costs), wording


def _meet_quality(
    front: tuple[Allocation, ...],
    rules: Mapping[str, list[Allocation]],
    budget: QualityBudget,
    held_out: Measurements,
    report: Callable[[int, int], None],
) -> tuple[Allocation, str]:
    """The fastest schedule that meets a quality budget on the validation samples, and the budget in words."""
    tried = [front, *rules.values()]
    done, total = 0, (sum(len(schedules).bit_length() for schedules in tried) + 1) * held_out.num_samples

    def measure(allocation: Allocation) -> float:
        nonlocal done
        held_out.expect([allocation.precisions], pictures=True)
        results = []
        for sample in range(held_out.num_samples):
            results.append(held_out.schedule_error("quality", allocation.precisions, sample, pictures=True))
            done += 1
            report(done, total)
        if budget.metric == "ssim":
            return mean([result["ssim"] for result in results])
        found = psnr_db([result["mse"] for result in results])
        return math.inf if found is None else found

    chosen, quality = fastest_meeting(front, rules.values(), budget, measure)
    name = next((name for name, rule in rules.items() if chosen in rule and chosen not in front), None)
    return (
        chosen,
        f"{budget} on the validation samples (measured: {quality:.4g}{f', by the rule {name!r}' if name else ''})",
    )


def _thinned(front: tuple[Allocation, ...]) -> tuple[Allocation, ...]:
    """At most `PARETO_POINTS` of the front, spread over it, both ends among them."""
    if len(front) <= PARETO_POINTS:
        return front
    return tuple(front[round(k)] for k in np.linspace(0, len(front) - 1, PARETO_POINTS))


def _score_calls(curve: ScoreCurve, calibration: Measurements) -> dict[str, int]:
    """Denoiser calls by precision; a carried curve may have cost none."""
    return calibration.calls.get(f"calibration: {curve.direction} {curve.precision}", {})


def _score_record(curve: ScoreCurve, calibration: Measurements, risks: Mapping[str, np.ndarray]) -> ScoreRecord:
    search = curve.search
    risk = risks[curve.precision] if curve.direction == "downcast" else np.zeros(0)
    return ScoreRecord(
        precision=curve.precision,
        direction=curve.direction,
        scores=tuple(search.scores.tolist()),
        risk=tuple(risk.tolist()),
        measured=tuple(search.measured.tolist()),
        order=search.order,
        settled=search.settled,
        calls=_score_calls(curve, calibration),
        sweep_calls=sweep_calls(calibration.num_steps, calibration.num_samples),
    )


def _journal_key(evaluator: Evaluator, validation: Evaluator | None) -> str:
    return sha256_bytes(f"{evaluator.key()} {validation.key() if validation else ''}".encode())


def _check(
    evaluator: Evaluator,
    latencies_ms: Mapping[str, float],
    method: str,
    validation: Evaluator | None,
    journal: Journal | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    missing = [name for name in evaluator.precisions if name not in latencies_ms]
    if missing:
        raise ValueError(f"latencies_ms lacks {', '.join(missing)}; give the step latency of every precision")
    for which in filter(None, (evaluator, validation)):
        if which.num_samples < 1:
            raise ValueError("an evaluator has no samples; give it at least one prompt")
    if validation and (validation.num_steps, validation.precisions) != (
        evaluator.num_steps,
        evaluator.precisions,
    ):
        raise ValueError("validation runs another number of steps or other precisions than calibration")
    if journal and journal.key != _journal_key(evaluator, validation):
        raise ValueError("the journal was opened for other evaluators; open it with open_journal")
