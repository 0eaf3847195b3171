"""How far a bundle's latents and pictures are from those of diffusers, over everything that a user can set.

    python -m tools.parity --out docs/results/parity.json [--families sd,flux] [--combined 10] [--workers 2]
    python -m tools.parity --table docs/results/parity.json

A small random pipeline of every family is built for ONNX Runtime on the CPU at FP16. Each axis (size, text length,
scheduler, steps, prompt, negative prompt, guidance, clip skip, batch, `attach`) is varied alone, and then all at random.
Exit status 1 when a cell is further from diffusers than rounding explains.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.cli import guarded
from engines.errors import TmpDiffError
from tools.parity.families import FAMILIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m tools.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="result file to write")
    parser.add_argument("--families", default=",".join(FAMILIES), help="default: %(default)s")
    parser.add_argument("--combined", type=int, default=10, metavar="N", help="random combinations of all axes (10)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one per core)"
    )
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print a result file as Markdown")
    args = parser.parse_args(arguments)
    if args.table is not None:
        from tools.parity.table import table

        print(table(args.table))
        return 0
    names = args.families.split(",")
    if unknown := [name for name in names if name not in FAMILIES]:
        raise TmpDiffError(f"family is {unknown[0]!r}, expected some of {', '.join(FAMILIES)}")
    if args.out is None:
        parser.error("name the result file with --out")
    from tools.parity.run import measure_families  # which imports torch

    return measure_families(args.out, names, args.combined, args.workers)


if __name__ == "__main__":
    sys.exit(guarded("parity", main))
