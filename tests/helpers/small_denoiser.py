"""A small denoiser with attention and a loop for it, for GPU tests of several backends."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.engine import Engine
from engines.loop import Loop
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP
from engines.sampler import SamplerRow, SamplerTable

TEXT = "encoder_hidden_states"
SHAPE = (4, 16, 16)
WIDTH = 256


def denoiser() -> Any:
    """float32, on the CPU; the same at every call."""
    import torch

    class Attention(torch.nn.Module):
        """As diffusers' attention layers have it: a processor that may be exchanged."""

        def __init__(self) -> None:
            super().__init__()
            self.processor: Any = _attend

        def forward(self, *parts: Any) -> Any:
            return self.processor(self, *parts)

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = torch.nn.Linear(SHAPE[0], WIDTH)
            self.q, self.k, self.v = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.wide, self.narrow = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)
            self.outside = torch.nn.Linear(WIDTH, SHAPE[0])
            self.norm = torch.nn.LayerNorm(WIDTH)
            self.attention = Attention()

        def forward(self, latents: Any, timestep: Any, text: Any) -> Any:
            tokens = self.inside(latents.flatten(2).transpose(1, 2))
            tokens = tokens + torch.sin(timestep / 100.0).to(tokens.dtype)[:, None, None]
            whole = torch.cat([tokens, text], dim=1)
            q, k, v = (layer(whole).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            mixed = self.attention(q, k, v).transpose(1, 2).flatten(2)
            whole = self.norm(whole + mixed)
            whole = whole + self.narrow(torch.nn.functional.gelu(self.wide(whole)))
            return self.outside(whole[:, : tokens.shape[1]]).transpose(1, 2).unflatten(2, SHAPE[1:])

    torch.manual_seed(11)
    return Denoiser().eval()


def _attend(_layer: Any, query: Any, key: Any, value: Any) -> Any:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def loop_inputs(rows: int) -> dict[str, np.ndarray]:
    """Inputs of the denoiser, every row its own."""
    rng = np.random.default_rng(rows)
    return {
        LATENTS: rng.standard_normal((rows, *SHAPE), dtype=np.float32),
        TIMESTEP: np.full(rows, 500.0, np.float32),
        TEXT: rng.standard_normal((rows, 16, WIDTH), dtype=np.float32),
    }


REUSING = (
    "fp16", "int8", "reuse0", "reuse1", "fp16", "reuse1", "int8", "reuse2", "reuse2", "int8", "fp16", "reuse0",
)  # fmt: skip
"""Choices of a loop of 12 steps that reuses some at every order, also several in a row."""


def make_loop(
    steps: int,
    samples: int,
    guidance_scale: float,
    precisions: tuple[str, ...],
    seconds: dict[str, list[float]] | None = None,
) -> Loop:
    """A loop with a two-step sampler, as DPM-Solver++ makes it."""
    rows = [SamplerRow(((k, 0.9),), ((k - 1, -0.03), (k, -0.11)) if k else ((k, -0.1),)) for k in range(steps)]
    timesteps, scales = np.linspace(999.0, 1.0, steps), np.linspace(1.0, 0.7, steps)
    table = SamplerTable("stand-in", steps, timesteps, None, 1.25, scales, tuple(rows))
    inputs = loop_inputs((2 if guidance_scale > 1.0 else 1) * samples)
    return Loop(
        table,
        tuple(precisions[k % len(precisions)] for k in range(steps)),
        {TEXT: inputs[TEXT]},
        np.random.default_rng(7).standard_normal((samples, *SHAPE), dtype=np.float32),
        guidance_scale,
        None if seconds is None else lambda _index, name, elapsed: seconds[name].append(elapsed),
    )


def require_agreement(engine: Engine, rows: int, floor_db: float) -> None:
    """Compares a call of `rows` rows with FP32 torch."""
    import torch

    inputs = loop_inputs(rows)
    found = engine.run(inputs)[MODEL_OUTPUT]
    with torch.inference_mode():
        expected = denoiser()(*(torch.from_numpy(inputs[key]) for key in (LATENTS, TIMESTEP, TEXT))).numpy()
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert -10 * np.log10(np.square(found - expected).sum() / np.square(expected).sum()) > floor_db
