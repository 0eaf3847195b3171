"""The neutral form of a quantized layer: integer, FP8 or FP4 codes and their scales.

Calibrated once, lowered many times: the ONNX Q/DQ graph, the CPU form of it, and the torch
layers are all made from the same codes and scales, so that they can be compared with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.precision import Precision
from tmpdiff_export.quantization import nvfp4
from tmpdiff_export.quantization.low_rank import LowRank, split

# Below this FP16 scales are subnormal and lose their bits.
SMALLEST_FP16_SCALE = 6.2e-5
LEAST_ATTENTION_SCALE = 1e-6
CODE_MAX = {Precision.FP8: 448.0, Precision.INT8: 127.0, Precision.INT4: 7.0}


@dataclass(frozen=True, eq=False)
class LayerRange:
    """What range calibration found for one layer.

    Attributes:
        input_amax: largest magnitude of the (scaled) input, None for weight-only precisions.
        pre_quant_scale: [K] float32 on the CPU that multiplies the input (SmoothQuant, AWQ), while the weight is
            divided by it; or None. Layers that read the same activation share it, so that one QuantizeLinear serves
            them all.
        shared_weight_amax: NVFP4's: largest magnitude over the (divided) weights of all layers that read the same
            activation, None for a layer that is alone with its own.
        rank: of the 16-bit branch beside NVFP4 codes, 0 for none.
    """

    input_amax: float | None
    pre_quant_scale: torch.Tensor | None
    shared_weight_amax: float | None = None
    rank: int = 0


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


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """Codes and scales of one linear layer; `codes * scale`, with its branch, approximates the weight.

    All tensors are on one device, which may be "meta".

    Attributes:
        precision: FP8, INT8, INT4 or NVFP4.
        codes: [N, K]; int8 for INT8 and INT4 (-7..7), float8_e4m3fn for FP8. NVFP4: E2M1 bits 0..15, uint8, one a byte.
        weight_scale: float16; FP8 [], INT8 [N], INT4 [N, K / block_size]. NVFP4: the tensor scale, float32 [].
        input_scale: float16 [] or None (weight-only). NVFP4: the tensor scale, float32 [].
        pre_quant_scale: [K] float16 or None.
        block_scale: NVFP4's, float8_e4m3fn [N, K / 16]; None for the others.
        branch: the 16-bit branch that reads the smoothed input before it is quantized; None for most layers.
    """

    precision: Precision
    codes: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    pre_quant_scale: torch.Tensor | None
    block_scale: torch.Tensor | None = None
    branch: LowRank | None = None

    def dequantized(self) -> torch.Tensor:
        """The (divided) weight that the codes stand for, without the branch, float32 [N, K]."""
        if self.block_scale is not None:
            return nvfp4.dequantize(self.codes, self.block_scale, self.weight_scale)
        # A scale a tensor, a row, or a block of a row.
        scale = self.weight_scale.float().reshape(*self.weight_scale.shape, *[1] * (3 - self.weight_scale.ndim))
        blocks = self.weight_scale.shape[1] if self.weight_scale.ndim == 2 else 1
        return (self.codes.float().unflatten(1, (blocks, -1)) * scale).flatten(1)


def fp16_scale(amax: torch.Tensor, precision: Precision) -> torch.Tensor:
    """amax / largest code as float16, floored where FP16 would turn subnormal; any shape, on the device of `amax`."""
    wide = amax.float()
    # A tensor as divisor: a CUDA kernel would multiply by the reciprocal of a number, which rounds differently.
    return (wide / torch.full_like(wide, CODE_MAX[precision])).clamp_min(SMALLEST_FP16_SCALE).half()


def input_scale(found: LayerRange, precision: Precision) -> torch.Tensor | None:
    """A layer's `QuantizedLayer.input_scale`, on the CPU."""
    if found.input_amax is None:
        return None
    if precision is Precision.NVFP4:
        return nvfp4.tensor_scale(found.input_amax)
    return fp16_scale(torch.tensor(found.input_amax), precision)


def quantize_layer(
    weight: torch.Tensor, found: LayerRange, precision: Precision, block_size: int | None
) -> QuantizedLayer:
    """Quantizes a weight symmetrically with the scale form of `precision`.

    Scales are rounded to the format that stores them before the codes are computed, so that codes are
    nearest to the scale that is stored. Next to `weight`, it takes the memory of one float32 copy and the codes, with a
    branch of two copies and twice the codes.

    Args:
        weight: [N, K] (of a convolution K = C kh kw), floating, on any device; not changed. On "meta" only the shapes
            and dtypes of the layer come out.
        found: its ranges; the weight is divided by their `pre_quant_scale`.
        precision: FP8, INT8, INT4 or NVFP4.
        block_size: weights per scale along K, of INT4.

    Returns:
        The layer, on the device of `weight`.

    Raises:
        ValueError: K is not a multiple of the block size (INT4, NVFP4).
    """
    device = weight.device
    scaled = weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if found.pre_quant_scale is not None:
        scaled.div_(found.pre_quant_scale.to(device))
    block_scale = branch = None
    if precision is Precision.NVFP4 and found.rank:
        made = split(scaled, found.rank, found.shared_weight_amax)
        branch, codes, block_scale, scale = made.branch, made.codes, made.block_scale, made.scale
    elif precision is Precision.NVFP4:
        # Layers that read one activation share the tensor scale, because TensorRT then makes one product of them (a
        # block's q, k and v). It costs next to nothing, since block scales follow each weight: 21.9 dB became 21.8 on
        # the embedded pipeline, with 31 products in place of 45.
        amax = largest(scaled) if found.shared_weight_amax is None else found.shared_weight_amax
        scale = nvfp4.tensor_scale(amax).to(device)
        codes, block_scale = nvfp4.quantize_blocks(scaled, scale)
    elif precision is Precision.FP8:
        scale = fp16_scale(largest(scaled), precision)
        codes = scaled.div_(scale.float()).clamp_(-CODE_MAX[precision], CODE_MAX[precision]).to(torch.float8_e4m3fn)
    elif precision is Precision.INT8:
        scale = fp16_scale(largest(scaled, 1), precision)
        codes = scaled.div_(scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    else:
        depth = weight.shape[1]
        if block_size is None or depth % block_size:
            raise ValueError(f"INT4 needs K ({depth}) to be a multiple of the block size ({block_size})")
        blocks = scaled.unflatten(1, (-1, block_size))
        scale = fp16_scale(largest(blocks, 2), precision)
        codes = blocks.div_(scale.float()[..., None]).round_().clamp_(-7, 7).to(torch.int8).flatten(1)
    taken = input_scale(found, precision)
    return QuantizedLayer(
        precision=precision,
        codes=codes,
        weight_scale=scale,
        input_scale=None if taken is None else taken.to(device),
        pre_quant_scale=None if found.pre_quant_scale is None else found.pre_quant_scale.half().to(device),
        block_scale=block_scale,
        branch=branch,
    )


def largest(data: torch.Tensor, dim: int | tuple[int, ...] = ()) -> torch.Tensor:
    """The largest magnitude along some dimensions, or of all, without a tensor of all magnitudes."""
    return torch.maximum(data.amax(dim), -data.amin(dim))
