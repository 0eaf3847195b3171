"""Activations as codes with one static scale, FP8 or INT8, for the `torch` backend."""

from __future__ import annotations

import torch

from engines.precision import Precision
from tmpdiff_export.quantization.codes import CODE_MAX

FP8 = torch.float8_e4m3fn
INT8_LIMIT = 127
CODE_LIMITS = {
    FP8: (-float(CODE_MAX[Precision.FP8]), float(CODE_MAX[Precision.FP8])),
    torch.int8: (-INT8_LIMIT - 1.0, float(INT8_LIMIT)),
}


def static_codes(rows: torch.Tensor, scale: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """Any floating shape -> the same in `dtype` (float8_e4m3fn or int8), saturated; scale: float32 [] or a number."""
    scaled = rows.float() * (1.0 / scale)
    if dtype is torch.int8:
        scaled = scaled.round()
    return scaled.clamp(*CODE_LIMITS[dtype]).to(dtype)
