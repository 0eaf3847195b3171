"""Group norm over channels-last data with SiLU and the codes of the convolution behind it, for the `torch` backend.

torch's own kernels want the channels first, and compilers read channels-last data in small pieces (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from tmpdiff_export.targets.torch.activations import CODE_LIMITS, static_codes

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.group_norm import group_norm_op


@dataclass(frozen=True, eq=False)
class Norm:
    """A group norm, and what is done to its result.

    Attributes:
        groups: number of groups.
        weight: [C].
        bias: [C].
        eps: added to variances.
        silu: whether SiLU follows.
    """

    groups: int
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    silu: bool


def group_norm(
    data: torch.Tensor,
    norm: Norm,
    added: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Group norm of `data + added`, computed in float32 and rounded once.

    Args:
        data: [B, H, W, C] in a 16-bit type or float32, contiguous.
        norm: what is computed, its tensors in that type.
        added: [B, C] in that type, or None.
        scale: float32 [], of codes; None for a result in the type of `data`.
        dtype: of codes, float8_e4m3fn or int8.

    Returns:
        [B, H, W, C] in `dtype`, or in the type of `data`.
    """
    if data.is_cuda:
        low, high = CODE_LIMITS[dtype] if dtype is not None else (0.0, 0.0)
        given = (norm.weight, norm.bias, norm.groups, norm.eps, norm.silu)
        return group_norm_op(data, added, *given, scale, low, high, dtype or data.dtype)
    wide = data.float() if added is None else data.float() + added.float()[:, None, None]
    normed = F.group_norm(wide.permute(0, 3, 1, 2), norm.groups, norm.weight.float(), norm.bias.float(), norm.eps)
    result = (F.silu(normed) if norm.silu else normed).permute(0, 2, 3, 1)
    if scale is None or dtype is None:
        return result.to(data.dtype).contiguous()
    return static_codes(result, scale, dtype).contiguous()
