"""Planted loops that are not linear: a reference that rounds coarsely, and samples close to where two pictures part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from helpers.planted import OneByOne, PlantedEvaluator

from calibration.choose.costs import NO_COSTS, AllocationCosts, LatencyModel
from calibration.choose.predictions import Predictions
from calibration.measure.evaluator import Evaluator
from calibration.measure.measurements import Measurements
from calibration.measure.metrics import relative_error
from calibration.scores.measured_gram import measured_gram
from calibration.scores.single_step import Downcasts, measure_downcasts


def run_errors(evaluator: Evaluator, schedule: Sequence[str]) -> np.ndarray:
    """E of every sample, by running the schedule and the reference from the start: float64 [S]."""

    def final(sample: int, precisions: Sequence[str]) -> np.ndarray:
        state = evaluator.start(sample)
        for precision in precisions:
            state = evaluator.steps([sample], [state], precision)[0]
        return evaluator.latents(state)

    reference = (evaluator.precisions[0],) * len(schedule)
    pairs = [(final(sample, schedule), final(sample, reference)) for sample in range(evaluator.num_samples)]
    return np.array([relative_error(*pair) for pair in pairs])


def predicted(
    measurements: Measurements,
    precisions: Sequence[str],
    latencies_ms: Mapping[str, float],
    costs: AllocationCosts = NO_COSTS,
) -> tuple[Predictions, list[Downcasts]]:
    """What a full sweep predicts, by the Gram matrix, and its curves."""
    curves = [measure_downcasts(measurements, name, method="sweep") for name in precisions[1:]]
    gram = measured_gram(measurements, curves).gram
    model = LatencyModel(tuple(precisions), latencies_ms, costs)
    return Predictions(model, {"gram": gram, "downcast sum": gram.downcast_sum()}, "gram"), curves


@dataclass(frozen=True)
class RoundedLoop(OneByOne):
    """x <- x turned by a rotation, plus a drift, rounded to a grid after every step at every precision.

    A low step adds a fixed matrix times x, as rounded weights do. Any change makes all later steps round otherwise:
    nothing that a run does leaves the others' rounding alone.

    Attributes:
        weight: by low precision the size of its matrix, relative to x.
        grid: what is rounded to, where x is about 1.
    """

    weight: tuple[tuple[str, float], ...] = (("int8", 0.03), ("int4", 0.06))
    grid: float = 0.03
    size: int = 192
    num_steps: int = 10
    num_samples: int = 40
    seed: int = 0

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("bf16", *(name for name, _ in self.weight))

    def start(self, sample: int, nudged: bool = False) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng((self.seed, sample))
        x, change = rng.normal(size=(2, self.size))
        # so few numbers round alike after a smaller change
        return 0, x + self.grid / 4 * change if nudged else x

    def step(self, sample: int, state: tuple[int, np.ndarray], precision: str) -> tuple[int, np.ndarray]:
        index, x = state
        rotation, drift, matrices = self._made
        found = 0.9 * rotation @ x + drift
        if precision in matrices:
            found = found + matrices[precision] @ x
        return index + 1, np.round(found / self.grid) * self.grid

    def latents(self, state: tuple[int, np.ndarray]) -> np.ndarray:
        return state[1].reshape(3, 8, -1).astype(np.float32)

    def key(self) -> str:
        return repr(self)

    @cached_property
    def _made(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        rng = np.random.default_rng(self.seed)
        rotation = np.linalg.qr(rng.normal(size=(self.size, self.size)))[0]
        matrices = {
            name: size * rng.normal(size=(self.size, self.size)) / np.sqrt(self.size) for name, size in self.weight
        }
        return rotation, 0.4 * rng.normal(size=self.size), matrices


@dataclass(frozen=True)
class Blocks(PlantedEvaluator):
    """Errors of the first half of the steps point the same way, those of the second half each its own way.

    With errors of like size a single downcast says little; many at once are worse in the first half.
    """

    def _direction(self, index: int) -> np.ndarray:
        direction = np.zeros(self._size)
        direction[0 if index < self.num_steps // 2 else 1 + index] = 1.0
        return direction


FragileState = tuple[int, np.ndarray, int]


@dataclass(frozen=True)
class FragileLoop(PlantedEvaluator):
    """Samples that depart as soon as so many of the first steps are low; those steps cost all the others next to nothing.

    A low early step shows in a fragile sample's downcast: it errs more than that of any other sample.

    Attributes:
        fragile: these samples.
        early: the first steps that push them.
        pushes: how many of these must be low.
        shown: what a push that is not enough adds, as `errors`.
        leap: what a departure adds, as `errors`.
    """

    fragile: tuple[int, ...] = ()
    early: int = 2
    pushes: int = 1
    shown: float = 0.5
    leap: float = 12.0

    def start(self, sample: int, nudged: bool = False) -> FragileState:
        return *super().start(sample, nudged), 0

    def step(self, sample: int, state: FragileState, precision: str) -> FragileState:
        pushed = state[0] < self.early and precision in self.errors and sample in self.fragile
        return *super().step(sample, state[:2], precision), state[2] + pushed

    def latents(self, state: FragileState) -> np.ndarray:
        index, x, pushed = state
        size = self.leap if pushed >= self.pushes else self.shown * pushed
        return super().latents((index, x + size * self._direction(self.num_steps + 1)))

    def key(self) -> str:
        return repr((super().key(), self.fragile, self.early, self.pushes, self.shown, self.leap))
