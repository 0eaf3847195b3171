"""The Triton kernels behind `kernels.attention.attend_codes`; importing it needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = (64, 128, 4, 3)  # queries and keys of a tile, warps, stages
_MOST_KEYS = 128  # values are padded to a multiple of this many tokens
_LOG2_E = 1.4426950408889634


@triton.jit
def _codes(data, scale):  # type: ignore[no-untyped-def]
    """E4M3, saturated; `scale` is where theirs is. An exact division costs `_attention` a third of its programs a processor."""
    return tl.clamp(data.to(tl.float32) * (1.0 / tl.load(scale)), -448.0, 448.0).to(tl.float8e4nv)


@triton.jit  # type: ignore[untyped-decorator]
def _key_and_value_codes(  # type: ignore[no-untyped-def]
    key,
    value,
    scales,
    key_codes,
    value_codes,
    tokens,
    value_tokens,
    key_sample,
    key_row,
    value_sample,
    value_row,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """[B, S, H, SIZE] -> codes: of values [B, H, SIZE, value_tokens], because tensor cores take FP8 along the keys only.

    Keys stay in their order, and are left out where they are codes; `_sample` and `_row` are strides.
    """
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    column = tl.arange(0, WIDE)
    inside = (at < tokens)[:, None] & (column < SIZE)[None, :]
    source = value + sample * value_sample + at[:, None] * value_row + (head * SIZE + column)[None, :]
    codes = _codes(tl.load(source, mask=inside, other=0.0), scales + 8)
    target = value_codes + ((sample * HEADS + head) * SIZE + column[:, None]) * value_tokens + at[None, :]
    tl.store(target, tl.trans(codes), mask=(column < SIZE)[:, None])
    if KEYS:
        source = key + sample * key_sample + at[:, None] * key_row + (head * SIZE + column)[None, :]
        codes = _codes(tl.load(source, mask=inside, other=0.0), scales + 4)
        target = key_codes + ((sample * tokens + at[:, None]) * HEADS + head) * SIZE + column[None, :]
        tl.store(target, codes, mask=inside)


@triton.jit
def _weights(logits, factor, level):  # type: ignore[no-untyped-def]
    """E4M3 of 2^(logits * factor - level + 8), about; `level` [M, 1], whole numbers not below their products."""
    # E4M3 codes of powers of two, four at a time. A code is eight times the logarithm, plus 56, where its mantissa is taken for
    # the logarithm's fraction (at most 6 % too much; Schraudolph, "A Fast, Compact Approximation of the Exponential Function",
    # 1999): no exponential function, and no conversion. Half precision from 1024 to 2048 is integers, whose lowest byte it is.
    factors = tl.full(logits.shape, 0.0, tl.float32) + factor * 8.0
    offsets = tl.broadcast_to(level * -8.0 + (1024.0 + 64.0 + 56.0), logits.shape)
    # The text stands here because a compiler that writes kernels anew (Inductor) does not write such globals right.
    return tl.inline_asm_elementwise(
        """
{
.reg .f32 a, b, c, d;
.reg .b32 h, g, k;
fma.rn.ftz.f32 a, $1, $5, $9;
fma.rn.ftz.f32 b, $2, $6, $10;
fma.rn.ftz.f32 c, $3, $7, $11;
fma.rn.ftz.f32 d, $4, $8, $12;
mov.b32 k, 0x64006400;
cvt.rn.f16x2.f32 h, b, a;
cvt.rn.f16x2.f32 g, d, c;
max.f16x2 h, h, k;
max.f16x2 g, g, k;
prmt.b32 $0, h, g, 0x6420;
}
""",
        "=r,f,f,f,f,f,f,f,f,f,f,f,f",
        [logits, factors, offsets],
        dtype=tl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _in_order(weights, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights whose keys were read in `_attention`'s order -> in their own; no thread needs another's."""
    return tl.reshape(tl.permute(tl.reshape(weights, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (M, N))


@triton.jit  # type: ignore[untyped-decorator]
def _attention(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    scales,
    result,
    tokens,
    value_tokens,
    query_sample,
    query_row,
    LOG2_E: tl.constexpr,
    CODE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """M queries of one head against all keys. `SIZE` is `D`, a power of two, or that and half of it.

    With `CODE` queries are made codes here.
    """
    SPLIT: tl.constexpr = SIZE > D
    ROW: tl.constexpr = HEADS * SIZE
    at_m = tl.program_id(0) * M + tl.arange(0, M)
    sample = (tl.program_id(1) // HEADS).to(tl.int64)
    start = sample * tokens * ROW + (tl.program_id(1) % HEADS) * SIZE
    column = tl.arange(0, D)
    more = D + tl.arange(0, D // 2)
    rows = query + sample * query_sample + (tl.program_id(1) % HEADS) * SIZE
    rows += tl.minimum(at_m, tokens - 1)[:, None] * query_row
    q = tl.load(rows + column[None, :])
    if CODE:
        q = _codes(q, scales)
    if SPLIT:
        q_more = tl.load(rows + more[None, :])
        if CODE:
            q_more = _codes(q_more, scales)
    factor = tl.load(scales) * tl.load(scales + 4) * (LOG2_E * SIZE**-0.5)
    n = tl.arange(0, N)
    # Threads hold two neighbouring products, and give tensor cores four neighbouring weights: in this order of keys
    # both are the same products.
    at_n = (n & ~15) | ((n & 6) << 1) | ((n & 8) >> 2) | (n & 1)
    values = value + tl.program_id(1).to(tl.int64) * SIZE * value_tokens + n[:, None]
    # The last keys first, which may be fewer than a tile.
    last = (tl.cdiv(tokens, N) - 1) * N
    inside = last + at_n < tokens
    keys = key + start + tl.where(inside, last + at_n, 0)[None, :] * ROW
    logits = tl.dot(q, tl.load(keys + column[:, None]))
    if SPLIT:
        logits = tl.dot(q_more, tl.load(keys + more[:, None]), logits)
    logits = tl.where(inside[None, :], logits, float("-inf"))
    # Weights are divided by a power of two that makes the largest 128 to 256.
    level = tl.ceil(tl.max(logits, 1) * factor)
    weights = _in_order(_weights(logits, factor, level[:, None]), M, N)
    sums = tl.dot(weights, tl.load(values + last + column[None, :] * value_tokens))
    if SPLIT:
        sums_more = tl.dot(weights, tl.load(values + last + more[None, :] * value_tokens))
    ones = tl.full((N, 16), 1.0, tl.float32).to(tl.float8e4nv)
    total = tl.dot(weights, ones)
    for first in tl.range(0, last, N, num_stages=STAGES):
        keys = key + start + (first + at_n)[None, :] * ROW
        logits = tl.dot(q, tl.load(keys + column[:, None]))
        if SPLIT:
            logits = tl.dot(q_more, tl.load(keys + more[:, None]), logits)
        higher = tl.maximum(level, tl.ceil(tl.max(logits, 1) * factor))
        shrink = tl.exp2(level - higher)[:, None]
        level = higher
        weights = _in_order(_weights(logits, factor, level[:, None]), M, N)
        # Tensor cores keep 14 bits of what they add to, which loses much of a growing sum of nothing but positive numbers.
        total = total * shrink + tl.dot(weights, ones)
        sums = tl.dot(weights, tl.load(values + first + column[None, :] * value_tokens), sums * shrink)
        if SPLIT:
            more_values = tl.load(values + first + more[None, :] * value_tokens)
            sums_more = tl.dot(weights, more_values, sums_more * shrink)
    scale = 1.0 / tl.max(total, 1)[:, None]
    target = result + start + at_m[:, None] * ROW
    stored = (at_m < tokens)[:, None]
    tl.store(target + column[None, :], (sums * scale).to(tl.float8e4nv), mask=stored)
    if SPLIT:
        tl.store(target + more[None, :], (sums_more * scale).to(tl.float8e4nv), mask=stored)


@torch.library.triton_op("tmpdiff::attend_codes", mutates_args={})  # type: ignore[untyped-decorator]
def attend_codes_op(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`kernels.attention.attend_codes` on a GPU."""
    batch, tokens, heads, size = query.shape
    wide = triton.cdiv(tokens, _MOST_KEYS) * _MOST_KEYS
    kind = torch.float8_e4m3fn
    value_codes = torch.empty((batch, heads, size, wide), device=query.device, dtype=kind)
    coded = key.dtype is kind
    key_codes = key if coded else torch.empty(key.shape, device=query.device, dtype=kind)
    padded = triton.next_power_of_2(size)
    torch.library.wrap_triton(_key_and_value_codes)[(wide // _MOST_KEYS, batch * heads)](
        key,
        value,
        scales,
        value_codes if coded else key_codes,
        value_codes,
        tokens,
        wide,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        KEYS=not coded,
        HEADS=heads,
        SIZE=size,
        WIDE=padded,
        ROWS=_MOST_KEYS,
        num_warps=4,
    )
    result = torch.empty(query.shape, device=query.device, dtype=kind)
    rows, keys, warps, stages = _TILE
    torch.library.wrap_triton(_attention)[(triton.cdiv(tokens, rows), batch * heads)](
        query,
        key_codes,
        value_codes,
        scales,
        result,
        tokens,
        wide,
        query.stride(0),
        query.stride(1),
        LOG2_E=_LOG2_E,
        CODE=query.dtype is not kind,
        HEADS=heads,
        SIZE=size,
        D=padded if padded == size else padded // 2,
        M=rows,
        N=keys,
        STAGES=stages,
        num_warps=warps,
        num_stages=stages,
    )
    return result
