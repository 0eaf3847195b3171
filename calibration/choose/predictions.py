"""What is predicted of schedules, and the one that predictions choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from calibration.choose.allocation import Budget, ErrorBudget, HighSteps, LatencyBudget, allocate
from calibration.choose.costs import LatencyModel
from calibration.choose.pareto import Allocation, pareto_front
from calibration.scores.predictors import Contributions, predict

DEFAULT_ERROR_FRACTION = 0.25
"""Without a budget: the fastest schedule with at most this fraction of the error predicted for the fastest
uniform precision. A quarter of the squared error is half the amplitude, 6 dB, what one more bit would give:
clearly better than uniform, and where few steps carry most of the error, close to its speed."""


@dataclass(frozen=True)
class Predictions:
    """What is predicted of schedules.

    Attributes:
        latency_model: what they are made of.
        predictor: the one that allocation goes by.
        fitted: contributions of `predictor`, without risk.
        weighed: contributions by predictor, with risk (`calibration.scores.divergence`).
    """

    latency_model: LatencyModel
    predictor: str
    fitted: Contributions
    weighed: Mapping[str, Contributions]

    @property
    def found(self) -> Contributions:
        """What schedules are chosen by: contributions of `predictor`, with risk."""
        return self.weighed[self.predictor]

    @cached_property
    def front(self) -> tuple[Allocation, ...]:
        """The Pareto front, fastest first."""
        return pareto_front(self.latency_model, self.found)

    def error(self, schedule: tuple[str, ...]) -> float:
        """Predicted E, with risk."""
        return predict(self.found, self.latency_model.precisions, schedule)

    def allocation(self, schedule: tuple[str, ...]) -> Allocation:
        """A schedule with its predicted error and its latency."""
        return Allocation(schedule, self.error(schedule), self.latency_model.latency(schedule))


def predicted_best(predictions: Predictions, budget: Budget | None) -> tuple[Allocation, str]:
    """The schedule under a budget (None: see `DEFAULT_ERROR_FRACTION`), and the budget in words.

    Raises:
        BudgetError: no schedule meets it.
    """
    latency_model, found = predictions.latency_model, predictions.found
    reference = latency_model.reference
    if budget is None:
        fastest = min(latency_model.precisions, key=latency_model.latencies_ms.__getitem__)
        budget = ErrorBudget(DEFAULT_ERROR_FRACTION * predictions.error((fastest,) * len(found.values)))
        wording = f"default budget: at most {DEFAULT_ERROR_FRACTION:g} of the error of uniform {fastest}"
    elif isinstance(budget, LatencyBudget):
        wording = f"latency at most {budget.ratio:g} of {reference}"
    elif isinstance(budget, ErrorBudget):
        wording = f"predicted error at most {budget.error:g}"
    elif isinstance(budget, HighSteps):
        wording = f"{budget.count} step{'s' * (budget.count != 1)} at {reference}"
    return allocate(latency_model, found, budget, predictions.front), wording
