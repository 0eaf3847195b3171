"""The guard: candidates are measured on calibration samples, and the best one is kept.

Predictions can mislead, so what they choose has to win against the rules of thumb where it counts. All candidates run on
the same samples, drawn at random, and on *fragile* ones: those most likely to depart. The better half, the best rule
always among it, goes on to twice as many samples (successive halving: Jamieson and Talwalkar, AISTATS 2016), until all
have been used. Of those left, a candidate that departs on significantly more samples than the one that departs least (sign
test over the samples where the two differ) is out; of the others the least typical error wins. Few samples leave it noisy,
and the least of many noisy figures is the luckiest: it is averaged with what is predicted, each weighed by its variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.choose.candidates import Candidate
from calibration.choose.predictions import Predictions
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import departed, limited, typical_errors
from calibration.records import CandidateRecord, GuardRecord
from calibration.statistics import share_record, sign_test, typical_interval

STAGE = "guard"

FIRST_SAMPLES = 8
"""Fewest samples of the first round, or all there are; a quarter of many."""

LEFT_AT_LAST = 3
"""Candidates of the last round, so that one that departs can give way."""

FRAGILE_SHARE = 0.1
"""Share of the samples, those with the largest summed downcasts, that departures are looked for on: 85 % of all
departures in 64 stored comparisons came from them."""

LEAST_DOUBT = 0.05
"""Least standard deviation of the logarithm that predictions are taken to be wrong by."""

SIGNIFICANT = 0.05
"""Largest probability that chance alone gives so many more departures: five more, where nothing else differs."""


@dataclass
class _Trial:
    """A candidate under test.

    Attributes:
        candidate: which one.
        leading: samples drawn at random, of the last round that it took part in.
        errors: E by sample, of leading and fragile ones.
        expected: typical error, from what is measured and predicted (`expected_errors`).
    """

    candidate: Candidate
    leading: Sequence[int] = ()
    errors: dict[int, float] = field(default_factory=dict)
    expected: float = math.inf

    def values(self, samples: Iterable[int]) -> np.ndarray:
        return np.array([self.errors[sample] for sample in samples])

    @property
    def typical(self) -> float:
        return float(typical_errors(self.values(self.leading)))

    @property
    def departures(self) -> set[int]:
        """Of all samples it ran on, by the median of the leading ones."""
        lost = departed(self.values(self.errors), float(np.median(self.values(self.leading))))
        return {sample for sample, gone in zip(self.errors, lost, strict=True) if gone}


def fragile_samples(measurements: Measurements, precisions: Sequence[str], summed: np.ndarray) -> tuple[int, ...]:
    """The samples most likely to depart.

    Args:
        measurements: of the calibration samples; uniform runs of `precisions` are asked for.
        precisions: low ones that schedules may hold.
        summed: downcasts summed over steps and precisions, float64 [S].

    Returns:
        Rising sample indices: the share with the largest `summed`, and those that depart in a uniform run.
    """
    count = math.ceil(FRAGILE_SHARE * len(summed))
    found = set(np.argsort(-summed, kind="stable")[:count].tolist())
    for precision in precisions:
        errors = [measurements.uniform_error(precision, sample)["error"] for sample in range(len(summed))]
        found |= set(np.flatnonzero(departed(np.array(errors))).tolist())
    return tuple(sorted(found))


def guard(
    measurements: Measurements,
    found: Sequence[Candidate],
    predictions: Predictions,
    fragile: Sequence[int],
    on_run: Callable[[int, int], None] | None = None,
) -> GuardRecord:
    """Compares candidates on the calibration samples.

    Args:
        measurements: of the calibration samples.
        found: the candidates, at least one.
        predictions: what they are recorded with.
        fragile: from `fragile_samples`.
        on_run: called after every run of a schedule on a sample with (done, at most).

    Returns:
        The record, the winner first.
    """
    order = np.random.default_rng(0).permutation(measurements.num_samples).tolist()
    rounds = [(order[:size], list(dict.fromkeys((*order[:size], *fragile)))) for size in _sizes(len(order))]
    alive = trials = [_Trial(candidate) for candidate in found]
    done, total = 0, _most_runs([len(samples) for _, samples in rounds], len(trials))
    took_part = []
    for leading, samples in rounds:
        took_part.append((len(leading), len(alive)))
        measurements.expect([trial.candidate.precisions for trial in alive], pictures=False, samples=samples)
        for trial in alive:
            trial.leading = leading
            for sample in samples:
                if sample in trial.errors:
                    continue
                values = measurements.schedule_error(STAGE, trial.candidate.precisions, sample, pictures=False)
                trial.errors[sample] = values["error"]
                done += 1
                if on_run:
                    on_run(done, total)
        alive = _ranked(alive, predictions)
        best_rule = next((trial for trial in alive if trial.candidate.rule), None)
        if len(leading) < len(order):
            alive = [trial for k, trial in enumerate(alive) if k < _survivors(len(alive)) or trial is best_rule]
    rest = [trial for trial in trials if trial is not alive[0]]
    rest.sort(key=lambda trial: (-len(trial.leading), trial.typical))
    return GuardRecord(
        candidates=tuple(_record(trial, measurements, predictions) for trial in (alive[0], *rest)),
        rounds=tuple(took_part),
        fragile=tuple(fragile),
        best_rule=best_rule.candidate.rule if best_rule else None,
        calls=measurements.calls.get(f"{measurements.name}: {STAGE}", {}),
    )


def _sizes(num_samples: int) -> list[int]:
    """How many leading samples each round has."""
    sizes = [min(max(FIRST_SAMPLES, -(-num_samples // 4)), num_samples)]
    while sizes[-1] < num_samples:
        sizes.append(min(2 * sizes[-1], num_samples))
    return sizes


def _survivors(count: int) -> int:
    return max((count + 1) // 2, LEFT_AT_LAST)


def _most_runs(samples: Sequence[int], count: int) -> int:
    """Runs of a schedule on a sample, at most: with the best rule beside the better half in every round."""
    total = before = 0
    for size in samples:
        total += count * (size - before)
        before, count = size, min(_survivors(count) + 1, count)
    return total


def _ranked(trials: Sequence[_Trial], predictions: Predictions) -> list[_Trial]:
    """The better first: those that do not depart significantly more than the one that does least, by expected error."""
    predicted = [predictions.error(trial.candidate.precisions) for trial in trials]
    expected = expected_errors(np.array([trial.values(trial.leading) for trial in trials]), np.array(predicted))
    for trial, error in zip(trials, expected.tolist(), strict=True):
        trial.expected = error
    by_error = sorted(trials, key=lambda trial: trial.expected)
    least = min((trial.departures for trial in by_error), key=len)
    return sorted(by_error, key=lambda trial: departs_more(trial.departures, least))


def expected_errors(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Typical errors of candidates from what is measured and what is predicted, each weighed by its variance.

    In logarithms, but for the level that all have in common. The variance of what is measured is that of the differences
    between candidates from sample to sample; what predictions disagree with it by beyond that is their own (empirical Bayes:
    Efron and Morris, Journal of the American Statistical Association 70, 1975).

    Args:
        measured: E by candidate and sample, float64 [C, S].
        predicted: E, float64 [C].

    Returns:
        float64 [C]; what is measured alone where a candidate has no error.
    """
    typical = typical_errors(measured)
    count, samples = measured.shape
    if count < 2 or not min(measured.min(), predicted.min()) > 0:
        return typical
    logs = np.log(limited(measured))
    spread = logs - logs.mean(axis=0) - logs.mean(axis=1, keepdims=True) + logs.mean()
    noise = float((spread**2).sum()) / ((count - 1) * (samples - 1) * samples) if samples > 1 else math.inf
    apart = np.log(predicted) - np.log(typical)
    apart -= apart.mean()
    doubt = max(float((apart**2).sum()) / (count - 1) - noise, LEAST_DOUBT**2)
    found: np.ndarray = typical * np.exp(apart * (noise / (noise + doubt) if math.isfinite(noise) else 1.0))
    return found


def departs_more(mine: set[int], other: set[int]) -> bool:
    """Whether a schedule departs on significantly more samples than another one does; a one-sided sign test."""
    return sign_test(len(mine - other), len(other - mine)) <= SIGNIFICANT


def _record(trial: _Trial, measurements: Measurements, predictions: Predictions) -> CandidateRecord:
    precisions = trial.candidate.precisions
    samples = list(dict.fromkeys((*trial.leading, *trial.errors)))
    point = predictions.allocation(precisions)
    return CandidateRecord(
        names=trial.candidate.names,
        rule=trial.candidate.rule,
        precisions=precisions,
        latency=point.latency,
        predicted_error=point.error,
        samples=tuple(samples),
        errors=tuple(trial.values(samples).tolist()),
        leading=len(trial.leading),
        typical=typical_interval(trial.values(trial.leading)),
        expected=trial.expected,
        departures=share_record(len(trial.departures), len(samples)),
        calls=len(samples) * measurements.schedule_calls(precisions),
    )
