"""What a stored calibration predicts for any schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.document import Sensitivity
from calibration.scores.divergence import with_risk
from calibration.scores.predictors import contributions, predict


class StoredPrediction:
    """Error and latency of schedules by the scores, predictor and latencies of a calibration.

    Attributes:
        precisions: the reference and the low precisions that have scores.
    """

    def __init__(self, found: Sensitivity) -> None:
        """Works out contributions once.

        Args:
            found: the calibration.
        """
        scored = {record.precision for record in found.scores}
        reference, *low = found.precisions
        self.precisions = (reference, *(name for name in low if name in scored))
        pairs = permutations(found.precisions, 2)
        costs = AllocationCosts({(a, b): found.swap_ms.get(f"{a} {b}", 0.0) for a, b in pairs})
        self._candidates = LatencyModel(found.precisions, found.latencies_ms, costs)
        curves: dict[tuple[str, str], np.ndarray] = {
            (record.direction, record.precision): np.array(record.scores) for record in found.scores
        }
        risks = {record.precision: record.risk for record in found.scores if record.direction == "downcast"}
        self._contributions = None
        if curves:
            fitted = contributions(found.predictor, self.precisions, curves, found.uniform_errors)
            self._contributions = with_risk(fitted, self.precisions, risks)

    def error(self, schedule: Sequence[str]) -> float | None:
        """Predicted E of a schedule; None where a step is at a precision without scores."""
        if not set(schedule) <= set(self.precisions):
            return None
        return predict(self._contributions, self.precisions, tuple(schedule)) if self._contributions else 0.0

    def latency(self, schedule: Sequence[str]) -> float:
        """Mean step latency of a schedule, changes of precision included, relative to the reference."""
        return self._candidates.latency(schedule)
