"""Step latency, memory, error and distance to the limit of full-size denoisers at every precision, on one GPU.

    python -m tools.gpu_bench flux|sana|pixart|sd3|sdxl --out FILE.json [--rows fp8,int8,...] [--seconds-limit N]
    python -m tools.gpu_bench link --out FILE.json [FILE.json ...]
    python -m tools.gpu_bench tables FILE.json ...

The first form measures one denoiser of published configuration with random weights at 1024x1024; docs/results.md
says how. The second measures the link to host memory and computes what engines of the given result files take to bring
in. The third prints result files as Markdown. Result files are replaced after every row. Exit status 0, or 1 if a row
failed (its text is in the file), or 2 for wrong usage. `--device cpu --tiny` tries everything on small denoisers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.errors import TmpDiffError
from tools.gpu_bench.tables import tables

DEFAULT_ROWS = "16-bit,fp8,int8,int4,torchao-fp8,torchao-int8,shared-fp8"
DENOISERS = ("flux", "sana", "pixart", "sd3", "sdxl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module."""
    args = arguments_of(arguments)
    try:
        if args.what == "tables":
            print(tables(args.files))
            return 0
        return 0 if measure(args) else 1
    except TmpDiffError as error:
        print(f"gpu_bench: {error}", file=sys.stderr)
        return 1


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments; wrong ones end the process with status 2."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name in (*DENOISERS, "link"):
        command = commands.add_parser(name, help="the link to host memory" if name == "link" else "a denoiser")
        command.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="result file")
        command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        command.add_argument("--tiny", action="store_true", help="small sizes, to try the tool")
        if name == "link":
            command.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="results of denoisers")
            continue
        command.add_argument(
            "--rows", default=DEFAULT_ROWS, help=f"comma-separated; the baseline always runs (default {DEFAULT_ROWS})"
        )
        command.add_argument(
            "--seconds-limit", type=float, default=540.0, metavar="N", help="start no row that would end later (540)"
        )
        command.add_argument("--repeats", type=int, default=30, help="timed steps of a row (30)")
        command.add_argument("--warm-ups", type=int, default=10, help="steps before them (10)")
        command.add_argument("--profile", default="", metavar="ROWS", help="rows whose kernels are listed")
        command.add_argument("--compile-backend", default="inductor", help="of torch.compile (inductor)")
        command.add_argument(
            "--torchao-recommended", action="store_true", help="let torchao set Inductor's options for its own rows"
        )
    shown = commands.add_parser("tables", help="print result files as Markdown")
    shown.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    args = parser.parse_args(arguments)
    for name in ("repeats", "warm_ups"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 1 or more")
    return args


def measure(args: argparse.Namespace) -> bool:
    """Measures a denoiser or the link; whether all went well.

    Raises:
        TmpDiffError: wrong rows, or no GPU where one is asked for.
    """
    import torch

    from tools.gpu_bench.link import measure_link
    from tools.gpu_bench.rows import BASELINE, Setting
    from tools.gpu_bench.run import measure_model
    from tools.gpu_bench.zoo import MODELS

    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise TmpDiffError("device 'cuda' is asked for, torch finds no GPU; run on one, or pass --device cpu --tiny")
    if args.device == "cpu" and not args.tiny:
        raise TmpDiffError("device 'cpu' is for trying the tool; pass --tiny with it")
    words = f"python -m tools.gpu_bench {args.what}"
    if args.what == "link":
        return measure_link(args.out, args.files, device, words, tiny=args.tiny)
    asked = row_names(args.rows)
    rows = [BASELINE, *(row for row in asked if row != BASELINE)]
    profiled = tuple(row_names(args.profile)) if args.profile else ()
    if missing := [row for row in profiled if row not in rows]:
        raise TmpDiffError(f"--profile names {', '.join(missing)}, expected rows that are measured: {', '.join(rows)}")
    setting = Setting(
        tiny=args.tiny,
        backend=args.compile_backend,
        repeats=args.repeats,
        warm_ups=args.warm_ups,
        torchao_recommended=args.torchao_recommended,
        profiled=profiled,
        seconds_limit=args.seconds_limit,
    )
    words += f" --rows {','.join(rows)} --repeats {args.repeats} --warm-ups {args.warm_ups}"
    return measure_model(MODELS[args.what], rows, args.out, device, setting, words)


def row_names(text: str) -> list[str]:
    """Rows of a comma-separated list, each once.

    Raises:
        TmpDiffError: an unknown name.
    """
    from tools.gpu_bench.rows import ALIASES, ROWS

    names = [ALIASES.get(name.strip(), name.strip()) for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ROWS]:
        raise TmpDiffError(f"unknown row {unknown[0]!r}; choose from {', '.join((*ROWS, *ALIASES))}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
