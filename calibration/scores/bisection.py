"""Adaptive bisection: the ranking of T step scores from fewer than T evaluations.

A pure search: it knows a callable and a number of steps, nothing of engines. Our own reconstruction
of the idea named in TMPDiff (arXiv 2603.14062), built for what score curves look like: smooth on a
log scale over 2 to 3 decades, not monotone (often U-shaped), with a spike at an end or one step before the last.

1. Evaluate both ends, the middle, and the step before the last, which costs two denoiser calls a sample: which of the
   last two has the spike is a matter of the scheduler. Flow matching in few steps ends with one too short to matter,
   after the one that matters most (docs/results.md, "How few measurements are enough?").
2. Where the first step, or the one before the last, towers over its nearest evaluated neighbour, evaluate the one beside
   it, so that a spike of one step does not lift the interpolation of the steps next to it.
3. Between evaluated steps, interpolate the log score with a monotone cubic (PCHIP; Fritsch and Butland,
   SIAM J. Sci. Stat. Comput. 5, 1984) and estimate how far the truth may stray: from the interval's rise,
   from the change of slope to its neighbours, and from its length.
4. For every step not evaluated, sum the probabilities that its order with any other step is wrong.
   Bisect the interval where that sum is largest; stop when the mean over steps is small, or at a budget.

What is guaranteed: no step is evaluated twice, evaluated scores are reported as they came, and both ends are right, as
is the step before the last with a budget above three. What is not: a spike of a single step further inside is found
only if it is hit (its neighbours do not show it), and the edge of a plateau is located to within an interval.
`full_sweep` has neither limit.

Preferring cheap steps (a downcast at step i costs T - i denoiser calls) was tried: dividing the gain by
the cost saved 5 to 25 % of the calls and worsened ranks as much as a smaller budget of evaluations did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr

FLOOR = 1e-4
"""Scores are clipped from below at this fraction of the largest before the logarithm: what is smaller,
zero or negative can be ranked at random without a visible effect on the error."""

STEEP = math.log(3.0)
"""A step at an end that is higher than its nearest evaluated neighbour by more than this (in log score) may be a spike."""

RISE, CURVATURE, ROUGHNESS = 0.25, 1.0, 0.05
"""Possible deviation in the middle of an interval, in log score: RISE * difference between its ends
+ CURVATURE * change of slope * length / 4 + ROUGHNESS * sqrt(length)."""

NEGLIGIBLE = 0.2
"""Two steps whose log scores cannot differ by more than this may be swapped at no visible cost."""

SETTLED = 0.05
"""Settled when the expected number of wrongly ordered partners of a step, a cautious estimate of its rank
deviation, is below this fraction of T."""

MIN_EVALUATIONS = 5
"""A curve is never called settled on fewer, however flat it looks."""


@dataclass(frozen=True)
class Search:
    """Scores of all steps, and how they were come by.

    Attributes:
        scores: float64 [T]; as evaluated where `measured`, interpolated elsewhere.
        measured: bool [T].
        order: the step indices evaluated, in order; none twice.
        settled: whether the search stopped because more evaluations would hardly change the ranking
            (true too when every step was evaluated), not because its budget was used up.
    """

    scores: np.ndarray
    measured: np.ndarray
    order: tuple[int, ...]
    settled: bool


def default_evaluations(num_steps: int) -> int:
    """The evaluations `adaptive_bisection` allows itself: half the steps, at least 8 (or all)."""
    return max(math.ceil(num_steps / 2), min(num_steps, 8))


def adaptive_bisection(
    evaluate: Callable[[int], float],
    num_steps: int,
    *,
    max_evaluations: int | None = None,
) -> Search:
    """Scores of `num_steps` steps from at most `max_evaluations` calls of `evaluate`.

    Args:
        evaluate: score of a step index; finite, small negative values and noise allowed.
        num_steps: T, at least 1.
        max_evaluations: the budget, default `default_evaluations(num_steps)`; T or more allows all.

    Raises:
        ValueError: `num_steps` below 1, a budget below min(T, 3), or a score that is not finite.
    """
    _check_steps(num_steps)
    budget = default_evaluations(num_steps) if max_evaluations is None else min(max_evaluations, num_steps)
    if budget < min(num_steps, 3):
        raise ValueError(
            f"max_evaluations is {max_evaluations}, expected {min(num_steps, 3)} or more: "
            f"both ends and the middle of {num_steps} steps come first"
        )
    values: dict[int, float] = {}
    for step in list(dict.fromkeys((0, num_steps - 1, (num_steps - 1) // 2, max(num_steps - 2, 0))))[:budget]:
        values[step] = _evaluate(evaluate, step)
    settled = False
    while len(values) < budget:
        beside = _beside_spike(values, num_steps)
        if beside is None:
            step, expected_deviation = _most_uncertain(values, num_steps)
            if expected_deviation <= SETTLED * num_steps and len(values) >= MIN_EVALUATIONS:
                settled = True
                break
        else:
            step = beside
        values[step] = _evaluate(evaluate, step)
    return _finish(values, num_steps, settled)


def full_sweep(evaluate: Callable[[int], float], num_steps: int) -> Search:
    """Evaluates every step, from first to last.

    Raises:
        ValueError: `num_steps` below 1 or a score that is not finite.
    """
    _check_steps(num_steps)
    values = {step: _evaluate(evaluate, step) for step in range(num_steps)}
    return _finish(values, num_steps, True)


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected 1 or more")


def _evaluate(evaluate: Callable[[int], float], step: int) -> float:
    score = float(evaluate(step))
    if not math.isfinite(score):
        raise ValueError(f"score of step {step} is {score}, expected a finite number")
    return score


def _logs(values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Evaluated step indices, ascending, and their log scores above the floor."""
    steps = np.array(sorted(values))
    scores = np.array([values[step] for step in steps])
    top = scores.max()
    return steps, np.log(np.maximum(scores, FLOOR * top)) if top > 0 else np.zeros(len(steps))


