"""Normalization of queries and keys, with FLUX.1's rotation, in one kernel, for the `torch` backend.

Inductor makes three to four kernels of them, whose reads of neighbouring pairs lie apart, and which took twice as long
(docs/results.md). Here a token is read once and written once.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.rotary import norm_rotary_op


def norm_rotary(
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMS norm over D of two runs of tokens, one after the other, then the rotation of neighbouring pairs.

    Computed in float32 and rounded once.

    Args:
        first: its data [B, S1, heads, D], contiguous, where S1 may be 0, and the weight [D] of its norm.
        second: the same, with S2.
        rotary: cosines and sines, float32 [S1 + S2, D], each number twice; or None: nothing is rotated.
        eps: of the norms.
        dtype: of the result; values beyond its range become its largest.
        scale: float32 [], what the result is divided by: the scale of codes; or None.

    Returns:
        [B, S1 + S2, heads, D] on the device of the data.
    """
    if first[0].is_cuda:
        return norm_rotary_op(*first, *second, *(rotary or (None, None)), eps, scale, dtype)
    parts = [F.rms_norm(data.float(), data.shape[-1:], weight.float(), eps) for data, weight in (first, second)]
    data = torch.cat(parts, dim=1)
    if rotary is not None:
        cos, sin = (table[None, :, None, :] for table in rotary)
        real, imaginary = data.unflatten(-1, (-1, 2)).unbind(-1)
        data = data * cos + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sin
    limit = torch.finfo(dtype).max
    factor = 1.0 if scale is None else 1.0 / scale
    return (data * factor).clamp(-limit, limit).to(dtype)
