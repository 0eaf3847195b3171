"""Layer norm with what follows it (modulation, or weight and bias), a residual before it and codes, in one kernel.

Inductor reads every row two or three times for it (docs/torch.md). Here a row is read once and stays in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from tmpdiff_export.targets.torch.activations import Codes, code_arguments, coded

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.norms import norm_op


class Modulation(NamedTuple):
    """What a normed row is multiplied by and added to: norm * (1 + scale) + shift.

    Attributes:
        table: [B, N, C], contiguous, in a 16-bit type or float32.
        shift: index in 0 to N - 1.
        scale: as `shift`.
        gate: as `shift`, what a branch is multiplied by before it is added; None for 1.
    """

    table: torch.Tensor
    shift: int
    scale: int
    gate: int | None = None


class Affine(NamedTuple):
    """A norm's own parameters: norm * weight + bias.

    Attributes:
        weight: [C], contiguous, in a 16-bit type or float32.
        bias: as `weight`.
    """

    weight: torch.Tensor
    bias: torch.Tensor


def norm_modulated(
    data: torch.Tensor,
    change: Modulation | Affine,
    eps: float,
    codes: Codes | None,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Layer norm over C and what follows it, computed in float32 and rounded once.

    Args:
        data: [B, S, C].
        change: what follows; the gate of a modulation is not read.
        eps: of the norm.
        codes: that are made of the result, or None.
        before: [B, S1, C], whose tokens come before those of `data`; or None.

    Returns:
        [B, S1 + S, C], codes or in the dtype of `data`.
    """
    if data.is_cuda:
        ungated = change._replace(gate=None) if isinstance(change, Modulation) else change
        tensors = _whole(data), None if before is None else _whole(before), None
        return norm_op(*tensors, *_factors(ungated), eps, *code_arguments(codes, data.dtype))[0]
    return _norm(data if before is None else torch.cat([before, data], dim=1), change, eps, codes)


def add_norm_modulated(
    data: torch.Tensor, branch: torch.Tensor, change: Modulation | Affine, eps: float, codes: Codes | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_modulated` of `data + gate * branch`, rounded once, and that sum.

    Args:
        data: [B, S, C].
        branch: as `data`.
        change: what follows; the gate is 1 where it has none.
        eps: of the norm.
        codes: that are made of the result, or None.

    Returns:
        [B, S, C] as `norm_modulated` returns it, and the sum in the dtype of `data`.
    """
    if data.is_cuda:
        tensors = _whole(data), None, branch.contiguous()
        result, total = norm_op(*tensors, *_factors(change), eps, *code_arguments(codes, data.dtype))
        return result, total
    more = branch.float()
    if isinstance(change, Modulation) and change.gate is not None:
        more = more * change.table[:, change.gate, None].float()
    total = (data.float() + more).to(data.dtype)
    return _norm(total, change, eps, codes), total


def _whole(data: torch.Tensor) -> torch.Tensor:
    """[B, S, C] whose samples may lie apart, but not their tokens."""
    return data if data.stride()[1:] == (data.shape[2], 1) else data.contiguous()


def _norm(data: torch.Tensor, change: Modulation | Affine, eps: float, codes: Codes | None) -> torch.Tensor:
    rows = F.layer_norm(data.float(), data.shape[-1:], eps=eps)
    if isinstance(change, Affine):
        rows = rows * change.weight.float() + change.bias.float()
    else:
        table, shift, scale, _ = change
        rows = rows * (1.0 + table[:, scale, None].float()) + table[:, shift, None].float()
    return coded(rows, codes, data.dtype)


def _factors(change: Modulation | Affine) -> tuple[torch.Tensor, torch.Tensor | None, int, int, int | None]:
    """As `norm_op` takes them: a table or the weight, the bias if it is that, shift, scale and gate."""
    if isinstance(change, Affine):
        return change.weight, change.bias, 0, 0, None
    return change.table.contiguous(), None, change.shift, change.scale, change.gate
