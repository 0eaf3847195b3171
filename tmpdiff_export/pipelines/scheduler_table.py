"""Compiles a diffusers scheduler to a `SamplerTable`.

Method: at loop iteration k the scheduler is handed a fresh basis vector as the sample x_k (not what
it returned before) and another as the model output m_k. A deterministic scheduler's step is linear
in everything it has seen, so the coordinates of what it returns are the coefficients of x_{k+1} over
x_0..x_k and m_0..m_k, without solving for anything. The table is then run against the scheduler over
whole trajectories with a nonlinear stand-in for the denoiser, which catches schedulers that draw
noise and schedulers that are not linear.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import SamplerError
from engines.sampler import SamplerRow, SamplerTable

TOLERANCE = 1e-5
"""Largest relative error of a table against its scheduler, at any step of a trajectory, in float32."""

ROUNDING = 2.0**-44
"""Coefficients below this fraction of the numbers they were summed from are rounding of float64 zeros.

Seen over 34 scheduler configurations: true coefficients from 2.5e-7 of their row's largest, rounding
up to 3e-17.
"""

MAX_ELIMINATION_FACTOR = 8.0
"""A row is shortened with its predecessor only if that multiplies no rounding error by more than this."""

STEP_ARGUMENTS = {"model_output", "timestep", "sample"}
CHECK_SHAPE = (2, 4, 8, 8)

Denoiser = Callable[[NDArray[np.float32], int], NDArray[np.float32]]


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
        A table that reproduces the scheduler within `TOLERANCE` on random trajectories.

    Raises:
        ValueError: `num_inference_steps` is not positive, or the scheduler takes no `mu` or `sigmas`.
        SamplerError: the scheduler draws noise, is not linear, needs `mu`, or cannot run that many steps.
    """
    name = type(scheduler).__name__
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}, expected 1 or more")
    if not hasattr(scheduler, "step") or _required_arguments(scheduler.step) != STEP_ARGUMENTS:
        raise SamplerError(
            f"scheduler {name} has no step(model_output, timestep, sample), which a sampler table is read "
            "from; use a scheduler such as DPMSolverMultistepScheduler"
        )
    options = _timestep_options(scheduler, mu, sigmas)

    def prepared() -> Any:
        return _prepared(scheduler, num_inference_steps, options)

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        references = [_Trajectory(prepared(), _stand_in(seed), _noise(seed), seed) for seed in (0, 1)]
        repeat = _Trajectory(prepared(), _stand_in(0), _noise(0), 2)
        if not references[0].equals(repeat):
            raise SamplerError(_draws_noise(scheduler))
        if not all(reference.is_finite() for reference in references):
            raise SamplerError(
                f"scheduler {name} gives samples that are not finite at {num_inference_steps} steps; "
                "check prediction_type, final_sigmas_type and rescale_betas_zero_snr in its config"
            )
        ready = prepared()
        init_noise_sigma = float(getattr(ready, "init_noise_sigma", 1.0))
        timesteps = _float64(ready.timesteps)
        levels = _sigmas(ready, timesteps)
        input_scale, coefficients = _probe(ready)
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
    for seed, reference in enumerate(references):
        worst = reference.worst_error(table, _stand_in(seed), _noise(seed))
        if not worst <= TOLERANCE:  # NaN is no agreement
            raise SamplerError(_not_linear(scheduler, worst))
    return table


class _Trajectory:
    """Denoiser inputs and samples of a real scheduler run, float32, from one initial noise."""

    def __init__(self, scheduler: Any, denoiser: Denoiser, noise: NDArray[np.float32], torch_seed: int) -> None:
        torch.default_generator.manual_seed(torch_seed)  # leaves the generators of devices alone
        self.inputs: list[NDArray[np.float32]] = []
        self.samples: list[NDArray[np.float32]] = []
        x = torch.from_numpy(noise) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for k, timestep in enumerate(scheduler.timesteps):
            model_input = _model_input(scheduler, x, timestep)
            self.inputs.append(model_input.numpy())
            x = _step(scheduler, torch.from_numpy(denoiser(model_input.numpy(), k)), timestep, x)
            self.samples.append(x.numpy())

    def equals(self, other: _Trajectory) -> bool:
        return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(self.samples, other.samples, strict=True))

    def is_finite(self) -> bool:
        return all(np.isfinite(sample).all() for sample in self.samples)

    def worst_error(self, table: SamplerTable, denoiser: Denoiser, noise: NDArray[np.float32]) -> float:
        """Largest relative error (L2 norm) over all denoiser inputs and samples of a run of `table`."""
        errors = []
        state = table.initial(noise)
        for k in range(table.num_steps):
            model_input = table.model_input(state)
            errors.append(_relative_error(model_input, self.inputs[k]))
            state = table.advance(state, denoiser(model_input, k))
            errors.append(_relative_error(state.latents, self.samples[k]))
        return float(np.max(errors))  # np.max, unlike max, passes NaN on


