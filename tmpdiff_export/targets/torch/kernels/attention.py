"""Attention in FP8 for the `torch` backend: a Triton kernel where it is faster than cuDNN, which the operator calls.

The kernel is compiled into a package: it needs neither Python nor cuDNN there.
"""

from __future__ import annotations

from typing import Final

import torch

from engines.backends.torch.attention import FP8, attention_fp8
from tmpdiff_export.targets.torch.activations import static_codes

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.attention import attend_codes_op

# Of 64, 96 and 128, those the kernel is faster at than cuDNN (tools/gpu_bench/attention.py).
KERNEL_SIZES: Final = frozenset({64})


def attend_codes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V without a mask, in FP8.

    Args:
        query: codes, float8_e4m3fn [B, S, H, D], contiguous; or in a 16-bit type or float32, then made codes here.
        key: as `query`.
        value: [B, S, H, D] in a 16-bit type or float32; made codes here.
        scales: see `engines.backends.torch.attention.scales_tensor`; on the device of the others.

    Returns:
        Codes, float8_e4m3fn [B, S, H, D], of the values' scale.
    """
    if query.is_cuda and query.shape[3] in KERNEL_SIZES:
        return attend_codes_op(*(_with_whole_rows(item) for item in (query, key, value)), scales)
    codes = (
        item if item.dtype is FP8 else static_codes(item, scales[row, 0], FP8).contiguous()
        for row, item in enumerate((query, key, value))
    )
    result: torch.Tensor = attention_fp8(*codes, scales)
    return result


def _with_whole_rows(heads: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] whose tokens may lie apart, but not what they have."""
    return heads if heads.stride()[2:] == (heads.shape[3], 1) else heads.contiguous()
