"""Linear layers of the `torch` backend, from the same codes and scales as the Q/DQ nodes of the ONNX file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch.nn import functional as F

from engines.precision import Precision
from tmpdiff_export.quantization import nvfp4
from tmpdiff_export.quantization.codes import QuantizedLayer
from tmpdiff_export.quantization.low_rank import LowRank
from tmpdiff_export.quantization.packing import pack, unpack
from tmpdiff_export.targets.torch.activations import static_codes
from tmpdiff_export.targets.torch.kernels.gelu_codes import gelu_codes
from tmpdiff_export.targets.torch.kernels.int8 import int8_linear

FP8_COMPUTE_CAPABILITY = (8, 9)
# `torch._scaled_mm` takes sizes that are multiples of this only.
FP8_ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Scales:
    """What the codes of a layer and of its input are multiplied by, and what is added.

    Attributes:
        weight: see the subclasses of `QuantizedLinear`.
        input: float32 [], or None where only weights have codes.
        smoothing: [K] that multiplies the input (SmoothQuant, AWQ), or None.
        block: of NVFP4's blocks, float8_e4m3fn [N, K / 16]; None for other layers.
        branch: beside the codes, or None.
    """

    weight: torch.Tensor
    input: torch.Tensor | None = None
    smoothing: torch.Tensor | None = None
    block: torch.Tensor | None = None
    branch: LowRank | None = None


class QuantizedLinear(torch.nn.Module, ABC):
    """A linear layer over codes; the subclasses say which.

    With `sixteen_bit` set, the weight that the codes stand for takes part in a 16-bit product instead: an engine of
    higher precision from the same stored weights.

    Buffers: `codes`, `weight_scale`, `input_scale` (float32 [], but for weight-only layers), `smoothing`
    ([K] in the layer's 16-bit type, or absent), `block_scale` (NVFP4 only), `low_rank_up` and `low_rank_down` (those of
    `LowRank` in that type, or absent) and `bias` ([N] in that type, or absent).
    """

    float32_buffers = ("weight_scale", "input_scale")
    codes: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    block_scale: torch.Tensor
    smoothing: torch.Tensor | None
    low_rank_up: torch.Tensor | None
    low_rank_down: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        codes: torch.Tensor,
        scales: Scales,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Takes the tensors over as they are, on whatever device they are.

        Args:
            codes: see the subclasses.
            scales: theirs, and the input's.
            bias: [N] or None.
            dtype: float16 or bfloat16, of results.
        """
        super().__init__()
        self.dtype = dtype
        self.sixteen_bit = False
        self.register_buffer("codes", codes)
        self.register_buffer("weight_scale", scales.weight)
        self.register_buffer("input_scale", scales.input)
        self.register_buffer("block_scale", scales.block)
        self.register_buffer("smoothing", None if scales.smoothing is None else scales.smoothing.to(dtype))
        for side in ("up", "down"):
            half = None if scales.branch is None else getattr(scales.branch, side).to(dtype)
            self.register_buffer(f"low_rank_{side}", half)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N], in `dtype`."""
        rows = data.to(self.dtype).flatten(0, -2)
        smoothing = self._input_smoothing()
        if smoothing is not None:
            rows = rows * smoothing
        product = F.linear(rows, self.weight(), self.bias) if self.sixteen_bit else self._product(rows)
        return product.view(*data.shape[:-1], -1)  # Dynamo does not trace unflatten in a function mode

    def _input_smoothing(self) -> torch.Tensor | None:
        return self.smoothing

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The weight that the codes stand for, [N, K] in `dtype`; made anew at every call."""

    @abstractmethod
    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        """[M, K] in `dtype`, smoothed -> [M, N] in `dtype`."""


