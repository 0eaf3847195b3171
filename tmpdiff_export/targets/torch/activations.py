"""Activations as codes with one static scale, FP8 or INT8, for the `torch` backend."""

from __future__ import annotations

import torch

from engines.precision import Precision
from tmpdiff_export.scales import CODE_MAX
from tmpdiff_export.torch_gelu import tanh_gelu

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.triton_codes import gelu_codes_op

FP8 = torch.float8_e4m3fn
INT8_LIMIT = 127
_LIMITS = {
    FP8: (-float(CODE_MAX[Precision.FP8]), float(CODE_MAX[Precision.FP8])),
    torch.int8: (-INT8_LIMIT - 1.0, float(INT8_LIMIT)),
}


def static_codes(rows: torch.Tensor, scale: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """Any shape, floating -> the same shape in `dtype` (float8_e4m3fn or int8), saturated; scale float32 [] or a number."""
    scaled = rows.float() * (1.0 / scale)
    if dtype is torch.int8:
        scaled = scaled.round()
    return scaled.clamp(*_LIMITS[dtype]).to(dtype)


def gelu_codes(
    first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor, smoothing: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`static_codes` of `first` and of GELU (tanh form) of `second`, side by side.

    On a GPU one kernel: compilers compute the GELU, and both sides of the seam, for every column of the result.

    Args:
        first: [M, K1] in a 16-bit type, contiguous; K1 may be 0.
        second: [M, K2] in that type, contiguous.
        scale: float32 [].
        smoothing: [K1 + K2] in that type, multiplies before the codes are made; or None.
        dtype: float8_e4m3fn or int8.

    Returns:
        [M, K1 + K2] in `dtype`.
    """
    if second.is_cuda:
        factors = second.new_zeros(0) if smoothing is None else smoothing
        return gelu_codes_op(first, second, scale, factors, *_LIMITS[dtype], dtype)
    rows = torch.cat([first, tanh_gelu(second)], dim=1)
    return static_codes(rows if smoothing is None else rows * smoothing, scale, dtype)
