"""One attention alone: in 16 bits, in FP8 by cuDNN and in FP8 by the project's kernel; on one GPU.

    python -m tools.gpu_bench.attention [--out FILE.json] [BxSxHxD ...]

Queries, keys and values are normal, 16-bit; queries and keys of FP8 are codes already. cuDNN's values are codes too; the
kernel makes those itself, and its time has that in it. Heads of other sizes than 64 and 128 are padded, for the kernel to
96 if they fit. SQNR is against float32, of the first sample. `KERNEL_SIZES` of `kernels/attention.py` follows these figures.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from engines.backends.torch.attention import attention_fp8, scales_tensor
from engines.files import atomic_write_text
from tmpdiff_export.targets.torch.activations import FP8, static_codes
from tools.gpu_bench.machine import facts
from tools.gpu_bench.timing import output_error

# Self-attention and joint attention at 1024x1024: SD3.5-medium's two, SDXL's two, PixArt-Sigma's, FLUX.1-dev's.
SHAPES = ("2x4429x24x64", "2x4096x24x64", "2x4096x10x64", "2x1024x20x64", "2x4096x16x72", "1x4608x24x128")
_CALLS, _ROUNDS = 10, 9


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_bench.attention", description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="BxSxHxD", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="result file")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a GPU: the kernel runs on no CPU")
    rows = []
    for shape in args.shapes or SHAPES:
        for row in measured(shape):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.out is not None:
        document = {"machine": facts(torch.device("cuda", 0)), "rows": rows}
        atomic_write_text(args.out, json.dumps(document, indent=1) + "\n")
    return 0


def measured(shape: str) -> list[dict[str, Any]]:
    """A row for each way of computing an attention of this shape."""
    from tmpdiff_export.targets.torch.kernels.triton.attention import attend_codes_op

    batch, tokens, heads, size = (int(item) for item in shape.split("x"))
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        factor * torch.randn(batch, tokens, heads, size, device="cuda", generator=generator, dtype=torch.bfloat16)
        for factor in (1.5, 1.0, 1.0)
    )
    first = [item[:1].float().transpose(1, 2) for item in (query, key, value)]
    wanted = F.scaled_dot_product_attention(*first).transpose(1, 2)

    def sixteen() -> torch.Tensor:
        return F.scaled_dot_product_attention(*(item.transpose(1, 2) for item in (query, key, value))).transpose(1, 2)

    rows = [_row(shape, "16-bit", sixteen, wanted, None)]
    for way, sizes in (("cuDNN FP8", (64, 128)), ("kernel FP8", (64, 96, 128))):
        wide = next(item for item in sizes if item >= size)
        factor = (wide / size) ** 0.5
        amaxes = [float(item.abs().max()) for item in (query, key, value)]
        scales = scales_tensor(amaxes[0] * factor / 448, amaxes[1] / 448, amaxes[2] / 448).cuda()
        parts = [F.pad(item, (0, wide - size)) for item in (query.float() * factor, key, value)]
        codes = [static_codes(item, scales[at, 0], FP8).contiguous() for at, item in enumerate(parts)]
        if way == "cuDNN FP8":
            operands = (*codes, scales)
            work = attention_fp8
        else:
            operands = (*codes[:2], parts[2].contiguous(), scales)
            work = attend_codes_op
        rows.append(_row(shape, way, functools.partial(work, *operands), wanted, float(scales[2, 0])))
    return rows


def _row(
    shape: str, way: str, work: Callable[[], torch.Tensor], wanted: torch.Tensor, scale: float | None
) -> dict[str, Any]:
    try:
        result = work()[:1, ..., : wanted.shape[3]].float() * (1.0 if scale is None else scale)
    except Exception as error:  # what one way cannot do is no reason to leave out the others
        return {"shape": shape, "way": way, "failed": f"{type(error).__name__}: {error}"[:300]}
    return {
        "shape": shape,
        "way": way,
        "us": _microseconds(work),
        "sqnr_db": output_error([result], [wanted])["sqnr_db"],
    }


def _microseconds(work: Callable[[], object]) -> float:
    """Of one call, the median of some replays of a CUDA graph of several."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            work()
    graph.replay()
    times = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / _CALLS * 1e3)
    return sorted(times)[_ROUNDS // 2]


if __name__ == "__main__":
    raise SystemExit(main())
