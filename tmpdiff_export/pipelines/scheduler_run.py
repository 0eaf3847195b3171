"""A diffusers scheduler, run step by step: by itself, and beside the table that was read off it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import SamplerError, first_line
from engines.sampler import SamplerTable

CHECK_SHAPE = (2, 4, 8, 8)
ROUNDINGS = 2
"""How many roundings to float32 of its numbers a scheduler's step may lose. Of 230 configurations those whose rounding
exceeds the tolerance lose .6 at most."""

Denoiser = Callable[[NDArray[np.float32], int], NDArray[np.float32]]


def prepared(scheduler: Any, num_inference_steps: int, options: dict[str, Any]) -> Any:
    """A copy of a scheduler, ready for its first step.

    Args:
        scheduler: not changed.
        num_inference_steps: as for `scheduler.set_timesteps`.
        options: from `timestep_options`.

    Raises:
        SamplerError: it cannot run that many steps.
    """
    ready = copy.deepcopy(scheduler)
    try:
        ready.set_timesteps(num_inference_steps, **options)
    except Exception as error:
        raise SamplerError(
            f"scheduler {type(scheduler).__name__} refused {num_inference_steps} steps: {first_line(error)}"
        ) from error
    if hasattr(ready, "set_begin_index"):
        ready.set_begin_index(0)  # the position counts, also where rounded timesteps repeat
    return ready


def timestep_options(scheduler: Any, mu: float | None, sigmas: Sequence[float] | None) -> dict[str, Any]:
    """Keyword arguments for `scheduler.set_timesteps`; None is left out.

    Raises:
        ValueError: the scheduler takes no such argument.
        SamplerError: it needs `mu`.
    """
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


def scaled_input(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What the denoiser is handed for a sample of any shape."""
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    scaled: torch.Tensor = scheduler.scale_model_input(sample, timestep)
    return scaled


def step(scheduler: Any, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The next sample, of the shape of the last.

    Raises:
        SamplerError: the scheduler failed.
    """
    try:
        stepped = scheduler.step(model_output=model_output, timestep=timestep, sample=sample, return_dict=False)
    except Exception as error:
        raise SamplerError(
            f"scheduler {type(scheduler).__name__} failed at timestep {float(timestep):g}: {first_line(error)}"
        ) from error
    previous: torch.Tensor = stepped[0]
    return previous


def required_arguments(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments that a function cannot be called without."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def stand_in(seed: int) -> Denoiser:
    """A bounded, nonlinear, time-dependent stand-in for a denoiser, on arrays of `CHECK_SHAPE`."""
    rng = np.random.default_rng([seed, 1])
    mix, shift = rng.standard_normal((4, 4)) / 2, rng.standard_normal((4, 1, 1))

    def denoise(model_input: NDArray[np.float32], step_index: int) -> NDArray[np.float32]:
        mixed = np.einsum("ij,bjhw->bihw", mix, model_input.astype(np.float64))
        return np.asarray(1.3 * np.tanh(mixed + shift * np.cos(step_index)), np.float32)

    return denoise


def noise_of(seed: int) -> NDArray[np.float32]:
    """Unit normal noise of `CHECK_SHAPE`."""
    return np.random.default_rng([seed, 0]).standard_normal(CHECK_SHAPE, dtype=np.float32)


def float64(values: torch.Tensor | NDArray[Any]) -> NDArray[np.float64]:
    """The values in float64 on the CPU; may share their memory."""
    return torch.as_tensor(values).detach().cpu().double().numpy()


class Trajectory:
    """Denoiser inputs, denoiser outputs and samples of a real scheduler run, float32, from one initial noise.

    Attributes:
        inputs: what the denoiser was handed at every step, [T] arrays of the noise's shape.
        outputs: what it returned, the same.
        samples: x_0 to x_T, [T+1] such arrays.
    """

    def __init__(self, scheduler: Any, denoiser: Denoiser, noise: NDArray[np.float32], torch_seed: int) -> None:
        """Runs it.

        Args:
            scheduler: from `prepared`; used up.
            denoiser: stands in for one.
            noise: unit normal.
            torch_seed: of torch's default generator, for schedulers that draw noise.

        Raises:
            SamplerError: the scheduler failed.
        """
        torch.default_generator.manual_seed(torch_seed)  # leaves the generators of devices alone
        self.inputs: list[NDArray[np.float32]] = []
        self.outputs: list[NDArray[np.float32]] = []
        x = torch.from_numpy(noise) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        self.samples = [x.numpy()]
        for k, timestep in enumerate(scheduler.timesteps):
            model_input = scaled_input(scheduler, x, timestep)
            self.inputs.append(model_input.numpy())
            self.outputs.append(denoiser(model_input.numpy(), k))
            x = step(scheduler, torch.from_numpy(self.outputs[k].copy()), timestep, x)
            self.samples.append(x.numpy())

    def equals(self, other: Trajectory) -> bool:
        """Whether all samples are the same, bit for bit."""
        return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(self.samples, other.samples, strict=True))

    def is_finite(self) -> bool:
        """Whether all samples are."""
        return all(np.isfinite(sample).all() for sample in self.samples)

    def worst_step(self, table: SamplerTable, tolerance: float) -> tuple[float, float]:
        """Runs every step of a table by itself, on the samples and outputs of this run, and finds the worst of them.

        A step is allowed `tolerance`, or what float32 loses in a scheduler that sums the same numbers in another order
        (`ROUNDINGS` of the lengths of x_k and of the terms of the row): with zero terminal SNR a first sample of length
        4096 leaves one of length 100 by cancellation, and its last bits are those of the first.

        Args:
            table: as it was read off the scheduler.
            tolerance: relative error (L2 norm).

        Returns:
            Relative error of the worst step, and what it was allowed; the error is larger or not a number where the
            table is not the scheduler.
        """
        found = []
        for k, row in enumerate(table.rows):
            scaled = float(table.input_scale[k]) * self.samples[k].astype(np.float64)
            found.append((_relative(_length(scaled - self.inputs[k]), self.inputs[k]), tolerance))
            terms = [
                coefficient * arrays[j].astype(np.float64)
                for pairs, arrays in ((row.samples, self.samples), (row.outputs, self.outputs))
                for j, coefficient in pairs
            ]
            summed = _length(self.samples[k]) + sum(map(_length, terms))
            after = self.samples[k + 1]
            rounding = _relative(ROUNDINGS * 2.0**-24 * summed, after)
            found.append(
                (_relative(_length(sum(terms, np.zeros(after.shape)) - after), after), max(tolerance, rounding))
            )
        ratios = [error / allowed for error, allowed in found]
        return found[int(np.argmax(ratios))]  # np.argmax, unlike max, finds NaN


def _length(values: NDArray[Any]) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


def _relative(error: float, expected: NDArray[np.float32]) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(error) / _length(expected))
