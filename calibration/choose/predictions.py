"""What is predicted of schedules, and the one that predictions choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from calibration.choose.allocation import Budget, ErrorBudget, HighSteps, LatencyBudget
from calibration.choose.costs import LatencyModel
from calibration.choose.joint import ReusePlan, best_joint, joint_front, predicted_error
from calibration.choose.pareto import Allocation
from calibration.records import Predictor
from calibration.scores.gram import Gram

DEFAULT_ERROR_FRACTION = 0.25
"""Without a budget: the fastest schedule with at most this fraction of the error predicted for the fastest
uniform precision. A quarter of the squared error is half the amplitude, 6 dB, what one more bit would give:
clearly better than uniform, and where few steps carry most of the error, close to its speed."""


@dataclass(frozen=True)
class Predictions:
    """What is predicted of schedules.

    Attributes:
        latency_model: what they are made of.
        grams: by predictor, of the precisions of `latency_model`.
        predictor: the one that the front goes by.
        plans: which steps may be reused; empty for none.
    """

    latency_model: LatencyModel
    grams: Mapping[Predictor, Gram]
    predictor: Predictor
    plans: tuple[ReusePlan, ...] = ()

    @property
    def gram(self) -> Gram:
        """That of `predictor`."""
        return self.grams[self.predictor]

    @cached_property
    def front(self) -> tuple[Allocation, ...]:
        """The Pareto front, fastest first."""
        return joint_front(self.latency_model, self.gram, self.plans)

    def allocation(self, schedule: Sequence[str]) -> Allocation:
        """A schedule with its predicted error and its latency."""
        return Allocation(tuple(schedule), self.error(schedule), self.latency_model.latency(schedule))

    def error(self, schedule: Sequence[str]) -> float:
        """Predicted E of a schedule.

        Raises:
            ValueError: it reuses steps as no plan does.
        """
        return predicted_error(self.gram, self.plans, schedule)

    def best(self, budget: Budget, held: int = 0, predictor: Predictor | None = None) -> Allocation:
        """The best schedule under a budget, by `predictor` or that of the front; see `calibration.choose.joint.best_joint`.

        Raises:
            BudgetError: no schedule that holds these steps meets the budget.
        """
        gram = self.grams[predictor or self.predictor]
        return best_joint(self.latency_model, gram, self.plans, budget, held)


def predicted_best(predictions: Predictions, budget: Budget | None) -> tuple[Allocation, str]:
    """The schedule under a budget (None: see `DEFAULT_ERROR_FRACTION`), and the budget in words.

    Raises:
        BudgetError: no schedule meets it.
    """
    latency_model, gram = predictions.latency_model, predictions.gram
    reference = latency_model.reference
    if budget is None:
        fastest = min(latency_model.precisions, key=latency_model.latencies_ms.__getitem__)
        budget = ErrorBudget(DEFAULT_ERROR_FRACTION * gram.error((fastest,) * gram.num_steps))
        wording = f"by default, predicted error at most {DEFAULT_ERROR_FRACTION:g} of uniform {fastest}'s"
    elif isinstance(budget, LatencyBudget):
        wording = f"latency at most {budget.ratio:g} of {reference}"
    elif isinstance(budget, ErrorBudget):
        wording = f"predicted error at most {budget.error:g}"
    elif isinstance(budget, HighSteps):
        wording = f"{budget.count} step{'s' * (budget.count != 1)} at {reference}"
    return predictions.best(budget), wording
