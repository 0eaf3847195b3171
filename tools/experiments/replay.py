"""Searches replayed on measured score curves: what each would have found, and for how many denoiser calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from calibration.bisection import FLOOR, adaptive_bisection


@dataclass(frozen=True)
class Curve:
    """A curve that is known at every step.

    Attributes:
        scores: the truth, float64 [T].
        local: what the scores are proportional to but for a gain that varies little from step to step, float64 [T]:
            errors of single steps, weighted. None if not measured.
    """

    scores: np.ndarray
    local: np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """What a search made of a curve.

    Attributes:
        scores: float64 [T].
        evaluations: steps evaluated.
        calls: denoiser calls per sample; a score of step i takes T - i.
    """

    scores: np.ndarray
    evaluations: int
    calls: int


Method = Callable[[Curve, int], Found]
"""Searches a curve with at most so many evaluations."""


def bisection(curve: Curve, evaluations: int) -> Found:
    """The calibrator's own search."""
    num_steps = len(curve.scores)
    search = adaptive_bisection(curve.scores.__getitem__, num_steps, max_evaluations=evaluations)
    return Found(search.scores, len(search.order), _calls(search.order, num_steps))


def evenly_spaced(curve: Curve, evaluations: int) -> Found:
    """Steps at equal distances, both ends among them; the same interpolation between them as the bisection's."""
    num_steps = len(curve.scores)
    steps = np.unique(np.rint(np.linspace(0, num_steps - 1, evaluations)).astype(int))
    values = curve.scores[steps]
    scores = np.zeros(num_steps)
    if values.max() > 0:
        logs = np.log(np.maximum(values, FLOOR * values.max()))
        scores = np.exp(PchipInterpolator(steps, logs)(np.arange(num_steps)))
    scores[steps] = values
    return Found(scores, len(steps), _calls(steps, num_steps))


def gain_bisection(curve: Curve, evaluations: int) -> Found:
    """The bisection on score / local error; T calls more, for the local errors."""
    if curve.local is None:
        raise ValueError("this curve has no local errors; measure them with local_gain")
    num_steps = len(curve.scores)
    shape = np.maximum(curve.local, FLOOR * curve.local.max())
    search = adaptive_bisection(curve.scores.__getitem__, num_steps, max_evaluations=evaluations, shape=shape)
    return Found(search.scores, len(search.order), _calls(search.order, num_steps) + num_steps)


METHODS: dict[str, Method] = {"bisection": bisection, "evenly spaced": evenly_spaced}
"""What `rank_deviation` compares."""


def _calls(steps: tuple[int, ...] | np.ndarray, num_steps: int) -> int:
    return int(sum(num_steps - int(step) for step in steps))
