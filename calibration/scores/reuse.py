"""Single reuses: what one step that is not computed does to the final latents, and what that says of many at once.

A *single* is the reference run with one step reused at one order. Its output is off by the extrapolation error

    d[k, o] = P[o](m[k-1], m[k-2], ...) - m[k],

and its run ends at an error vector e[k, o], to first order a linear function of d[k, o]. Where other steps are reused
too, step k extrapolates from outputs further back: another polynomial, another error. But any such error is a sum of
m[k], m[k-1], m[k-2], ... whose weights add up to 0, and so are the d[k, o], which span these sums as far back as they
reach. So the error in any pattern is a known combination of measured singles, with nothing more to run. Outputs further
back than singles reach are taken to lie on the polynomial through those within.

What that leaves out: computed steps answer to the change of their latents, and an extrapolation repeats or multiplies the
answer (`calibration.choose.reuse_plans` measures it where it matters). Vectors are sketches, which add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from calibration.measure.measurements import ErrorVector, Measurements
from calibration.measure.metrics import typical_error, typical_errors
from engines.reuse import MOST_COMPUTED, REUSES, Terms, extrapolation, lagrange_weight, reuse_terms, with_computed

STAGE = "reuse scores"

PROBES = 6
"""Steps at which parabolas are tried, both ends among them; they are measured at all others where they are the best order
at one of these."""


@dataclass(frozen=True)
class Reuses:
    """Single reuses on S samples.

    Attributes:
        timesteps: of the T steps.
        vectors: error vectors in units of the reference's final latents, float32 [T, O, S, K] by step and order; zero where
            not measured.
        errors: typical E, float64 [T, O]; infinite where not measured.
    """

    timesteps: Sequence[float]
    vectors: np.ndarray
    errors: np.ndarray
    _known: dict[tuple[int, Terms], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def orders(self) -> range:
        """The orders that were measured at every step that can have them."""
        return range(self.vectors.shape[1])

    def patterns(self, schedules: Sequence[Sequence[str]]) -> np.ndarray:
        """What schedules are made of: weights of the singles, float64 [N, T, O], by first-order theory.

        Raises:
            ScheduleError: a reused step has too few computed ones before it.
        """
        found = np.zeros((len(schedules), *self.errors.shape))
        for row, choices in enumerate(schedules):
            for step, terms in enumerate(reuse_terms(self.timesteps, choices)):
                if terms is not None:
                    if (step, terms) not in self._known:
                        self._known[step, terms] = self._weights(step, terms)
                    found[row, step] = self._known[step, terms]
        return found

    def predicted(self, schedules: Sequence[Sequence[str]]) -> np.ndarray:
        """Error vectors of schedules, float64 [N, S, K]."""
        found: np.ndarray = np.tensordot(self.patterns(schedules), self.vectors, axes=2)
        return found

    def _weights(self, step: int, terms: Sequence[tuple[int, float]]) -> np.ndarray:
        """Of the singles of a step, for its output as weights of computed ones; float64 [O]."""
        nodes, basis = self._bases[step]
        found = np.zeros(len(self.orders))
        if not len(basis):  # the output before it is at the same timestep: there is one single only
            found[0] = 1.0
            return found
        on_nodes = np.zeros(len(nodes))
        for j, weight in terms:
            if j in nodes:
                on_nodes[nodes.index(j)] += weight
            else:
                at = self.timesteps[j]
                on_nodes += weight * np.array([lagrange_weight(nodes, node, at, self.timesteps) for node in nodes])
        found[: len(basis)] = np.linalg.solve(basis.T, on_nodes[1:])
        return found

    @cached_property
    def _bases(self) -> list[tuple[list[int], np.ndarray]]:
        """By step: itself and the last computed ones, backwards; and the weights that each order gives those, [O', O']."""
        found = []
        for step, before in enumerate(_computed_before(self.timesteps)):
            count = min(len(before), len(self.orders))
            nodes = [step, *before[::-1][:count]]
            if any(self.timesteps[node] == self.timesteps[step] for node in nodes[1:]):
                count = 0
            basis = np.zeros((count, count))
            for order in range(count):
                for j, weight in extrapolation(order, step, before, self.timesteps):
                    basis[order, nodes.index(j) - 1] = weight
            found.append((nodes, basis))
        return found


def single(reference: str, num_steps: int, step: int, order: int) -> tuple[str, ...]:
    """The reference run with one step reused."""
    return (reference,) * step + (REUSES[order],) + (reference,) * (num_steps - step - 1)


def measure_reuses(
    measurements: Measurements,
    timesteps: Sequence[float],
    samples: Sequence[int],
    on_run: Callable[[int, int], None],
) -> Reuses:
    """Measures single reuses: orders 0 and 1 at every step that can have them, order 2 where it is any use.

    A run costs T - k - 1 denoiser calls per sample for step k. Neighbouring steps tell nothing of each other here, as
    timesteps are rounded to whole numbers, which changes the sign of a curvature: nothing is interpolated.

    Args:
        measurements: of the calibration samples.
        timesteps: of the T steps.
        samples: those that are run.
        on_run: called after every run on a sample with (done, at most).
    """
    measurer = _Measurer(measurements, timesteps, samples, on_run)
    steps = range(1, len(timesteps))
    measurer.measure([(step, order) for order in (0, 1) for step in steps])
    inner = [step for step in steps if measurer.possible(step, 2)]
    probes = sorted({inner[round(at)] for at in np.linspace(0, len(inner) - 1, PROBES)}) if inner else []
    measurer.measure([(step, 2) for step in probes])
    errors = measurer.errors()
    if any(errors[step, 2] < errors[step, :2].min() for step in probes):
        measurer.measure([(step, 2) for step in inner])
        return measurer.reuses(3)
    return measurer.reuses(2)


class _Measurer:
    """Singles as they come in."""

    def __init__(
        self,
        measurements: Measurements,
        timesteps: Sequence[float],
        samples: Sequence[int],
        on_run: Callable[[int, int], None],
    ) -> None:
        self._measurements, self._samples, self._on_run = measurements, samples, on_run
        self._timesteps, self._before = timesteps, _computed_before(timesteps)
        self._runs: dict[tuple[int, int], list[ErrorVector]] = {}
        self._done = 0

    def possible(self, step: int, order: int) -> bool:
        """Whether a step can be reused at an order, and that gives anything but a lower one."""
        before = self._before[step]
        return order < len(before) and (order == 0 or self._timesteps[before[-1]] != self._timesteps[step])

    def measure(self, wanted: Sequence[tuple[int, int]]) -> None:
        asked = [cell for cell in wanted if self.possible(*cell) and cell not in self._runs]
        schedules = [single(self._measurements.reference, len(self._timesteps), step, order) for step, order in asked]
        self._measurements.expect_planned(schedules, self._samples)
        total = self._done + len(asked) * len(self._samples)
        for cell, schedule in zip(asked, schedules, strict=True):
            runs = self._runs[cell] = []
            for sample in self._samples:
                runs.append(self._measurements.planned(STAGE, schedule, sample))
                self._done += 1
                self._on_run(self._done, total)

    def errors(self) -> np.ndarray:
        found = np.full((len(self._timesteps), MOST_COMPUTED), np.inf)
        for cell, runs in self._runs.items():
            found[cell] = typical_error([run.error for run in runs])
        return found

    def reuses(self, orders: int) -> Reuses:
        size = max((len(run.direction) for runs in self._runs.values() for run in runs), default=1)
        vectors = np.zeros((len(self._timesteps), orders, len(self._samples), size), dtype=np.float32)
        for (step, order), runs in self._runs.items():
            if order < orders:
                vectors[step, order] = vector_of(runs)
        return Reuses(self._timesteps, vectors, self.errors()[:, :orders])


def vector_of(runs: Sequence[ErrorVector]) -> np.ndarray:
    """Error vectors of a run on S samples in units of the reference's final latents, float64 [S, K]."""
    return np.array([np.sqrt(run.error) * run.direction.astype(np.float64) for run in runs])


def errors_of(vectors: np.ndarray) -> np.ndarray:
    """Typical E of error vectors float64 [N, S, K]: [N]."""
    return typical_errors(np.sum(vectors**2, axis=-1))


def _computed_before(timesteps: Sequence[float]) -> list[tuple[int, ...]]:
    """By step the last computed ones at distinct timesteps, where every step is computed."""
    found: list[tuple[int, ...]] = []
    computed: tuple[int, ...] = ()
    for step in range(len(timesteps)):
        found.append(computed)
        computed = with_computed(computed, step, timesteps)[-MOST_COMPUTED:]
    return found