def _probe(scheduler: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Input scales [T] and coefficients [T, 2, T]: of x_{k+1} over the samples and over the outputs."""
    steps = len(scheduler.timesteps)
    basis = torch.eye(2 * steps, dtype=torch.float64).reshape(2 * steps, 1, 1, 1, 2 * steps)
    input_scale = np.empty(steps)
    coefficients = np.empty((steps, 2, steps))
    for k, timestep in enumerate(scheduler.timesteps):
        sample = basis[k].clone()
        model_input = _float64(_model_input(scheduler, sample, timestep)).reshape(-1)
        input_scale[k] = model_input[k]
        x = _step(scheduler, basis[steps + k].clone(), timestep, sample)
        coefficients[k] = _float64(x).reshape(2, steps)
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
        levels = _float64(scheduler.sigmas)
    elif hasattr(scheduler, "final_alpha_cumprod"):
        alphas = _float64(scheduler.alphas_cumprod)[timesteps.astype(np.int64)]
        alphas = np.append(alphas, float(scheduler.final_alpha_cumprod))
        with np.errstate(divide="ignore"):
            levels = np.sqrt((1 - alphas) / alphas)
    if levels is None or levels.shape != (timesteps.size + 1,) or not np.isfinite(levels).all():
        return None
    return levels


def _prepared(scheduler: Any, num_inference_steps: int, options: dict[str, Any]) -> Any:
    """A copy of the scheduler, ready for its first step."""
    ready = copy.deepcopy(scheduler)
    try:
        ready.set_timesteps(num_inference_steps, **options)
    except Exception as error:
        raise SamplerError(
            f"scheduler {type(scheduler).__name__} refused {num_inference_steps} steps: {_reason(error)}"
        ) from error
    if hasattr(ready, "set_begin_index"):
        ready.set_begin_index(0)  # the position counts, also where rounded timesteps repeat
    return ready


def _timestep_options(scheduler: Any, mu: float | None, sigmas: Sequence[float] | None) -> dict[str, Any]:
    """Keyword arguments for `set_timesteps`."""
    name = type(scheduler).__name__
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    options = {key: value for key, value in (("mu", mu), ("sigmas", sigmas)) if value is not None}
    for key in options:
        if key not in accepted:
            raise ValueError(f"{key} was passed, but {name}.set_timesteps takes {', '.join(accepted)}; leave it out")
    if scheduler.config.get("use_dynamic_shifting") and mu is None:
        raise SamplerError(
            f"scheduler {name} has use_dynamic_shifting=True, whose shift depends on the image size: "
            "pass mu as the pipeline computes it"
        )
    return options


def _model_input(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    scaled: torch.Tensor = scheduler.scale_model_input(sample, timestep)
    return scaled


def _step(scheduler: Any, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    try:
        stepped = scheduler.step(model_output=model_output, timestep=timestep, sample=sample, return_dict=False)
    except Exception as error:
        raise SamplerError(
            f"scheduler {type(scheduler).__name__} failed at timestep {float(timestep):g}: {_reason(error)}"
        ) from error
    previous: torch.Tensor = stepped[0]
    return previous


def _required_arguments(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _stand_in(seed: int) -> Denoiser:
    """A bounded, nonlinear, time-dependent stand-in for a denoiser, on arrays of `CHECK_SHAPE`."""
    rng = np.random.default_rng([seed, 1])
    mix, shift = rng.standard_normal((4, 4)) / 2, rng.standard_normal((4, 1, 1))

    def denoise(model_input: NDArray[np.float32], step_index: int) -> NDArray[np.float32]:
        mixed = np.einsum("ij,bjhw->bihw", mix, model_input.astype(np.float64))
        return np.asarray(1.3 * np.tanh(mixed + shift * np.cos(step_index)), np.float32)

    return denoise


def _noise(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng([seed, 0]).standard_normal(CHECK_SHAPE, dtype=np.float32)


def _relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    reference = expected.astype(np.float64)
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


def _float64(values: torch.Tensor | NDArray[Any]) -> NDArray[np.float64]:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _draws_noise(scheduler: Any) -> str:
    config = scheduler.config
    fix = "use a deterministic scheduler, such as DPMSolverMultistepScheduler or EulerDiscreteScheduler"
    if str(config.get("algorithm_type", "")).startswith("sde-"):
        fix = f"set algorithm_type={config['algorithm_type'].removeprefix('sde-')!r} in its config"
    elif config.get("stochastic_sampling"):
        fix = "set stochastic_sampling=False in its config"
    name = type(scheduler).__name__
    return f"scheduler {name} draws noise while sampling, which a sampler table cannot do; {fix}"


def _not_linear(scheduler: Any, worst: float) -> str:
    culprits = [entry for entry in ("clip_sample", "thresholding") if scheduler.config.get(entry)]
    fix = (
        f"set {' and '.join(f'{entry}=False' for entry in culprits)} in its config"
        if culprits
        else "use another scheduler, such as DPMSolverMultistepScheduler"
    )
    return (
        f"scheduler {type(scheduler).__name__} is not linear in its samples and model outputs (a table of "
        f"coefficients is off by {worst:.1e} relative, {TOLERANCE:.0e} is allowed); {fix}"
    )
