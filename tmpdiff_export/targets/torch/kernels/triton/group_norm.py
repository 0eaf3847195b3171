"""The Triton kernels behind `kernels.group_norm.group_norm`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

# Pixels and channels of a program that reads the data, and its warps.
_PIXELS = 256
_CHANNELS = 32
_WARPS = 8
_CHUNKS = 64  # of those pixels, that are put together at once


@triton.jit  # type: ignore[untyped-decorator]
def _moments(  # type: ignore[no-untyped-def]
    data,
    added,
    means,
    squares,
    pixels,
    channels,
    ADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of some pixels and channels, per channel: the mean, and the sum of the squares of distances to it."""
    chunk = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    pixel = chunk * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < channels
    inside = (pixel < pixels)[:, None] & here[None, :]
    at = (sample * pixels + pixel[:, None]) * channels + channel[None, :]
    values = tl.load(data + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        values += tl.load(added + sample * channels + channel, mask=here, other=0.0).to(tl.float32)[None, :]
        values = tl.where(inside, values, 0.0)
    count = min(pixels - chunk * PIXELS, PIXELS)
    mean = tl.sum(values, axis=0) / count
    apart = tl.where(inside, values - mean[None, :], 0.0)
    target = (sample * tl.num_programs(0) + chunk) * channels + channel
    tl.store(means + target, mean, mask=here)
    tl.store(squares + target, tl.sum(apart * apart, axis=0), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _factors(  # type: ignore[no-untyped-def]
    means,
    squares,
    added,
    weight,
    bias,
    factors,
    pixels,
    channels,
    chunks,
    EPS: tl.constexpr,
    ADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of a group of `SIZE` channels: what a value is multiplied by, and what is added then, per channel."""
    sample = tl.program_id(1).to(tl.int64)
    offset = tl.arange(0, WIDTH)
    channel = tl.program_id(0) * SIZE + offset
    here = offset < SIZE
    source = sample * chunks * channels + channel[None, :]
    total = 0.0
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & here[None, :]
        count = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)[:, None]
        mean = tl.load(means + source + chunk[:, None] * channels, mask=inside, other=0.0)
        total += tl.sum(tl.where(inside, mean * count, 0.0))
    center = total / (SIZE * pixels)
    spread = 0.0
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & here[None, :]
        count = tl.minimum(pixels - chunk * PIXELS, PIXELS).to(tl.float32)[:, None]
        apart = tl.load(means + source + chunk[:, None] * channels, mask=inside, other=0.0) - center
        within = tl.load(squares + source + chunk[:, None] * channels, mask=inside, other=0.0)
        spread += tl.sum(tl.where(inside, within + apart * apart * count, 0.0))
    factor = tl.rsqrt(spread / (SIZE * pixels) + EPS) * tl.load(weight + channel, mask=here, other=0.0).to(tl.float32)
    if ADDED:
        center -= tl.load(added + sample * channels + channel, mask=here, other=0.0).to(tl.float32)
    tl.store(factors + sample * 2 * channels + channel, factor, mask=here)
    shift = tl.load(bias + channel, mask=here, other=0.0).to(tl.float32) - center * factor
    tl.store(factors + (sample * 2 + 1) * channels + channel, shift, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _apply(  # type: ignore[no-untyped-def]
    data,
    factors,
    scale,
    result,
    pixels,
    channels,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    SILU: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The result of some pixels and channels."""
    sample = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < channels
    inside = (pixel < pixels)[:, None] & here[None, :]
    at = (sample * pixels + pixel[:, None]) * channels + channel[None, :]
    factor = tl.load(factors + sample * 2 * channels + channel, mask=here, other=0.0)
    shift = tl.load(factors + (sample * 2 + 1) * channels + channel, mask=here, other=0.0)
    values = tl.load(data + at, mask=inside, other=0.0).to(tl.float32) * factor[None, :] + shift[None, :]
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    if CODES:
        values = tl.clamp(values * tl.div_rn(1.0, tl.load(scale)), LIMIT_LOW, LIMIT_HIGH, tl.PropagateNan.ALL)
    if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
        values = (values + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(result + at, values.to(result.dtype.element_ty), mask=inside)


@torch.library.triton_op("tmpdiff::group_norm", mutates_args={})  # type: ignore[untyped-decorator]
def group_norm_op(
    data: torch.Tensor,
    added: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    scale: Optional[torch.Tensor],  # noqa: UP045
    limit_low: float,
    limit_high: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.group_norm.group_norm` on a GPU, with the least and the largest code."""
    batch, height, width, channels = data.shape
    pixels, size = height * width, channels // groups
    chunks = triton.cdiv(pixels, _PIXELS)
    single = torch.float32
    means, squares = (torch.empty((batch, chunks, channels), device=data.device, dtype=single) for _ in range(2))
    factors = torch.empty((batch, 2, channels), device=data.device, dtype=single)
    result = torch.empty(data.shape, device=data.device, dtype=dtype)
    grid = (chunks, triton.cdiv(channels, _CHANNELS), batch)
    more = data if added is None else added
    torch.library.wrap_triton(_moments)[grid](
        data,
        more,
        means,
        squares,
        pixels,
        channels,
        ADDED=added is not None,
        PIXELS=_PIXELS,
        CHANNELS=_CHANNELS,
        num_warps=_WARPS,
    )
    torch.library.wrap_triton(_factors)[(groups, batch)](
        means,
        squares,
        more,
        weight,
        bias,
        factors,
        pixels,
        channels,
        chunks,
        EPS=eps,
        ADDED=added is not None,
        PIXELS=_PIXELS,
        SIZE=size,
        WIDTH=triton.next_power_of_2(size),
        CHUNKS=_CHUNKS,
        num_warps=4,
    )
    torch.library.wrap_triton(_apply)[grid](
        data,
        factors,
        data if scale is None else scale,
        result,
        pixels,
        channels,
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        SILU=silu,
        CODES=scale is not None,
        ROUND=dtype is torch.int8,
        PIXELS=_PIXELS,
        CHANNELS=_CHANNELS,
        num_warps=_WARPS,
    )
    return result
