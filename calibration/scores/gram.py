"""E of any schedule from the error vectors of single downcasts.

A downcast of step i at precision p ends at an error vector e[i, p]. To first order in the errors those of a schedule z
add up, so that in units of ||x_ref||^2, as a mean over samples,

    E(z) = || sum over i of e[i, z_i] ||^2 = sum over i and j of G[i z_i, j z_j]

G, the Gram matrix of the error vectors, knows what no sum of scores can: where neighbouring steps err in the same
direction, low steps cost less apart than side by side. Its diagonal alone is the *downcast sum*.

Steps that were not measured are interpolated: scores by the search, correlations bilinearly between measured steps of
both precisions. That a vector's correlation with itself is 1 says nothing about its neighbours; in the interpolation the
mean of the correlations beside it stands there.

The floor. Where the reference rounds coarsely (BF16), any change lets this step and all later ones round otherwise. Every
e[i, p] then carries r' - r: its own rounding from step i on, and, with the other sign, the reference's, which all vectors
share. The reference run from a start changed by next to nothing ends at r'' - r, whose inner product with e[i, p] is in
the mean the reference's own rounding from step i on, f[i]. G holds it once for every pair of low steps and twice for every
step, E only once for each of the two runs:

    E(z) = sum over i and j of (G[i z_i, j z_j] - f[max(i, j)] (1 + [i = j])) + 2 f[first low step]

The derivation is this project's own (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from calibration.measure.metrics import limited

DIGITS = 4
"""Decimals of correlations, which are rounded before they are used: documents hold them so."""

ROUNDING = 1e-12
"""Negative eigenvalues, as a fraction of the largest, that are those of a matrix without any but for rounding."""


@dataclass(frozen=True)
class Vectors:
    """Error vectors of runs on S samples.

    Attributes:
        errors: E, float64 [M, S].
        directions: sketches of the vectors over their norms (`calibration.measure.sketch`), float [M, S, K].
    """

    errors: np.ndarray
    directions: np.ndarray

    def weighed(self) -> np.ndarray:
        """Vectors whose inner products are means over samples, none counting for more than ten medians.

        Returns:
            float64 [M, S * K].
        """
        weights = np.sqrt(limited(self.errors) / self.errors.shape[1])
        found: np.ndarray = (weights[..., None] * self.directions).reshape(len(weights), -1)
        return found


@dataclass(frozen=True)
class Correlations:
    """Correlations of error vectors between measured steps.

    Attributes:
        positions: by low precision, in order of precision: rising step indices, M of them, at least one. Fractions
            where they were carried from another sampler table.
        values: float64 [M, M'] by pair of precisions, the first no later in the order than the second; within -1..1.
    """

    positions: Mapping[str, tuple[float, ...]]
    values: Mapping[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Gram:
    """Predicted E of schedules.

    Attributes:
        precisions: the reference first; P of them.
        values: float64 [T, P, T, P], symmetric, positive semidefinite, zero for the reference.
        floor: float64 [T], what a schedule has on top whose first low step is step i.
    """

    precisions: tuple[str, ...]
    values: np.ndarray
    floor: np.ndarray

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.floor)

    @property
    def diagonal(self) -> np.ndarray:
        """What step i at precision p adds by itself, float64 [T, P]."""
        found: np.ndarray = np.einsum("ipip->ip", self.values).copy()
        return found

    def errors(self, choices: np.ndarray) -> np.ndarray:
        """Predicted E of schedules given as indices into `precisions`, int [N, T] -> float64 [N]."""
        picked = np.asarray(choices)
        steps = np.arange(self.num_steps)
        cells = steps * len(self.precisions) + picked
        flat = self.values.reshape(self.num_steps * len(self.precisions), -1)
        sums = np.array([float(flat[np.ix_(row, row)].sum()) for row in cells])
        low = picked > 0
        floors = np.where(low.any(axis=1), self.floor[low.argmax(axis=1)], 0.0)
        found: np.ndarray = np.maximum(sums, 0.0) + floors
        return found

    def error(self, schedule: Sequence[str]) -> float:
        """Predicted E of one schedule, a precision per step."""
        return float(self.errors(np.array([[self.precisions.index(name) for name in schedule]]))[0])

    def downcast_sum(self) -> Gram:
        """The same scores without what steps have to do with each other, the floor left in every one of them."""
        own = self.diagonal
        own[:, 1:] += self.floor[:, None]
        steps, count = own.shape
        values = np.diag(own.reshape(-1)).reshape(steps, count, steps, count)
        return Gram(self.precisions, values, np.zeros(steps))


def correlate(measured: Mapping[str, tuple[Sequence[int], Vectors]]) -> Correlations:
    """Correlations of measured downcasts, those that few samples give by chance taken back.

    Each is shrunk by its noise across samples (the positive part of James and Stein's estimator, Berkeley Symposium 4,
    1961; the noise is the mean over a pair of precisions). Without that a search would find the steps whose vectors seem to
    cancel.

    Args:
        measured: by low precision, in order of precision: the steps, rising, and their vectors, of the same samples.
    """
    units = {name: _units(vectors.weighed()) for name, (_, vectors) in measured.items()}
    num_samples = {name: vectors.errors.shape[1] for name, (_, vectors) in measured.items()}
    names = list(measured)
    values = {
        (a, b): np.round(_shrunk(units[a], units[b], num_samples[a], own=a == b), DIGITS)
        for k, a in enumerate(names)
        for b in names[k:]
    }
    return Correlations({name: tuple(map(float, steps)) for name, (steps, _) in measured.items()}, values)


def _shrunk(first: np.ndarray, second: np.ndarray, num_samples: int, own: bool) -> np.ndarray:
    """Inner products of unit vectors float64 [M, S * K] and [M', S * K], less what samples disagree by."""
    rows = [vectors.reshape(len(vectors), num_samples, -1) for vectors in (first, second)]
    parts = np.einsum("isk,jsk->sij", *rows)
    found = parts.sum(axis=0)
    others = ~np.eye(len(found), dtype=bool) if own else np.ones(found.shape, dtype=bool)
    if num_samples > 1 and others.any():
        # how far samples are from having the same correlation, each by its weight
        weights = np.einsum("is,js->sij", *(np.linalg.norm(vectors, axis=2) for vectors in rows))
        strays = parts - weights * found / np.maximum(weights.sum(axis=0), 1e-300)
        noise = float((strays**2).sum(axis=0)[others].mean()) * num_samples / (num_samples - 1)
        kept = 1 - noise / np.maximum(found**2, 1e-300)
        found = np.where(others, found * np.maximum(kept, 0.0), found)
    return np.clip(found, -1.0, 1.0)


def rounding_floor(
    nudged: Vectors, measured: Mapping[str, tuple[Sequence[int], Vectors]], num_steps: int
) -> np.ndarray:
    """What a schedule whose first low step is step i has of the reference's own rounding: 2 f[i], float64 [T].

    Args:
        nudged: of the reference run from a start changed by next to nothing; M = 1.
        measured: as for `correlate`; f does not depend on the precision, so that its mean over them is taken.
        num_steps: T.

    Returns:
        Non-negative and falling; linear between measured steps.
    """
    run = nudged.weighed()[0]
    curves = []
    for steps, vectors in measured.values():
        products = vectors.weighed() @ run
        own = np.sum(vectors.weighed() ** 2, axis=1)
        curves.append(np.interp(np.arange(num_steps), steps, np.clip(products, 0.0, own / 2)))
    floor = 2 * np.mean(curves, axis=0) if curves else np.zeros(num_steps)
    found: np.ndarray = np.minimum.accumulate(floor)
    return found


def gram(scores: Mapping[str, np.ndarray], correlations: Correlations, floor: np.ndarray, reference: str) -> Gram:
    """The Gram matrix of all steps and precisions.

    Args:
        scores: d[i, p] by low precision, float64 [T], in order of precision; negative ones count as 0.
        correlations: of the same precisions.
        floor: float64 [T], see `rounding_floor`.
        reference: name of the reference precision.
    """
    names, num_steps = list(scores), len(floor)
    roots = {name: np.sqrt(np.maximum(scores[name], 0.0)) for name in names}
    values = np.zeros((num_steps, len(names) + 1, num_steps, len(names) + 1))
    shared = floor[np.maximum(*np.indices((num_steps, num_steps)))] / 2
    for a, first in enumerate(names, start=1):
        for b, second in enumerate(names[a - 1 :], start=a):
            grid = correlations.values[first, second]
            found = _interpolated(grid, correlations.positions[first], correlations.positions[second], num_steps)
            if a == b:
                np.fill_diagonal(found, 1.0)
            block = found * np.outer(roots[first], roots[second]) - shared
            if a == b:
                np.fill_diagonal(block, np.maximum(roots[first] ** 2 - floor, 0.0))
            values[:, a, :, b] = block
            values[:, b, :, a] = block.T
    return Gram((reference, *names), _semidefinite(values), floor)


def _units(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: np.ndarray = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return found


def _interpolated(grid: np.ndarray, rows: Sequence[float], columns: Sequence[float], num_steps: int) -> np.ndarray:
    """Correlations of all pairs of steps from those at `rows` x `columns`, held constant beyond them; float64 [T, T]."""
    between = grid.copy()
    for i, j in zip(*np.nonzero(np.equal.outer(rows, columns)), strict=True):
        beside = [grid[i, k] for k in (j - 1, j + 1) if 0 <= k < len(columns)]
        beside += [grid[k, j] for k in (i - 1, i + 1) if 0 <= k < len(rows)]
        if beside:
            between[i, j] = np.mean(beside)
    steps = np.arange(num_steps)
    if min(len(rows), len(columns)) < 2:
        return np.full((num_steps, num_steps), float(between.mean()))
    inside = [np.clip(steps, axis[0], axis[-1]) for axis in (rows, columns)]
    points = np.stack(np.meshgrid(*inside, indexing="ij"), axis=-1)
    found: np.ndarray = RegularGridInterpolator((rows, columns), between)(points)
    at_rows, at_columns = (np.searchsorted(axis, steps) for axis in (rows, columns))
    for i, row in enumerate(at_rows):
        for j, column in enumerate(at_columns):
            if row < len(rows) and column < len(columns) and rows[row] == i and columns[column] == j:
                found[i, j] = grid[row, column]
    return found


def _semidefinite(values: np.ndarray) -> np.ndarray:
    """The nearest matrix without negative eigenvalues, brought back to its diagonal.

    Interpolated correlations need not be those of any vectors, and a search would find the schedule whose predicted E
    is negative.
    """
    flat = values.reshape(values.shape[0] * values.shape[1], -1)
    eigenvalues, eigenvectors = np.linalg.eigh(flat)
    if eigenvalues.min() >= -ROUNDING * eigenvalues.max():
        return values
    found = (eigenvectors * np.maximum(eigenvalues, 0.0)) @ eigenvectors.T
    own, wanted = np.diag(found), np.diag(flat)
    scale = np.sqrt(np.divide(wanted, own, out=np.zeros_like(own), where=(own > 0) & (wanted > 0)))
    result: np.ndarray = (found * np.outer(scale, scale)).reshape(values.shape)
    return result
