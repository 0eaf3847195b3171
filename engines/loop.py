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
from engines.sampler import SamplerState, SamplerTable

StepHook = Callable[[int, str, float], None]


@dataclass(frozen=True, eq=False)
class Loop:
    """One denoising loop over N samples.

    Attributes:
        table: the sampler, T rows.
        precisions: name of the denoiser engine of every step, T of them.
        conditioning: denoiser inputs other than latents and timestep, [B, ...]; B is 2 N with guidance
            (the unconditional half first), N without.
        noise: unit normal, float32 [N, C, h, w]; not changed.
        guidance_scale: classifier-free guidance scale; at most 1 turns guidance off.
        on_step: called with step index, precision and seconds of each step, in order; a host that runs
            the loop on a device calls it when the loop has ended.
    """

    table: SamplerTable
    precisions: tuple[str, ...]
    conditioning: Arrays
    noise: NDArray[np.float32]
    guidance_scale: float
    on_step: StepHook | None = None

    @property
    def guided(self) -> bool:
        """Whether every denoiser call is a batch of 2 N."""
        return self.guidance_scale > 1.0


def host_step(
    table: SamplerTable, state: SamplerState, engine: Engine, conditioning: Arrays, guidance_scale: float
) -> SamplerState:
    """One loop iteration: one denoiser call (with guidance: one batch of 2 N) and the sampler update.

    Args:
        table: the sampler.
        state: latents [N, C, h, w] and history; not changed.
        engine: the denoiser.
        conditioning: as in `Loop`.
        guidance_scale: as in `Loop`.

    Returns:
        The next state; its arrays are new.

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
    return table.advance(state, output)


def host_loop(loop: Loop, engine_of: Callable[[str], Engine]) -> NDArray[np.float32]:
    """The whole loop, step by step on host arrays.

    Every engine is asked for once before the first step, so that no step's time includes its loading.

    Returns:
        Final latents, float32 [N, C, h, w], owned by the caller.

    Raises:
        BackendError: an engine is not available or failed.
    """
    engines = {name: engine_of(name) for name in dict.fromkeys(loop.precisions)}
    state = loop.table.initial(loop.noise)
    for step_index, precision in enumerate(loop.precisions):
        begin = time.perf_counter()
        state = host_step(loop.table, state, engines[precision], loop.conditioning, loop.guidance_scale)
        if loop.on_step is not None:
            loop.on_step(step_index, precision, time.perf_counter() - begin)
    return state.latents.copy()


def named_output(outputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The output `name` of an engine.

    Raises:
        BackendError: the engine returned others.
    """
    if name not in outputs:
        raise BackendError(f"an engine returned {', '.join(outputs)}, expected {name}; build the bundle again")
    return outputs[name]
