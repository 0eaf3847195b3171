"""Validation: how well scores predict, and how the chosen schedule compares with the baselines."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr

from calibration.choose import baselines
from calibration.choose.costs import LatencyModel
from calibration.document import FitPoint, FitRecord, ValidationRow
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import level, mean, psnr_db
from calibration.scores.predictors import PREDICTORS, Contributions, predict

FIT_SCHEDULES = 8
RANDOM_DRAWS = 3
SEED = 0
LATENCY_TOLERANCE = 1e-9

Schedule = tuple[str, ...]
OnRun = Callable[[int, int], None]
"""Called after every run of a schedule on a sample with (done, total)."""


def random_schedules(precisions: Sequence[str], num_steps: int) -> tuple[Schedule, ...]:
    """Distinct mixed schedules for the fit, at most `FIT_SCHEDULES`; the same for equal arguments.

    Each has between 1 and T - 1 steps at the reference, at random places, and the others at low precisions
    drawn one by one. None for T = 1 or where only the reference is left.
    """
    if num_steps < 2 or len(precisions) < 2:
        return ()
    generator = np.random.default_rng(SEED)
    found: dict[Schedule, None] = {}
    for _ in range(20 * FIT_SCHEDULES):
        schedule = [precisions[1 + k] for k in generator.integers(len(precisions) - 1, size=num_steps)]
        for step in generator.permutation(num_steps)[: generator.integers(1, num_steps)]:
            schedule[step] = precisions[0]
        found[tuple(schedule)] = None
        if len(found) == FIT_SCHEDULES:
            break
    return tuple(found)


def schedule_errors(
    measurements: Measurements, stage: str, schedules: Sequence[Schedule], on_run: OnRun | None = None
) -> list[float]:
    """Measured E of each schedule, as scores have it (`calibration.measure.metrics.level`)."""
    runs = [(schedule, sample) for schedule in schedules for sample in range(measurements.num_samples)]
    errors: dict[Schedule, list[float]] = {schedule: [] for schedule in schedules}
    measurements.expect(schedules, pictures=False)
    for done, (schedule, sample) in enumerate(runs, start=1):
        values = measurements.schedule_error(stage, schedule, sample, pictures=False)
        errors[schedule].append(values["error"])
        if on_run:
            on_run(done, len(runs))
    return [level(errors[schedule]) for schedule in schedules]


def fit(predictor: str, predicted: Sequence[float], measured: Sequence[float]) -> FitRecord:
    """How well predicted errors describe measured ones."""
    ratio = sum(predicted) / sum(measured) if sum(measured) > 0 else None
    if len(measured) < 3 or len(set(measured)) == 1 or len(set(predicted)) == 1:
        return FitRecord(predictor=predictor, r2=None, spearman=None, ratio=ratio)
    return FitRecord(
        predictor=predictor,
        r2=float(pearsonr(predicted, measured).statistic) ** 2,
        spearman=float(spearmanr(predicted, measured).statistic),
        ratio=ratio,
    )


def fit_predictors(
    measurements: Measurements,
    kept: tuple[str, ...],
    values: Mapping[str, Contributions],
    on_run: OnRun | None = None,
) -> tuple[tuple[FitRecord, ...], tuple[FitPoint, ...]]:
    """Measures random schedules and compares every predictor with them.

    Args:
        measurements: of the samples to compare on.
        kept: the precisions left, the reference first.
        values: contributions by predictor.
        on_run: see `OnRun`.

    Returns:
        A record per predictor, in order of `PREDICTORS`, and the schedules with measured and predicted E.
    """
    schedules = random_schedules(kept, measurements.num_steps)
    measured = schedule_errors(measurements, "fit", schedules, on_run)
    predicted = {name: [predict(values[name], kept, schedule) for schedule in schedules] for name in PREDICTORS}
    points = tuple(
        FitPoint(
            precisions=schedule,
            measured=measured[k],
            predicted={name: predicted[name][k] for name in PREDICTORS},
        )
        for k, schedule in enumerate(schedules)
    )
    return tuple(fit(name, predicted[name], measured) for name in PREDICTORS), points


def best_fit(records: Sequence[FitRecord]) -> str:
    """The predictor with the highest R^2; of equal ones the one whose level (`ratio`) is nearest to right.

    A falling relation counts as none. Without any figures, the first.
    """

    def quality(record: FitRecord) -> tuple[float, float]:
        r2 = record.r2 if record.r2 is not None and (record.spearman or 0) > 0 else -1.0
        level = -abs(math.log(record.ratio)) if record.ratio else -1e9
        return round(r2, 9), round(level, 6)

    return max(records, key=quality).predictor


def validation_rows(
    measurements: Measurements,
    chosen: Schedule,
    latency_model: LatencyModel,
    on_run: OnRun | None = None,
) -> tuple[ValidationRow, ...]:
    """Runs the chosen schedule and every baseline on the validation samples.

    Args:
        measurements: of the validation samples.
        chosen: the schedule under test.
        latency_model: all built precisions in order of precision (the pool of the baselines is sorted by it).
        on_run: see `OnRun`.

    Returns:
        The chosen schedule first, then uniform schedules, then baselines with the same number of steps per
        precision: of the same latency, unless changes cost something. A schedule that several names stand for
        is run once.
    """
    precisions = latency_model.precisions
    pool = sorted(chosen, key=list(precisions).index)
    generator = np.random.default_rng(SEED)
    count = chosen.count(precisions[0])
    named: dict[str, tuple[Schedule, ...]] = {
        "schedule": (chosen,),
        **{f"uniform {name}": ((name,) * len(chosen),) for name in precisions},
        **{name: (schedule,) for name, schedule in baselines.fixed_rules(chosen, precisions).items()},
        f"random {count}": tuple(baselines.shuffled(pool, generator) for _ in range(RANDOM_DRAWS)),
    }
    # uniform runs first: the others share their prefixes
    order = sorted(named, key=lambda name: not name.startswith("uniform"))
    total = sum(len(schedules) for schedules in named.values()) * measurements.num_samples
    done = 0
    measurements.expect([schedule for name in order for schedule in named[name]], pictures=True)
    rows: dict[str, ValidationRow] = {}
    for name in order:
        draws: list[list[dict[str, float]]] = []
        for schedule in named[name]:
            values = []
            for sample in range(measurements.num_samples):
                values.append(measurements.schedule_error("schedules", schedule, sample, pictures=True))
                done += 1
                if on_run:
                    on_run(done, total)
            draws.append(values)
        latency = mean([latency_model.latency(drawn) for drawn in named[name]])
        rows[name] = _row(name, named[name], draws, latency)
    schedule_row = rows["schedule"]
    winners = tuple(
        name
        for name, row in rows.items()
        if row.error < schedule_row.error and row.latency <= schedule_row.latency * (1 + LATENCY_TOLERANCE)
    )
    rows["schedule"] = schedule_row.model_copy(update={"loses_to": winners})
    return tuple(rows[name] for name in named)


def _row(
    name: str, schedules: tuple[Schedule, ...], draws: list[list[dict[str, float]]], latency: float
) -> ValidationRow:
    errors = [mean([value["error"] for value in values]) for values in draws]
    values = [value for values in draws for value in values]
    pictures = "ssim" in values[0]
    return ValidationRow(
        name=name,
        schedules=schedules,
        counts=dict(Counter(schedules[0])),
        latency=latency,
        error=mean(errors),
        error_spread=statistics.stdev(errors) if len(errors) > 1 else None,
        sample_errors=tuple(mean([value["error"] for value in column]) for column in zip(*draws, strict=True)),
        ssim=mean([value["ssim"] for value in values]) if pictures else None,
        psnr_db=psnr_db([value["mse"] for value in values]) if pictures else None,
    )
