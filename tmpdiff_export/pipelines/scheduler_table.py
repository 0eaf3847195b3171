"""Compiles a diffusers scheduler to a `SamplerTable`.

Method: at loop iteration k the scheduler is handed a fresh basis vector as the sample x_k (not what
it returned before) and another as the model output m_k. A deterministic scheduler's step is linear
in everything it has seen, so the coordinates of what it returns are the coefficients of x_{k+1} over
x_0..x_k and m_0..m_k, without solving for anything. The table is then run against the scheduler over
whole trajectories with a nonlinear stand-in for the denoiser, each step from where the scheduler is, which catches
schedulers that draw noise and schedulers that are not linear.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import SamplerError, first_line
from engines.sampler import SamplerRow, SamplerTable
from tmpdiff_export.pipelines.scheduler_run import (
    Trajectory,
    float64,
    noise_of,
    prepared,
    required_arguments,
    scaled_input,
    stand_in,
    step,
    timestep_options,
)

TOLERANCE = 1e-5
"""Largest relative error of a step of a table against its scheduler's, unless float32 cannot hold that; see
`Trajectory.worst_step`."""

ROUNDING = 2.0**-44
"""Coefficients below this fraction of the numbers they were summed from are rounding of float64 zeros.

Seen over 34 scheduler configurations: true coefficients from 2.5e-7 of their row's largest, rounding
up to 3e-17.
"""

MAX_ELIMINATION_FACTOR = 8.0
"""A row is shortened with its predecessor only if that multiplies no rounding error by more than this."""

STEP_ARGUMENTS = {"model_output", "timestep", "sample"}


def sampler_table(
    scheduler: Any,
    num_inference_steps: int,
    *,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> SamplerTable:
    """Reads the table off `scheduler` and checks it against `scheduler`.

    Args:
        scheduler: a diffusers scheduler; it is copied, and neither it nor torch's random state changes.
        num_inference_steps: as for `scheduler.set_timesteps`.
        mu: shift for schedulers with `use_dynamic_shifting`, as the pipeline computes it.
        sigmas: sigmas of the pipeline's own, for schedulers whose `set_timesteps` takes them.

    Returns:
        A table that reproduces the scheduler's steps within `TOLERANCE`, or its rounding, on random trajectories.

    Raises:
        ValueError: `num_inference_steps` is not positive, or the scheduler takes no `mu` or `sigmas`.
        SamplerError: the scheduler draws noise, is not linear, needs `mu`, or cannot run that many steps.
    """
    name = type(scheduler).__name__
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}, expected 1 or more")
    if not hasattr(scheduler, "step") or required_arguments(scheduler.step) != STEP_ARGUMENTS:
        raise SamplerError(
            f"scheduler {name} has no step(model_output, timestep, sample), which a sampler table is read "
            "from; use a scheduler such as DPMSolverMultistepScheduler"
        )
    options = timestep_options(scheduler, mu, sigmas)

    def ready() -> Any:
        return prepared(scheduler, num_inference_steps, options)

    with _as_sampler_errors(name), torch.random.fork_rng(devices=[]), torch.inference_mode():
        references = [Trajectory(ready(), stand_in(seed), noise_of(seed), seed) for seed in (0, 1)]
        repeat = Trajectory(ready(), stand_in(0), noise_of(0), 2)
        if not references[0].equals(repeat):
            raise SamplerError(_draws_noise(scheduler))
        if not all(reference.is_finite() for reference in references):
            raise SamplerError(
                f"scheduler {name} gives samples that are not finite at {num_inference_steps} steps; "
                "check prediction_type, final_sigmas_type and rescale_betas_zero_snr in its config"
            )
        probed = ready()
        init_noise_sigma = float(getattr(probed, "init_noise_sigma", 1.0))
        timesteps = float64(probed.timesteps)
        levels = _sigmas(probed, timesteps)
        input_scale, coefficients = _probe(probed)
    try:
        table = SamplerTable(
            scheduler=name,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=levels,
            init_noise_sigma=init_noise_sigma,
            input_scale=input_scale,
            rows=_rows(coefficients),
        )
    except ValueError as error:
        raise SamplerError(
            f"scheduler {name} gives no usable coefficients at {num_inference_steps} steps: {error}"
        ) from error
    for reference in references:
        worst, allowed = reference.worst_step(table, TOLERANCE)
        if not worst <= allowed:  # NaN is no agreement
            raise SamplerError(_not_linear(scheduler, worst, allowed))
    return table


@contextlib.contextmanager
def _as_sampler_errors(name: str) -> Iterator[None]:
    """What a scheduler raises of its configuration reaches the user as one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SamplerError:
        raise
    except Exception as error:
        raise SamplerError(f"scheduler {name} failed: {type(error).__name__}: {first_line(error)}") from error


