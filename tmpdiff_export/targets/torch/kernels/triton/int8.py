"""The Triton kernels behind `kernels.int8.int8_linear`; importing it needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# (rows, columns, depth of a tile, warps, stages) by the number of rows of the activation, for the plain kernel.
_TILES = ((1024, (256, 128, 128, 8, 3)), (128, (128, 128, 128, 8, 4)), (0, (64, 64, 128, 4, 4)))
_GROUP = 8  # row tiles that share the columns they read in the L2 cache

# The persistent kernel, which lets the tensor memory accelerator fetch tiles: it took the products of a FLUX.1 step on
# an H100 from 61.2 to 57.6 ms (docs/results/gpu/earlier).
_PERSISTENT_TILE = (128, 256, 128, 8, 3)
_PERSISTENT_ROWS = 256  # from here on
_PERSISTENT_CAPABILITY = (9, 0)
_ALIGNMENT = 16  # bytes; of every row that the accelerator reads


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


@triton.jit  # type: ignore[untyped-decorator]
def _int8_linear_persistent(  # type: ignore[no-untyped-def]
    codes,
    weight,
    result,
    scale,
    bias,
    rows,
    columns,
    depth,
    HAS_BIAS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    a = tl.make_tensor_descriptor(codes, [rows, depth], [depth, 1], [TILE_M, TILE_K])
    b = tl.make_tensor_descriptor(weight, [columns, depth], [depth, 1], [TILE_N, TILE_K])
    row_tiles = tl.cdiv(rows, TILE_M)
    column_tiles = tl.cdiv(columns, TILE_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        height = min(row_tiles - first, GROUP)
        at_m = (first + (tile % (GROUP * column_tiles)) % height) * TILE_M
        at_n = ((tile % (GROUP * column_tiles)) // height) * TILE_N
        sums = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
        for at_k in range(0, depth, TILE_K):  # what lies outside reads as zero
            sums = tl.dot(a.load([at_m, at_k]), b.load([at_n, at_k]).T, sums, out_dtype=tl.int32)
        to_m = (at_m + tl.arange(0, TILE_M)).to(tl.int64)
        to_n = at_n + tl.arange(0, TILE_N)
        values = sums.to(tl.float32) * tl.load(scale + to_n, mask=to_n < columns, other=0.0)[None, :]
        if HAS_BIAS:
            values += tl.load(bias + to_n, mask=to_n < columns, other=0.0).to(tl.float32)[None, :]
        inside = (to_m[:, None] < rows) & (to_n[None, :] < columns)
        tl.store(result + to_m[:, None] * columns + to_n[None, :], values.to(result.dtype.element_ty), mask=inside)


@torch.library.triton_op("tmpdiff::int8_linear", mutates_args={})  # type: ignore[untyped-decorator]
def int8_linear_op(
    codes: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
    descriptors: bool,
) -> torch.Tensor:
    """`kernels.int8.int8_linear` on a GPU, an empty `bias` for none; whether kernels may make tensor descriptors."""
    result = torch.empty((codes.shape[0], weight.shape[0]), device=codes.device, dtype=dtype)
    _launch(codes, weight, scale, bias, result, descriptors)
    return result


def _launch(
    codes: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    result: torch.Tensor,
    descriptors: bool,
) -> None:
    """Enqueues the kernel that suits the shapes on the current stream."""
    rows, depth = codes.shape
    columns = weight.shape[0]
    has_bias = bias.numel() > 0
    arguments = (codes, weight, result, scale, bias, rows, columns, depth)
    properties = torch.cuda.get_device_properties(codes.device)
    capability = (properties.major, properties.minor)
    # Results of more than 16 bits would not fit its shared memory beside the tiles.
    fits = depth % _ALIGNMENT == 0 and result.element_size() <= 2
    if descriptors and rows >= _PERSISTENT_ROWS and fits and capability >= _PERSISTENT_CAPABILITY:
        triton.set_allocator(_descriptor_memory)
        tile_m, tile_n, tile_k, warps, stages = _PERSISTENT_TILE
        programs = min(properties.multi_processor_count, triton.cdiv(rows, tile_m) * triton.cdiv(columns, tile_n))
        torch.library.wrap_triton(_int8_linear_persistent)[(programs,)](
            *arguments,
            HAS_BIAS=has_bias,
            TILE_M=tile_m,
            TILE_N=tile_n,
            TILE_K=tile_k,
            GROUP=_GROUP,
            PROGRAMS=programs,
            num_warps=warps,
            num_stages=stages,
        )
        return
    tile_m, tile_n, tile_k, warps, stages = next(tile for least, tile in _TILES if rows >= least)
    torch.library.wrap_triton(_int8_linear)[(triton.cdiv(rows, tile_m) * triton.cdiv(columns, tile_n),)](
        *arguments,
        HAS_BIAS=has_bias,
        EVEN_DEPTH=depth % tile_k == 0,
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_K=tile_k,
        GROUP=_GROUP,
        num_warps=warps,
        num_stages=stages,
    )


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where the persistent kernel keeps its tensor descriptors."""
    return torch.empty(size, device="cuda", dtype=torch.int8)
