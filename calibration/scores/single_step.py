"""Downcast and upcast scores of every step.

E is the relative squared error of the final latents, a mean over the calibration samples in which none counts for more
than ten medians (`calibration.measure.metrics.limited`).

- Downcast d[i, p]: E of the reference run with only step i at p.
- Upcast u[i, p]: E(all p) - E(all p but step i at the reference).

Negative scores (noise; an error that cancels another) count as 0: no step is paid for being worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from calibration.document import ScoreRecord
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import level
from calibration.scores.bisection import Search, adaptive_bisection, default_evaluations, full_sweep

METHODS = ("bisection", "sweep")
Direction = Literal["downcast", "upcast"]
DIRECTIONS: tuple[Direction, ...] = ("downcast", "upcast")
OnEvaluation = Callable[[int, int], None]
"""Called after every sample of an evaluation with (done, at most)."""


@dataclass(frozen=True)
class ScoreCurve:
    """Scores of one precision in one direction: `search.scores` is d[:, p] or u[:, p]."""

    precision: str
    direction: Direction
    search: Search

    def calls(self, measurements: Measurements) -> dict[str, int]:
        """Denoiser calls by precision that its measurements took; a carried curve may have cost none."""
        return measurements.calls.get(f"{measurements.name}: {self.direction} {self.precision}", {})

    def record(self, measurements: Measurements, risks: Mapping[str, np.ndarray]) -> ScoreRecord:
        """What is stored of it, with the risk of its precision, float64 [T], where it is of downcasts."""
        return ScoreRecord(
            precision=self.precision,
            direction=self.direction,
            scores=tuple(self.search.scores.tolist()),
            risk=tuple(risks[self.precision].tolist()) if self.direction == "downcast" else (),
            measured=tuple(self.search.measured.tolist()),
            order=self.search.order,
            settled=self.search.settled,
            calls=self.calls(measurements),
            sweep_calls=sweep_calls(measurements.num_steps, measurements.num_samples),
        )


def sweep_calls(num_steps: int, num_samples: int) -> int:
    """Denoiser calls of a full sweep in one direction at one precision: T - i per step and sample."""
    return num_samples * num_steps * (num_steps + 1) // 2


def measure_scores(
    measurements: Measurements,
    precision: str,
    direction: Direction,
    *,
    method: str = "bisection",
    max_evaluations: int | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> ScoreCurve:
    """Scores of every step at `precision`, by adaptive bisection or a full sweep.

    Costs T - i denoiser calls per sample for every step i evaluated; E(all p) has to be measured for
    upcast scores and is, at T calls per sample, if it was not.

    Raises:
        ValueError: unknown direction or method.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}, expected one of {', '.join(DIRECTIONS)}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    samples = range(measurements.num_samples)
    num_steps = measurements.num_steps
    evaluations = (max_evaluations or default_evaluations(num_steps)) if method == "bisection" else num_steps
    done = 0

    def evaluate(step_index: int) -> float:
        nonlocal done
        errors = []
        if direction == "downcast":
            measurements.expect_downcasts(step_index, precision)
        else:
            measurements.expect_upcasts(precision, step_index)
        for sample in samples:
            if direction == "downcast":
                errors.append(measurements.downcast(step_index, precision, sample).error)
            else:
                errors.append(measurements.upcast_error(precision, step_index, sample))
            done += 1
            if on_evaluation:
                on_evaluation(done, min(evaluations, num_steps) * len(samples))
        if direction == "downcast":
            return level(errors)
        return level([measurements.uniform_error(precision, sample)["error"] for sample in samples]) - level(errors)

    search: Callable[[Callable[[int], float], int], Search] = full_sweep
    if method == "bisection":
        search = partial(adaptive_bisection, max_evaluations=max_evaluations)
    return ScoreCurve(precision, direction, search(evaluate, num_steps))
