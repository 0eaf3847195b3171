"""How well predictions describe measured errors of random schedules, and which predictor is the better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr

from calibration.measure.measurements import Measurements
from calibration.measure.metrics import typical_error
from calibration.records import PREDICTORS, FitPoint, FitRecord, Predictor
from calibration.scores.gram import Gram

FIT_SCHEDULES = 8
FIT_SAMPLES = 48
"""Most samples they run on: of more, the noise of the mean is no longer what hides a difference between predictors."""

STAGE = "fit"
SEED = 0

Schedule = tuple[str, ...]


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


def measure_fit(
    measurements: Measurements, grams: Mapping[Predictor, Gram], on_run: Callable[[int, int], None] | None = None
) -> tuple[tuple[FitRecord, ...], tuple[FitPoint, ...]]:
    """Measures random schedules on calibration samples and compares both predictors with them.

    Args:
        measurements: of the calibration samples.
        grams: by predictor.
        on_run: called after every run of a schedule on a sample with (done, total).

    Returns:
        A record per predictor, in order of `PREDICTORS`, and the schedules with measured and predicted E.
    """
    schedules = random_schedules(grams["gram"].precisions, measurements.num_steps)
    samples = range(min(measurements.num_samples, FIT_SAMPLES))
    measurements.expect(schedules, pictures=False, samples=samples)
    points: list[FitPoint] = []
    for schedule in schedules:
        errors = []
        for sample in samples:
            errors.append(measurements.schedule_error(STAGE, schedule, sample, pictures=False)["error"])
            if on_run:
                on_run(len(points) * len(samples) + len(errors), len(schedules) * len(samples))
        predicted = {name: grams[name].error(schedule) for name in PREDICTORS}
        points.append(FitPoint(precisions=schedule, measured=typical_error(errors), predicted=predicted))
    measured = [point.measured for point in points]
    return tuple(fit(name, [point.predicted[name] for point in points], measured) for name in PREDICTORS), tuple(points)


def fit(predictor: Predictor, predicted: Sequence[float], measured: Sequence[float]) -> FitRecord:
    """How well predicted errors describe measured ones."""
    ratio = sum(predicted) / sum(measured) if sum(measured) > 0 else None
    scatter = None
    if measured and min(*measured, *predicted) > 0:
        scatter = math.sqrt(float(np.mean(np.log(np.divide(predicted, measured)) ** 2)))
    r2 = spearman = None
    if len(measured) >= 3 and len(set(measured)) > 1 and len(set(predicted)) > 1:
        r2 = float(pearsonr(predicted, measured).statistic) ** 2
        spearman = float(spearmanr(predicted, measured).statistic)
    return FitRecord(predictor=predictor, r2=r2, spearman=spearman, ratio=ratio, scatter=scatter)


def best_fit(records: Sequence[FitRecord]) -> Predictor:
    """The predictor with the highest R^2, where a falling relation counts as none; without any figures, the first."""

    def quality(record: FitRecord) -> float:
        return round(record.r2, 9) if record.r2 is not None and (record.spearman or 0) > 0 else -1.0

    return max(records, key=quality).predictor
