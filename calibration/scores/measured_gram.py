"""The Gram matrix of a calibration: from what was measured, to what is stored, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.measure.measurements import Measurements
from calibration.records import CorrelationRecord, GramRecord, ScoreRecord
from calibration.scores.gram import Correlations, Gram, correlate, gram, rounding_floor
from calibration.scores.single_step import Downcasts, vectors_of


@dataclass(frozen=True)
class MeasuredGram:
    """A Gram matrix, and what beside the scores it is made of."""

    gram: Gram
    correlations: Correlations
    floor: np.ndarray

    def record(self) -> GramRecord:
        """What is stored of it."""
        return GramRecord(
            positions=dict(self.correlations.positions),
            correlations=tuple(
                CorrelationRecord(first=first, second=second, values=tuple(map(tuple, values.tolist())))
                for (first, second), values in self.correlations.values.items()
            ),
            floor=tuple(self.floor.tolist()),
        )


def measured_gram(
    measurements: Measurements, curves: Sequence[Downcasts], correlations: Correlations | None = None
) -> MeasuredGram:
    """The Gram matrix of measured downcasts, without the floor of the reference's own rounding.

    Costs one more run of the reference per sample, which shows that floor; nothing where there are no curves.

    Args:
        measurements: of the calibration samples.
        curves: of every low precision, in order.
        correlations: carried ones; None takes those of the vectors in `curves`.
    """
    vectors = {curve.precision: (curve.steps, curve.vectors) for curve in curves}
    found = correlations or correlate(vectors)
    floor = np.zeros(measurements.num_steps)
    if curves:
        measurements.expect_nudged()
        nudged = vectors_of([[measurements.nudged(sample) for sample in range(measurements.num_samples)]])
        floor = rounding_floor(nudged, vectors, measurements.num_steps)
    scores = {curve.precision: curve.search.scores for curve in curves}
    return MeasuredGram(gram(scores, found, floor, measurements.reference), found, floor)


def stored_correlations(record: GramRecord) -> Correlations:
    """The correlations of a document."""
    values = {(item.first, item.second): np.array(item.values) for item in record.correlations}
    return Correlations(record.positions, values)


def gram_of(reference: str, scores: Sequence[ScoreRecord], record: GramRecord) -> Gram:
    """The Gram matrix of a document, equal to the one it was stored from."""
    curves = {curve.precision: np.array(curve.scores) for curve in scores}
    return gram(curves, stored_correlations(record), np.array(record.floor), reference)
