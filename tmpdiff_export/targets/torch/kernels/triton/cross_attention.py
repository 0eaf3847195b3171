"""The Triton kernel behind `kernels.cross_attention.cross_attention`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

_TILE = (64, 4)  # queries of a program, and its warps
_LEAST_KEYS, _MOST_KEYS = 16, 64  # of a tile: what tensor cores take; what leaves room for several programs
_LOG2_E = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator]
def _cross_attention(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bias,
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
    bias_sample,
    FACTOR: tl.constexpr,
    LOG2_E: tl.constexpr,
    BIAS: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    MORE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """M queries of one head against all keys; `_sample` and `_row` are strides. `SIZE` is `D`, or up to `MORE` more."""
    SPLIT: tl.constexpr = SIZE > D
    at = tl.program_id(0) * M + tl.arange(0, M)
    sample = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS) * SIZE
    column, more = tl.arange(0, D), D + tl.arange(0, MORE)
    here, inside = at < tokens, more < SIZE
    query_rows = query + sample * query_sample + at[:, None] * query_row + head
    q = tl.load(query_rows + column[None, :], mask=here[:, None], other=0.0)
    if SPLIT:
        q_more = tl.load(query_rows + more[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        sums_more = tl.zeros((M, MORE), tl.float32)
    level = tl.full((M,), -1e30, tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, D), tl.float32)
    for first in tl.range(0, keys, N):
        number = first + tl.arange(0, N)
        known = number < keys
        key_rows = key + sample * key_sample + number[:, None] * key_row + head
        logits = tl.dot(q, tl.trans(tl.load(key_rows + column[None, :], mask=known[:, None], other=0.0)))
        if SPLIT:
            k_more = tl.load(key_rows + more[None, :], mask=known[:, None] & inside[None, :], other=0.0)
            logits = tl.dot(q_more, tl.trans(k_more), logits)
        logits = logits * FACTOR
        if BIAS:
            added = tl.load(bias + sample * bias_sample + number, mask=known, other=0.0).to(tl.float32)
            logits += (added * LOG2_E)[None, :]
        logits = tl.where(known[None, :], logits, float("-inf"))
        higher = tl.maximum(level, tl.max(logits, 1))
        shrink = tl.exp2(level - higher)
        level = higher
        weights = tl.exp2(logits - level[:, None])
        total = total * shrink + tl.sum(weights, 1)
        value_rows = value + sample * value_sample + number[:, None] * value_row + head
        v = tl.load(value_rows + column[None, :], mask=known[:, None], other=0.0)
        weights = weights.to(v.dtype)
        sums = tl.dot(weights, v, sums * shrink[:, None])
        if SPLIT:
            v_more = tl.load(value_rows + more[None, :], mask=known[:, None] & inside[None, :], other=0.0)
            sums_more = tl.dot(weights, v_more, sums_more * shrink[:, None])
    factor = 1.0 / total
    if CODES:
        factor *= tl.div_rn(1.0, tl.load(scale))
    target = result + (sample * tokens + at[:, None]) * (HEADS * SIZE) + head
    values = _rounded(sums * factor[:, None], CODES, ROUND, LIMIT_LOW, LIMIT_HIGH)
    tl.store(target + column[None, :], values.to(result.dtype.element_ty), mask=here[:, None])
    if SPLIT:
        values = _rounded(sums_more * factor[:, None], CODES, ROUND, LIMIT_LOW, LIMIT_HIGH)
        tl.store(target + more[None, :], values.to(result.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(  # type: ignore[no-untyped-def]
    values, CODES: tl.constexpr, ROUND: tl.constexpr, LIMIT_LOW: tl.constexpr, LIMIT_HIGH: tl.constexpr
):
    if CODES:
        values = tl.clamp(values, LIMIT_LOW, LIMIT_HIGH, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
        values = (values + 12582912.0).to(tl.int32, bitcast=True)
    return values


@torch.library.triton_op("tmpdiff::cross_attention", mutates_args={})  # type: ignore[untyped-decorator]
def cross_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: Optional[torch.Tensor],  # noqa: UP045
    scale: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    limit_low: float,
    limit_high: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.cross_attention.cross_attention` on a GPU, with the least and the largest code."""
    batch, tokens, heads, size = query.shape
    keys, wide = key.shape[1], 1 << (size.bit_length() - 1)
    result = torch.empty(query.shape, device=query.device, dtype=dtype)
    rows, warps = _TILE
    torch.library.wrap_triton(_cross_attention)[(triton.cdiv(tokens, rows), batch * heads)](
        query,
        key,
        value,
        query if bias is None else bias,
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
        0 if bias is None else bias.stride(0),
        FACTOR=_LOG2_E * size**-0.5,
        LOG2_E=_LOG2_E,
        BIAS=bias is not None,
        CODES=scale is not None,
        ROUND=dtype is torch.int8,
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        HEADS=heads,
        SIZE=size,
        D=wide,
        MORE=max(triton.next_power_of_2(size - wide), 16) if size > wide else 16,
        M=rows,
        N=min(max(triton.next_power_of_2(keys), _LEAST_KEYS), _MOST_KEYS),
        num_warps=warps,
    )
    return result
