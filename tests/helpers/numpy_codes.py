"""Quantization in numpy and ml_dtypes: what the torch form has to be equal to, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from engines.precision import Precision
from tmpdiff_export.quantization.codes import CODE_MAX, SMALLEST_FP16_SCALE
from tmpdiff_export.quantization.nvfp4 import (
    BLOCK_SIZE,
    E2M1_MAX,
    E4M3_MAX,
    SMALLEST_BLOCK_SCALE,
    SMALLEST_TENSOR_SCALE,
)


@dataclass(frozen=True, eq=False)
class NumpyLayer:
    """As `QuantizedLayer`, but that NVFP4 codes are float4_e2m1fn."""

    codes: np.ndarray
    weight_scale: np.ndarray
    block_scale: np.ndarray | None = None


def fp16_scale(amax: np.ndarray | float, precision: Precision) -> np.ndarray:
    scale = np.asarray(amax, np.float32) / CODE_MAX[precision]
    return np.maximum(scale, SMALLEST_FP16_SCALE).astype(np.float16)


def quantize(
    weight: np.ndarray, precision: Precision, block_size: int | None, shared_weight_amax: float | None = None
) -> NumpyLayer:
    """The codes and scales of a weight, float32 [N, K]."""
    magnitude = np.abs(weight)
    if precision is Precision.NVFP4:
        scale = tensor_scale(float(magnitude.max()) if shared_weight_amax is None else shared_weight_amax)
        codes, block_scale = quantize_blocks(weight, scale)
        return NumpyLayer(codes, scale, block_scale)
    if precision is Precision.FP8:
        scale = fp16_scale(magnitude.max(), precision)
        return NumpyLayer(np.clip(weight / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn), scale)
    if precision is Precision.INT8:
        scale = fp16_scale(magnitude.max(axis=1), precision)
        codes = np.clip(np.rint(weight / scale.astype(np.float32)[:, None]), -127, 127)
        return NumpyLayer(codes.astype(np.int8), scale)
    assert block_size is not None
    blocks = weight.reshape(len(weight), -1, block_size)
    scale = fp16_scale(np.abs(blocks).max(axis=2), precision)
    codes = np.clip(np.rint(blocks / scale.astype(np.float32)[..., None]), -7, 7).astype(np.int8)
    return NumpyLayer(codes.reshape(weight.shape), scale)


def tensor_scale(amax: float) -> np.ndarray:
    return np.asarray(max(amax / (E4M3_MAX * E2M1_MAX), SMALLEST_TENSOR_SCALE), np.float32)


def quantize_blocks(values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., K] -> NVFP4 codes, float4_e2m1fn [..., K], and block scales, float8_e4m3fn [..., K / 16]."""
    blocks = values.astype(np.float32).reshape(*values.shape[:-1], -1, BLOCK_SIZE)
    wanted = np.abs(blocks).max(axis=-1) / (scale * np.float32(E2M1_MAX))
    block_scales = np.clip(wanted, SMALLEST_BLOCK_SCALE, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    stored = block_scales.astype(np.float32) * scale
    codes = np.clip(blocks / stored[..., None], -E2M1_MAX, E2M1_MAX).astype(ml_dtypes.float4_e2m1fn)
    return codes.reshape(values.shape), block_scales


def dequantize_blocks(codes: np.ndarray, block_scales: np.ndarray, scale: np.ndarray) -> np.ndarray:
    stored = block_scales.astype(np.float32) * scale
    return codes.astype(np.float32) * np.repeat(stored, BLOCK_SIZE, axis=-1)


def fake_quantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [..., K] as an NVFP4 engine sees an activation."""
    return dequantize_blocks(*quantize_blocks(values, scale), scale)
