"""Sana's feed-forward network between its two products: SiLU, depthwise convolution and gate in one kernel.

Compilers make three of them, one a convolution of cuDNN's that reads every value nine times (docs/results.md). Here a value is read
three times, and what leaves is what the next product takes.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tmpdiff_export.targets.torch.activations import CODE_LIMITS, static_codes

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.glu_convolution import glu_convolution_op


def glu_convolution(
    data: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """SiLU, a depthwise convolution of 3 x 3 with zeros around the picture, and half of the channels gated by the other.

    The gate is SiLU of the second half. Computed in float32 and rounded once.

    Args:
        data: [B, H, W, 2 C] in a 16-bit type or float32, contiguous.
        weight: [2 C, 1, 3, 3] in that type.
        bias: [2 C] in that type.
        scale: float32 [], of codes; None for a result in the type of `data`.
        dtype: of codes, float8_e4m3fn or int8.

    Returns:
        [B, H, W, C] in `dtype`, or in the type of `data`.
    """
    if data.is_cuda:
        low, high = CODE_LIMITS[dtype] if dtype is not None else (0.0, 0.0)
        return glu_convolution_op(data, weight, bias, scale, low, high, dtype or data.dtype)
    channels = weight.shape[0]
    wide = F.silu(data.float()).permute(0, 3, 1, 2)
    convolved = F.conv2d(wide, weight.float(), bias.float(), padding=1, groups=channels)
    first, gate = convolved.permute(0, 2, 3, 1).chunk(2, dim=-1)
    result = first * F.silu(gate)
    if scale is None or dtype is None:
        return result.to(data.dtype).contiguous()
    return static_codes(result, scale, dtype).contiguous()
