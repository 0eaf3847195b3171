"""FP8 convolutions of 3 x 3 over channels-last codes, for the `torch` backend: torch has no product for them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.convolution import convolution_fp8_op


def convolution_fp8(
    codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """A convolution of 3 x 3 with zeros around the picture, summed in FP32, times `scale`, plus `bias`, rounded once.

    Args:
        codes: float8_e4m3fn [B, H, W, C], contiguous; C a multiple of 16.
        weight: float8_e4m3fn [N, 9 C], contiguous: of every place of the window, row by row, C numbers.
        scale: float32 [], weight scale times activation scale.
        bias: [N] in `dtype`.
        dtype: of the result, a 16-bit type.

    Returns:
        [B, H, W, N] on the device of `codes`.
    """
    if codes.is_cuda:
        return convolution_fp8_op(codes, weight, scale, bias, dtype)
    kernel = weight.float().unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
    sums = F.conv2d(codes.float().permute(0, 3, 1, 2), kernel, padding=1).permute(0, 2, 3, 1)
    return (sums * scale + bias.float()).to(dtype).contiguous()