def _interpolate(steps: np.ndarray, logs: np.ndarray, num_steps: int) -> np.ndarray:
    """Log scores of all steps, float64 [T]."""
    if len(steps) < 2:
        return np.full(num_steps, logs[0])
    return np.asarray(PchipInterpolator(steps, logs)(np.arange(num_steps)))


def _beside_spike(values: dict[int, float], num_steps: int) -> int | None:
    """The step beside the first one, or before the one before the last, if that one is steep and this is not evaluated."""
    steps, logs = _logs(values)
    found = dict(zip(steps.tolist(), logs.tolist(), strict=True))
    for spike, beside, inward in ((0, 1, 1), (num_steps - 2, num_steps - 3, -1)):
        if spike not in found or not 0 <= beside < num_steps or beside in found:
            continue
        nearest = min((step for step in found if (step - spike) * inward > 0), key=lambda step: abs(step - spike))
        if found[spike] - found[nearest] > STEEP:
            return beside
    return None


def _most_uncertain(values: dict[int, float], num_steps: int) -> tuple[int, float]:
    """The middle of the interval that can change the ranking most, and the expected rank deviation.

    At least one step is not evaluated.
    """
    steps, logs = _logs(values)
    curve = _interpolate(steps, logs, num_steps)
    deviation = np.zeros(num_steps)
    slopes = np.diff(logs) / np.diff(steps)
    gaps = [(k, int(steps[k]), int(steps[k + 1])) for k in np.flatnonzero(np.diff(steps) > 1)]
    for k, left, right in gaps:
        length = right - left
        bend = max((abs(slopes[k] - slopes[m]) for m in (k - 1, k + 1) if 0 <= m < len(slopes)), default=0.0)
        rise = abs(logs[k + 1] - logs[k])
        middle = RISE * rise + CURVATURE * bend * length / 4 + ROUGHNESS * math.sqrt(length)
        position = np.arange(1, length) / length
        deviation[left + 1 : right] = middle * 4 * position * (1 - position)
    distance = np.abs(curve[:, None] - curve)
    spread = np.hypot(deviation[:, None], deviation)
    wrong = np.zeros((num_steps, num_steps))
    matters = (distance + spread > NEGLIGIBLE) & (spread > 0)
    wrong[matters] = ndtr(-distance[matters] / spread[matters])
    np.fill_diagonal(wrong, 0.0)
    displaced = wrong.sum(axis=1)
    # the length breaks ties, so that a flat curve is still cut where least is known
    _, left, right = max(gaps, key=lambda gap: (displaced[gap[1] + 1 : gap[2]].sum(), gap[2] - gap[1]))
    return (left + right) // 2, float(displaced.mean())


def _finish(values: dict[int, float], num_steps: int, settled: bool) -> Search:
    steps, logs = _logs(values)
    # all at or below zero: no scale to interpolate on, and nothing to rank
    scores = np.exp(_interpolate(steps, logs, num_steps)) if max(values.values()) > 0 else np.zeros(num_steps)
    measured = np.zeros(num_steps, dtype=bool)
    measured[steps] = True
    scores[steps] = [values[step] for step in steps]
    return Search(scores, measured, tuple(values), settled or len(values) == num_steps)
