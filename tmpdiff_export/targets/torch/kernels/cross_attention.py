"""Attention to few keys, such as a short text's, with codes of the result, for the `torch` backend.

All keys of a head are one tile: libraries, whose kernels walk over keys, take several times as long.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional as F

from tmpdiff_export.targets.torch.activations import CODE_LIMITS, static_codes

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.cross_attention import cross_attention_op

MOST_KEYS: Final = 128
HEAD_SIZES: Final = (16, 32, 64, 128)


def cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V without a mask.

    Args:
        query: [B, S, H, D] in a 16-bit type; rows of tokens may lie apart.
        key: [B, S1, H, D] as `query`.
        value: as `key`.
        scale: float32 [], of codes; None for a result in the type of `query`.
        dtype: of codes, float8_e4m3fn or int8.

    Returns:
        [B, S, H, D], contiguous, in `dtype` or in the type of `query`.
    """
    if query.is_cuda and key.shape[1] <= MOST_KEYS and key.shape[3] in HEAD_SIZES:
        low, high = CODE_LIMITS[dtype] if dtype is not None else (0.0, 0.0)
        return cross_attention_op(query, key, value, scale, low, high, dtype or query.dtype)
    result = F.scaled_dot_product_attention(*(item.transpose(1, 2) for item in (query, key, value))).transpose(1, 2)
    if scale is None or dtype is None:
        return result.contiguous()
    return static_codes(result, scale, dtype).contiguous()
