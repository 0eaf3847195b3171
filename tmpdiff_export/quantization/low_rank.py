"""NVFP4 beside a 16-bit branch of low rank, as SVDQuant (arXiv 2411.05007): weight = up down + residual.

The branch takes the directions in which the (smoothed) weight is largest, the residual is quantized. The error of
quantized activations reaches the output through the residual alone, so a smaller residual makes both errors smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from engines.precision import BITS_PER_WEIGHT, Precision
from tmpdiff_export.quantization import nvfp4

ROUNDS = 5
"""Of finding the branch anew with what rounding has left over: .7 dB on the embedded pipeline, where 10 give .1 more."""
# Of the first branch; random start, so that it has to be found. Later ones begin at the one before.
_FIRST_ITERATIONS, _LATER_ITERATIONS = 6, 1
_SEED = 0
_FP16_MAX = torch.finfo(torch.float16).max
_VALUES_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class LowRank:
    """A branch of a linear layer: `up @ down` is added to the weight that its codes stand for.

    Attributes:
        up: float16 [N, r].
        down: float16 [r, K].
    """

    up: torch.Tensor
    down: torch.Tensor

    def weight(self) -> torch.Tensor:
        """What it adds, float32 [N, K]."""
        return self.up.float() @ self.down.float()


@dataclass(frozen=True, eq=False)
class SplitWeight:
    """A weight as codes beside a branch.

    Attributes:
        branch: beside the codes.
        codes: of the residual, as `nvfp4.quantize_blocks` has them.
        block_scale: the same.
        scale: tensor scale of the residual, float32 [].
    """

    branch: LowRank
    codes: torch.Tensor
    block_scale: torch.Tensor
    scale: torch.Tensor


def rank_within(rank: int, shape: Iterable[int]) -> int:
    """The rank that a branch of a weight [N, K] has: no larger than either side."""
    return min(rank, *shape)


def split(weight: torch.Tensor, rank: int, shared_amax: float | None) -> SplitWeight:
    """Finds the branch and the codes of what it leaves.

    Each round takes the directions of largest magnitude of the weight less what the codes stand for, by subspace
    iteration from seeded noise, and rounds what is left to new codes; the round of least squared error is kept. Codes are
    those of the residual to the branch as it is stored. The same bytes come out on the same machine.

    Args:
        weight: (smoothed) float32 [N, K], on any device; not changed. On "meta" only shapes and dtypes come out.
        rank: of the branch.
        shared_amax: of `LayerRange.shared_weight_amax`; None for the residual's own.

    Raises:
        ValueError: K is not a multiple of 16.
    """
    width, depth = weight.shape
    rank = rank_within(rank, weight.shape)
    device = weight.device
    if device.type == "meta":
        halves = (torch.empty(size, dtype=torch.float16, device=device) for size in ((width, rank), (rank, depth)))
        scale = torch.empty((), device=device)
        return SplitWeight(LowRank(*halves), *nvfp4.quantize_blocks(weight, scale), scale)
    noise = torch.randn(depth, rank, generator=torch.Generator().manual_seed(_SEED))
    basis = torch.linalg.qr(weight @ noise.to(device)).Q
    best, least = None, math.inf
    wanted = weight.clone()
    for index in range(ROUNDS):
        for _ in range(_LATER_ITERATIONS if index else _FIRST_ITERATIONS):
            basis = torch.linalg.qr(wanted @ torch.linalg.qr(wanted.T @ basis).Q).Q
        branch = _stored(basis, basis.T @ wanted)
        amax = _residual_amax(weight, branch) if shared_amax is None else shared_amax
        made, error = _rounded(weight, branch, nvfp4.tensor_scale(amax).to(device), wanted)
        if best is None or error < least:
            best, least = made, error
    assert best is not None
    return best


def share_of_fp8(shapes: Iterable[tuple[int, int]], rank: int) -> float:
    """What branches of a rank take, over what these layers would take more as FP8 than as NVFP4; 0 without branches.

    Args:
        shapes: of the weights, [N, K].
        rank: of the branches, 0 for none.
    """
    taken = more = 0.0
    for width, depth in shapes:
        taken += 16 * rank_within(rank, (width, depth)) * (width + depth)
        more += (BITS_PER_WEIGHT[Precision.FP8] - BITS_PER_WEIGHT[Precision.NVFP4]) * width * depth
    return taken / more if more else 0.0


def price_db(share: float) -> float:
    """What branches have to gain to be worth their bytes: those would leave `share` of the layers in FP8.

    FP8's error is nothing beside NVFP4's, and errors of layers add up, so that 1 - `share` of the squared error would
    be left; infinite where FP8 would take no more bytes.
    """
    return 10 * math.log10(1 / (1 - share)) if share < 1 else math.inf


def _rounded(
    weight: torch.Tensor, branch: LowRank, scale: torch.Tensor, wanted: torch.Tensor
) -> tuple[SplitWeight, float]:
    """The codes of what a branch leaves, and their squared error; `wanted` becomes the weight less what they stand for."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    block_scale = weight.new_empty((len(weight), weight.shape[1] // nvfp4.BLOCK_SIZE), dtype=torch.float8_e4m3fn)
    error = torch.zeros((), dtype=torch.float64, device=weight.device)
    for part, residual in _residuals(weight, branch):
        codes[part], block_scale[part] = nvfp4.quantize_blocks(residual, scale)
        rounded = nvfp4.dequantize(codes[part], block_scale[part], scale)
        error += residual.sub_(rounded).square_().sum()
        wanted[part] = weight[part] - rounded
    return SplitWeight(branch, codes, block_scale, scale), float(error)


def _residual_amax(weight: torch.Tensor, branch: LowRank) -> torch.Tensor:
    return torch.stack([residual.abs().max() for _, residual in _residuals(weight, branch)]).max()


def _residuals(weight: torch.Tensor, branch: LowRank) -> Iterator[tuple[slice, torch.Tensor]]:
    """What a branch leaves of a weight, some rows at a time: rounding takes several tensors of that size."""
    down, rows = branch.down.float(), max(1, _VALUES_AT_ONCE // weight.shape[1])
    for begin in range(0, len(weight), rows):
        part = slice(begin, begin + rows)
        yield part, weight[part] - branch.up[part].float() @ down


def _stored(basis: torch.Tensor, down: torch.Tensor) -> LowRank:
    """The branch as it is stored, of a basis [N, r] and what is read of it [r, K].

    Between the two products nothing is larger than the layer's largest output: FP16 does not overflow there first.
    """
    factor = math.sqrt(len(basis))
    return LowRank((basis * factor).half(), (down / factor).clamp_(-_FP16_MAX, _FP16_MAX).half())
