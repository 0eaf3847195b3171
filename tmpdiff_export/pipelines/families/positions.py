"""Sine and cosine positions of image tokens, for latents of any size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

_LONGEST_WAVE = 10000.0


class SinCosPositions(torch.nn.Module):
    """What diffusers' `PatchEmbed` adds to its tokens at a size: computed, where it has a table for one size only.

    A position counts in the grid that the model was made for, whatever the size of the picture. Half of the channels
    tells columns apart and half of them rows, so that sines are of two short lists. In float32; diffusers computes in
    float64 and rounds.
    """

    float32_buffers = ("frequencies",)
    frequencies: torch.Tensor

    def __init__(self, patches: Any) -> None:
        """patches: a `PatchEmbed` that adds positions and does not crop them out of a larger table."""
        super().__init__()
        self.patch_size = int(patches.patch_size)
        self.extent = float(patches.base_size) / float(patches.interpolation_scale)
        waves = patches.pos_embed.shape[-1] // 4
        exponents = torch.arange(waves, dtype=torch.float64) / waves
        self.register_buffer("frequencies", (_LONGEST_WAVE**-exponents).float(), persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> float32 [1, tokens, D], row by row."""
        rows, columns = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size
        half = 2 * self.frequencies.shape[0]
        across, down = functional.pad(self._waves(columns), (0, half)), functional.pad(self._waves(rows), (half, 0))
        return (down[:, None] + across[None]).reshape(1, -1, 2 * half)

    def _waves(self, count: int) -> torch.Tensor:
        """Sines and cosines of one axis, [count, D / 2]."""
        places = torch.arange(count, dtype=torch.float32, device=self.frequencies.device)
        phases = (places * self.extent / count)[:, None] * self.frequencies
        return torch.cat([phases.sin(), phases.cos()], dim=-1)


def computed_positions(patches: Any) -> SinCosPositions | None:
    """`SinCosPositions` in the place of the table of a `PatchEmbed`, or None where it has none or crops it."""
    if patches.pos_embed is None or patches.pos_embed_max_size:
        return None
    return SinCosPositions(patches)


@contextlib.contextmanager
def adding(positions: SinCosPositions | None, patches: Any, latents: torch.Tensor) -> Iterator[None]:
    """Within it `patches` adds computed positions for the size of `latents` instead of its table's."""
    if positions is None:
        yield
        return
    computed = positions(latents)
    handle = patches.register_forward_hook(lambda _, args, tokens: (tokens + computed).to(tokens.dtype))
    table, patches.pos_embed = patches.pos_embed, None
    try:
        yield
    finally:
        patches.pos_embed = table
        handle.remove()
