"""4-bit codes two to a byte."""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] of 0..15, K even -> uint8 [..., K / 2]; even k in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """What `pack` packed: uint8 [..., K / 2] -> uint8 [..., K] of 0..15."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