def _probe(scheduler: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Input scales [T] and coefficients [T, 2, T]: of x_{k+1} over the samples and over the outputs."""
    steps = len(scheduler.timesteps)
    basis = torch.eye(2 * steps, dtype=torch.float64).reshape(2 * steps, 1, 1, 1, 2 * steps)
    input_scale = np.empty(steps)
    coefficients = np.empty((steps, 2, steps))
    for k, timestep in enumerate(scheduler.timesteps):
        sample = basis[k].clone()
        model_input = float64(scaled_input(scheduler, sample, timestep)).reshape(-1)
        input_scale[k] = model_input[k]
        x = step(scheduler, basis[steps + k].clone(), timestep, sample)
        coefficients[k] = float64(x).reshape(2, steps)
    return input_scale, coefficients


def _rows(coefficients: NDArray[np.float64]) -> tuple[SamplerRow, ...]:
    """Sparse rows from coefficients [T, 2, T]: rounding set to zero, long memories shortened."""
    pruned = [np.where(abs(row) > ROUNDING * abs(row).max(), row, 0.0) for row in coefficients]
    short = [_shortened(row, pruned[k - 1], k) if k else row for k, row in enumerate(pruned)]
    return tuple(
        SamplerRow(*(tuple((int(j), float(part[j])) for j in np.flatnonzero(part)) for part in r)) for r in short
    )


def _shortened(row: NDArray[np.float64], previous: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """An equal row with a shorter reach, if there is one.

    A scheduler that carries a vector of its own from step to step (UniPC: the corrected sample) reaches
    back to x_0. That vector is also in x_k = previous . (x, m), so adding a multiple of
    x_k - previous . (x, m) = 0 to the row replaces it.
    """
    oldest = _oldest(row)
    if oldest >= k or previous[0, oldest] == 0:
        return row
    factor = row[0, oldest] / previous[0, oldest]
    shorter = row - factor * previous
    shorter[abs(shorter) <= ROUNDING * (abs(row) + abs(factor * previous))] = 0.0
    shorter[0, k] += factor
    return shorter if abs(factor) <= MAX_ELIMINATION_FACTOR and _oldest(shorter) > oldest else row


def _oldest(row: NDArray[np.float64]) -> int:
    """Smallest step index with a coefficient, T for none."""
    used = np.flatnonzero(row.any(axis=0))
    return int(used[0]) if used.size else row.shape[1]


def _sigmas(scheduler: Any, timesteps: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Noise level of x_0..x_T [T+1], or None where the scheduler states none or an infinite one."""
    levels: NDArray[np.float64] | None = None
    if hasattr(scheduler, "sigmas"):
        levels = float64(scheduler.sigmas)
    elif hasattr(scheduler, "final_alpha_cumprod"):
        alphas = float64(scheduler.alphas_cumprod)[timesteps.astype(np.int64)]
        alphas = np.append(alphas, float(scheduler.final_alpha_cumprod))
        with np.errstate(divide="ignore"):
            levels = np.sqrt((1 - alphas) / alphas)
    if levels is None or levels.shape != (timesteps.size + 1,) or not np.isfinite(levels).all():
        return None
    return levels


def _draws_noise(scheduler: Any) -> str:
    config = scheduler.config
    fix = "use a deterministic scheduler, such as DPMSolverMultistepScheduler or EulerDiscreteScheduler"
    if str(config.get("algorithm_type", "")).startswith("sde-"):
        fix = f"set algorithm_type={config['algorithm_type'].removeprefix('sde-')!r} in its config"
    elif config.get("stochastic_sampling"):
        fix = "set stochastic_sampling=False in its config"
    name = type(scheduler).__name__
    return f"scheduler {name} draws noise while sampling, which a sampler table cannot do; {fix}"


def _not_linear(scheduler: Any, worst: float, allowed: float) -> str:
    culprits = [entry for entry in ("clip_sample", "thresholding") if scheduler.config.get(entry)]
    fix = (
        f"set {' and '.join(f'{entry}=False' for entry in culprits)} in its config"
        if culprits
        else "use another scheduler, such as DPMSolverMultistepScheduler"
    )
    return (
        f"scheduler {type(scheduler).__name__} is not linear in its samples and model outputs (a table of "
        f"coefficients is off by {worst:.1e} relative, {allowed:.0e} is allowed); {fix}"
    )
