"""GELU's tanh form, written so that it compiles to a kernel that waits for memory and not for arithmetic."""

from __future__ import annotations

import math

import torch
from diffusers.models.activations import GELU


class TanhGelu(torch.nn.Module):
    """GELU in its tanh approximation, as x sigmoid(2 z) where torch has x (1 + tanh z) / 2: the same function.

    A sigmoid is one exponential and one division, a tanh some twenty instructions; on an H100 the kernel that also
    quantizes the result to FP8 was bound by them. Computed in float32 and rounded once, as torch does.
    """

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """Any shape and floating type -> the same."""
        single = data.float()
        twice = single * (2 * math.sqrt(2 / math.pi) * (1 + 0.044715 * single * single))
        return (single * torch.sigmoid(twice)).to(data.dtype)


class GeluProjection(torch.nn.Module):
    """diffusers' linear layer with GELU behind it; the layer keeps its name, `proj`."""

    def __init__(self, proj: torch.nn.Module) -> None:
        super().__init__()
        self.proj = proj
        self.gelu = TanhGelu()

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        output: torch.Tensor = self.gelu(self.proj(data))
        return output


def replace_tanh_gelu(module: torch.nn.Module) -> int:
    """Puts `TanhGelu` in place of every GELU in the tanh approximation; names of layers stay.

    Returns:
        How many were replaced.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.GELU) and child.approximate == "tanh":
                setattr(parent, name, TanhGelu())
            elif isinstance(child, GELU) and child.approximate == "tanh":
                setattr(parent, name, GeluProjection(child.proj))
            else:
                continue
            count += 1
    return count
