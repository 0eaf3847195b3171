"""The Triton kernel behind `kernels.linear_attention.linear_attention`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

_TOKENS = 128  # of a tile
_WARPS = 4
_STAGES = 3


@triton.jit  # type: ignore[untyped-decorator]
def _linear_attention(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    scale,
    result,
    tokens,
    heads,
    query_sample,
    query_token,
    key_sample,
    key_token,
    value_sample,
    value_token,
    EPSILON: tl.constexpr,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A head of a sample: once over keys and values, whose sums stay on the chip, then once over the queries."""
    head = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, TOKENS)
    column = tl.arange(0, SIZE)
    keys = key + sample * key_sample + head * SIZE + column[None, :]
    values = value + sample * value_sample + head * SIZE + column[None, :]
    state = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    amount = tl.zeros((SIZE,), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + at
        inside = (token < tokens)[:, None]
        seen = tl.load(keys + token[:, None].to(tl.int64) * key_token, mask=inside, other=0.0)
        seen = tl.maximum(seen.to(tl.float32), 0.0).to(key.dtype.element_ty)
        given = tl.load(values + token[:, None].to(tl.int64) * value_token, mask=inside, other=0.0)
        state = tl.dot(tl.trans(seen), given, state)
        amount += tl.sum(seen.to(tl.float32), axis=0)
    factor = tl.div_rn(1.0, tl.load(scale)) if CODES else 1.0
    queries = query + sample * query_sample + head * SIZE + column[None, :]
    target = result + sample * tokens * heads * SIZE + head * SIZE + column[None, :]
    for start in range(0, tokens, TOKENS):
        token = start + at
        inside = (token < tokens)[:, None]
        asked = tl.load(queries + token[:, None].to(tl.int64) * query_token, mask=inside, other=0.0)
        asked = tl.maximum(asked.to(tl.float32), 0.0)
        share = 1.0 / (tl.sum(asked * amount[None, :], axis=1) + EPSILON)
        found = tl.dot(asked, state, input_precision="tf32") * share[:, None]
        if CODES:
            found = tl.clamp(found * factor, LIMIT_LOW, LIMIT_HIGH, propagate_nan=tl.PropagateNan.ALL)
        if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
            found = (found + 12582912.0).to(tl.int32, bitcast=True)
        tl.store(target + token[:, None].to(tl.int64) * heads * SIZE, found.to(result.dtype.element_ty), mask=inside)


@torch.library.triton_op("tmpdiff::linear_attention", mutates_args={})  # type: ignore[untyped-decorator]
def linear_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    epsilon: float,
    limit_low: float,
    limit_high: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.linear_attention.linear_attention` on a GPU, with the least and the largest code."""
    batch, tokens, heads, size = query.shape
    result = torch.empty((batch, tokens, heads, size), device=query.device, dtype=dtype)
    torch.library.wrap_triton(_linear_attention)[(heads, batch)](
        query,
        key,
        value,
        query if scale is None else scale,
        result,
        tokens,
        heads,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        EPSILON=epsilon,
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        CODES=scale is not None,
        ROUND=dtype is torch.int8,
        SIZE=size,
        TOKENS=_TOKENS,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return result
