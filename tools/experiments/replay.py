"""Searches replayed on measured score curves: what each would have found, and for how many denoiser calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from calibration.scores.bisection import FLOOR, adaptive_bisection


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


Method = Callable[[np.ndarray, int], Found]
"""Searches scores known at every step, float64 [T], with at most so many evaluations."""


def bisection(scores: np.ndarray, evaluations: int) -> Found:
    """The calibrator's own search."""
    num_steps = len(scores)
    search = adaptive_bisection(scores.__getitem__, num_steps, max_evaluations=evaluations)
    return Found(search.scores, len(search.order), _calls(search.order, num_steps))


def evenly_spaced(scores: np.ndarray, evaluations: int) -> Found:
    """Steps at equal distances, both ends among them; the same interpolation between them as the bisection's."""
    num_steps = len(scores)
    steps = np.unique(np.rint(np.linspace(0, num_steps - 1, evaluations)).astype(int))
    values = scores[steps]
    found = np.zeros(num_steps)
    if values.max() > 0:
        logs = np.log(np.maximum(values, FLOOR * values.max()))
        found = np.exp(PchipInterpolator(steps, logs)(np.arange(num_steps)))
    found[steps] = values
    return Found(found, len(steps), _calls(steps, num_steps))


METHODS: dict[str, Method] = {"bisection": bisection, "evenly spaced": evenly_spaced}
"""What `rank_deviation` compares."""


def _calls(steps: tuple[int, ...] | np.ndarray, num_steps: int) -> int:
    return int(sum(num_steps - int(step) for step in steps))
