"""Score curves from scores carried over from another calibration, checked by a few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from calibration.document import CheckRecord, Sensitivity, TransferRecord
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import level
from calibration.scores.bisection import Search
from calibration.scores.single_step import DIRECTIONS, Direction, ScoreCurve
from calibration.scores.transfer import MAX_SCATTER, StepAxis, TransferError, carry, check_steps, compare

OnCheck = Callable[[str, int, int], None]
"""Called after every measured sample with (stage, done, total)."""


@dataclass(frozen=True)
class CarriedScores:
    """Scores of another calibration at the steps of this one.

    Attributes:
        curves: by (direction, precision), float64 [T]. Downcast scores are in units of the other calibration, upcast
            scores relative to E(all p), so that they add up to what they added up to there.
        origin: where they come from; `checks` is filled in by `checked_curves`.
    """

    curves: Mapping[tuple[Direction, str], np.ndarray]
    origin: TransferRecord


def carried_scores(found: Sensitivity, source: StepAxis, target: StepAxis) -> CarriedScores:
    """Carries every score curve of a calibration to the steps of another table.

    Args:
        found: the calibration; of a bundle, so that its settings are known.
        source: axis of its sampler table.
        target: axis of the table the scores are wanted for.

    Raises:
        ValueError: `found` has no settings.
        TransferError: see `carry`.
    """
    if found.settings is None:
        raise ValueError("the calibration to carry scores from has no settings; it is not that of a bundle")
    curves: dict[tuple[Direction, str], np.ndarray] = {}
    for record in found.scores:
        scores = np.array(record.scores)
        curve = carry(scores, source, target)
        if record.direction == "upcast" and curve.any():
            total = float(np.maximum(scores, 0.0).sum())
            curve *= total / (found.uniform_errors[record.precision] * curve.sum())
        curves[record.direction, record.precision] = curve
    origin = TransferRecord(
        bundle_id=found.settings.bundle_id,
        num_steps=found.num_steps,
        guidance_scale=found.settings.guidance_scale,
        checks=(),
    )
    return CarriedScores(curves, origin)


def checked_curves(
    measurements: Measurements,
    precisions: tuple[str, ...],
    carried: CarriedScores,
    on_check: OnCheck | None = None,
) -> tuple[list[ScoreCurve], TransferRecord]:
    """Measures a few downcasts per precision, and gives the carried curves if they agree.

    Costs T - i denoiser calls per sample for every step i of `check_steps`. Measured scores take the place of
    carried ones, which are brought to their level; upcast scores, which are not checked, take E(all p) as measured.

    Args:
        measurements: of the calibration samples.
        precisions: those scores are wanted for, the reference first.
        carried: from `carried_scores`.
        on_check: see `OnCheck`.

    Returns:
        Curves in both directions for every low precision, and the record with the comparisons.

    Raises:
        TransferError: a precision has no carried scores, or they do not hold; the text has the figures.
    """
    missing = [name for name in precisions[1:] if any((side, name) not in carried.curves for side in DIRECTIONS)]
    if missing:
        known = dict.fromkeys(name for _, name in carried.curves)
        raise TransferError(
            f"the calibration to carry scores from has none for {', '.join(missing)}, only for "
            f"{', '.join(known) or 'no precision'}; calibrate this bundle without --from"
        )
    curves: list[ScoreCurve] = []
    checks: list[CheckRecord] = []
    for precision in precisions[1:]:
        curve, check = _checked(measurements, precision, carried.curves["downcast", precision], on_check)
        uniform = [measurements.uniform_error(precision, s)["error"] for s in range(measurements.num_samples)]
        upcast = carried.curves["upcast", precision] * level(uniform)
        nothing = np.zeros(len(upcast), dtype=bool)
        curves += [curve, ScoreCurve(precision, "upcast", Search(upcast, nothing, (), True))]
        checks.append(check)
    return curves, carried.origin.model_copy(update={"checks": tuple(checks)})


def _checked(
    measurements: Measurements, precision: str, carried: np.ndarray, on_check: OnCheck | None
) -> tuple[ScoreCurve, CheckRecord]:
    steps = check_steps(measurements.num_steps)
    samples = range(measurements.num_samples)
    measured: list[float] = []
    for step in steps:
        measurements.expect_downcasts(step, precision)
    for step in steps:
        errors = []
        for sample in samples:
            errors.append(measurements.downcast(step, precision, sample).error)
            if on_check:
                done = len(measured) * len(samples) + len(errors)
                on_check(f"check {precision}", done, len(steps) * len(samples))
        measured.append(level(errors))
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
    return ScoreCurve(precision, "downcast", Search(scores, known, steps, True)), check


def _refusal(check: CheckRecord) -> str:
    ranks = "" if check.spearman is None else f", rank correlation {check.spearman:.2f}"
    return (
        f"the carried {check.precision} scores do not hold here: measured at steps {', '.join(map(str, check.steps))}, "
        f"they scatter about them by a typical factor of {math.exp(check.scatter):.1f} (limit "
        f"{math.exp(MAX_SCATTER):.1f}){ranks}; calibrate this bundle without --from, which reuses what was measured"
    )
