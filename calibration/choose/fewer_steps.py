"""Fewer steps by the scheduler: what a schedule that reuses steps has to beat at the same latency.

No schedule of the setting is as this: it is another loop. So it is measured beside the chosen schedule, on the same
samples, and what comes out is recorded and said.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from calibration.choose.allocation import BUDGET_TOLERANCE
from calibration.choose.costs import LatencyModel
from calibration.choose.pareto import Allocation
from calibration.measure.evaluator import ShorterLoop
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import mean, psnr_db, typical_errors
from calibration.records import ValidationRow
from calibration.reuse_records import FewerStepsRecord
from calibration.statistics import departure_record, ratio_interval, typical_interval
from engines.errors import TmpDiffError

STAGE = "fewer steps"

FIRST_SAMPLES = 8
"""Samples that every precision runs on; the one that errs least goes on to all."""

Shorter = Callable[[int], ShorterLoop]
Runs = list[tuple[ShorterLoop, FewerStepsRecord]]


def fewer_steps(
    measurements: Measurements,
    shorter: Shorter,
    chosen: Allocation,
    latency_model: LatencyModel,
    on_run: Callable[[int, int], None],
) -> Runs:
    """Loops of fewer steps that are no slower than a schedule, uniform in each precision, on calibration samples.

    Args:
        measurements: of the calibration samples.
        shorter: `SampleSets.shorter`.
        chosen: the schedule.
        latency_model: of the precisions that are kept.
        on_run: called after every run on a sample with (done, at most).

    Returns:
        One of every precision with its loop, the best first; those that could not be run have no loop and are not listed
        with one, but with a reason.
    """
    num_samples = measurements.num_samples
    order = np.random.default_rng(0).permutation(num_samples).tolist()
    entries = [_shorter(shorter, chosen, latency_model, name) for name in latency_model.precisions]
    running = [entry for entry in entries if entry[1].reason is None]
    first = order[: min(FIRST_SAMPLES, num_samples)]
    total, done = len(running) * len(first) + num_samples - len(first), 0
    measured: dict[str, np.ndarray] = {}

    def run(loop: ShorterLoop, name: str, samples: Sequence[int]) -> np.ndarray:
        nonlocal done
        measurements.expect_shorter([(loop, name)], pictures=False, samples=samples)
        errors = []
        for sample in samples:
            errors.append(measurements.shorter_error(STAGE, loop, name, sample, pictures=False)["error"])
            done += 1
            on_run(min(done, total), total)
        return np.array(errors)

    for loop, record in running:
        measured[record.precision] = run(loop, record.precision, first)
    running.sort(key=lambda entry: float(typical_errors(measured[entry[1].precision])))
    if running:
        loop, record = running[0]
        rest = run(loop, record.precision, order[len(first) :])
        measured[record.precision] = np.concatenate([measured[record.precision], rest])
    judged = []
    for loop, record in running:
        errors = measured[record.precision]
        judged.append((loop, _judged(measurements, chosen, record, errors, order[: len(errors)])))
    return judged + [entry for entry in entries if entry[1].reason is not None]


def fewer_steps_row(
    measurements: Measurements, loop: ShorterLoop, record: FewerStepsRecord, chosen: ValidationRow
) -> ValidationRow:
    """A loop of fewer steps on validation samples, as a row beside the chosen schedule's."""
    samples = range(measurements.num_samples)
    measurements.expect_shorter([(loop, record.precision)], pictures=True, samples=samples)
    values = [measurements.shorter_error(STAGE, loop, record.precision, k, pictures=True) for k in samples]
    errors = np.array([value["error"] for value in values])
    run = (record.precision,) * loop.num_steps
    return ValidationRow(
        name=record.name,
        schedules=(run,),
        counts=dict(Counter(run)),
        latency=record.latency,
        typical=typical_interval(errors),
        departures=departure_record(errors),
        against=ratio_interval(np.array(chosen.sample_errors), errors[None]),
        error=mean(errors.tolist()),
        sample_errors=tuple(errors.tolist()),
        ssim=mean([value["ssim"] for value in values]) if "ssim" in values[0] else None,
        psnr_db=psnr_db([value["mse"] for value in values]) if "mse" in values[0] else None,
    )


def _shorter(
    shorter: Shorter, chosen: Allocation, latency_model: LatencyModel, precision: str
) -> tuple[ShorterLoop, FewerStepsRecord]:
    num_steps = len(chosen.precisions)
    one = latency_model.latency((precision,))
    most = min(math.floor(chosen.latency * (1 + BUDGET_TOLERANCE) * num_steps / one), num_steps - 1)
    nothing = FewerStepsRecord(
        num_steps=0, precision=precision, latency=0, samples=0, typical=None, against=None, reason=None
    )
    try:
        if most < 1:
            raise TmpDiffError(f"not one step at {precision} is as fast as the schedule")
        loop = shorter(most)
    except TmpDiffError as error:
        return ShorterLoop("", 0), nothing.model_copy(update={"reason": str(error)})
    latency = loop.num_steps * one / num_steps
    return loop, nothing.model_copy(update={"num_steps": loop.num_steps, "latency": latency})


def _judged(
    measurements: Measurements, chosen: Allocation, record: FewerStepsRecord, errors: np.ndarray, samples: Sequence[int]
) -> FewerStepsRecord:
    measurements.expect([chosen.precisions], pictures=False, samples=samples)
    own = [measurements.schedule_error(STAGE, chosen.precisions, k, pictures=False)["error"] for k in samples]
    found = record.model_dump() | {
        "samples": len(errors),
        "typical": typical_interval(errors),
        "against": ratio_interval(np.array(own), errors[None]),
    }
    return FewerStepsRecord.model_validate(found)