class StaticLinear(QuantizedLinear, ABC):
    """W8A8 with one static scale for the input.

    With `after_gelu` set, the input has yet to pass through GELU (tanh form), which is computed with its codes. A layer
    with a `leader` reads the same input with the same scales, and takes the leader's: so a compiler makes codes once
    for all of them.
    """

    after_gelu = False
    leader: tuple[StaticLinear, ...] = ()  # one or none; in a tuple, it is not a part of this layer

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """See `QuantizedLinear.forward`; `data` may be codes as `leading` makes them."""
        if data.dtype == self.codes.dtype:
            return self.from_codes(data.flatten(0, -2), self.leading.input_scale).view(*data.shape[:-1], -1)
        if not self.after_gelu:
            return super().forward(data)
        rows = data.flatten(0, -2)
        return self.with_gelu(rows[:, :0], rows).view(*data.shape[:-1], -1)

    def with_gelu(
        self, first: torch.Tensor, second: torch.Tensor, first_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the layer makes of two tensors side by side.

        Args:
            first: [M, K1], FP8 codes where they have a scale.
            second: [M, K2], which has yet to pass through GELU.
            first_scale: float32 [], of the codes; or None.

        Returns:
            [M, N] in `dtype`.
        """
        first = first.to(self.dtype) if first_scale is None else first
        second = second.to(self.dtype)
        codes = gelu_codes(
            first.contiguous(), second.contiguous(), self.input_scale, self.smoothing, self.codes.dtype, first_scale
        )
        return self.from_codes(codes, self.input_scale)

    def of_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """The input as codes [..., K] of the layer's own scale, contiguous, -> [..., N] in `dtype`."""
        return self.from_codes(codes.flatten(0, -2), self.input_scale).view(*codes.shape[:-1], -1)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        scale = self.leading.input_scale
        return self.from_codes(static_codes(rows, scale, self.codes.dtype), scale)

    def _input_smoothing(self) -> torch.Tensor | None:
        return self.leading.smoothing

    @property
    def leading(self) -> StaticLinear:
        """The layer whose codes this one takes: its leader, or itself."""
        return self.leader[0] if self.leader else self

    @abstractmethod
    def from_codes(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """[M, K] in the dtype of `codes`, smoothed, and the scale float32 [] that they have -> [M, N] in `dtype`."""


def makes_codes(layer: torch.nn.Module) -> TypeGuard[StaticLinear]:
    """Whether a layer turns its input into codes."""
    return isinstance(layer, StaticLinear) and not layer.sixteen_bit


def takes_codes(layer: torch.nn.Module) -> TypeGuard[StaticLinear]:
    """Whether the codes of a layer's input can be made by what comes before it: nothing multiplies the input first."""
    return makes_codes(layer) and layer.smoothing is None


def takes_fp8(layer: torch.nn.Module) -> TypeGuard[Fp8Linear]:
    """Whether a layer multiplies FP8 codes as they come, whatever their scale."""
    return isinstance(layer, Fp8Linear) and takes_codes(layer)


class Fp8Linear(StaticLinear):
    """W8A8 FP8 E4M3: codes float8_e4m3fn [N, K], weight_scale float32 []."""

    def weight(self) -> torch.Tensor:
        """See `QuantizedLinear.weight`."""
        return (self.codes.float() * self.weight_scale).to(self.dtype)

    def from_codes(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """See `StaticLinear.from_codes`."""
        return torch._scaled_mm(
            codes,
            self.codes.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )


class Int8Linear(StaticLinear):
    """W8A8 INT8, weights per output channel: codes int8 [N, K], weight_scale float32 [N]."""

    def weight(self) -> torch.Tensor:
        """See `QuantizedLinear.weight`."""
        return (self.codes.float() * self.weight_scale[:, None]).to(self.dtype)

    def from_codes(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """See `StaticLinear.from_codes`."""
        return int8_linear(codes, self.codes, self.weight_scale * scale, self.bias, self.dtype)


class Int4Linear(QuantizedLinear):
    """Weight-only INT4 in blocks along K: codes uint8 [N, K / 2] of 0..15, 8 more than they are, weight_scale [N, K / block].

    The weight is unpacked before every product: that saves memory, not time.
    """

    def weight(self) -> torch.Tensor:
        """See `QuantizedLinear.weight`."""
        blocks = (unpack(self.codes).to(self.dtype) - 8.0).unflatten(1, (self.weight_scale.shape[1], -1))
        return (blocks * self.weight_scale.to(self.dtype).unsqueeze(-1)).flatten(1)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, self.weight(), self.bias)


class Nvfp4Linear(QuantizedLinear):
    """W4A4 NVFP4, emulated: codes uint8 [N, K / 2], weight_scale float32 [], block_scale float8_e4m3fn [N, K / 16].

    Weights and activations take the values that NVFP4 gives them, the product is a 16-bit one: its error, not its
    speed. A branch of low rank reads what has not been quantized, and its products are 16-bit ones anywhere.
    """

    def weight(self) -> torch.Tensor:
        """See `QuantizedLinear.weight`."""
        weight = self._stood_for()
        if self.low_rank_up is not None and self.low_rank_down is not None:
            weight = weight + self.low_rank_up.float() @ self.low_rank_down.float()
        return weight.to(self.dtype)

    def _stood_for(self) -> torch.Tensor:
        return nvfp4.dequantize(unpack(self.codes), self.block_scale, self.weight_scale)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        seen = nvfp4.fake_quantize(rows, self.input_scale).to(self.dtype)
        product = F.linear(seen, self._stood_for().to(self.dtype), self.bias)
        if self.low_rank_up is None or self.low_rank_down is None:
            return product
        return product + F.linear(F.linear(rows, self.low_rank_down), self.low_rank_up)


def linear_from(layer: QuantizedLayer, bias: torch.Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
    """The torch form of a quantized linear layer, on the layer's device; on "meta" it has shapes and dtypes only.

    Args:
        layer: codes and scales.
        bias: [N] on the same device, or None.
        dtype: float16 or bfloat16, of activations.

    Raises:
        ValueError: the precision has no codes.
    """
    input_scale = None if layer.input_scale is None else layer.input_scale.float()
    scales = Scales(layer.weight_scale.float(), input_scale, layer.pre_quant_scale, layer.block_scale, layer.branch)
    if layer.precision is Precision.NVFP4:
        return Nvfp4Linear(pack(layer.codes), scales, bias, dtype)
    if layer.precision is Precision.FP8:
        return Fp8Linear(layer.codes, scales, bias, dtype)
    if layer.precision is Precision.INT8:
        return Int8Linear(layer.codes, scales, bias, dtype)
    if layer.precision is Precision.INT4:
        blocks = replace(scales, weight=scales.weight.to(dtype))
        return Int4Linear(pack((layer.codes + 8).to(torch.uint8)), blocks, bias, dtype)
    raise ValueError(f"precision {layer.precision.value} has no codes; choose from fp8, int8, int4, nvfp4")
