"""Makes a pipeline of published size with random weights and takes it through build, calibrate, run and bench.

    python -m tools.scale NAME --out result.json [--folder DIR] [--phases make,build,...] [--text small|full] ...

NAME is flux, sd3, sdxl, pixart, pixart-1b or sana. Pipeline and bundle go to DIR (default: a folder beside the result),
which is kept. The result file is replaced every few seconds; a phase that is done in it is skipped by the next call with
the same folder, and one that was killed goes on, so that a machine that is lent for minutes will do. Exit status 0, or 1
if a phase failed (the end of what it said is in the file); without a bundle, the others are not tried. `--tiny --device cpu` tries everything on small denoisers.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from engines.files import atomic_write_text
from tools.gpu_bench.document import rounded
from tools.scale.models import FULL, PIPELINES, SMALL
from tools.scale.phases import NEEDED, PHASES, Setting, run_phase

TOOL, VERSION = "scale", 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module."""
    args = _parser().parse_args(arguments)
    phases = [name.strip() for name in args.phases.split(",")]
    if unknown := [name for name in phases if name not in PHASES]:
        raise TmpDiffError(f"phase is {unknown[0]!r}, expected some of {', '.join(PHASES)}")
    folder = args.folder or args.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        name=args.name,
        folder=folder.absolute(),
        text=args.text,
        vae=args.vae,
        tiny=args.tiny,
        device=args.device,
        backend=args.backend,
        precisions=args.precisions,
        fp8_attention=args.fp8_attention,
        compile=args.compile,
        steps=args.steps,
        side=args.side,
        prompts=args.prompts,
        samples=args.samples,
        rounds=args.rounds,
        build_options=tuple(args.build_option),
        compile_backend=args.compile_backend,
        seconds_limit=args.seconds_limit,
    )
    return 0 if prove(setting, phases, args.out) else 1


def prove(setting: Setting, phases: Sequence[str], out: Path) -> bool:
    """Runs the phases that are not done; whether all are.

    Raises:
        TmpDiffError: the result file is of another setting.
    """
    import json

    import torch

    from tools.gpu_bench.machine import facts

    words = _words(setting)
    found: dict[str, Any] = {"tool": TOOL, "version": VERSION, "setting": words, "phases": {}}
    if out.exists():
        found = read_json(out, "result file", TmpDiffError)
        if found.get("setting") != words:
            raise TmpDiffError(f"{out} holds the result of other options; give the same ones, or name another --out")
    found["machine"] = facts(torch.device(setting.device))

    def save(phase: str, data: dict[str, Any]) -> None:
        found["phases"][phase] = data
        atomic_write_text(out, json.dumps(rounded(found), indent=1) + "\n")

    for phase in phases:
        before = found["phases"].get(phase, {})
        if before.get("status") in ("done", "none"):
            continue
        print(f"scale: {phase}", file=sys.stderr, flush=True)
        data = run_phase(phase, setting, before, functools.partial(save, phase))
        save(phase, data)
        print(f"scale: {phase} {data['status']}, {data.get('seconds', 0.0):.1f} s", file=sys.stderr, flush=True)
        if data["status"] == "failed":
            print("\n".join(data["attempts"][-1]["errors"]), file=sys.stderr)
            if phase in NEEDED:
                break
    return all(found["phases"].get(phase, {}).get("status") in ("done", "none") for phase in phases)


def _words(setting: Setting) -> dict[str, Any]:
    """The setting as it stands in the result file: what has no influence on the results is left out."""
    data = {name: value for name, value in vars(setting).items() if name not in ("folder", "seconds_limit")}
    return {**data, "build_options": list(setting.build_options), "title": setting.pipeline.bench.title}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(PIPELINES), metavar="NAME", help=", ".join(PIPELINES))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="result file")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where pipeline and bundle go")
    parser.add_argument("--phases", default=",".join(PHASES), help=f"comma-separated, of {', '.join(PHASES)}")
    parser.add_argument("--text", choices=(SMALL, FULL), default=SMALL, help="size of the text encoders")
    parser.add_argument("--vae", choices=(SMALL, FULL), default=SMALL, help="size of the autoencoder")
    parser.add_argument("--tiny", action="store_true", help="a small denoiser, to try the tool")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default="torch", help="of the build (torch)")
    parser.add_argument("--precisions", default="fp16,fp8", help="of the build (fp16,fp8)")
    parser.add_argument("--fp8-attention", default="", metavar="PRECISIONS", help="of the build")
    parser.add_argument("--compile", choices=("whole", "blocks"), default="whole", help="of the build (whole)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of the loop (8)")
    parser.add_argument("--side", type=int, metavar="PIXELS", help="of the picture")
    parser.add_argument("--prompts", type=int, default=2, metavar="N", help="of the build (2)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="prompts of calibrate (1)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of bench (9)")
    parser.add_argument("--build-option", action="append", default=[], metavar="WORD", help="one more word for build")
    parser.add_argument("--compile-backend", default="inductor", help="of the peer's torch.compile (inductor)")
    parser.add_argument("--seconds-limit", type=float, metavar="S", help="end a command after so long")
    return parser


if __name__ == "__main__":
    sys.exit(guarded("scale", main))
