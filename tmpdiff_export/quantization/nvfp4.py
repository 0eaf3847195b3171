"""NVFP4 numerics: E2M1 codes in blocks of 16, an E4M3 scale per block and one FP32 scale per tensor.

A value is `code * block_scale * tensor_scale`. Weights are quantized here, once. Activations are quantized by
the engine with block scales of their own for every input; `fake_quantize` is the reference for that, and what the
`torch` backend computes, which has no 4-bit products.
"""

from __future__ import annotations

import torch

BLOCK_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
# The smallest E4M3 number: a scale that rounded to zero would erase its block, and zero blocks would divide by it.
SMALLEST_BLOCK_SCALE = 2.0**-9
# Its product with the smallest block scale is still a normal FP32 number.
SMALLEST_TENSOR_SCALE = 2.0**-100
# Rounding to codes takes several tensors of the size of what it rounds; a large weight is rounded in parts.
_VALUES_AT_ONCE = 2**22


def tensor_scale(amax: torch.Tensor | float) -> torch.Tensor:
    """The scale with which the block of largest magnitude `amax` [] gets the largest E4M3 scale; float32 []."""
    wide = torch.as_tensor(amax, dtype=torch.float64)
    # A tensor as divisor: a CUDA kernel would multiply by the reciprocal of a number, which rounds differently.
    return (wide / torch.full_like(wide, E4M3_MAX * E2M1_MAX)).clamp_min(SMALLEST_TENSOR_SCALE).float()


def quantize_blocks(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of `values`, blocked along the last axis.

    Codes are nearest, ties to even, under the block scale as it is stored, so that its rounding is
    accounted for. Values beyond what `scale` covers saturate.

    Args:
        values: [..., K], floating.
        scale: tensor scale, float32 [], on the same device.

    Returns:
        Codes, E2M1 bits as uint8 [..., K] of 0..15, and block scales, float8_e4m3fn [..., K / 16].

    Raises:
        ValueError: K is not a multiple of 16.
    """
    width = values.shape[-1]
    if width % BLOCK_SIZE:
        raise ValueError(f"NVFP4 needs K ({width}) to be a multiple of the block size ({BLOCK_SIZE})")
    blocks = values.reshape(-1, BLOCK_SIZE)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=values.device)
    block_scales = torch.empty((len(blocks), 1), dtype=torch.float8_e4m3fn, device=values.device)
    at_once = _VALUES_AT_ONCE // BLOCK_SIZE
    for begin in range(0, len(blocks), at_once):
        part = slice(begin, begin + at_once)
        numbers, block_scales[part] = _scaled(blocks[part].float(), scale)
        codes[part] = _bits(numbers)
    return codes.reshape(values.shape), block_scales.reshape(*values.shape[:-1], width // BLOCK_SIZE)


def fake_quantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` as an NVFP4 engine sees an activation: quantized with block scales of their own, and dequantized.

    Args:
        values: [..., K], floating, K a multiple of 16.
        scale: tensor scale, float32 [].

    Returns:
        float32 [..., K].
    """
    numbers, block_scales = _scaled(values.float().unflatten(-1, (-1, BLOCK_SIZE)), scale)
    return (numbers * (block_scales.float() * scale)).flatten(-2)


def dequantize(codes: torch.Tensor, block_scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What codes and scales stand for.

    Args:
        codes: E2M1 bits, uint8 [..., K] of 0..15.
        block_scales: float8_e4m3fn [..., K / 16].
        scale: tensor scale, float32 [].

    Returns:
        float32 [..., K].
    """
    exponent, half = (codes >> 1 & 3).float(), (codes & 1).float()
    size = torch.where(exponent == 0.0, half * 0.5, torch.exp2(exponent - 1.0) * (1.0 + half * 0.5))
    numbers = torch.where(codes < 8, size, -size).unflatten(-1, (-1, BLOCK_SIZE))
    return (numbers * (block_scales.float() * scale).unsqueeze(-1)).flatten(-2)


def _scaled(blocks: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., 16] -> the nearest E2M1 numbers, float32 [..., 16], under block scales, float8_e4m3fn [..., 1]."""
    wanted = blocks.abs().amax(dim=-1, keepdim=True) / (scale * E2M1_MAX)
    block_scales = wanted.clamp(SMALLEST_BLOCK_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)
    scaled = (blocks / (block_scales.float() * scale)).clamp(-E2M1_MAX, E2M1_MAX)
    # From 0 to 2, 2 to 4 and 4 to 6 the E2M1 numbers are the multiples of 0.5, 1 and 2, and those with an even code are
    # the even multiples: rounding ties to even gives the nearest code.
    size = scaled.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.round(scaled / step) * step, block_scales


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    """E2M1 numbers -> their codes, uint8; zero has a sign too."""
    size = numbers.abs()
    codes = torch.where(size < 2.0, size * 2.0, torch.where(size < 4.0, size + 2.0, size * 0.5 + 4.0))
    return codes.to(torch.uint8) + torch.signbit(numbers).to(torch.uint8) * 8
