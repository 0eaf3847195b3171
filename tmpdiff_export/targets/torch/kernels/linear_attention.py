"""Sana's linear attention in two kernels: what compilers make of it widens queries, keys and values to FP32 in memory first."""

from __future__ import annotations

import torch

from tmpdiff_export.targets.torch.activations import CODE_LIMITS, static_codes

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.linear_attention import linear_attention_op

EPSILON = 1e-15  # of the denominator


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """relu(Q) (relu(K)^T V) / (relu(Q) sum of relu(K)), of every sample and head alone.

    Sums are in float32, and rounded once; the products with the queries take their other operand as TF32 on a GPU.

    Args:
        query: [B, S, H, D] in a 16-bit type or float32; D a power of two, 16 to 128; the last dimension contiguous.
        key: the same.
        value: the same.
        scale: float32 [], of codes; None for a result in the type of `query`.
        dtype: of codes, float8_e4m3fn or int8.

    Returns:
        [B, S, H, D], contiguous, in `dtype`, or in the type of `query`.
    """
    if query.is_cuda:
        low, high = CODE_LIMITS[dtype] if dtype is not None else (0.0, 0.0)
        return linear_attention_op(query, key, value, scale, EPSILON, low, high, dtype or query.dtype)
    queries, keys = (item.float().relu() for item in (query, key))
    state = torch.einsum("bshd,bshe->bhde", keys, value.float())
    amount = torch.einsum("bshd,bhd->bsh", queries, keys.sum(1))
    result = torch.einsum("bshd,bhde->bshe", queries, state) / (amount + EPSILON).unsqueeze(-1)
    if scale is None or dtype is None:
        return result.to(query.dtype).contiguous()
    return static_codes(result, scale, dtype).contiguous()
