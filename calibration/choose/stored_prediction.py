"""What a stored calibration predicts for any schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from calibration.choose.costs import AllocationCosts, LatencyModel
from calibration.choose.joint import ReusePlan, plan_of, predicted_error
from calibration.document import Sensitivity
from calibration.reuse_records import ReuseRecord
from calibration.scores.gram import Gram
from calibration.scores.measured_gram import gram_of
from engines.reuse import REUSES, reused_steps


def stored_gram(found: Sensitivity) -> Gram | None:
    """The Gram matrix of a calibration, whichever predictor it used; None where every low precision was dropped."""
    if found.gram is None:
        return None
    return gram_of(found.precisions[0], found.scores, found.gram)


def stored_plans(record: ReuseRecord) -> tuple[ReusePlan, ...]:
    """The reuse plans of a document."""
    return tuple(
        ReusePlan(plan.choices, plan.measured, plan.predicted, np.array(plan.influence), plan.rule)
        for plan in record.plans
    )


class StoredPrediction:
    """Error and latency of schedules by the scores, predictor and latencies of a calibration.

    Attributes:
        precisions: the reference and the low precisions that have scores.
        gram: what errors are predicted by, the diagonal only for predictor "downcast sum"; None without scores.
        plans: which steps may be reused.
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
        self.plans = stored_plans(found.reuse) if found.reuse else ()
        reuse_ms = found.reuse.step_ms if found.reuse else None
        self._latency_model = LatencyModel(found.precisions, found.latencies_ms, costs, reuse_ms)

    def error(self, schedule: Sequence[str]) -> float:
        """Predicted E of a schedule.

        Raises:
            ValueError: a step is at a precision without scores, or steps are reused as no plan does.
        """
        if unscored := sorted(set(schedule) - {*self.precisions, *REUSES}):
            raise ValueError(f"schedule has steps at {', '.join(unscored)}; scores are of {', '.join(self.precisions)}")
        if self.gram is None:
            plan = plan_of(self.plans, schedule)
            return plan.error if plan else 0.0
        return predicted_error(self.gram, self.plans, schedule)

    def predicts(self, schedule: Sequence[str]) -> bool:
        """Whether `error` has an answer."""
        try:
            self.error(schedule)
        except ValueError:
            return False
        return True

    def latency(self, schedule: Sequence[str]) -> float:
        """Mean step latency of a schedule, changes of precision included, relative to the reference.

        Raises:
            ValueError: steps are reused, and the calibration did not time a reused step.
        """
        return self._latency_model.latency(schedule)

    def times(self, schedule: Sequence[str]) -> bool:
        """Whether `latency` has an answer."""
        return self._latency_model.reuse_ms is not None or not reused_steps(schedule)
