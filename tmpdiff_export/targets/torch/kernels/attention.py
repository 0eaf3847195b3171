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
        query: codes, float8_e4m3fn [B, S, H, D], contiguous.
        key: as `query`.
        value: [B, S, H, D] in a 16-bit type or float32; made codes here.
        scales: see `engines.backends.torch.attention.scales_tensor`; on the device of the codes.

    Returns:
        Codes, float8_e4m3fn [B, S, H, D], of the values' scale.
    """
    if query.is_cuda and query.shape[3] in KERNEL_SIZES:
        return attend_codes_op(query, key, value.contiguous(), scales)
    result: torch.Tensor = attention_fp8(query, key, static_codes(value, scales[2, 0], FP8).contiguous(), scales)
    return result
