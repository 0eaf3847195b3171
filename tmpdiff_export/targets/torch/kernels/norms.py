"""Layer norm with the modulation behind it, a residual before it and codes of the result, in one kernel.

Inductor reads every row two or three times for it (docs/torch.md). Here a row is read once and stays in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from tmpdiff_export.targets.torch.activations import CODE_LIMITS, static_codes

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


class Codes(NamedTuple):
    """Codes that the layers behind a norm take.

    Attributes:
        dtype: float8_e4m3fn or int8.
        scale: float32 [].
        smoothing: [C] that multiplies before the codes are made, or None.
    """

    dtype: torch.dtype
    scale: torch.Tensor
    smoothing: torch.Tensor | None


def norm_modulated(data: torch.Tensor, modulation: Modulation, eps: float, codes: Codes | None) -> torch.Tensor:
    """Layer norm over C and modulation, computed in float32 and rounded once.

    Args:
        data: [B, S, C].
        modulation: see there; its gate is not read.
        eps: of the norm.
        codes: that are made of the result, or None.

    Returns:
        [B, S, C], codes or in the dtype of `data`.
    """
    if data.is_cuda:
        return norm_op(data.contiguous(), None, *_numbers(modulation._replace(gate=None)), eps, *_given(data, codes))[0]
    return _norm(data, modulation, eps, codes)


def add_norm_modulated(
    data: torch.Tensor, branch: torch.Tensor, modulation: Modulation, eps: float, codes: Codes | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_modulated` of `data + gate * branch`, rounded once, and that sum.

    Args:
        data: [B, S, C].
        branch: as `data`.
        modulation: see there.
        eps: of the norm.
        codes: that are made of the result, or None.

    Returns:
        [B, S, C] as `norm_modulated` returns it, and the sum in the dtype of `data`.
    """
    if data.is_cuda:
        result, total = norm_op(
            data.contiguous(), branch.contiguous(), *_numbers(modulation), eps, *_given(data, codes)
        )
        return result, total
    more = branch.float()
    if modulation.gate is not None:
        more = more * modulation.table[:, modulation.gate, None].float()
    total = (data.float() + more).to(data.dtype)
    return _norm(total, modulation, eps, codes), total


def _norm(data: torch.Tensor, modulation: Modulation, eps: float, codes: Codes | None) -> torch.Tensor:
    table, shift, scale, _ = modulation
    rows = F.layer_norm(data.float(), data.shape[-1:], eps=eps)
    rows = rows * (1.0 + table[:, scale, None].float()) + table[:, shift, None].float()
    if codes is None:
        return rows.to(data.dtype)
    return static_codes(rows if codes.smoothing is None else rows * codes.smoothing.float(), codes.scale, codes.dtype)


def _numbers(modulation: Modulation) -> tuple[torch.Tensor, int, int, int | None]:
    return modulation.table.contiguous(), modulation.shift, modulation.scale, modulation.gate


def _given(
    data: torch.Tensor, codes: Codes | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, float, float, torch.dtype]:
    if codes is None:
        return None, None, 0.0, 0.0, data.dtype
    return codes.scale, codes.smoothing, *CODE_LIMITS[codes.dtype], codes.dtype
