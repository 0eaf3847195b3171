"""The Triton kernel behind `kernels.gelu_codes.gelu_codes`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # columns of a program
_WARPS = 1


@triton.jit  # type: ignore[untyped-decorator]
def _gelu_codes(  # type: ignore[no-untyped-def]
    first,
    first_scale,
    second,
    scale,
    smoothing,
    result,
    first_columns,
    second_columns,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    ROUND: tl.constexpr,
    SMOOTH: tl.constexpr,
    FIRST_SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of a row, all of them of one of the two tensors."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    first_blocks = tl.cdiv(first_columns, BLOCK)
    if block < first_blocks:
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < first_columns
        data = tl.load(first + row * first_columns + column, mask=inside, other=0.0).to(tl.float32)
        if FIRST_SCALED:
            data *= tl.load(first_scale)
    else:
        at = (block - first_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = at < second_columns
        given = tl.load(second + row * second_columns + at, mask=inside, other=0.0).to(tl.float32)
        # x / (1 + exp(-2 z)) of `kernels.gelu_codes.tanh_gelu`, its constants times -log2(e); the plain instructions,
        # because what Triton makes of exp2 and of a division also looks after numbers that are as good as zero here.
        power = given * (-2.302208198144325 - 0.1029432395800235 * given * given)
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, True, 1)
        share = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1)
        data = given * share
        column = at + first_columns
    if SMOOTH:
        data = data * tl.load(smoothing + column, mask=inside, other=0.0).to(tl.float32)
    data = data * tl.div_rn(1.0, tl.load(scale))
    data = tl.clamp(data, LIMIT_LOW, LIMIT_HIGH, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
        data = (data + 12582912.0).to(tl.int32, bitcast=True)
    target = result + row * (first_columns + second_columns)
    tl.store(target + column, data.to(result.dtype.element_ty), mask=inside)


@torch.library.triton_op("tmpdiff::gelu_codes", mutates_args={})  # type: ignore[untyped-decorator]
def gelu_codes_op(
    first: torch.Tensor,
    first_scale: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    second: torch.Tensor,
    scale: torch.Tensor,
    smoothing: torch.Tensor,
    limit_low: float,
    limit_high: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.gelu_codes.gelu_codes` on a GPU, with the least and the largest code; an empty `smoothing` for none."""
    rows, columns = second.shape[0], first.shape[1] + second.shape[1]
    result = torch.empty((rows, columns), device=second.device, dtype=dtype)
    blocks = triton.cdiv(first.shape[1], _BLOCK) + triton.cdiv(second.shape[1], _BLOCK)
    torch.library.wrap_triton(_gelu_codes)[(rows, blocks)](
        first,
        scale if first_scale is None else first_scale,
        second,
        scale,
        smoothing,
        result,
        first.shape[1],
        second.shape[1],
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        ROUND=dtype is torch.int8,
        SMOOTH=smoothing.numel() > 0,
        FIRST_SCALED=first_scale is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return result
