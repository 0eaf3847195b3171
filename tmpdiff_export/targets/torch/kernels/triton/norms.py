"""The Triton kernel behind `kernels.norms`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

_COLUMNS_OF_A_WARP = 2048  # few warps: their sums are short, and many rows wait for memory beside each other
_MOST_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    data,
    before,
    branch,
    table,
    shifts,
    code_scale,
    smoothing,
    total,
    result,
    tokens,
    before_tokens,
    data_sample,
    before_sample,
    EPS: tl.constexpr,  # a float argument may come as float64, and everything with it
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    AFFINE: tl.constexpr,
    BEFORE: tl.constexpr,
    BRANCH: tl.constexpr,
    GATED: tl.constexpr,
    CODES: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROUND: tl.constexpr,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row; samples have `ROWS` rows of the table each, 0 where all have the same factors; `_sample` are strides."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    own = sample * ROWS * COLUMNS + column
    source = data + sample * data_sample + (token - before_tokens) * COLUMNS
    if BEFORE:  # noqa: SIM102  (known when it is compiled)
        if token < before_tokens:
            source = before + sample * before_sample + token * COLUMNS
    given = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        more = tl.load(branch + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            more *= tl.load(table + own + GATE * COLUMNS, mask=inside, other=0.0).to(tl.float32)
        rounded = (given + more).to(total.dtype.element_ty)
        tl.store(total + row * COLUMNS + column, rounded, mask=inside)
        given = rounded.to(tl.float32)
    mean = tl.sum(given, axis=0) / COLUMNS
    centred = tl.where(inside, given - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / COLUMNS + EPS)
    factor = tl.load(table + own + SCALE * COLUMNS, mask=inside, other=0.0).to(tl.float32)
    if not AFFINE:
        factor += 1.0
    added = tl.load(shifts + own + SHIFT * COLUMNS, mask=inside, other=0.0).to(tl.float32)
    values = centred * inverse * factor + added
    if SMOOTH:
        values *= tl.load(smoothing + column, mask=inside, other=0.0).to(tl.float32)
    if CODES:
        values *= tl.div_rn(1.0, tl.load(code_scale))
        values = tl.clamp(values, LIMIT_LOW, LIMIT_HIGH, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
        values = (values + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(result + row * COLUMNS + column, values.to(result.dtype.element_ty), mask=inside)


@torch.library.triton_op("tmpdiff::norm_modulated", mutates_args={})  # type: ignore[untyped-decorator]
def norm_op(
    data: torch.Tensor,
    before: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    branch: Optional[torch.Tensor],  # noqa: UP045
    table: torch.Tensor,
    bias: Optional[torch.Tensor],  # noqa: UP045
    shift: int,
    scale: int,
    gate: Optional[int],  # noqa: UP045
    eps: float,
    code_scale: Optional[torch.Tensor],  # noqa: UP045
    smoothing: Optional[torch.Tensor],  # noqa: UP045
    limit_low: float,
    limit_high: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.norms.add_norm_modulated` on a GPU, with the least and the largest code; no sum without a branch.

    With a bias, `table` is the weight [C].
    """
    batch, own_tokens, columns = data.shape
    before_tokens = 0 if before is None else before.shape[1]
    tokens = own_tokens + before_tokens
    result = torch.empty((batch, tokens, columns), device=data.device, dtype=dtype)
    sum_shape = (0,) if branch is None else (batch, tokens, columns)
    total = torch.empty(sum_shape, device=data.device, dtype=data.dtype)
    block = triton.next_power_of_2(columns)
    torch.library.wrap_triton(_norm)[(batch * tokens,)](
        data,
        data if before is None else before,
        data if branch is None else branch,
        table,
        table if bias is None else bias,
        table if code_scale is None else code_scale,
        table if smoothing is None else smoothing,
        total,
        result,
        tokens,
        before_tokens,
        data.stride(0),
        0 if before is None else before.stride(0),
        EPS=eps,
        SHIFT=shift,
        SCALE=scale,
        GATE=0 if gate is None else gate,
        ROWS=table.shape[1] if bias is None else 0,
        AFFINE=bias is not None,
        BEFORE=before is not None,
        BRANCH=branch is not None,
        GATED=gate is not None,
        CODES=code_scale is not None,
        SMOOTH=smoothing is not None,
        ROUND=dtype is torch.int8,
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=min(max(block // _COLUMNS_OF_A_WARP, 1), _MOST_WARPS),
    )
    return result, total
