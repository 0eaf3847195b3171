"""A planted loop that behaves as diffusion does: exact denoising of a mixture of Gaussians, with steps that may be reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from helpers.planted import NUDGE, OneByOne

from calibration.measure.evaluator import ShorterLoop
from calibration.measure.influence import output_influence
from engines.errors import SamplerError
from engines.reuse import order_of
from engines.sampler import SamplerRow, SamplerTable
from engines.sampler_state import SamplerState


def table(num_steps: int, second_order: bool = True) -> SamplerTable:
    """Euler steps in sigma, or those of Adams and Bashforth through the last two outputs, from 8 down to 0."""
    ends = np.array([8.0, 0.05]) ** (1 / 7)
    sigmas = np.append(np.linspace(*ends, num_steps) ** 7, 0.0)
    rows = []
    for k, length in enumerate(np.diff(sigmas)):
        outputs = [(k, float(length))]
        if second_order and 0 < k < num_steps - 1:
            ratio = float(length / (sigmas[k] - sigmas[k - 1]) / 2)
            outputs = [(k - 1, float(-length * ratio)), (k, float(length * (1 + ratio)))]
        rows.append(SamplerRow(((k, 1.0),), tuple(outputs)))
    timesteps = 1000 * sigmas[:-1] / (1 + sigmas[:-1])
    return SamplerTable("planted", num_steps, timesteps, sigmas, 8.0, np.ones(num_steps), tuple(rows))


@dataclass(frozen=True)
class ReuseLoop(OneByOne):
    """x_T are samples of a mixture; a low precision turns the model output a little, always in the same way.

    Attributes:
        num_steps: T.
        low: by low precision the size of its error, relative to the model output.
        response: whether outputs answer to the latents, or depend smoothly on time alone.
    """

    num_steps: int = 20
    low: tuple[tuple[str, float], ...] = (("int8", 0.01), ("int4", 0.03))
    response: bool = True
    num_samples: int = 4
    seed: int = 0
    size: int = 48
    second_order: bool = True

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("fp16", *(name for name, _ in self.low))

    def start(self, sample: int, nudged: bool = False) -> SamplerState:
        rng = np.random.default_rng((self.seed, sample))
        noise = rng.normal(size=(1, 1, 1, self.size))
        if nudged:
            noise = noise + NUDGE * rng.normal(size=noise.shape)
        return self.table.initial(noise)

    def step(self, sample: int, state: SamplerState, choice: str) -> SamplerState:
        order = order_of(choice)
        if order is not None:
            return self.table.reuse(state, order, 3)
        return self.table.advance(state, self._output(state, choice), 3)

    def latents(self, state: SamplerState) -> np.ndarray:
        found: np.ndarray = state.latents[0]
        return found

    def timesteps(self) -> list[float]:
        return self.table.timesteps.tolist()

    def influence(self, choices: Sequence[str]) -> np.ndarray:
        return output_influence(self.table, choices)

    def shorter(self, loop: str) -> ReuseLoop:
        return replace(self, num_steps=json.loads(loop))

    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def _output(self, state: SamplerState, precision: str) -> np.ndarray:
        assert self.table.sigmas is not None
        sigma = float(self.table.sigmas[state.step_index])
        means = self._made[0]
        x = state.latents.reshape(-1).astype(np.float64)
        if not self.response:
            output = np.sin(np.arange(self.size) + 0.002 * self.table.timesteps[state.step_index])
            return self._turned(output, precision).reshape(state.latents.shape)
        spread = 0.04 + sigma**2
        logs = -np.sum((x - means) ** 2, axis=1) / (2 * spread)
        shares = np.exp(logs - logs.max())
        shares /= shares.sum()
        denoised = shares @ (means + 0.04 / spread * (x - means))
        return self._turned((x - denoised) / sigma, precision).reshape(state.latents.shape)

    def _turned(self, output: np.ndarray, precision: str) -> np.ndarray:
        return output + dict(self.low).get(precision, 0.0) * (self._made[1] @ output)

    @cached_property
    def table(self) -> SamplerTable:
        return table(self.num_steps, self.second_order)

    @cached_property
    def _made(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(7)
        means = rng.normal(size=(12, self.size))
        turn = rng.normal(size=(self.size, self.size)) / np.sqrt(self.size)
        return means, turn


def shorter_loop(most: int) -> ShorterLoop:
    """`SampleSets.shorter` of such loops, which need three steps."""
    if most < 3:
        raise SamplerError(f"planted cannot make {most} steps")
    return ShorterLoop(json.dumps(most), most)
