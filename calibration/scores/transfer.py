"""Transfer: scores measured with one sampler table, carried to another one through noise level.

A precision disturbs the denoiser's output of step i by an error that depends on the noise level of that step, hardly
on how many steps there are. The sampler is linear in model outputs, so the final latents are off by the weight w[i]
times that error, carried through the rest of the loop. The weight is read off the table: the factor with which model
output i enters x_T while all other outputs are held fixed (for Euler and flow matching the step's length in sigma).
It changes with T, with the spacing and the order of the scheduler, and is known exactly; what has to be measured is

    density(noise level of step i) = score[i] / w[i] ** 2

Its logarithm is interpolated linearly over noise level, held constant beyond the ends, and multiplied by the weights
of the other table. The last step is carried by itself, to the last step: nothing after it takes back any of its
error, so that its density can be ten times that of the step before it, at any T.

Only the shape of a curve is claimed to hold; its level is measured at the target. Whether the shape holds is tested
at a few steps, see `Comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from calibration.measure.influence import output_influence
from calibration.scores.bisection import FLOOR
from engines.errors import TmpDiffError
from engines.sampler import SamplerTable

CHECKED_STEPS = 6
"""Steps measured at the target. With six, the limit below passes at least nine in ten curves that are right but for
noise of 40 % on both sides, and at most one in ten that have nothing to do with the truth
(tests/unit/calibration/scores/test_transfer.py)."""

MAX_SCATTER = 0.9
"""Largest standard deviation of log(measured / carried) for scores that hold: a typical factor of 2.5 either way."""

WEIGHT_FLOOR = 1e-3
"""Weights are clipped from below at this fraction of the largest: a step that hardly counts tells no density."""


class TransferError(TmpDiffError):
    """Scores cannot be carried to another bundle, or were found not to hold there."""


@dataclass(frozen=True)
class StepAxis:
    """Where the steps of a sampler table lie, and how much each counts.

    Attributes:
        levels: float64 [T], noise level of every step, never rising; in units that both tables of a transfer share.
        weights: float64 [T], positive, see `output_weights`.
    """

    levels: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Carried scores against measured ones, at a few steps.

    Attributes:
        level: geometric mean of measured / carried.
        scatter: standard deviation of log(measured / carried); 0 for fewer than two steps.
        spearman: rank correlation of the two, None where either does not vary.
    """

    level: float
    scatter: float
    spearman: float | None

    @property
    def holds(self) -> bool:
        """Whether the carried shape may be used: scatter within `MAX_SCATTER`, ranks not opposed.

        The rank correlation alone is no test: along the flat middle of a score curve it is decided by noise.
        """
        return self.scatter <= MAX_SCATTER and (self.spearman is None or self.spearman > 0)


def output_weights(table: SamplerTable) -> np.ndarray:
    """How much each model output counts in the final latents: |dx_T / dm_i|, float64 [T].

    The other model outputs are held fixed, so that this is a property of the table alone.
    """
    return np.abs(output_influence(table))


def step_axes(source: SamplerTable, target: SamplerTable) -> tuple[StepAxis, StepAxis]:
    """The axes of both tables: over sigmas where both state them, over timesteps otherwise.

    Raises:
        TransferError: the tables are of different schedulers, whose units need not agree, or a noise level rises.
    """
    if source.scheduler != target.scheduler:
        raise TransferError(
            f"scores of a {source.scheduler} bundle cannot be carried to {target.scheduler}; calibrate it by itself"
        )
    use_sigmas = source.sigmas is not None and target.sigmas is not None
    axes = []
    for table in (source, target):
        levels = table.sigmas[:-1] if use_sigmas and table.sigmas is not None else table.timesteps
        if (np.diff(levels) > 0).any():
            raise TransferError(
                f"the noise level of {table.scheduler} with {table.num_steps} steps rises on the way, so that it "
                "cannot order steps; calibrate the bundle by itself"
            )
        weights = output_weights(table)
        axes.append(StepAxis(np.asarray(levels), np.maximum(weights, WEIGHT_FLOOR * weights.max())))
    return axes[0], axes[1]


def carry(scores: np.ndarray, source: StepAxis, target: StepAxis) -> np.ndarray:
    """Scores at the steps of another table.

    Args:
        scores: float64 [T]; those below `FLOOR` of the largest count as that.
        source: axis of the table they were measured with.
        target: axis of the table they are wanted for.

    Returns:
        float64 [T'], non-negative; all zero where no score is positive. Equal axes give back the scores.

    Raises:
        TransferError: scores of a single step say nothing of several.
    """
    num_steps = len(target.levels)
    top = float(scores.max())
    if top <= 0:
        return np.zeros(num_steps)
    floored = np.maximum(scores, FLOOR * top)
    if np.array_equal(source.levels, target.levels) and np.array_equal(source.weights, target.weights):
        return floored
    densities = np.log(floored / source.weights**2)
    logs = np.full(num_steps, densities[-1])
    if num_steps > 1:
        if len(scores) < 2:
            raise TransferError(f"one step cannot stand for {num_steps}; calibrate this bundle by itself")
        # np.interp wants rising positions; steps at one level (Heun has pairs) are averaged
        levels, group = np.unique(-source.levels[:-1], return_inverse=True)
        averages = np.bincount(group, densities[:-1]) / np.bincount(group)
        logs[:-1] = np.interp(-target.levels[:-1], levels, averages)
    carried: np.ndarray = np.exp(logs) * target.weights**2
    return carried


def carry_positions(positions: Sequence[float], source: StepAxis, target: StepAxis) -> np.ndarray:
    """Where steps of a table lie among those of another one, by noise level; correlations are carried so.

    Args:
        positions: step indices of the source, rising; fractions lie between two steps.
        source: axis of the table they belong to.
        target: axis of the other table.

    Returns:
        float64 [M], step indices of the target, never falling, mostly fractions; the last step is the last step, with all
        that lie beyond it. Equal axes give back the positions.
    """
    found: np.ndarray = np.array(positions, dtype=np.float64)
    if np.array_equal(source.levels, target.levels):
        return found
    last, last_target = len(source.levels) - 1, len(target.levels) - 1
    levels = np.interp(found, np.arange(last + 1), source.levels)
    return np.where(found >= last, last_target, np.interp(-levels, -target.levels, np.arange(last_target + 1)))


def check_steps(num_steps: int) -> tuple[int, ...]:
    """The step indices to measure: `CHECKED_STEPS` evenly spread ones, both ends included, or all."""
    spread = np.linspace(0, num_steps - 1, min(CHECKED_STEPS, num_steps))
    return tuple(int(step) for step in np.unique(np.rint(spread)))


def compare(carried: np.ndarray, measured: np.ndarray) -> Comparison:
    """Compares scores float64 [N] at the same steps; both are floored at `FLOOR` of their largest.

    Raises:
        TransferError: one of the two has no positive score, so that there is nothing to compare.
    """
    for name, scores in (("carried", carried), ("measured", measured)):
        if not scores.max() > 0:
            raise TransferError(f"no {name} score is positive at the checked steps; calibrate this bundle by itself")
    logs = [np.log(np.maximum(scores, FLOOR * scores.max())) for scores in (carried, measured)]
    ratio = logs[1] - logs[0]
    varies = all(len(np.unique(values)) > 1 for values in logs)
    return Comparison(
        level=math.exp(float(ratio.mean())),
        scatter=float(ratio.std(ddof=1)) if len(ratio) > 1 else 0.0,
        spearman=float(spearmanr(*logs).statistic) if varies else None,
    )
