"""Departures, and the risk of them, read off the tail of downcast scores.

A *departure* is a run that ends elsewhere than the reference run of its sample: now and then a small error decides early
in the loop which picture is drawn, and E is then near `DEPARTED`, however small the error was. A run counts as one
where its E exceeds ten medians over samples (`calibration.measure.metrics.departed`); the limited means that scores are
made of leave departures out.

A sample departs if its reference run passes close by a place where two pictures part, and it takes a low step before
that place. Near such a place errors grow: in inverse proportion to the distance from it. Distances of samples are spread
evenly, so that a share of samples proportional to 1 / g has an error g times the usual one, and E, a square, exceeds y
medians for a share proportional to y ** -0.5. That law shows in single-step scores long before anything departs, and
extends to where it does. With f, the share beyond `TAIL` t medians m, the departures and the tail before them add to the
mean

    r = 2 f sqrt(t m) (sqrt(DEPARTED) - sqrt(t m))

beyond what a limited mean counts. That is the *risk* of a step; risks of steps are added up. The law and its constants
are this project's own; docs/results.md, "Departures", has the evidence.

Sparing a risky step leaves another one at the low precision, and all samples pay for that. `affordable` keeps it to
`PRICE`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from calibration.measure.measurements import Measurements
from calibration.scores.bisection import Search
from calibration.scores.predictors import Contributions

TAIL = 5.0
"""Medians beyond which a sample counts as one of the tail."""

DEPARTED = 0.3
"""E of a departure; measured ones lie between 0.05 and 0.75."""

TAILLESS_SAMPLES = 40
"""As if so many samples without a tail had been seen too: one outlier of few samples says little."""

PRICE = 0.1
"""Share of limited E that may be paid for fewer departures."""

HALVINGS = 8
"""Risks are tried at 1, 1/2, ..., 1/128 of their size, and then left out."""


def risk_curve(errors: Mapping[int, Sequence[float]], num_steps: int) -> np.ndarray:
    """The risk of every step, in units of E, float64 [T].

    Args:
        errors: E of every sample with only that step at the low precision, by step index; at least one step. Between
            those steps medians are interpolated by their logarithms and shares linearly.
        num_steps: T.
    """
    steps = np.array(sorted(errors))
    samples = np.array([errors[step] for step in steps], dtype=np.float64)
    medians = np.median(samples, axis=1)
    counts = (samples > TAIL * medians[:, None]).sum(axis=1)
    shares = np.interp(np.arange(num_steps), steps, counts / (samples.shape[1] + TAILLESS_SAMPLES))
    padded = np.pad(shares, 1, mode="edge")
    shares = (padded[:-2] + 2 * shares + padded[2:]) / 4  # neighbours err alike: three times the samples
    if not medians.all():
        return np.zeros(num_steps)  # a step without error has no scale to tell a tail by
    amplitudes = np.sqrt(TAIL * np.exp(np.interp(np.arange(num_steps), steps, np.log(medians))))
    return np.asarray(2 * shares * amplitudes * np.maximum(np.sqrt(DEPARTED) - amplitudes, 0.0))


def measured_risk(measurements: Measurements, precision: str, search: Search) -> np.ndarray:
    """The risk curve of a precision from its downcast search, float64 [T]; nothing is measured again."""
    errors = {
        step: [measurements.downcast(step, precision, sample).error for sample in range(measurements.num_samples)]
        for step in search.order
    }
    return risk_curve(errors, measurements.num_steps)


def affordable(
    found: Contributions, precisions: Sequence[str], risks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Risks, those of a precision halved until they cost at most `PRICE` of E.

    The cost is that of schedules of the reference and the precision that have K steps at the reference, from T/5 to
    4T/5: by how much the one chosen with risk has more E, as predicted without, than the one chosen without.

    Args:
        found: contributions without risk.
        precisions: of their columns, the reference first.
        risks: curves float64 [T] by precision.
    """
    return {name: _affordable(found, precisions, name, risk) for name, risk in risks.items()}


def _affordable(found: Contributions, precisions: Sequence[str], precision: str, risk: np.ndarray) -> np.ndarray:
    plain = found.values[:, precisions.index(precision)]
    num_steps = len(plain)
    counts = range(math.ceil(num_steps / 5), 4 * num_steps // 5 + 1)
    for halvings in range(HALVINGS):
        scaled = risk / 2**halvings
        weighed = with_risk(found, precisions, {precision: scaled}).values[:, precisions.index(precision)]
        cheapest, chosen = np.argsort(plain, kind="stable"), np.argsort(weighed, kind="stable")
        least, spent = np.cumsum(plain[cheapest]), np.cumsum(plain[chosen])
        low = [num_steps - count - 1 for count in counts if count < num_steps]
        if (spent[low] ** found.power <= (1 + PRICE) * least[low] ** found.power).all():
            return scaled
    return np.zeros(num_steps)


def with_risk(
    found: Contributions, precisions: Sequence[str], risks: Mapping[str, Sequence[float] | np.ndarray]
) -> Contributions:
    """Contributions that predict the plain mean of E, from those that predict the limited one.

    With a power other than 1 risks are scaled, so that every uniform schedule is predicted with its risk added.

    Args:
        found: of a predictor.
        precisions: of its columns, the reference first.
        risks: curves of length T by precision; none for those without.
    """
    values = found.values.copy()
    for column, precision in enumerate(precisions):
        risk = np.asarray(risks.get(precision, ()), dtype=np.float64)
        if not risk.any():
            continue
        total, added = float(values[:, column].sum()), float(risk.sum())
        whole = (total**found.power + added) ** (1 / found.power)
        values[:, column] += risk * (whole - total) / added
    return replace(found, values=values)
