"""Score curves of samples: what one changed step does to E."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from calibration.measure.metrics import typical_errors

Direction = Literal["downcast", "upcast"]
DIRECTIONS: tuple[Direction, ...] = ("downcast", "upcast")
"""A downcast score is E of the reference run with one step at the low precision; an upcast score, by how much E of the
uniform low run falls with one step at the reference."""


def mean_scores(direction: Direction, scores: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The curve of samples, float64 [T], none counting for more than ten medians.

    Args:
        direction: of the scores.
        scores: of each sample, float64 [S, T].
        uniform: E(all p), float64 [S]; upcasts are limited before they are taken from it.
    """
    if direction == "downcast":
        return np.asarray(typical_errors(scores.T))
    return np.asarray(typical_errors(uniform) - typical_errors((uniform[:, None] - scores).T))


def curve(measured: dict[str, Any], direction: Direction, rows: np.ndarray | None = None) -> np.ndarray:
    """The curve of a result file of `single_steps`; over repeated samples where `rows` repeats them, None for all."""
    scores, uniform = np.array(measured[direction]), np.array(measured["uniform"])
    return (
        mean_scores(direction, scores, uniform) if rows is None else mean_scores(direction, scores[rows], uniform[rows])
    )
