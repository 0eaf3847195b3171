"""GELU's tanh form, alone and with codes made of it, written so that kernels wait for memory and not for arithmetic."""

from __future__ import annotations

import math

import torch

from tmpdiff_export.targets.torch.activations import CODE_LIMITS, static_codes

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.gelu_codes import gelu_codes_op


def tanh_gelu(data: torch.Tensor) -> torch.Tensor:
    """Any shape and floating type -> the same: GELU in its tanh approximation.

    As x sigmoid(2 z) where torch has x (1 + tanh z) / 2, the same function: a sigmoid is one exponential and one
    division, a tanh some twenty instructions, which kernels on a GPU were bound by. Computed in float32 and rounded
    once, as torch does.
    """
    single = data.float()
    twice = single * (2 * math.sqrt(2 / math.pi) * (1 + 0.044715 * single * single))
    return (single * torch.sigmoid(twice)).to(data.dtype)


class TanhGelu(torch.nn.Module):
    """`tanh_gelu`."""

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """Any shape and floating type -> the same."""
        return tanh_gelu(data)


def gelu_codes(
    first: torch.Tensor,
    second: torch.Tensor,
    scale: torch.Tensor,
    smoothing: torch.Tensor | None,
    dtype: torch.dtype,
    first_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`static_codes` of `first` and of GELU (tanh form) of `second`, side by side.

    On a GPU one kernel: compilers compute the GELU, and both sides of the seam, for every column of the result.

    Args:
        first: [M, K1] in a 16-bit type, or FP8 codes, contiguous; K1 may be 0.
        second: [M, K2] in a 16-bit type, contiguous.
        scale: float32 [].
        smoothing: [K1 + K2] in that type, multiplies before the codes are made; or None.
        dtype: float8_e4m3fn or int8.
        first_scale: float32 [], what `first` is multiplied by: the scale of its codes; or None.

    Returns:
        [M, K1 + K2] in `dtype`.
    """
    if second.is_cuda:
        factors = second.new_zeros(0) if smoothing is None else smoothing
        return gelu_codes_op(first, first_scale, second, scale, factors, *CODE_LIMITS[dtype], dtype)
    if first_scale is not None:
        first = (first.float() * first_scale).to(second.dtype)
    rows = torch.cat([first, tanh_gelu(second)], dim=1)
    return static_codes(rows if smoothing is None else rows * smoothing, scale, dtype)
