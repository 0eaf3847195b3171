"""What scores predict for a schedule.

A predictor turns scores into contributions c[i, p], 0 for the reference, so that a schedule z has the
predicted error (sum over i of c[i, z_i]) ** power. Allocation needs the sum, over any number of precisions;
the power, 1 but for the last two predictors, changes no ranking. There are five, and validation decides which
one describes the model best:

- "downcast": c = d. Exact when errors of different steps are uncorrelated.
- "downcast-rescaled": c = d * E(all p) / sum over i of d[i, p]. The ranking of the steps within p stays;
  what correlation between steps does to the level of each precision is put right, which matters when
  precisions compete (weight-only errors are correlated, and their plain sum is several times too low).
- "upcast": c = u * E(all p) / sum over i of u[i, p]. With one low precision, E(all p) minus the sum of u
  over the upcast steps has the same ranking of schedules; that form is only right near all p, though: it
  does not give 0 for the all-reference schedule unless the u add up to E(all p), and it has no meaning
  for a mixture of low precisions. Sharing E(all p) out in proportion to u is exact at every uniform
  schedule, reference included, and additive over precisions.
- "upcast-power": c = E(all p) ** (1 / power) in proportion to u, power = sum of all u / sum of all E(all p).
  Errors that point the same way add up before they are squared, so that E goes with the square of the sum,
  and the u (each the slope of E at its upper end) add up to twice E(all p); uncorrelated errors give power
  1 and the predictor above. Still exact at every uniform schedule, and its slope there is right too.
- "mixed-power": c in proportion to (d - floor + u) / 2, power = sum of all u / sum of all (d - floor + u) / 2.
  Downcasts are right where few steps are low, upcasts where nearly all are: to second order, with z[i] = 1 where step i
  is at p,

      E(z) = floor + sum of a[i] z[i] + sum over i < j of b[i, j] z[i] z[j]     (z not all zero)

  so that d[i] = floor + a[i], u[i] = a[i] + sum over j other than i of b[i, j], and E(all p) = floor + sum of
  (d - floor + u) / 2. The floor is what any change costs, however small, as all later steps round otherwise; it is
  in every downcast but the last step's, after which nothing rounds, and once in E. The last equation gives it, bounded
  by 0 and the least of those downcasts; with fewer than five steps none is taken. After a transfer, what is wrong with
  the level of carried scores is in it, too. Predictions are shares of E(all p), in which the floor is part of the
  whole, so that schedules of few low steps come out too low by up to the floor. The expansion is this project's own
  (docs/results.md, "Do predictions hold?", has what it is worth).

What departures add to E, `calibration.scores.divergence` predicts; allocation gets both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PREDICTORS = ("downcast", "downcast-rescaled", "upcast", "upcast-power", "mixed-power")
POWERS = (0.5, 2.0)
"""Range of the power: 2 is full correlation; below 1, errors of different steps cancel."""

FEWEST_FOR_FLOOR = 5
"""Steps; with fewer the floor of "mixed-power" would be a multiple of its equation's noise."""


@dataclass(frozen=True)
class Contributions:
    """What a predictor makes of scores: predicted E = (sum over i of values[i, z_i]) ** power.

    Attributes:
        values: float64 [T, P], non-negative, zero for the reference.
        power: 1 for predictors that are additive in E itself.
    """

    values: np.ndarray
    power: float = 1.0


def contributions(
    predictor: str,
    precisions: tuple[str, ...],
    curves: Mapping[tuple[str, str], np.ndarray],
    totals: Mapping[str, float],
) -> Contributions:
    """The contributions of a predictor: what step i at precision p adds.

    Args:
        predictor: one of `PREDICTORS`.
        precisions: the reference first.
        curves: scores float64 [T] by (direction, precision), for every precision but the reference.
        totals: E(all p) by precision.

    Raises:
        ValueError: unknown predictor.
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor is {predictor!r}, expected one of {', '.join(PREDICTORS)}")
    low, (source, _, variant) = precisions[1:], predictor.partition("-")
    upcasts = whole = 0.0
    scores = {}
    for name in low:
        if source == "mixed":
            scores[name] = _mixed(curves["downcast", name], curves["upcast", name], totals[name])
        else:
            scores[name] = np.maximum(curves[source, name], 0.0)
        if variant == "power":
            upcasts += float(np.maximum(curves["upcast", name], 0.0).sum())
            whole += float(scores[name].sum()) if source == "mixed" else totals[name]
    power = min(max(upcasts / whole, POWERS[0]), POWERS[1]) if whole > 0 else 1.0
    if predictor != "downcast":
        scores = {name: _shared_out(totals[name] ** (1 / power), found) for name, found in scores.items()}
    num_steps = len(next(iter(scores.values())))
    return Contributions(np.stack([np.zeros(num_steps), *scores.values()], axis=1), power)


def _mixed(downcast: np.ndarray, upcast: np.ndarray, total: float) -> np.ndarray:
    """(d - floor + u) / 2, negative parts of which count as 0, float64 [T]; `total` is E(all p)."""
    floor = np.zeros(len(downcast))
    if len(downcast) >= FEWEST_FOR_FLOOR:
        # of scores as measured: without their negative ones, noise would pass for a floor
        excess = float((downcast + upcast).sum()) / 2 - total
        before_last = len(downcast) - 1
        floor[:-1] = max(min(excess / (before_last / 2 - 1), float(downcast[:-1].min())), 0.0)
    return (np.maximum(downcast - floor, 0.0) + np.maximum(upcast, 0.0)) / 2


def _shared_out(total: float, scores: np.ndarray) -> np.ndarray:
    """`total` in proportion to the scores; without any positive one there is nothing to go by: all steps alike."""
    whole = float(scores.sum())
    return total * (scores / whole if whole > 0 else np.full(len(scores), 1 / len(scores)))


def predict(contributions: Contributions, precisions: tuple[str, ...], schedule: tuple[str, ...]) -> float:
    """Predicted E of a schedule."""
    terms = (contributions.values[step, precisions.index(name)] for step, name in enumerate(schedule))
    return float(math.fsum(terms) ** contributions.power)
