"""A local search that measures schedules instead of predicting them.

Scores predict what a schedule does by adding up what single steps do. Where the errors of steps point the same way, or
where few samples leave the scores noisy, the best of the predictions need not be the best schedule, and a fixed rule
can beat it. So the schedule that was chosen has to win against its rivals on the calibration samples:

1. Where samples depart under it (`calibration.scores.divergence`), it is replaced by one that spares the first steps
   (`calibration.choose.sparing`), if that has a smaller mean of E; rivals then have to spare them, too.
2. A race against rivals (successive halving: Jamieson and Talwalkar, AISTATS 2016): all run on the first samples, the
   better half goes on to twice as many, until those left have run on all.
3. The winner is the one to beat in the next round, among the rivals nearest to it. It ends when nobody wins or the
   calls are used up.

Schedules are compared by the logarithm of their E, sample by sample: E varies by an order of magnitude between
samples, and a mean of E would be decided by the one or two with the largest. The schedule to beat gives way only if
chance alone would give such a mean of the differences with a probability below `CONVINCING`: the least mean of few
samples would choose the luckiest rival, which does worse on others. Departures are too few to be compared so: no rival
wins that has more of them, their share is predicted as well, and E of every sample counts by the factor that it adds to
the schedule's prediction. That the winner is the best of several rivals is not allowed for, so that two or three samples
are too few to rely on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t as student_t

from calibration.measure.metrics import departed, mean

Schedule = tuple[str, ...]
Rivals = Callable[[Schedule], Iterable[tuple[str, Schedule]]]
"""(origin, schedule) of those worth a try against a schedule, the most promising first. The schedule itself and
repetitions do no harm."""

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


@dataclass(frozen=True)
class Runs:
    """How schedules are run, and what their errors count for.

    Attributes:
        measure: E of a schedule on a sample; asked for once each.
        cost: denoiser calls that takes, at most.
        num_samples: samples 0..num_samples-1 can be asked for. With a single one nothing is raced: no difference
            would be known to be more than chance.
        expect: told which schedules will be measured on which samples, before they are.
        weight: factor, at least 1, that a schedule's errors count by.
    """

    measure: Callable[[Schedule, int], float]
    cost: Callable[[Schedule], int]
    num_samples: int
    expect: Callable[[Sequence[Schedule], range], None]
    weight: Callable[[Schedule], float]


def refine(
    start: Schedule, rivals: Rivals, runs: Runs, max_calls: int, spares: Iterable[tuple[int, Schedule]]
) -> Refinement:
    """Races a schedule against its rivals, and the winner against its own, until nobody wins.

    Args:
        start: the schedule to beat.
        rivals: see `Rivals`.
        runs: how schedules are run.
        max_calls: denoiser calls, never exceeded. Where a race against one rival might, none is held.
        spares: schedules to try, in this order, where a sample departs under the one before, each with the number
            of first steps that it holds at the reference. Of those that ran, and `start`, the one with the least mean of E
            is the one to beat, and its rivals leave those steps alone.
    """
    search = _Search(Trial(start, "scores", runs.weight(start)), runs, max_calls)
    if runs.num_samples < 2:
        return Refinement(search.incumbent, (), 0)
    search.spare(spares)
    while search.race(rivals(search.incumbent.precisions)):
        pass
    return Refinement(search.incumbent, tuple(trial for trial in search.trials.values() if trial.errors), search.rounds)


@dataclass
class _Search:
    """A search in progress.

    Attributes:
        incumbent: the schedule to beat.
        runs: how schedules are run.
        left: denoiser calls that may still be spent.
        trials: every schedule entered, by itself.
        rounds: races held.
        spared: how many first steps rivals have to leave as the incumbent has them.
    """

    incumbent: Trial
    runs: Runs
    left: int
    trials: dict[Schedule, Trial] = field(default_factory=dict)
    rounds: int = 0
    spared: int = 0

    def __post_init__(self) -> None:
        self.trials[self.incumbent.precisions] = self.incumbent

    def spare(self, spares: Iterable[tuple[int, Schedule]]) -> None:
        """Has the incumbent give way to the best of `spares`, see `refine`."""
        tried = [(0, self.incumbent)]
        for first, schedule in spares:
            if schedule in self.trials:
                continue
            if self.runs.num_samples * self.runs.cost(schedule) > self._left_for_others():
                break
            self._run_all(self.incumbent)
            _, last = tried[-1]
            if not departed(np.array(last.errors)):
                break
            trial = Trial(schedule, f"spares the first {first}", self.runs.weight(schedule))
            self.trials[schedule] = trial
            self._run_all(trial)
            tried.append((first, trial))
        if len(tried) > 1:
            self.spared, self.incumbent = min(tried, key=lambda found: mean(found[1].errors))

    def race(self, rivals: Iterable[tuple[str, Schedule]]) -> bool:
        """Races rivals against the incumbent; whether one of them has taken its place."""
        kept = self.incumbent.precisions[: self.spared]
        racing = _fresh((rival for rival in rivals if rival[1][: self.spared] == kept), self.trials, self.runs.weight)
        costs = [self.runs.cost(trial.precisions) for trial in racing]
        heats = _heats(self.runs.num_samples)
        racing = racing[: _affordable(costs, heats, self._left_for_others())]
        if not racing:
            return False
        self.rounds += 1
        self.trials |= {trial.precisions: trial for trial in racing}
        self._run_all(self.incumbent)
        for samples in heats:
            self.runs.expect([trial.precisions for trial in racing], range(len(racing[0].errors), samples))
            for trial in racing:
                self._run(trial, samples)
            # stable: of equal ones the more promising
            racing.sort(key=lambda trial: (self._lost(trial), _level(trial.weighed())))
            if samples < self.runs.num_samples:
                racing = racing[: _survivors(len(racing))]
        best = racing[0]
        if self._lost(best) or not beats(best.weighed(), self.incumbent.weighed()):
            return False
        self.incumbent = best
        return True

    def _left_for_others(self) -> int:
        """Denoiser calls that are left when the incumbent has run."""
        return self.left - (
            0 if self.incumbent.errors else self.runs.num_samples * self.runs.cost(self.incumbent.precisions)
        )

    def _run_all(self, trial: Trial) -> None:
        if len(trial.errors) < self.runs.num_samples:
            self.runs.expect([trial.precisions], range(len(trial.errors), self.runs.num_samples))
            self._run(trial, self.runs.num_samples)

    def _run(self, trial: Trial, samples: int) -> None:
        while len(trial.errors) < samples:
            self.left -= self.runs.cost(trial.precisions)
            trial.errors.append(self.runs.measure(trial.precisions, len(trial.errors)))

    def _lost(self, trial: Trial) -> int:
        """How many samples more than under the incumbent depart, of those it ran on."""
        beside = np.array(self.incumbent.errors[: len(trial.errors)])
        return max(0, departed(np.array(trial.errors), beside) - departed(beside))


def beats(challenger: Sequence[float], incumbent: Sequence[float]) -> bool:
    """Whether E on the same samples, two or more, says that the challenger is better, by more than chance might."""
    differences = np.log(np.maximum(challenger, TINY)) - np.log(np.maximum(incumbent, TINY))
    standard_error = differences.std(ddof=1) / math.sqrt(len(differences))
    return bool(differences.mean() < student_t.ppf(CONVINCING, len(differences) - 1) * standard_error)


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
