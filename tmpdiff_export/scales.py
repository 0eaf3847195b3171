"""The neutral form of a quantized layer: integer or FP8 codes and their scales.

Calibrated once, lowered many times: the ONNX Q/DQ graph, the CPU form of it, and (later) torch
kernels are all made from the same codes and scales, so that they can be compared with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from engines.precision import Precision

# Below this FP16 scales are subnormal and lose their bits.
SMALLEST_FP16_SCALE = 6.2e-5
CODE_MAX = {Precision.FP8: 448.0, Precision.INT8: 127.0, Precision.INT4: 7.0}


@dataclass(frozen=True)
class LayerRange:
    """What range calibration found for one linear layer.

    Attributes:
        weight: [N, K] float32, already divided by `pre_quant_scale` where there is one.
        input_amax: largest magnitude of the (scaled) input, None for weight-only precisions.
        pre_quant_scale: [K] float32 that multiplies the input (SmoothQuant, AWQ), or None. Layers
            that read the same activation share it, so that one QuantizeLinear serves them all.
    """

    weight: np.ndarray
    input_amax: float | None
    pre_quant_scale: np.ndarray | None


@dataclass(frozen=True)
class QuantizedLayer:
    """Codes and scales of one linear layer; `codes * scale` approximates the weight.

    Attributes:
        precision: FP8, INT8 or INT4.
        codes: [K, N] (ready for MatMul); int8 for INT8 and INT4 (-7..7), float8_e4m3fn for FP8.
        weight_scale: float16; FP8 [], INT8 [N], INT4 [K / block_size, N].
        input_scale: float16 [] or None (weight-only).
        pre_quant_scale: [K] float16 or None.
    """

    precision: Precision
    codes: np.ndarray
    weight_scale: np.ndarray
    input_scale: np.ndarray | None
    pre_quant_scale: np.ndarray | None

    def dequantized(self) -> np.ndarray:
        """The weight the codes stand for, [K, N] float32."""
        scale = self.weight_scale.astype(np.float32)
        if self.precision is Precision.INT4:
            scale = np.repeat(scale, self.codes.shape[0] // scale.shape[0], axis=0)
        return self.codes.astype(np.float32) * scale


def fp16_scale(amax: np.ndarray | float, precision: Precision) -> np.ndarray:
    """amax / largest code as float16, floored where FP16 would turn subnormal."""
    scale = np.asarray(amax, np.float32) / CODE_MAX[precision]
    return np.maximum(scale, SMALLEST_FP16_SCALE).astype(np.float16)


def quantize_layer(found: LayerRange, precision: Precision, block_size: int | None) -> QuantizedLayer:
    """Quantizes a weight symmetrically with the scale form of `precision`.

    Scales are rounded to FP16 before the codes are computed, so that codes are nearest to the scale
    that is stored.

    Raises:
        ValueError: K is not a multiple of `block_size` (INT4).
    """
    weight = np.ascontiguousarray(found.weight.T, dtype=np.float32)
    magnitude = np.abs(weight)
    if precision is Precision.FP8:
        scale = fp16_scale(magnitude.max(), precision)
        limit = CODE_MAX[precision]
        codes = np.clip(weight / np.float32(scale), -limit, limit).astype(ml_dtypes.float8_e4m3fn)
    elif precision is Precision.INT8:
        scale = fp16_scale(magnitude.max(axis=0), precision)
        codes = np.clip(np.rint(weight / scale.astype(np.float32)), -127, 127).astype(np.int8)
    else:
        depth, width = weight.shape
        if block_size is None or depth % block_size:
            raise ValueError(f"INT4 needs K ({depth}) to be a multiple of the block size ({block_size})")
        blocks = weight.reshape(depth // block_size, block_size, width)
        scale = fp16_scale(np.abs(blocks).max(axis=1), precision)
        codes = (
            np.clip(np.rint(blocks / scale.astype(np.float32)[:, None]), -7, 7).astype(np.int8).reshape(depth, width)
        )
    return QuantizedLayer(
        precision=precision,
        codes=codes,
        weight_scale=scale,
        input_scale=None if found.input_amax is None else fp16_scale(found.input_amax, precision),
        pre_quant_scale=None if found.pre_quant_scale is None else found.pre_quant_scale.astype(np.float16),
    )
