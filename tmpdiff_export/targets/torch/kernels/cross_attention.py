"""Attention to few keys, such as a short text's, with codes of the result, for the `torch` backend.

Libraries, whose kernels are made for many keys, take several times as long, more so with a mask.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional as F

from tmpdiff_export.targets.torch.activations import CODE_LIMITS, static_codes

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.cross_attention import cross_attention_op

MOST_KEYS: Final = 512
LEAST_SIZE, MOST_SIZE = 16, 128  # of a head, which is a multiple of 8


def cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D) + bias) V.

    Args:
        query: [B, S, H, D] in a 16-bit type; rows of tokens may lie apart.
        key: [B, S1, H, D] as `query`.
        value: as `key`.
        bias: [B, S1], of every query's logits: a mask; or None.
        scale: float32 [], of codes; None for a result in the type of `query`.
        dtype: of codes, float8_e4m3fn or int8.

    Returns:
        [B, S, H, D], contiguous, in `dtype` or in the type of `query`.
    """
    size = key.shape[3]
    if query.is_cuda and key.shape[1] <= MOST_KEYS and LEAST_SIZE <= size <= MOST_SIZE and size % 8 == 0:
        low, high = CODE_LIMITS[dtype] if dtype is not None else (0.0, 0.0)
        return cross_attention_op(query, key, value, bias, scale, low, high, dtype or query.dtype)
    query, key, value = (item.transpose(1, 2) for item in (query, key, value))
    mask = None if bias is None else bias[:, None, None].to(query.dtype)
    result = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    if scale is None or dtype is None:
        return result.contiguous()
    return static_codes(result, scale, dtype).contiguous()
