"""Activations as codes with one static scale, FP8 or INT8, for the `torch` backend."""

from __future__ import annotations

from typing import NamedTuple

import torch

from engines.precision import Precision
from tmpdiff_export.quantization.codes import CODE_MAX

FP8 = torch.float8_e4m3fn
INT8_LIMIT = 127
CODE_LIMITS = {
    FP8: (-float(CODE_MAX[Precision.FP8]), float(CODE_MAX[Precision.FP8])),
    torch.int8: (-INT8_LIMIT - 1.0, float(INT8_LIMIT)),
}


class Codes(NamedTuple):
    """Codes that layers take of their input.

    Attributes:
        dtype: float8_e4m3fn or int8.
        scale: float32 [].
        smoothing: [C] that multiplies before the codes are made, or None.
    """

    dtype: torch.dtype
    scale: torch.Tensor
    smoothing: torch.Tensor | None


# What kernels are given in place of `Codes`: scale, smoothing, the least and the largest code, the dtype of the result.
CodeArguments = tuple[torch.Tensor | None, torch.Tensor | None, float, float, torch.dtype]


def code_arguments(codes: Codes | None, dtype: torch.dtype) -> CodeArguments:
    """Of a kernel that makes `codes`, or a result in `dtype`."""
    if codes is None:
        return None, None, 0.0, 0.0, dtype
    return codes.scale, codes.smoothing, *CODE_LIMITS[codes.dtype], codes.dtype


def coded(rows: torch.Tensor, codes: Codes | None, dtype: torch.dtype) -> torch.Tensor:
    """float32 [..., C] -> the same as codes, or in `dtype`; rounded once."""
    if codes is None:
        return rows.to(dtype)
    return static_codes(rows if codes.smoothing is None else rows * codes.smoothing.float(), codes.scale, codes.dtype)


def static_codes(rows: torch.Tensor, scale: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """Any floating shape -> the same in `dtype` (float8_e4m3fn or int8), saturated; scale: float32 [] or a number."""
    scaled = rows.float() * (1.0 / scale)
    if dtype is torch.int8:
        scaled = scaled.round()
    return scaled.clamp(*CODE_LIMITS[dtype]).to(dtype)
