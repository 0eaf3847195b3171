"""The Triton kernel behind `kernels.convolution.convolution_fp8`; importing it needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows, columns and depth of a tile, warps, stages: the best of six, or as good, at every shape of SDXL on an H200.
_TILE = (128, 128, 128, 8, 3)
_GROUP = 8  # row tiles that share the columns they read in the L2 cache


@triton.jit  # type: ignore[untyped-decorator]
def _convolution_fp8(  # type: ignore[no-untyped-def]
    codes,
    weight,
    scale,
    bias,
    result,
    rows,
    columns,
    channels,
    height,
    width,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of the product of pixels' windows and the weight: nine products, each of the picture shifted by a place."""
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, TILE_M)
    column_tiles = tl.cdiv(columns, TILE_N)
    first = tile // (GROUP * column_tiles) * GROUP
    breadth = min(row_tiles - first, GROUP)
    tile_m = first + (tile % (GROUP * column_tiles)) % breadth
    tile_n = (tile % (GROUP * column_tiles)) // breadth
    pixel = tile_m * TILE_M + tl.arange(0, TILE_M)
    column = tile_n * TILE_N + tl.arange(0, TILE_N)
    x, y = pixel % width, pixel // width % height
    depth = tl.arange(0, TILE_K)
    there = (column < columns)[:, None]
    source = codes + pixel[:, None].to(tl.int64) * channels + depth[None, :]
    factors = weight + column[:, None].to(tl.int64) * (9 * channels) + depth[None, :]
    blocks = tl.cdiv(channels, TILE_K)
    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for step in range(0, 9 * blocks):
        place = step // blocks
        start = step % blocks * TILE_K
        down, right = place // 3 - 1, place % 3 - 1
        left = (depth < channels - start)[None, :]
        shown = (x + right >= 0) & (x + right < width) & (y + down >= 0) & (y + down < height) & (pixel < rows)
        a = tl.load(source + (down * width + right) * channels + start, mask=shown[:, None] & left, other=0.0)
        b = tl.load(factors + place * channels + start, mask=there & left, other=0.0)
        sums = tl.dot(a, b.T, sums)
    values = sums * tl.load(scale) + tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    target = result + pixel[:, None].to(tl.int64) * columns + column[None, :]
    inside = (pixel < rows)[:, None] & (column < columns)[None, :]
    tl.store(target, values.to(result.dtype.element_ty), mask=inside)


@torch.library.triton_op("tmpdiff::convolution_fp8", mutates_args={})  # type: ignore[untyped-decorator]
def convolution_fp8_op(
    codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`kernels.convolution.convolution_fp8` on a GPU."""
    batch, height, width, channels = codes.shape
    rows, columns = batch * height * width, weight.shape[0]
    result = torch.empty((batch, height, width, columns), device=codes.device, dtype=dtype)
    tile_m, tile_n, tile_k, warps, stages = _TILE
    torch.library.wrap_triton(_convolution_fp8)[(triton.cdiv(rows, tile_m) * triton.cdiv(columns, tile_n),)](
        codes,
        weight,
        scale,
        bias,
        result,
        rows,
        columns,
        channels,
        height,
        width,
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_K=tile_k,
        GROUP=_GROUP,
        num_warps=warps,
        num_stages=stages,
    )
    return result
