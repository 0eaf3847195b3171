"""NVFP4 for the `torch` backend, which has no 4-bit products: the values that codes and scales stand for.

The arithmetic is that of `quantization.nvfp4`, in torch operators; products of these values run in 16 bit.
"""

from __future__ import annotations

import torch

from tmpdiff_export.quantization.nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, SMALLEST_BLOCK_SCALE


def fake_quantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` as an NVFP4 engine sees an activation: quantized with block scales of their own, and dequantized.

    Args:
        values: [..., K], floating, K a multiple of 16.
        scale: tensor scale, float32 [].

    Returns:
        float32 [..., K].
    """
    blocks = values.float().unflatten(-1, (-1, BLOCK_SIZE))
    wanted = blocks.abs().amax(dim=-1, keepdim=True) / (scale * E2M1_MAX)
    block_scales = wanted.clamp(SMALLEST_BLOCK_SCALE, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
    scaled = (blocks / block_scales).clamp(-E2M1_MAX, E2M1_MAX)
    # From 0 to 2, 2 to 4 and 4 to 6 the E2M1 numbers are the multiples of 0.5, 1 and 2, and those with an even code are
    # the even multiples: rounding ties to even gives the nearest code.
    size = scaled.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return (torch.round(scaled / step) * step * block_scales).flatten(-2)


def dequantize(codes: torch.Tensor, block_scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight that stored codes stand for.

    Args:
        codes: E2M1 bits two to a byte, uint8 [N, K / 2], even k in the low half.
        block_scales: float8_e4m3fn [N, K / 16].
        scale: tensor scale, float32 [].

    Returns:
        float32 [N, K].
    """
    bits = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    exponent, half = (bits >> 1 & 3).float(), (bits & 1).float()
    size = torch.where(exponent == 0.0, half * 0.5, torch.exp2(exponent - 1.0) * (1.0 + half * 0.5))
    values = torch.where(bits < 8, size, -size).unflatten(-1, (-1, BLOCK_SIZE))
    return (values * (block_scales.float() * scale).unsqueeze(-1)).flatten(-2)
