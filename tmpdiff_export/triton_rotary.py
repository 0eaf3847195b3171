"""The Triton kernel behind `torch_rotary.norm_rotary`; importing it needs Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rotary(  # type: ignore[no-untyped-def]
    first,
    first_weight,
    second,
    second_weight,
    cos,
    sin,
    result,
    first_tokens,
    tokens,
    eps,
    factor,
    limit,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One token: all its heads are read once, in rows of `SIZE` that stay in registers."""
    token = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, LANES)
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
    data = data * tl.rsqrt(tl.sum(data * data, axis=1) / SIZE + eps)[:, None] * weight[None, :]
    pair = tl.arange(0, SIZE // 2) * 2
    turn = tl.load(cos + token * SIZE + pair)[None, :] * factor
    lean = tl.load(sin + token * SIZE + pair)[None, :] * factor
    real, imaginary = tl.split(tl.reshape(data, (LANES, SIZE // 2, 2)))
    turned = tl.join(real * turn - imaginary * lean, imaginary * turn + real * lean)
    turned = tl.clamp(tl.reshape(turned, (LANES, SIZE)), -limit, limit)
    target = result + (sample * tokens + token) * HEADS * SIZE
    tl.store(target + at, turned.to(result.dtype.element_ty), mask=inside)


def launch(
    wrap: Callable[[Any], Any],
    first: torch.Tensor,
    first_weight: torch.Tensor,
    second: torch.Tensor,
    second_weight: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    factor: float,
    result: torch.Tensor,
) -> None:
    """Enqueues the kernel on the current stream; arguments as in `norm_rotary`, all contiguous.

    Args:
        wrap: `torch.library.wrap_triton`, which lets compilers see the launch.
        result: [B, S1 + S2, heads, D], written.
    """
    batch, tokens, heads, size = result.shape
    wrap(_norm_rotary)[(tokens, batch)](
        first,
        first_weight,
        second,
        second_weight,
        *rotary,
        result,
        first.shape[1],
        tokens,
        eps,
        factor,
        torch.finfo(result.dtype).max,
        HEADS=heads,
        SIZE=size,
        LANES=triton.next_power_of_2(heads),
        num_warps=_WARPS,
    )
