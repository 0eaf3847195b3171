"""Downcasts of every step: what one step at a low precision does to the final latents.

The score d[i, p] of step i at precision p is E of the reference run with only that step at p, a mean over the calibration
samples in which none counts for more than ten medians (`calibration.measure.metrics.limited`). Beside it stand the error
vectors, for the Gram matrix (`calibration.scores.gram`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from calibration.measure.measurements import ErrorVector, Measurements
from calibration.measure.metrics import typical_error
from calibration.records import ScoreRecord
from calibration.scores.bisection import Search, adaptive_bisection, default_evaluations, full_sweep
from calibration.scores.gram import Vectors

METHODS = ("bisection", "sweep")
OnEvaluation = Callable[[int, int], None]
"""Called after every sample of an evaluation with (done, at most)."""


@dataclass(frozen=True)
class Downcasts:
    """Scores of one precision: `search.scores` is d[:, p].

    Attributes:
        precision: p.
        search: the scores, and how they were come by.
        steps: those whose vectors were measured, rising.
        vectors: of these steps, in order.
    """

    precision: str
    search: Search
    steps: tuple[int, ...]
    vectors: Vectors

    def calls(self, measurements: Measurements) -> dict[str, int]:
        """Denoiser calls by precision that its measurements took; carried scores may have cost few."""
        return measurements.calls.get(f"{measurements.name}: downcast {self.precision}", {})

    def record(self, measurements: Measurements) -> ScoreRecord:
        """What is stored of it."""
        return ScoreRecord(
            precision=self.precision,
            scores=tuple(self.search.scores.tolist()),
            measured=tuple(self.search.measured.tolist()),
            order=self.search.order,
            settled=self.search.settled,
            calls=self.calls(measurements),
            sweep_calls=sweep_calls(measurements.num_steps, measurements.num_samples),
        )


def sweep_calls(num_steps: int, num_samples: int) -> int:
    """Denoiser calls of a full sweep at one precision: T - i per step and sample."""
    return num_samples * num_steps * (num_steps + 1) // 2


def measure_downcasts(
    measurements: Measurements,
    precision: str,
    method: str = "bisection",
    on_evaluation: OnEvaluation | None = None,
) -> Downcasts:
    """Scores and error vectors at `precision`, by adaptive bisection or a full sweep.

    Costs T - i denoiser calls per sample for every step i evaluated.

    Raises:
        ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    num_steps = measurements.num_steps
    most = (default_evaluations(num_steps) if method == "bisection" else num_steps) * measurements.num_samples
    found: dict[int, list[ErrorVector]] = {}

    def evaluate(step_index: int) -> float:
        measurements.expect_downcasts(step_index, precision)
        runs = found[step_index] = []
        for sample in range(measurements.num_samples):
            runs.append(measurements.downcast(step_index, precision, sample))
            if on_evaluation:
                on_evaluation((len(found) - 1) * measurements.num_samples + len(runs), most)
        return typical_error([run.error for run in runs])

    result = (adaptive_bisection if method == "bisection" else full_sweep)(evaluate, num_steps)
    steps = tuple(sorted(found))
    return Downcasts(precision, result, steps, vectors_of([found[step] for step in steps]))


def vectors_of(runs: list[list[ErrorVector]]) -> Vectors:
    """Measured runs by step and sample as arrays."""
    return Vectors(
        np.array([[run.error for run in row] for row in runs]),
        np.array([[run.direction for run in row] for row in runs]),
    )
