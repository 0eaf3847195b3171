"""FP8 convolutions of the `torch` backend, from the same codes and scales as the Q/DQ nodes of the ONNX file."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch.nn import functional as F

from engines.precision import Precision
from tmpdiff_export.quantization.codes import QuantizedLayer
from tmpdiff_export.targets.torch.activations import static_codes
from tmpdiff_export.targets.torch.kernels.convolution import convolution_fp8
from tmpdiff_export.targets.torch.layers import FP8_ALIGNMENT, Fp8Linear, Scales

_WINDOW = (3, 3)


class Fp8Convolution(Fp8Linear):
    """A convolution of 3 x 3 in W8A8 FP8 E4M3: codes float8_e4m3fn [N, 9 C], of every place of the window C numbers."""

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, N, H, W] in `dtype`, channels last in memory."""
        pixels = data.to(self.dtype).permute(0, 2, 3, 1).contiguous()
        if self.sixteen_bit:
            weight = self.weight().unflatten(1, (*_WINDOW, -1)).permute(0, 3, 1, 2)
            return F.conv2d(pixels.permute(0, 3, 1, 2), weight, self.bias, padding=1)
        return self.of_codes(static_codes(pixels, self.input_scale, self.codes.dtype)).permute(0, 3, 1, 2)

    def of_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """The input as codes [B, H, W, C], contiguous, -> [B, H, W, N] in `dtype`."""
        bias = self.weight_scale.new_zeros(len(self.codes), dtype=self.dtype) if self.bias is None else self.bias
        return convolution_fp8(codes, self.codes, self.weight_scale * self.input_scale, bias, self.dtype)


def has_product(original: torch.nn.Module, precision: Precision) -> TypeGuard[torch.nn.Conv2d]:
    """Whether `Fp8Convolution` can stand for a layer at a precision."""
    return (
        precision is Precision.FP8
        and isinstance(original, torch.nn.Conv2d)
        and original.kernel_size == _WINDOW
        and original.stride == original.dilation == original.padding == (1, 1)
        and original.groups == 1
        and original.padding_mode == "zeros"
        and all(size % FP8_ALIGNMENT == 0 for size in original.weight.shape[:2])
    )


def convolution_from(layer: QuantizedLayer, bias: torch.Tensor | None, dtype: torch.dtype) -> Fp8Convolution:
    """The torch form of a quantized convolution that `has_product`, on the layer's device; "meta" too.

    Args:
        layer: codes [N, 9 C] in the order of the weight, of every channel the window; and scales.
        bias: [N] on the same device, or None.
        dtype: float16 or bfloat16, of activations.
    """
    if layer.input_scale is None:
        raise ValueError("a convolution in FP8 needs the scale of its input, found none")
    codes = layer.codes.unflatten(1, (-1, *_WINDOW)).permute(0, 2, 3, 1).flatten(1).contiguous()
    return Fp8Convolution(codes, Scales(layer.weight_scale.float(), layer.input_scale.float()), bias, dtype)
