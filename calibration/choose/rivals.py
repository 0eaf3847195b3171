"""Refinement: the local search, from what allocation chose, on the calibration samples.

Rivals are the fixed rules at the same step counts, the choices of the other predictors, and what the predictor holds to
be nearly as good: points of the Pareto front, and two steps trading their precisions. Where samples depart, the
schedules of `calibration.choose.sparing` come first. What decides is in `calibration.choose.race`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from calibration.choose.allocation import BUDGET_TOLERANCE, Budget, HighSteps, LatencyBudget, allocate
from calibration.choose.baselines import fixed_rules
from calibration.choose.pareto import Allocation
from calibration.choose.predictions import Predictions
from calibration.choose.race import MOST_RIVALS, Runs, Schedule, refine
from calibration.choose.sparing import sparing
from calibration.document import RefinementRecord, TrialRecord
from calibration.measure.measurements import Measurements
from calibration.scores.predictors import predict

STAGE = "refinement"


def refine_schedule(
    measurements: Measurements,
    chosen: Allocation,
    budget: Budget | None,
    predictions: Predictions,
    max_calls: int,
    on_run: Callable[[int, int], None] | None = None,
) -> tuple[Allocation, RefinementRecord]:
    """Refines what allocation chose, on the samples of `measurements`.

    Args:
        measurements: of the calibration samples.
        chosen: allocation's choice under `budget`.
        budget: rivals keep to it: no slower than a latency budget allows, the same number of steps per precision for
            `HighSteps`. For an error budget, which the prediction meets, no slower than `chosen`.
        predictions: what `chosen` comes from.
        max_calls: denoiser calls to spend at most; 0 measures nothing.
        on_run: called after every run of a schedule on a sample with (done, at most).

    Returns:
        The schedule that no rival beat, and the record of the search.
    """
    latency_model, costs = predictions.latency_model, predictions.latency_model.costs
    limit = budget.ratio if isinstance(budget, LatencyBudget) else chosen.latency

    def allowed(schedule: Schedule) -> bool:
        if costs.max_engines is not None and len(set(schedule)) > costs.max_engines:
            return False
        if isinstance(budget, HighSteps):
            return sorted(schedule) == sorted(chosen.precisions)
        return latency_model.latency(schedule) <= limit * (1 + BUDGET_TOLERANCE)

    same = budget if isinstance(budget, HighSteps) else LatencyBudget(limit)
    others = [
        (f"{name} scores", allocate(latency_model, other, same).precisions)
        for name, other in predictions.weighed.items()
        if name != predictions.predictor
    ]
    nearest = [("front", point.precisions) for point in predictions.front if allowed(point.precisions)][-MOST_RIVALS:]

    def rivals(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
        near = [*nearest, *(("exchange", traded) for traded in _exchanges(schedule))]
        near.sort(key=lambda rival: predictions.error(rival[1]))
        rules = fixed_rules(schedule, latency_model.precisions)
        yield from (rival for rival in (*rules.items(), *others, *near) if allowed(rival[1]))

    done = 0

    def measure(schedule: Schedule, sample: int) -> float:
        nonlocal done
        error = measurements.schedule_error(STAGE, schedule, sample, pictures=False)["error"]
        done += 1
        if on_run:
            on_run(done, max(done, max_calls // measurements.num_steps))
        return error

    def expect(schedules: Sequence[Schedule], samples: range) -> None:
        measurements.expect(schedules, pictures=False, samples=samples)

    def weight(schedule: Schedule) -> float:
        level = predict(predictions.fitted, latency_model.precisions, schedule)
        return predictions.error(schedule) / level if level > 0 else 1.0

    runs = Runs(measure, measurements.schedule_calls, measurements.num_samples, expect, weight)
    spares = sparing(latency_model, predictions.found, same)
    result = refine(chosen.precisions, rivals, runs, max_calls, spares)
    record = RefinementRecord(
        trials=tuple(
            TrialRecord(
                precisions=trial.precisions,
                origin=trial.origin,
                latency=latency_model.latency(trial.precisions),
                predicted_error=predictions.error(trial.precisions),
                errors=tuple(trial.errors),
            )
            for trial in result.trials
        ),
        rounds=result.rounds,
        max_calls=max_calls,
        calls=measurements.calls.get(f"{measurements.name}: {STAGE}", {}),
        origin=result.best.origin,
    )
    return predictions.allocation(result.best.precisions), record


def _exchanges(schedule: Schedule) -> Iterator[Schedule]:
    """Every schedule that differs from this one by two steps trading their precisions."""
    for i, j in combinations(range(len(schedule)), 2):
        if schedule[i] != schedule[j]:
            traded = list(schedule)
            traded[i], traded[j] = traded[j], traded[i]
            yield tuple(traded)
