"""The denoising loop: what is asked of it, and how it runs on host arrays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.engine import Arrays, Engine
from engines.errors import BackendError
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP
from engines.reuse import engines_of, kept_outputs, order_of, reuse_terms
from engines.sampler import SamplerTable
from engines.sampler_state import SamplerState

StepHook = Callable[[int, str, float], None]


@dataclass(frozen=True, eq=False)
class Loop:
    """One denoising loop over N samples.

    Attributes:
        table: the sampler, T rows.
        precisions: name on the host of the denoiser engine of every step, T of them: a precision, where a bundle has
            one engine of it, else such a name as "fp8 #2"; or one of `engines.reuse.REUSES`.
        conditioning: denoiser inputs other than latents and timestep, [B, ...]; B is 2 N with guidance
            (the unconditional half first), N without.
        noise: unit normal, float32 [N, C, h, w]; not changed.
        guidance_scale: classifier-free guidance scale; at most 1 turns guidance off.
        on_step: called with step index, engine (or reuse) and seconds of each step, in order; a host that runs
            the loop on a device calls it when the loop has ended.
        guidance_rescale: how much of the guided output is brought to the standard deviation of the conditional one, 0
            to 1; Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.
    """

    table: SamplerTable
    precisions: tuple[str, ...]
    conditioning: Arrays
    noise: NDArray[np.float32]
    guidance_scale: float
    on_step: StepHook | None = None
    guidance_rescale: float = 0.0

    @property
    def guided(self) -> bool:
        """Whether every denoiser call is a batch of 2 N."""
        return self.guidance_scale > 1.0


def guided_output(
    table: SamplerTable,
    state: SamplerState,
    engine: Engine,
    conditioning: Arrays,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> NDArray[np.float32]:
    """The model output of a loop iteration: one denoiser call, with guidance of one batch of 2 N.

    Args:
        table: the sampler.
        state: latents [N, C, h, w] and history; not changed.
        engine: the denoiser.
        conditioning: as in `Loop`.
        guidance_scale: as in `Loop`.
        guidance_rescale: as in `Loop`.

    Returns:
        What `SamplerTable.advance` takes, [N, C, h, w].

    Raises:
        BackendError: the engine failed.
    """
    latents = table.model_input(state)
    guided = guidance_scale > 1.0
    if guided:
        latents = np.concatenate([latents, latents])
    timestep = np.full(len(latents), table.timesteps[state.step_index], np.float32)
    outputs = engine.run({LATENTS: latents, TIMESTEP: timestep, **conditioning})
    output = named_output(outputs, MODEL_OUTPUT)
    if guided:
        unconditional, conditional = np.split(output, 2)
        output = unconditional + np.float32(guidance_scale) * (conditional - unconditional)
        if guidance_rescale:
            output = _rescaled(output, conditional, guidance_rescale)
    return output


def host_loop(loop: Loop, engine_of: Callable[[str], Engine]) -> NDArray[np.float32]:
    """The whole loop, step by step on host arrays.

    Every engine is asked for once before the first step, so that no step's time includes its loading.

    Returns:
        Final latents, float32 [N, C, h, w], owned by the caller.

    Raises:
        BackendError: an engine is not available or failed.
        ScheduleError: a reused step has too few computed outputs before it.
    """
    table = loop.table
    reuse_terms(table.timesteps.tolist(), loop.precisions)  # before anything is loaded
    engines = {name: engine_of(name) for name in engines_of(loop.precisions)}
    state = table.initial(loop.noise)
    for step_index, (choice, keep) in enumerate(zip(loop.precisions, kept_outputs(loop.precisions), strict=True)):
        begin = time.perf_counter()
        order = order_of(choice)
        if order is None:
            output = guided_output(
                table, state, engines[choice], loop.conditioning, loop.guidance_scale, loop.guidance_rescale
            )
            state = table.advance(state, output, keep)
        else:
            state = table.reuse(state, order, keep)
        if loop.on_step is not None:
            loop.on_step(step_index, choice, time.perf_counter() - begin)
    return state.latents.copy()


def _rescaled(guided: NDArray[np.float32], conditional: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Outputs [N, C, h, w], each partly at the standard deviation of its conditional one."""
    axes = tuple(range(1, guided.ndim))
    wanted, found = (np.std(item, axis=axes, keepdims=True, ddof=1, dtype=np.float64) for item in (conditional, guided))
    return np.asarray(guided * (share * wanted / found + (1.0 - share)), np.float32)


def named_output(outputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The output `name` of an engine.

    Raises:
        BackendError: the engine returned others.
    """
    if name not in outputs:
        raise BackendError(f"an engine returned {', '.join(outputs)}, expected {name}; build the bundle again")
    return outputs[name]
