"""The neutral form of a quantized layer: integer, FP8 or FP4 codes and their scales.

Calibrated once, lowered many times: the ONNX Q/DQ graph, the CPU form of it, and the torch
layers are all made from the same codes and scales, so that they can be compared with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from engines.precision import Precision
from tmpdiff_export.quantization import nvfp4

# Below this FP16 scales are subnormal and lose their bits.
SMALLEST_FP16_SCALE = 6.2e-5
LEAST_ATTENTION_SCALE = 1e-6
CODE_MAX = {Precision.FP8: 448.0, Precision.INT8: 127.0, Precision.INT4: 7.0}


@dataclass(frozen=True)
class LayerRange:
    """What range calibration found for one layer.

    Attributes:
        weight: [N, K] float32 (of a convolution K = C kh kw), already divided by `pre_quant_scale` where there is one.
        input_amax: largest magnitude of the (scaled) input, None for weight-only precisions.
        pre_quant_scale: [K] float32 that multiplies the input (SmoothQuant, AWQ), or None. Layers
            that read the same activation share it, so that one QuantizeLinear serves them all.
        shared_weight_amax: largest magnitude over the weights of all layers that read the same activation, None
            for a layer that is alone with its own.
    """

    weight: np.ndarray
    input_amax: float | None
    pre_quant_scale: np.ndarray | None
    shared_weight_amax: float | None = None


@dataclass(frozen=True)
class AttentionRange:
    """Largest magnitudes (amax) of what an attention layer takes."""

    query: float
    key: float
    value: float

    def joined(self, other: AttentionRange) -> AttentionRange:
        """Of both."""
        return AttentionRange(max(self.query, other.query), max(self.key, other.key), max(self.value, other.value))

    @property
    def scales(self) -> tuple[float, float, float]:
        """Static scales of query, key and value: code times scale is what a code stands for."""
        query, key, value = (
            max(amax / CODE_MAX[Precision.FP8], LEAST_ATTENTION_SCALE) for amax in (self.query, self.key, self.value)
        )
        return query, key, value


@dataclass(frozen=True)
class QuantizedLayer:
    """Codes and scales of one linear layer; `codes * scale` approximates the weight.

    Attributes:
        precision: FP8, INT8, INT4 or NVFP4.
        codes: [K, N] (ready for MatMul); int8 for INT8 and INT4 (-7..7), float8_e4m3fn for FP8. NVFP4:
            float4_e2m1fn [N, K], the order in which tensor cores read it.
        weight_scale: float16; FP8 [], INT8 [N], INT4 [K / block_size, N]. NVFP4: the tensor scale, float32 [].
        input_scale: float16 [] or None (weight-only). NVFP4: the tensor scale, float32 [].
        pre_quant_scale: [K] float16 or None.
        block_scale: NVFP4's, float8_e4m3fn [N, K / 16]; None for the others.
    """

    precision: Precision
    codes: np.ndarray
    weight_scale: np.ndarray
    input_scale: np.ndarray | None
    pre_quant_scale: np.ndarray | None
    block_scale: np.ndarray | None = None

    def dequantized(self) -> np.ndarray:
        """The weight the codes stand for, [K, N] float32."""
        if self.block_scale is not None:
            return nvfp4.dequantize_blocks(self.codes, self.block_scale, self.weight_scale).T
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

    Scales are rounded to the format that stores them before the codes are computed, so that codes are
    nearest to the scale that is stored.

    Raises:
        ValueError: K is not a multiple of the block size (INT4, NVFP4).
    """
    if precision is Precision.NVFP4:
        return _quantize_nvfp4(found)
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
        pre_quant_scale=_as_float16(found.pre_quant_scale),
    )


def _quantize_nvfp4(found: LayerRange) -> QuantizedLayer:
    # Layers that read one activation share the tensor scale, because TensorRT then makes one product of them (a
    # block's q, k and v). It costs next to nothing, since block scales follow each weight: 21.9 dB became 21.8 on
    # the embedded pipeline, with 31 products in place of 45.
    amax = found.shared_weight_amax
    scale = nvfp4.tensor_scale(float(np.abs(found.weight).max()) if amax is None else amax)
    codes, block_scale = nvfp4.quantize_blocks(found.weight, scale)
    return QuantizedLayer(
        precision=Precision.NVFP4,
        codes=codes,
        weight_scale=scale,
        input_scale=None if found.input_amax is None else nvfp4.tensor_scale(found.input_amax),
        pre_quant_scale=_as_float16(found.pre_quant_scale),
        block_scale=block_scale,
    )


def _as_float16(scale: np.ndarray | None) -> np.ndarray | None:
    return None if scale is None else scale.astype(np.float16)
