"""What a stored calibration predicts for any schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.document import Sensitivity
from calibration.scores.gram import Gram
from calibration.scores.measured_gram import stored_gram


class StoredPrediction:
    """Error and latency of schedules by the Gram matrix and the latencies of a calibration.

    Attributes:
        precisions: the reference and the low precisions that have scores.
        gram: what errors are predicted by; None where no precision has scores.
    """

    def __init__(self, found: Sensitivity) -> None:
        """Makes the Gram matrix anew.

        Args:
            found: the calibration.
        """
        scored = {record.precision for record in found.scores}
        reference, *low = found.precisions
        self.precisions = (reference, *(name for name in low if name in scored))
        pairs = permutations(found.precisions, 2)
        costs = AllocationCosts({(a, b): found.swap_ms.get(f"{a} {b}", 0.0) for a, b in pairs})
        self._latency_model = LatencyModel(found.precisions, found.latencies_ms, costs)
        self.gram: Gram | None = None
        if found.gram:
            gram = stored_gram(reference, found.scores, found.gram)
            self.gram = gram if found.predictor == "gram" else gram.downcast_sum()

    def error(self, schedule: Sequence[str]) -> float | None:
        """Predicted E of a schedule; None where a step is at a precision without scores."""
        if not set(schedule) <= set(self.precisions):
            return None
        return self.gram.error(schedule) if self.gram else 0.0

    def latency(self, schedule: Sequence[str]) -> float:
        """Mean step latency of a schedule, changes of precision included, relative to the reference."""
        return self._latency_model.latency(schedule)
