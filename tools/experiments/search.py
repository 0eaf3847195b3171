"""What calibration chooses at K steps at the reference, from the scores of an experiment."""

from __future__ import annotations

from collections.abc import Callable

from calibration.choose.allocation import HighSteps
from calibration.choose.costs import LatencyModel
from calibration.choose.pareto import Allocation
from calibration.choose.predictions import Predictions, predicted_best
from calibration.choose.rivals import refine_schedule
from calibration.document import RefinementRecord
from calibration.measure.measurements import Measurements
from calibration.scores.predictors import PREDICTORS
from calibration.scores.single_step import sweep_calls
from tools.experiments.prediction import SampleScores


def search(
    calibration: Measurements,
    scores: SampleScores,
    predictor: str,
    precision: str,
    count: int,
    on_run: Callable[[int, int], None],
) -> tuple[Allocation, Allocation, RefinementRecord]:
    """What scores and the risk of departures choose, what the local search makes of it, and its record.

    Args:
        calibration: of the samples to search on; the search may spend a sweep's calls.
        scores: of the precision.
        predictor: one of `PREDICTORS`.
        precision: the low one.
        count: K.
        on_run: see `calibration.choose.rivals.refine_schedule`.
    """
    pair = (calibration.reference, precision)
    equal = LatencyModel(pair, dict.fromkeys(pair, 1.0))  # K says it all: latency has no part in it
    risks = scores.risks(predictor)
    weighed = {name: scores.weighed(name, risks) for name in PREDICTORS}
    predictions = Predictions(equal, predictor, scores.contributions(predictor), weighed)
    budget = HighSteps(count)
    start, _ = predicted_best(predictions, budget)
    max_calls = sweep_calls(calibration.num_steps, calibration.num_samples)
    best, record = refine_schedule(calibration, start, budget, predictions, max_calls, on_run)
    return start, best, record
