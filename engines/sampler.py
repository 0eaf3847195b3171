"""The sampler: a deterministic diffusion scheduler compiled to a table of coefficients.

Every deterministic scheduler of the usual families (DDIM, Euler, Heun, DPM-Solver, UniPC, LMS,
PNDM, DEIS, flow matching) is linear in the samples x_j and model outputs m_j it has seen, so a loop
iteration k is

    model input = input_scale[k] * x_k
    x_{k+1}     = sum_j a[k,j] x_j + sum_j b[k,j] m_j,    j <= k

with numbers a, b that depend on the scheduler and the step count only. `tmpdiff_export` reads them
off a diffusers scheduler at build time; this module runs them with numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engines.documents import canonical_json
from engines.errors import SamplerError
from engines.files import sha256_bytes
from engines.floating import floating, frozen, scaled, weighted_sum
from engines.reuse import Terms, extrapolation, taken_whole, with_computed
from engines.sampler_document import SAMPLER_VERSION, parse_document
from engines.sampler_state import History, SamplerState


@dataclass(frozen=True)
class SamplerRow:
    """The coefficients of x_{k+1}: `samples` over x_j and `outputs` over m_j, all j <= k."""

    samples: Terms
    outputs: Terms

    @property
    def indices(self) -> tuple[int, ...]:
        """Every step index the row names, samples first."""
        return tuple(j for j, _ in self.samples + self.outputs)


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A scheduler at one step count, as numbers. T is the number of loop iterations (denoiser calls).

    Attributes:
        scheduler: class name of the scheduler the table was read off.
        num_inference_steps: what the scheduler was asked for; T can be larger (Heun: 2 n - 1).
        timesteps: float64 [T], what the denoiser is handed, in the scheduler's own units.
        sigmas: float64 [T+1], the noise level of x_0..x_T in the scheduler's own units (sigma in
            [0, 1] for flow matching, noise-to-signal ratio otherwise), or None where the scheduler
            states none per loop iteration, or an infinite one. For information; nothing is computed from it.
        init_noise_sigma: standard deviation of x_0.
        input_scale: float64 [T], factor from x_k to the denoiser's input.
        rows: T rows of coefficients.

    Raises:
        ValueError: lengths, indices or numbers that make no sampler.
    """

    scheduler: str
    num_inference_steps: int
    timesteps: NDArray[np.float64]
    sigmas: NDArray[np.float64] | None
    init_noise_sigma: float
    input_scale: NDArray[np.float64]
    rows: tuple[SamplerRow, ...]
    _kept_samples: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    _kept_outputs: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("timesteps", "input_scale", "sigmas"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, frozen(getattr(self, name), np.float64))
        object.__setattr__(self, "rows", tuple(self.rows))
        self._check()
        object.__setattr__(self, "_kept_samples", _kept([row.samples for row in self.rows]))
        object.__setattr__(self, "_kept_outputs", _kept([row.outputs for row in self.rows]))

    @property
    def num_steps(self) -> int:
        """T, the number of loop iterations (denoiser calls)."""
        return len(self.timesteps)

    @property
    def window(self) -> int:
        """How many loop iterations before the current one a row reaches back at most."""
        return max(k - min(row.indices) for k, row in enumerate(self.rows))

    def own_coefficients(self) -> NDArray[np.float64]:
        """The coefficient of each step's own model output, of m_k in x_{k+1}: float64 [T], 0 where it has none."""
        return np.array([dict(row.outputs).get(k, 0.0) for k, row in enumerate(self.rows)])

    def initial(self, noise: ArrayLike) -> SamplerState:
        """The state before the first loop iteration.

        Args:
            noise: unit normal noise, floating point, [..., C, H, W]; copied.

        Raises:
            TypeError: `noise` is not floating point.
        """
        return SamplerState(0, frozen(scaled(floating(noise, "noise"), self.init_noise_sigma), np.float32))

    def model_input(self, state: SamplerState) -> NDArray[np.float32]:
        """What the denoiser is handed at `state`: float32, shaped like the latents, read-only.

        Raises:
            ValueError: the trajectory is finished or belongs to a longer table.
        """
        scale = float(self.input_scale[self._position(state)])
        if scale == 1.0:
            return state.latents
        return frozen(scaled(state.latents, scale), np.float32)

    def advance(self, state: SamplerState, model_output: ArrayLike, keep: int = 0) -> SamplerState:
        """The state after one loop iteration; `state` and its arrays stay as they are.

        Sums in float64, term by term in the table's order and elementwise, so that the result does
        not depend on what else is in the batch, and rounds once to float32.

        Args:
            state: where the trajectory stands.
            model_output: the denoiser's output (after guidance) at `state`, floating point, shaped like
                the latents; copied, so the caller may reuse its buffer.
            keep: how many computed outputs the new state keeps for steps that reuse them, this one among them.

        Raises:
            ValueError: the trajectory is finished, or the shape differs from the latents'.
            TypeError: `model_output` is not floating point.
        """
        k = self._position(state)
        output = frozen(floating(model_output, "model_output"), np.float32)
        if output.shape != state.latents.shape:
            raise ValueError(f"model_output has shape {output.shape}, expected the latents' {state.latents.shape}")
        known = dict(state.computed) | {k: output}
        kept = with_computed([j for j, _ in state.computed], k, self.timesteps.tolist())
        return self._advanced(state, output, _last([(j, known[j]) for j in kept], keep))

    def reuse(self, state: SamplerState, order: int, keep: int = 0) -> SamplerState:
        """The state after one loop iteration whose model output is extrapolated, not computed.

        Args:
            state: where the trajectory stands, with as many computed outputs as the order needs.
            order: 0, 1 or 2; see `engines.reuse`.
            keep: how many of the computed outputs the new state keeps.

        Raises:
            ScheduleError: the state has too few computed outputs.
            ValueError: the trajectory is finished.
        """
        return self._advanced(state, self.reused_output(state, order), _last(state.computed, keep))

    def reused_output(self, state: SamplerState, order: int) -> NDArray[np.float32]:
        """The model output of a reused step: float32, shaped like the latents, read-only.

        Summed as in `advance`; where it is one computed output with weight 1, that array itself.

        Raises:
            ScheduleError, ValueError: as `reuse`.
        """
        computed = dict(state.computed)
        terms = extrapolation(order, self._position(state), tuple(computed), self.timesteps.tolist())
        if taken_whole(terms):
            return computed[terms[0][0]]
        return weighted_sum([(computed[j], weight) for j, weight in terms])

    def _advanced(self, state: SamplerState, output: NDArray[np.float32], computed: History) -> SamplerState:
        k = state.step_index
        samples = dict(state.past_samples) | {k: state.latents}
        outputs = dict(state.past_outputs) | {k: output}
        row = self.rows[k]
        return SamplerState(
            k + 1,
            weighted_sum(
                [(samples[j], factor) for j, factor in row.samples]
                + [(outputs[j], factor) for j, factor in row.outputs]
            ),
            tuple((j, samples[j]) for j in self._kept_samples[k + 1]),
            tuple((j, outputs[j]) for j in self._kept_outputs[k + 1]),
            computed,
        )

    def to_json(self) -> str:
        """The table as canonical JSON; `from_json` gives back every number exactly."""
        data: dict[str, Any] = {
            "version": SAMPLER_VERSION,
            "scheduler": self.scheduler,
            "num_inference_steps": self.num_inference_steps,
            "timesteps": self.timesteps.tolist(),
            "sigmas": None if self.sigmas is None else self.sigmas.tolist(),
            "init_noise_sigma": self.init_noise_sigma,
            "input_scale": self.input_scale.tolist(),
            "rows": [{"samples": row.samples, "outputs": row.outputs} for row in self.rows],
        }
        return canonical_json(data).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> SamplerTable:
        """Reads what `to_json` wrote.

        Raises:
            SamplerError: not JSON, a newer version, missing or unknown fields, wrong lengths, step
                indices out of range, or numbers that are not finite.
        """
        document = parse_document(text)
        try:
            return cls(
                scheduler=document.scheduler,
                num_inference_steps=document.num_inference_steps,
                timesteps=np.array(document.timesteps, np.float64),
                sigmas=None if document.sigmas is None else np.array(document.sigmas, np.float64),
                init_noise_sigma=document.init_noise_sigma,
                input_scale=np.array(document.input_scale, np.float64),
                rows=tuple(SamplerRow(row.samples, row.outputs) for row in document.rows),
            )
        except ValueError as error:
            raise SamplerError(f"sampler table is malformed: {error}; build the bundle again") from error

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON: equal for equal tables."""
        return sha256_bytes(self.to_json().encode())

    def _position(self, state: SamplerState) -> int:
        if not 0 <= state.step_index < self.num_steps:
            raise ValueError(
                f"state stands at step index {state.step_index}, the loop has step indices "
                f"0..{self.num_steps - 1}; the trajectory is finished or of another table"
            )
        return state.step_index

    def _check(self) -> None:
        steps = self.timesteps.size
        if not self.scheduler or self.num_inference_steps < 1 or steps < 1:
            raise ValueError("a sampler needs a scheduler name, num_inference_steps and one timestep at least")
        for name, values, length in (
            ("timesteps", self.timesteps, steps),
            ("input_scale", self.input_scale, steps),
            ("sigmas", self.sigmas, steps + 1),
        ):
            if values is not None and (values.shape != (length,) or not np.isfinite(values).all()):
                raise ValueError(f"{name} has shape {values.shape}, expected {length} finite numbers")
        if not (np.isfinite(self.init_noise_sigma) and self.init_noise_sigma > 0):
            raise ValueError(f"init_noise_sigma is {self.init_noise_sigma}, expected a positive number")
        if len(self.rows) != steps:
            raise ValueError(f"rows has {len(self.rows)} rows, expected {steps}, one per timestep")
        for k, row in enumerate(self.rows):
            if not row.indices:
                raise ValueError(f"rows.{k} is empty, expected one coefficient at least")
            for name, terms in (("samples", row.samples), ("outputs", row.outputs)):
                indices = [j for j, _ in terms]
                if indices != sorted(set(indices)) or not all(0 <= j <= k for j in indices):
                    raise ValueError(f"rows.{k}.{name} has step indices {indices}, expected ascending ones in 0..{k}")
                if not all(np.isfinite(coefficient) for _, coefficient in terms):
                    raise ValueError(f"rows.{k}.{name} holds a coefficient that is not finite")


def _kept(terms: Sequence[Terms]) -> tuple[tuple[int, ...], ...]:
    """For every k in 0..T, the j < k that rows k..T-1 still name."""
    kept: list[tuple[int, ...]] = [()]
    needed: set[int] = set()
    for k in reversed(range(len(terms))):
        needed = {j for j in needed | {j for j, _ in terms[k]} if j < k}
        kept.append(tuple(sorted(needed)))
    return tuple(reversed(kept))


def _last(history: Sequence[tuple[int, NDArray[np.float32]]], count: int) -> History:
    return tuple(history[-count:]) if count else ()
