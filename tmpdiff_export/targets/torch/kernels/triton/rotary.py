"""The Triton kernel behind `kernels.rotary.norm_rotary`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

# Small programs: what takes time is waiting for memory, and many of them wait beside each other.
_LANES = 8  # heads of a token in one program
_WARPS = 1


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rotary(  # type: ignore[no-untyped-def]
    first,
    first_weight,
    second,
    second_weight,
    cos,
    sin,
    scale,
    result,
    first_tokens,
    tokens,
    EPS: tl.constexpr,  # a float argument may come as float64, and everything with it
    ROTARY: tl.constexpr,
    SCALED: tl.constexpr,
    LIMIT: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Some heads of one token: each is read once, as a row of `SIZE` that stays in registers."""
    token = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * LANES + tl.arange(0, LANES)
    column = tl.arange(0, SIZE)
    at = head[:, None] * SIZE + column[None, :]
    inside = (head < HEADS)[:, None]
    if token < first_tokens:
        source = first + (sample * first_tokens + token) * HEADS * SIZE
        weight = tl.load(first_weight + column).to(tl.float32)
    else:
        source = second + (sample * (tokens - first_tokens) + token - first_tokens) * HEADS * SIZE
        weight = tl.load(second_weight + column).to(tl.float32)
    data = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    data = data * tl.rsqrt(tl.sum(data * data, axis=1) / SIZE + EPS)[:, None] * weight[None, :]
    factor = 1.0 / tl.load(scale) if SCALED else 1.0
    if ROTARY:
        pair = tl.arange(0, SIZE // 2) * 2
        turn = tl.load(cos + token * SIZE + pair)[None, :] * factor
        lean = tl.load(sin + token * SIZE + pair)[None, :] * factor
        real, imaginary = tl.split(tl.reshape(data, (LANES, SIZE // 2, 2)))
        turned = tl.join(real * turn - imaginary * lean, imaginary * turn + real * lean)
        turned = tl.reshape(turned, (LANES, SIZE))
    else:
        turned = data * factor
    if LIMIT is not None:
        turned = tl.clamp(turned, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    target = result + (sample * tokens + token) * HEADS * SIZE
    tl.store(target + at, turned.to(result.dtype.element_ty), mask=inside)


@torch.library.triton_op("tmpdiff::norm_rotary", mutates_args={})  # type: ignore[untyped-decorator]
def norm_rotary_op(
    first: torch.Tensor,
    first_weight: torch.Tensor,
    second: torch.Tensor,
    second_weight: torch.Tensor,
    cos: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    sin: Optional[torch.Tensor],  # noqa: UP045
    eps: float,
    scale: Optional[torch.Tensor],  # noqa: UP045
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.rotary.norm_rotary` on a GPU."""
    batch, _, heads, size = second.shape
    tokens = first.shape[1] + second.shape[1]
    result = torch.empty((batch, tokens, heads, size), device=second.device, dtype=dtype)
    lanes = min(_LANES, triton.next_power_of_2(heads))
    torch.library.wrap_triton(_norm_rotary)[(tokens, triton.cdiv(heads, lanes), batch)](
        first,
        first_weight,
        second,
        second_weight,
        second if cos is None else cos,
        second if sin is None else sin,
        second if scale is None else scale,
        result,
        first.shape[1],
        tokens,
        EPS=eps,
        ROTARY=cos is not None,
        SCALED=scale is not None,
        LIMIT=None if dtype is torch.bfloat16 else torch.finfo(dtype).max,
        HEADS=heads,
        SIZE=size,
        LANES=lanes,
        num_warps=_WARPS,
    )
    return result
