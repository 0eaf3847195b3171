"""Refinement: a short local search that measures schedules instead of predicting them.

Scores predict what a schedule does by adding up what single steps do. Where the errors of steps point the same way, or
where few samples leave the scores noisy, the best of the predictions need not be the best schedule, and a fixed rule
can beat it. So the schedule that allocation chose has to win against its rivals on the calibration samples:

1. Where samples go to another picture under it, it is replaced by one that spares the first steps
   (`calibration.departures`), if that has a smaller mean of E; rivals then have to spare them, too.
2. Rivals: the fixed rules at the same step counts, the choices of the other predictors, and what the predictor holds
   to be nearly as good: points of the Pareto front, and two steps trading their precisions.
3. A race (successive halving: Jamieson and Talwalkar, AISTATS 2016): all run on the first samples, the better half
   goes on to twice as many, until those left have run on all.
4. The winner is the one to beat in the next round, among the rivals nearest to it. It ends when nobody wins or the
   calls are used up.

Schedules are compared by the logarithm of their E, sample by sample: E varies by an order of magnitude between
samples, and a mean of E would be decided by the one or two with the largest. The schedule to beat gives way only if
chance alone would give such a mean of the differences with a probability below `CONVINCING`: the least mean of few
samples would choose the luckiest rival, which does worse on others. Samples that go to another picture are too few to be
compared so: no rival wins that sends more of them there, their share is predicted as well (`calibration.risk`), and E of
every sample counts by the factor that it adds to the schedule's prediction. That the winner is the best of several
rivals is not allowed for, so that two or three samples are too few to rely on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from scipy.stats import t as student_t

from calibration.allocation import (
    BUDGET_TOLERANCE,
    Allocation,
    AllocationCosts,
    Budget,
    HighSteps,
    LatencyBudget,
    allocate,
    relative_latency,
)
from calibration.baselines import fixed_rules
from calibration.departures import sparing
from calibration.measurements import Measurements, mean
from calibration.metrics import departed
from calibration.scores import Contributions, predict
from calibration.sensitivity import RefinementRecord, TrialRecord

Schedule = tuple[str, ...]
Rivals = Callable[[Schedule], Iterable[tuple[str, Schedule]]]
"""(origin, schedule) of those worth a try against a schedule, the most promising first. The schedule itself and
repetitions do no harm."""

STAGE = "refinement"

FIRST_SAMPLES = 2
"""Samples of the first heat: a single one would decide alone."""

MOST_RIVALS = 16
"""Most rivals in a round."""

CONVINCING = 0.16
"""Probability that a winner may have been better by chance (one-sided t-test): one standard error for many samples,
nearly two for two of them."""

TINY = 1e-300
"""Stands for an E of zero in logarithms."""


@dataclass
class Trial:
    """A schedule that took part.

    Attributes:
        precisions: one name per step index.
        origin: "scores" for the schedule the search started from, otherwise why this one was tried.
        weight: what its errors count for.
        errors: measured E of the leading samples, of as many as it ran on.
    """

    precisions: Schedule
    origin: str
    weight: float
    errors: list[float] = field(default_factory=list)

    def weighed(self) -> list[float]:
        """Errors as they are compared."""
        return [self.weight * error for error in self.errors]


@dataclass(frozen=True)
class Refinement:
    """What a local search found.

    Attributes:
        best: the schedule that no rival beat.
        trials: every schedule that ran, in the order they were entered; the first is where the search started.
            None where it was not compared with any.
        rounds: races held.
    """

    best: Trial
    trials: tuple[Trial, ...]
    rounds: int


def refine(
    start: Schedule,
    rivals: Rivals,
    measure: Callable[[Schedule, int], float],
    cost: Callable[[Schedule], int],
    num_samples: int,
    max_calls: int,
    expect: Callable[[Sequence[Schedule], range], None] = lambda schedules, samples: None,
    weight: Callable[[Schedule], float] = lambda schedule: 1.0,
    spares: Iterable[tuple[int, Schedule]] = (),
) -> Refinement:
    """Races a schedule against its rivals, and the winner against its own, until nobody wins.

    Args:
        start: the schedule to beat.
        rivals: see `Rivals`.
        measure: E of a schedule on a sample; asked for once each.
        cost: denoiser calls that takes, at most.
        num_samples: samples 0..num_samples-1 can be asked for. With a single one nothing is raced: no difference
            would be known to be more than chance.
        max_calls: never exceeded. Where a race against one rival might, none is held.
        expect: told which schedules will be measured on which samples, before they are.
        weight: factor, at least 1, that a schedule's errors count by.
        spares: schedules to try, in this order, where a sample goes to another picture under the one before, each with
            the number of first steps that it holds at the reference. Of those that ran, and `start`, the one with the
            least mean of E is the one to beat, and its rivals leave those steps alone.
    """
    incumbent = Trial(start, "scores", weight(start))
    if num_samples < 2:
        return Refinement(incumbent, (), 0)
    trials: dict[Schedule, Trial] = {start: incumbent}
    heats = _heats(num_samples)
    left = max_calls
    rounds = 0

    def run(trial: Trial, samples: int) -> None:
        nonlocal left
        while len(trial.errors) < samples:
            left -= cost(trial.precisions)
            trial.errors.append(measure(trial.precisions, len(trial.errors)))

    def run_all(trial: Trial) -> None:
        expect([trial.precisions], range(len(trial.errors), num_samples))
        run(trial, num_samples)

    spared = 0
    tried = [(spared, incumbent)]
    for first, schedule in spares:
        if schedule in trials:
            continue
        known = 0 if incumbent.errors else num_samples * cost(start)
        if num_samples * cost(schedule) > left - known:
            break
        if not incumbent.errors:
            run_all(incumbent)
        _, last = tried[-1]
        if not departed(np.array(last.errors)):
            break
        trials[schedule] = Trial(schedule, f"spares the first {first}", weight(schedule))
        run_all(trials[schedule])
        tried.append((first, trials[schedule]))
    spared, incumbent = min(tried, key=lambda found: mean(found[1].errors)) if incumbent.errors else tried[0]

    def leaves_spared(rival: tuple[str, Schedule]) -> bool:
        return rival[1][:spared] == incumbent.precisions[:spared]

    def lost(trial: Trial) -> int:
        beside = np.array(incumbent.errors[: len(trial.errors)])
        return max(0, departed(np.array(trial.errors), beside) - departed(beside))

    while True:
        racing = _fresh(filter(leaves_spared, rivals(incumbent.precisions)), trials, weight)
        known = 0 if incumbent.errors else num_samples * cost(start)
        racing = racing[: _affordable([cost(trial.precisions) for trial in racing], heats, left - known)]
        if not racing:
            break
        rounds += 1
        trials |= {trial.precisions: trial for trial in racing}
        run_all(incumbent)
        for samples in heats:
            expect([trial.precisions for trial in racing], range(len(racing[0].errors), samples))
            for trial in racing:
                run(trial, samples)
            # stable: of equal ones the more promising
            racing.sort(key=lambda trial: (lost(trial), _level(trial.weighed())))
            if samples < num_samples:
                racing = racing[: _survivors(len(racing))]
        if lost(racing[0]) or not beats(racing[0].weighed(), incumbent.weighed()):
            break
        incumbent = racing[0]
    return Refinement(incumbent, tuple(trial for trial in trials.values() if trial.errors), rounds)


def beats(challenger: Sequence[float], incumbent: Sequence[float]) -> bool:
    """Whether E on the same samples, two or more, says that the challenger is better, by more than chance might."""
    differences = np.log(np.maximum(challenger, TINY)) - np.log(np.maximum(incumbent, TINY))
    standard_error = differences.std(ddof=1) / math.sqrt(len(differences))
    return bool(differences.mean() < student_t.ppf(CONVINCING, len(differences) - 1) * standard_error)


def refine_schedule(
    measurements: Measurements,
    chosen: Allocation,
    budget: Budget | None,
    kept: tuple[str, ...],
    latencies_ms: Mapping[str, float],
    costs: AllocationCosts,
    values: Mapping[str, Contributions],
    fitted: Contributions,
    predictor: str,
    front: Sequence[Allocation],
    max_calls: int,
    on_run: Callable[[int, int], None] | None = None,
) -> tuple[Allocation, RefinementRecord]:
    """Refines what allocation chose, on the samples of `measurements`.

    Args:
        measurements: of the calibration samples.
        chosen: allocation's choice under `budget`.
        budget: rivals keep to it: no slower than a latency budget allows, the same number of steps per precision for
            `HighSteps`. For an error budget, which the prediction meets, no slower than `chosen`.
        kept: the precisions that schedules may use, the reference first.
        latencies_ms: step latency by precision.
        costs: of changes of precision, and the limit on precisions.
        values: contributions by predictor, with risk (`calibration.risk`).
        fitted: those of `predictor` without it.
        predictor: the one that `chosen` and `front` come from.
        front: the Pareto front.
        max_calls: denoiser calls to spend at most; 0 measures nothing.
        on_run: called after every run of a schedule on a sample with (done, at most).

    Returns:
        The schedule that no rival beat, and the record of the search.
    """
    found, reference = values[predictor], kept[0]
    limit = budget.ratio if isinstance(budget, LatencyBudget) else chosen.latency

    def allowed(schedule: Schedule) -> bool:
        if costs.max_engines is not None and len(set(schedule)) > costs.max_engines:
            return False
        if isinstance(budget, HighSteps):
            return sorted(schedule) == sorted(chosen.precisions)
        return relative_latency(schedule, latencies_ms, reference, costs) <= limit * (1 + BUDGET_TOLERANCE)

    same = budget if isinstance(budget, HighSteps) else LatencyBudget(limit)
    others = [
        (f"{name} scores", allocate(kept, latencies_ms, other.values, same, other.power, costs=costs).precisions)
        for name, other in values.items()
        if name != predictor
    ]

    nearest = [("front", point.precisions) for point in front if allowed(point.precisions)][-MOST_RIVALS:]

    def rivals(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
        near = [*nearest, *(("exchange", traded) for traded in _exchanges(schedule))]
        near.sort(key=lambda rival: predict(found, kept, rival[1]))
        yield from (rival for rival in (*fixed_rules(schedule, kept).items(), *others, *near) if allowed(rival[1]))

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
        level = predict(fitted, kept, schedule)
        return predict(found, kept, schedule) / level if level > 0 else 1.0

    result = refine(
        chosen.precisions,
        rivals,
        measure,
        measurements.schedule_calls,
        measurements.num_samples,
        max_calls,
        expect,
        weight,
        sparing(kept, latencies_ms, found, same, costs),
    )
    record = RefinementRecord(
        trials=tuple(
            TrialRecord(
                precisions=trial.precisions,
                origin=trial.origin,
                latency=relative_latency(trial.precisions, latencies_ms, reference, costs),
                predicted_error=predict(found, kept, trial.precisions),
                errors=tuple(trial.errors),
            )
            for trial in result.trials
        ),
        rounds=result.rounds,
        max_calls=max_calls,
        calls=measurements.calls.get(f"{measurements.name}: {STAGE}", {}),
        origin=result.best.origin,
    )
    best = result.best.precisions
    return Allocation(best, predict(found, kept, best), relative_latency(best, latencies_ms, reference, costs)), record


def _exchanges(schedule: Schedule) -> Iterator[Schedule]:
    """Every schedule that differs from this one by two steps trading their precisions."""
    for i, j in combinations(range(len(schedule)), 2):
        if schedule[i] != schedule[j]:
            traded = list(schedule)
            traded[i], traded[j] = traded[j], traded[i]
            yield tuple(traded)


def _fresh(
    rivals: Iterable[tuple[str, Schedule]], tried: Mapping[Schedule, Trial], weight: Callable[[Schedule], float]
) -> list[Trial]:
    """The first `MOST_RIVALS` that have not been tried."""
    fresh: dict[Schedule, Trial] = {}
    for origin, schedule in rivals:
        if len(fresh) == MOST_RIVALS:
            break
        if schedule not in tried and schedule not in fresh:
            fresh[schedule] = Trial(schedule, origin, weight(schedule))
    return list(fresh.values())


def _level(errors: Sequence[float]) -> float:
    return mean([math.log(max(error, TINY)) for error in errors])


def _heats(num_samples: int) -> list[int]:
    """How many samples have been run after each heat: doubling up to all."""
    heats = [min(FIRST_SAMPLES, num_samples)]
    while heats[-1] < num_samples:
        heats.append(min(2 * heats[-1], num_samples))
    return heats


def _survivors(racing: int) -> int:
    return (racing + 1) // 2


def _affordable(costs: Sequence[int], heats: Sequence[int], calls: int) -> int:
    """The largest number of rivals, in order, whose race takes at most `calls`, whoever goes on; `costs` by rival."""
    for size in range(len(costs), 0, -1):
        dearest = sorted(costs[:size], reverse=True)
        needed = before = 0
        for samples in heats:
            needed += (samples - before) * sum(dearest)
            before, dearest = samples, dearest[: _survivors(len(dearest))]
        if needed <= calls:
            return size
    return 0
