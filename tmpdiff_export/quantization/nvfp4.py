"""NVFP4 numerics in numpy: E2M1 codes in blocks of 16, an E4M3 scale per block and one FP32 scale per tensor.

A value is `code * block_scale * tensor_scale`. Weights are quantized here, once. Activations are quantized by
the engine with block scales of their own for every input; `fake_quantize` is the reference for that.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCK_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
# The smallest E4M3 number: a scale that rounded to zero would erase its block, and zero blocks would divide by it.
SMALLEST_BLOCK_SCALE = 2.0**-9
# Its product with the smallest block scale is still a normal FP32 number.
SMALLEST_TENSOR_SCALE = 2.0**-100


def tensor_scale(amax: float) -> np.ndarray:
    """The scale with which the block of largest magnitude `amax` gets the largest E4M3 scale; float32 []."""
    return np.asarray(max(amax / (E4M3_MAX * E2M1_MAX), SMALLEST_TENSOR_SCALE), np.float32)


def quantize_blocks(values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and block scales of `values`, blocked along the last axis.

    Codes are nearest, ties to even, under the block scale as it is stored, so that its rounding is
    accounted for. Values beyond what `scale` covers saturate.

    Args:
        values: [..., K] float32.
        scale: tensor scale, float32 [].

    Returns:
        Codes, float4_e2m1fn [..., K], and block scales, float8_e4m3fn [..., K / 16].

    Raises:
        ValueError: K is not a multiple of 16.
    """
    width = values.shape[-1]
    if width % BLOCK_SIZE:
        raise ValueError(f"NVFP4 needs K ({width}) to be a multiple of the block size ({BLOCK_SIZE})")
    blocks = values.astype(np.float32).reshape(*values.shape[:-1], width // BLOCK_SIZE, BLOCK_SIZE)
    wanted = np.abs(blocks).max(axis=-1) / (scale * np.float32(E2M1_MAX))
    block_scales = np.clip(wanted, SMALLEST_BLOCK_SCALE, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    stored = block_scales.astype(np.float32) * scale
    codes = np.clip(blocks / stored[..., None], -E2M1_MAX, E2M1_MAX).astype(ml_dtypes.float4_e2m1fn)
    return codes.reshape(values.shape), block_scales


def dequantize_blocks(codes: np.ndarray, block_scales: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What codes [..., K] and block scales [..., K / 16] stand for, float32 [..., K]."""
    stored = block_scales.astype(np.float32) * scale
    return codes.astype(np.float32) * np.repeat(stored, BLOCK_SIZE, axis=-1)


def fake_quantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`values` [..., K] as an NVFP4 engine sees an activation, float32."""
    return dequantize_blocks(*quantize_blocks(values, scale), scale)


def packed(codes: np.ndarray) -> bytes:
    """E2M1 codes two to a byte, the first in the low nibble."""
    flat = codes.reshape(-1).view(np.uint8) & 0xF
    return (flat[0::2] | (flat[1::2] << 4)).tobytes()
