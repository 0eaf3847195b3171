"""GEGLU, and codes of its result, in one kernel for the `torch` backend.

With a compiler's error function it takes twice the time of its reads and writes.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tmpdiff_export.targets.torch.activations import Codes, code_arguments, coded

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.geglu import geglu_op


def geglu(data: torch.Tensor, codes: Codes | None) -> torch.Tensor:
    """The first half of every row times GELU (with the error function) of the second, rounded once.

    Args:
        data: [..., 2 N] in a 16-bit type or float32.
        codes: that are made of the result, or None.

    Returns:
        [..., N], codes or in the dtype of `data`.
    """
    if data.is_cuda:
        rows = data.flatten(0, -2).contiguous()
        return geglu_op(rows, *code_arguments(codes, data.dtype)).view(*data.shape[:-1], -1)
    given, gate = data.float().chunk(2, dim=-1)
    return coded(given * F.gelu(gate), codes, data.dtype)
