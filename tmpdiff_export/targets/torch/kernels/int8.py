"""INT8 products of the `torch` backend: a Triton kernel on a GPU, torch's own product on a CPU.

cuBLAS's INT8 product (`torch._int_mm`) writes INT32 and leaves scales and bias to another kernel; on an H100 it was no
faster than BF16 at the shapes of FLUX.1 (docs/results.md). Here the INT32 sums never leave the chip.
"""

from __future__ import annotations

import torch

if torch.version.cuda:  # a CUDA build brings Triton
    from tmpdiff_export.targets.torch.kernels.triton.int8 import int8_linear_op
# A package made by torch 2.11 or older gives a kernel that makes tensor descriptors the memory for one program's only:
# all but the first write beyond it (the fault is in Inductor's C++ wrapper; 2.12 multiplies by the number of programs).
DESCRIPTORS_IN_PACKAGES = torch.__version__ >= "2.12"


def int8_linear(
    codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`(codes @ weight.T) * scale + bias`, summed exactly in INT32, then computed in FP32 and rounded once.

    Args:
        codes: int8 [M, K], contiguous.
        weight: int8 [N, K], contiguous.
        scale: float32 [N], weight scale times activation scale.
        bias: [N] or None.
        dtype: of the result.

    Returns:
        [M, N] on the device of `codes`.
    """
    if codes.is_cuda:
        added = scale.new_zeros(0) if bias is None else bias
        descriptors = DESCRIPTORS_IN_PACKAGES or not torch.compiler.is_exporting()
        return int8_linear_op(codes, weight, scale, added, dtype, descriptors)
    sums = torch._int_mm(codes, weight.t()).float() * scale
    return (sums if bias is None else sums + bias.float()).to(dtype)
