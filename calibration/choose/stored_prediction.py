"""What a stored calibration predicts for any schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.document import Sensitivity
from calibration.scores.gram import Gram
from calibration.scores.measured_gram import gram_of


def stored_gram(found: Sensitivity) -> Gram | None:
    """The Gram matrix of a calibration, whichever predictor it used; None where every low precision was dropped."""
    if found.gram is None:
        return None
    return gram_of(found.precisions[0], found.scores, found.gram)


class StoredPrediction:
    """Error and latency of schedules by the scores, predictor and latencies of a calibration.

    Attributes:
        precisions: the reference and the low precisions that have scores.
        gram: what errors are predicted by, the diagonal only for predictor "downcast sum"; None without scores.
    """

    def __init__(self, found: Sensitivity) -> None:
        """Works the matrix out once.

        Args:
            found: the calibration.
        """
        whole = stored_gram(found)
        self.gram = whole.downcast_sum() if whole and found.predictor == "downcast sum" else whole
        self.precisions = whole.precisions if whole else found.precisions[:1]
        pairs = permutations(found.precisions, 2)
        costs = AllocationCosts({(a, b): found.swap_ms.get(f"{a} {b}", 0.0) for a, b in pairs})
        self._latency_model = LatencyModel(found.precisions, found.latencies_ms, costs)

    def error(self, schedule: Sequence[str]) -> float:
        """Predicted E of a schedule.

        Raises:
            ValueError: a step is at a precision without scores.
        """
        if unscored := sorted(set(schedule) - set(self.precisions)):
            raise ValueError(f"schedule has steps at {', '.join(unscored)}; scores are of {', '.join(self.precisions)}")
        return self.gram.error(schedule) if self.gram else 0.0

    def latency(self, schedule: Sequence[str]) -> float:
        """Mean step latency of a schedule, changes of precision included, relative to the reference."""
        return self._latency_model.latency(schedule)
