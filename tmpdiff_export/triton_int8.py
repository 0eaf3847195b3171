"""The Triton kernel behind `torch_kernels.int8_linear`; importing it needs Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

# (rows, columns, depth of a tile, warps, stages) by the number of rows of the activation. Measured on an H100: 950 to
# 1030 TFLOP/s with the first at 4096 rows and more of FLUX.1, where cuBLAS's INT8 gave 630 to 830 and its BF16 670 to 760.
_TILES = ((1024, (256, 128, 128, 8, 3)), (128, (128, 128, 128, 8, 4)), (0, (64, 64, 128, 4, 4)))
_GROUP = 8  # row tiles that share the columns they read in the L2 cache


@triton.jit  # type: ignore[untyped-decorator]
def _int8_linear(  # type: ignore[no-untyped-def]
    codes,
    weight,
    result,
    scale,
    bias,
    rows,
    columns,
    depth,
    HAS_BIAS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, TILE_M)
    column_tiles = tl.cdiv(columns, TILE_N)
    first = tile // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    tile_m = first + (tile % (GROUP * column_tiles)) % height
    tile_n = (tile % (GROUP * column_tiles)) // height
    at_m = (tile_m * TILE_M + tl.arange(0, TILE_M)) % rows
    at_n = (tile_n * TILE_N + tl.arange(0, TILE_N)) % columns
    at_k = tl.arange(0, TILE_K)
    a = codes + at_m[:, None].to(tl.int64) * depth + at_k[None, :]
    b = weight + at_n[None, :].to(tl.int64) * depth + at_k[:, None]
    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
    for done in range(0, depth, TILE_K):
        if EVEN_DEPTH:
            sums = tl.dot(tl.load(a), tl.load(b), sums, out_dtype=tl.int32)
        else:
            left = at_k < depth - done
            sums = tl.dot(
                tl.load(a, mask=left[None, :], other=0),
                tl.load(b, mask=left[:, None], other=0),
                sums,
                out_dtype=tl.int32,
            )
        a += TILE_K
        b += TILE_K
    to_m = (tile_m * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    to_n = tile_n * TILE_N + tl.arange(0, TILE_N)
    values = sums.to(tl.float32) * tl.load(scale + to_n, mask=to_n < columns, other=0.0)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + to_n, mask=to_n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (to_m[:, None] < rows) & (to_n[None, :] < columns)
    tl.store(result + to_m[:, None] * columns + to_n[None, :], values.to(result.dtype.element_ty), mask=inside)


def launch(
    wrap: Callable[[Any], Any],
    codes: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    result: torch.Tensor,
) -> None:
    """Enqueues the kernel on the current stream; tensors as in `int8_linear`, an empty `bias` for none.

    Args:
        wrap: `torch.library.wrap_triton`, which lets compilers see the launch.
        result: [M, N], written.
    """
    rows, depth = codes.shape
    columns = weight.shape[0]
    tile_m, tile_n, tile_k, warps, stages = next(tile for least, tile in _TILES if rows >= least)
    wrap(_int8_linear)[(triton.cdiv(rows, tile_m) * triton.cdiv(columns, tile_n),)](
        codes,
        weight,
        result,
        scale,
        bias,
        rows,
        columns,
        depth,
        HAS_BIAS=bias.numel() > 0,
        EVEN_DEPTH=depth % tile_k == 0,
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_K=tile_k,
        GROUP=_GROUP,
        num_warps=warps,
        num_stages=stages,
    )
