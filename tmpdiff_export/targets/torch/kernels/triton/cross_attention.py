"""The Triton kernel behind `kernels.cross_attention.cross_attention`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

_TILE = (64, 4)  # queries of a program, and its warps
_LEAST_KEYS = 16  # that tensor cores take
_LOG2_E = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator]
def _cross_attention(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    scale,
    result,
    tokens,
    keys,
    query_sample,
    query_row,
    key_sample,
    key_row,
    value_sample,
    value_row,
    FACTOR: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """M queries of one head against all keys; `_sample` and `_row` are strides."""
    at = tl.program_id(0) * M + tl.arange(0, M)
    sample = (tl.program_id(1) // HEADS).to(tl.int64)
    column = (tl.program_id(1) % HEADS) * SIZE + tl.arange(0, SIZE)
    number = tl.arange(0, N)
    here, known = at < tokens, number < keys
    q = tl.load(
        query + sample * query_sample + at[:, None] * query_row + column[None, :], mask=here[:, None], other=0.0
    )
    k = tl.load(key + sample * key_sample + number[:, None] * key_row + column[None, :], mask=known[:, None], other=0.0)
    v = tl.load(
        value + sample * value_sample + number[:, None] * value_row + column[None, :], mask=known[:, None], other=0.0
    )
    logits = tl.where(known[None, :], tl.dot(q, tl.trans(k)), float("-inf"))
    weights = tl.exp2(logits * FACTOR - (tl.max(logits, 1) * FACTOR)[:, None])
    factor = 1.0 / tl.sum(weights, 1)
    if CODES:
        factor *= tl.div_rn(1.0, tl.load(scale))
    values = tl.dot(weights.to(v.dtype), v) * factor[:, None]
    if CODES:
        values = tl.clamp(values, LIMIT_LOW, LIMIT_HIGH, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
        values = (values + 12582912.0).to(tl.int32, bitcast=True)
    target = result + (sample * tokens + at[:, None]) * (HEADS * SIZE) + column[None, :]
    tl.store(target, values.to(result.dtype.element_ty), mask=here[:, None])


@torch.library.triton_op("tmpdiff::cross_attention", mutates_args={})  # type: ignore[untyped-decorator]
def cross_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    limit_low: float,
    limit_high: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.cross_attention.cross_attention` on a GPU, with the least and the largest code."""
    batch, tokens, heads, size = query.shape
    keys = key.shape[1]
    result = torch.empty(query.shape, device=query.device, dtype=dtype)
    rows, warps = _TILE
    torch.library.wrap_triton(_cross_attention)[(triton.cdiv(tokens, rows), batch * heads)](
        query,
        key,
        value,
        query if scale is None else scale,
        result,
        tokens,
        keys,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        FACTOR=_LOG2_E * size**-0.5,
        CODES=scale is not None,
        ROUND=dtype is torch.int8,
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        HEADS=heads,
        SIZE=size,
        M=rows,
        N=max(triton.next_power_of_2(keys), _LEAST_KEYS),
        num_warps=warps,
    )
    return result
