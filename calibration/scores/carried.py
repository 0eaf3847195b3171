"""Downcasts from scores carried over from another calibration, checked by a few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from calibration.document import Sensitivity
from calibration.measure.measurements import ErrorVector, Measurements
from calibration.measure.metrics import typical_error
from calibration.records import CheckRecord, TransferRecord
from calibration.scores.bisection import Search
from calibration.scores.gram import Correlations
from calibration.scores.measured_gram import stored_correlations
from calibration.scores.single_step import Downcasts, vectors_of
from calibration.scores.transfer import (
    MAX_SCATTER,
    StepAxis,
    TransferError,
    carry,
    carry_positions,
    check_steps,
    compare,
)

OnCheck = Callable[[str, int, int], None]
"""Called after every measured sample with (stage, done, total)."""


@dataclass(frozen=True)
class CarriedScores:
    """Scores of another calibration at the steps of this one.

    Attributes:
        curves: by precision, float64 [T], in units of the other calibration.
        correlations: of the same precisions, at the noise levels where they were measured.
        origin: where they come from; `checks` is filled in by `checked_curves`.
    """

    curves: Mapping[str, np.ndarray]
    correlations: Correlations
    origin: TransferRecord

    def correlations_of(self, precisions: tuple[str, ...]) -> Correlations:
        """Those of some low precisions, in order."""
        pairs = [(a, b) for k, a in enumerate(precisions) for b in precisions[k:]]
        return Correlations(
            {name: self.correlations.positions[name] for name in precisions},
            {pair: self.correlations.values[pair] for pair in pairs},
        )


def carried_scores(found: Sensitivity, source: StepAxis, target: StepAxis) -> CarriedScores:
    """Carries the scores of a calibration, and the correlations of its error vectors, to the steps of another table.

    Args:
        found: the calibration; of a bundle, so that its settings are known.
        source: axis of its sampler table.
        target: axis of the table the scores are wanted for.

    Raises:
        ValueError: `found` has no settings.
        TransferError: see `carry`; or there are no scores.
    """
    if found.settings is None:
        raise ValueError("the calibration to carry scores from has no settings; it is not that of a bundle")
    if found.gram is None:
        raise TransferError(
            "the calibration to carry scores from has none, as it dropped every low precision; calibrate this bundle "
            "without --from"
        )
    origin = TransferRecord(
        bundle_id=found.settings.bundle_id,
        setting=found.settings.setting,
        num_steps=found.num_steps,
        guidance_scale=found.settings.guidance_scale,
        checks=(),
    )
    curves = {record.precision: carry(np.array(record.scores), source, target) for record in found.scores}
    return CarriedScores(curves, _carried_correlations(stored_correlations(found.gram), source, target), origin)


def _carried_correlations(found: Correlations, source: StepAxis, target: StepAxis) -> Correlations:
    positions, kept = {}, {}
    for name, steps in found.positions.items():
        # of steps that fall together, pairs of Heun's at one noise level and all beyond the last one, the last stands for all
        found_at = carry_positions(steps, source, target)
        positions[name], first = np.unique(found_at[::-1], return_index=True)
        kept[name] = len(found_at) - 1 - first
    values = {(a, b): values[np.ix_(kept[a], kept[b])] for (a, b), values in found.values.items()}
    return Correlations({name: tuple(found_at.tolist()) for name, found_at in positions.items()}, values)


def checked_curves(
    measurements: Measurements,
    precisions: tuple[str, ...],
    carried: CarriedScores,
    on_check: OnCheck | None = None,
) -> tuple[list[Downcasts], TransferRecord]:
    """Measures a few downcasts per precision, and gives the carried curves if they agree.

    Costs T - i denoiser calls per sample for every step i of `check_steps`. Measured scores take the place of
    carried ones, which are brought to their level.

    Args:
        measurements: of the calibration samples.
        precisions: those scores are wanted for, the reference first.
        carried: from `carried_scores`.
        on_check: see `OnCheck`.

    Returns:
        Downcasts of every low precision, and the record with the comparisons.

    Raises:
        TransferError: a precision has no carried scores, or they do not hold; the text has the figures.
    """
    missing = [name for name in precisions[1:] if name not in carried.curves]
    if missing:
        raise TransferError(
            f"the calibration to carry scores from has none for {', '.join(missing)}, only for "
            f"{', '.join(carried.curves) or 'no precision'}; calibrate this bundle without --from"
        )
    found = [_checked(measurements, name, carried.curves[name], on_check) for name in precisions[1:]]
    checks = tuple(check for _, check in found)
    return [curve for curve, _ in found], carried.origin.model_copy(update={"checks": checks})


def _checked(
    measurements: Measurements, precision: str, carried: np.ndarray, on_check: OnCheck | None
) -> tuple[Downcasts, CheckRecord]:
    steps = check_steps(measurements.num_steps)
    samples = range(measurements.num_samples)
    for step in steps:
        measurements.expect_downcasts(step, precision)
    runs: list[list[ErrorVector]] = []
    for row, step in enumerate(steps):
        runs.append([])
        for sample in samples:
            runs[row].append(measurements.downcast(step, precision, sample))
            if on_check:
                on_check(f"check {precision}", row * len(samples) + sample + 1, len(steps) * len(samples))
    measured = [typical_error([run.error for run in row]) for row in runs]
    picked = list(steps)
    comparison = compare(carried[picked], np.array(measured))
    check = CheckRecord(
        precision=precision,
        steps=steps,
        carried=tuple(carried[picked].tolist()),
        measured=tuple(measured),
        level=comparison.level,
        scatter=comparison.scatter,
        spearman=comparison.spearman,
    )
    if len(steps) < len(carried) and not comparison.holds:
        raise TransferError(_refusal(check))
    scores = carried * comparison.level
    scores[picked] = measured
    known = np.zeros(len(scores), dtype=bool)
    known[picked] = True
    return Downcasts(precision, Search(scores, known, steps, True), steps, vectors_of(runs)), check


def _refusal(check: CheckRecord) -> str:
    ranks = "" if check.spearman is None else f", rank correlation {check.spearman:.2f}"
    return (
        f"the carried {check.precision} scores do not hold here: measured at steps {', '.join(map(str, check.steps))}, "
        f"they scatter about them by a typical factor of {math.exp(check.scatter):.1f} (limit "
        f"{math.exp(MAX_SCATTER):.1f}){ranks}; calibrate this bundle without --from, which reuses what was measured"
    )
