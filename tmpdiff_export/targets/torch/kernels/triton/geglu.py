"""The Triton kernel behind `kernels.geglu.geglu`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

# Rows and columns of a program, and its warps: every thread reads 16 bytes at a time, several times at once.
_TILE = (4, 512, 4)


@triton.jit  # type: ignore[untyped-decorator]
def _geglu(  # type: ignore[no-untyped-def]
    data,
    code_scale,
    smoothing,
    result,
    rows,
    CODES: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROUND: tl.constexpr,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    source = data + row[:, None] * (2 * COLUMNS) + column[None, :]
    given = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + COLUMNS, mask=inside, other=0.0).to(tl.float32)
    # GELU is max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2. Of erfc, Abramowitz and Stegun 7.1.26, within 1.5e-7: a
    # polynomial of 1 / (1 + 0.3275911 z), times exp(-z z). Plain instructions for both, as in `triton.gelu_codes`.
    size = tl.abs(gate)
    share = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + 0.2316418882663604 * size], tl.float32, True, 1
    )
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [-0.7213475204444817 * gate * gate], tl.float32, True, 1
    )
    tail = 0.5307027145 * share - 0.7265760135
    tail = tail * share + 0.7107068705
    tail = tail * share - 0.142248368
    tail = tail * share + 0.127414796
    gelu = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL) - size * (share * power) * tail
    values = given * gelu
    if SMOOTH:
        factors = tl.load(smoothing + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        values *= factors[None, :]
    if CODES:
        values *= tl.div_rn(1.0, tl.load(code_scale))
        values = tl.clamp(values, LIMIT_LOW, LIMIT_HIGH, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
        values = (values + 12582912.0).to(tl.int32, bitcast=True)
    target = result + row[:, None] * COLUMNS + column[None, :]
    tl.store(target, values.to(result.dtype.element_ty), mask=inside)


@torch.library.triton_op("tmpdiff::geglu", mutates_args={})  # type: ignore[untyped-decorator]
def geglu_op(
    data: torch.Tensor,
    code_scale: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    smoothing: Optional[torch.Tensor],  # noqa: UP045
    limit_low: float,
    limit_high: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.geglu.geglu` of [M, 2 N] on a GPU, with the least and the largest code."""
    rows, columns = data.shape[0], data.shape[1] // 2
    result = torch.empty((rows, columns), device=data.device, dtype=dtype)
    tile_rows, block, warps = _TILE
    torch.library.wrap_triton(_geglu)[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, block))](
        data,
        data if code_scale is None else code_scale,
        data if smoothing is None else smoothing,
        result,
        rows,
        CODES=code_scale is not None,
        SMOOTH=smoothing is not None,
        ROUND=dtype is torch.int8,
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        COLUMNS=columns,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=warps,
    )
    return result
