"""INT8 products of the `torch` backend: a Triton kernel on a GPU, torch's own product on a CPU.

cuBLAS's INT8 product (`torch._int_mm`) writes INT32 and leaves scales and bias to another kernel; on an H100 it was no
faster than BF16 at the shapes of FLUX.1 (docs/performance.md). Here the INT32 sums never leave the chip.
"""

from __future__ import annotations

from typing import Any

import torch

INT8_LIMIT = 127


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
        return _cuda_op()(codes, weight, scale, scale.new_zeros(0) if bias is None else bias, dtype)
    sums = torch._int_mm(codes, weight.t()).float() * scale
    return (sums if bias is None else sums + bias.float()).to(dtype)


_OP: Any = None


def _cuda_op() -> Any:
    """The operator over the Triton kernel, made at its first use: Triton is installed with CUDA builds of torch only."""
    global _OP
    if _OP is None:
        from tmpdiff_export.triton_int8 import launch

        @torch.library.triton_op("tmpdiff::int8_linear", mutates_args={})  # type: ignore[untyped-decorator]
        def int8_linear_op(
            codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
        ) -> torch.Tensor:
            result = torch.empty((codes.shape[0], weight.shape[0]), device=codes.device, dtype=dtype)
            launch(torch.library.wrap_triton, codes, weight, scale, bias, result)
            return result

        _OP = int8_linear_op
    return _OP
