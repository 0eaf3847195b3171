"""The Triton kernel behind `kernels.glu_convolution.glu_convolution`; importing it needs Triton."""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

# Columns of the picture, channels, and rows of a program; warps.
_COLUMNS = 8
_CHANNELS = 64
_ROWS = 8
_WARPS = 4


@triton.jit
def _silu(data):  # type: ignore[no-untyped-def]
    return data / (1.0 + tl.exp(-data))


@triton.jit
def _window(weight, here):  # type: ignore[no-untyped-def]
    """The nine weights of some channels, row by row."""
    return (
        tl.load(weight, mask=here, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 1, mask=here, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 2, mask=here, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 3, mask=here, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 4, mask=here, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 5, mask=here, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 6, mask=here, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 7, mask=here, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 8, mask=here, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def _glu_convolution(  # type: ignore[no-untyped-def]
    data,
    weight,
    bias,
    scale,
    result,
    height,
    width,
    channels,
    LIMIT_LOW: tl.constexpr,
    LIMIT_HIGH: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`ROWS` rows of some columns and channels: a row of the data is read once, and counts for three of the result."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    strips = tl.cdiv(width, COLUMNS)
    column = (tl.program_id(1) % strips) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) // strips) * ROWS
    sample = tl.program_id(2).to(tl.int64)
    here = channel < channels
    source = data + sample * height * width * 2 * channels
    target = result + sample * height * width * channels
    factor = tl.div_rn(1.0, tl.load(scale)) if CODES else 1.0
    own, other = _window(weight + channel * 9, here), _window(weight + (channels + channel) * 9, here)
    own_bias = tl.load(bias + channel, mask=here, other=0.0).to(tl.float32)[None, :]
    other_bias = tl.load(bias + channels + channel, mask=here, other=0.0).to(tl.float32)[None, :]
    zeros = tl.zeros((COLUMNS, CHANNELS), dtype=tl.float32)
    # Of the rows before, at and behind the row that is read: value and gate.
    before_value, before_gate, at_value, at_gate = zeros, zeros, zeros, zeros
    for step in range(ROWS + 2):
        line = row + step - 1
        next_value, next_gate = zeros, zeros
        for shift in tl.static_range(3):
            place = column + (shift - 1)
            inside = ((line >= 0) & (line < height) & (place >= 0) & (place < width))[:, None] & here[None, :]
            start = source + (line * width + place)[:, None] * (2 * channels) + channel[None, :]
            value = _silu(tl.load(start, mask=inside, other=0.0).to(tl.float32))
            gate = _silu(tl.load(start + channels, mask=inside, other=0.0).to(tl.float32))
            # The row is the lowest of the window around the row before it, and so on.
            before_value += value * own[6 + shift]
            before_gate += gate * other[6 + shift]
            at_value += value * own[3 + shift]
            at_gate += gate * other[3 + shift]
            next_value += value * own[shift]
            next_gate += gate * other[shift]
        if step >= 2:
            made = (before_value + own_bias) * _silu(before_gate + other_bias)
            if CODES:
                made = tl.clamp(made * factor, LIMIT_LOW, LIMIT_HIGH, propagate_nan=tl.PropagateNan.ALL)
            if ROUND:  # to even: 1.5 2^23 leaves no bits behind the point, and the code in the lowest byte
                made = (made + 12582912.0).to(tl.int32, bitcast=True)
            written = (line - 1 < height) & (column < width)
            at = ((line - 1) * width + column)[:, None] * channels + channel[None, :]
            tl.store(target + at, made.to(result.dtype.element_ty), mask=written[:, None] & here[None, :])
        before_value, before_gate, at_value, at_gate = at_value, at_gate, next_value, next_gate


@torch.library.triton_op("tmpdiff::glu_convolution", mutates_args={})  # type: ignore[untyped-decorator]
def glu_convolution_op(
    data: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: Optional[torch.Tensor],  # noqa: UP045  (torch's schemas know no other form)
    limit_low: float,
    limit_high: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.glu_convolution.glu_convolution` on a GPU, with the least and the largest code."""
    batch, height, width, channels = data.shape[0], data.shape[1], data.shape[2], data.shape[3] // 2
    result = torch.empty((batch, height, width, channels), device=data.device, dtype=dtype)
    strips = triton.cdiv(width, _COLUMNS) * triton.cdiv(height, _ROWS)
    torch.library.wrap_triton(_glu_convolution)[(triton.cdiv(channels, _CHANNELS), strips, batch)](
        data,
        weight,
        bias,
        bias if scale is None else scale,
        result,
        height,
        width,
        channels,
        LIMIT_LOW=limit_low,
        LIMIT_HIGH=limit_high,
        CODES=scale is not None,
        ROUND=dtype is torch.int8,
        COLUMNS=_COLUMNS,
        CHANNELS=_CHANNELS,
        ROWS=_ROWS,
        num_warps=_WARPS,
    )
    return result
