"""The Triton kernels behind `kernels.linear_attention.linear_attention`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

# Tokens of a program, of a tile, and warps. A head of a sample is the work of several programs: one alone waits for memory.
_SPAN = 256
_TOKENS = 128
_WARPS = 4
_STAGES = 2


@triton.jit  # type: ignore[untyped-decorator]
def _sums(  # type: ignore[no-untyped-def]
    key,
    value,
    states,
    amounts,
    tokens,
    heads,
    key_sample,
    key_token,
    value_sample,
    value_token,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Of some tokens of a head: keys times values, and keys, summed."""
    head = tl.program_id(0)
    span = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, SIZE)
    keys = key + sample * key_sample + head * SIZE + column[None, :]
    values = value + sample * value_sample + head * SIZE + column[None, :]
    state = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    amount = tl.zeros((SIZE,), dtype=tl.float32)
    for start in range(span * SPAN, span * SPAN + SPAN, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = (token < tokens)[:, None]
        seen = tl.load(keys + token[:, None].to(tl.int64) * key_token, mask=inside, other=0.0)
        seen = tl.maximum(seen.to(tl.float32), 0.0).to(key.dtype.element_ty)
        given = tl.load(values + token[:, None].to(tl.int64) * value_token, mask=inside, other=0.0)
        state = tl.dot(tl.trans(seen), given, state)
        amount += tl.sum(seen.to(tl.float32), axis=0)
    place = (sample * heads + head) * tl.num_programs(1) + span
    tl.store(states + place * SIZE * SIZE + column[:, None] * SIZE + column[None, :], state)
    tl.store(amounts + place * SIZE + column, amount)


@triton.jit  # type: ignore[untyped-decorator]
def _answers(  # type: ignore[no-untyped-def]
    query,
    states,
    amounts,
    scale,
    result,
    tokens,
    heads,
    spans,
    query_sample,
    query_token,
    EPSILON: tl.constexpr,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The result of some tokens of a head, from the sums of all of them."""
    head = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, SIZE)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    queries = query + sample * query_sample + head * SIZE + column[None, :]
    asked = tl.load(queries + token[:, None].to(tl.int64) * query_token, mask=inside, other=0.0)
    asked = tl.maximum(asked.to(tl.float32), 0.0)
    state = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    amount = tl.zeros((SIZE,), dtype=tl.float32)
    place = (sample * heads + head) * spans
    for span in range(0, spans):
        state += tl.load(states + (place + span) * SIZE * SIZE + column[:, None] * SIZE + column[None, :])
        amount += tl.load(amounts + (place + span) * SIZE + column)
    share = 1.0 / (tl.sum(asked * amount[None, :], axis=1) + EPSILON)
    found = tl.dot(asked, state, input_precision="tf32") * share[:, None]
    if CODES:
        factor = tl.div_rn(1.0, tl.load(scale))
        found = tl.clamp(found * factor, LIMIT_LOW, LIMIT_HIGH, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
        found = (found + 12582912.0).to(tl.int32, bitcast=True)
    at = ((sample * tokens + token[:, None]) * heads + head) * SIZE + column[None, :]
    tl.store(result + at, found.to(result.dtype.element_ty), mask=inside)


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
    spans = triton.cdiv(key.shape[1], _SPAN)
    states = torch.empty((batch, heads, spans, size, size), device=query.device, dtype=torch.float32)
    amounts = torch.empty((batch, heads, spans, size), device=query.device, dtype=torch.float32)
    result = torch.empty((batch, tokens, heads, size), device=query.device, dtype=dtype)
    torch.library.wrap_triton(_sums)[(heads, spans, batch)](
        key,
        value,
        states,
        amounts,
        key.shape[1],
        heads,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        SIZE=size,
        SPAN=_SPAN,
        TOKENS=_TOKENS,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    torch.library.wrap_triton(_answers)[(heads, triton.cdiv(tokens, _TOKENS), batch)](
        query,
        states,
        amounts,
        query if scale is None else scale,
        result,
        tokens,
        heads,
        spans,
        query.stride(0),
        query.stride(1),
        EPSILON=epsilon,
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        CODES=scale is not None,
        ROUND=dtype is torch.int8,
        SIZE=size,
        TOKENS=_TOKENS,
        num_warps=_WARPS,
    )
    return result
