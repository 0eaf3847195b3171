"""Speed and quality of whole loops on a bundle, beside diffusers compiled, torchao and cache-dit.

    python -m tools.headline measure BUNDLE --pipeline FOLDER --prompts FILE --steps 28 \\
        --schedules a.json b.json --fewer 8,10,14,20 --lpips FILE --out headline-28.json
    python -m tools.headline figure headline-28.json headline-50.json --out headline.png
    python -m tools.headline loops BUNDLE --like headline-28.json --out loops.json

`measure` runs every method on the same unseen prompts (the second section of the prompt file) and noise: uniform
precisions, schedules, reuse at fixed steps and fewer steps of the bundle, and of the pipeline it was built from, a
Stable Diffusion 3, the compiled 16-bit denoiser as CUDA graphs, with torchao's FP8, with fewer steps, and with cache-dit
(https://pypi.org/project/cache-dit) at several settings. The result file is written after every method anew, and one that
fails leaves the others. A loop is timed from conditioning and noise on the host to final
latents on the host; the baseline, compiled 16 bit, runs in turns with each method. Pictures are compared with those of
the method's own 16-bit run of all steps. `loops` times schedules of other bundles where pictures mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from calibration.measure.latency import machine
from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from engines.files import atomic_write_text
from engines.runtime import DenoiseRuntime
from engines.setting_choice import SettingChoice
from engines.text import read_prompts
from tools.experiments.command import compact_json, round_numbers
from tools.experiments.figures import save
from tools.headline.figure import draw
from tools.headline.goals import CACHE_DIT, findings
from tools.headline.loops import time_choices
from tools.headline.measure import Study, make_batches
from tools.headline.order import parts
from tools.headline.quality import comparison

LIBRARIES = ("torch", "diffusers", "torchao", "cache-dit")


def measure(args: argparse.Namespace) -> int:
    """Runs all methods and writes what they gave, after every method anew."""
    begin = time.monotonic()
    prompts = read_prompts(args.prompts).validation[: args.samples]
    choice = SettingChoice(steps=args.steps)
    if args.threads is not None:
        torch.set_num_threads(args.threads)  # of the peers
    with (
        DenoiseRuntime.load(args.bundle, setting=choice, threads=args.threads) as runtime,
        comparison(args.lpips, args.workers) as pool,
    ):
        if runtime.manifest.model.denoiser_class != "SD3Transformer2DModel":
            raise TmpDiffError(
                f"bundle {args.bundle} has a {runtime.manifest.model.denoiser_class}; the peers are those of an "
                "SD3Transformer2DModel"
            )
        batches = make_batches(runtime, prompts, args.batch, args.seed, print)
        study = Study(runtime, batches, pool)
        about = {
            "format": "tmpdiff headline",
            "command": f"python -m tools.headline measure BUNDLE --steps {args.steps} --batch {args.batch}",
            "setting": _setting(args, runtime, sum(batch.conditioning.size for batch in batches)),
        }

        def write(left_out: Sequence[str], failed: Sequence[str], *, wait: bool = False) -> None:
            rows = study.rows(wait=wait)
            content = {
                **about, "seconds": time.monotonic() - begin, "left_out": list(left_out), "failed": list(failed),
                "rows": rows, "findings": findings(rows),
            }  # fmt: skip
            atomic_write_text(args.out, compact_json(round_numbers(content)) + "\n")

        left_out, failed = study.run_all(
            parts(args, runtime, batches[0]), lambda: time.monotonic() - begin > args.seconds_limit, write
        )
        write(left_out, failed, wait=True)
    print(f"wrote {args.out}")
    if left_out:
        print(f"left out after {args.seconds_limit:.0f} s: {'; '.join(left_out)}")
    if failed:
        raise TmpDiffError(f"not all was measured: {'; '.join(failed)}; the rest is in {args.out}")
    return 0


def _setting(args: argparse.Namespace, runtime: DenoiseRuntime, prompts: int) -> dict[str, Any]:
    model, setting = runtime.manifest.model, runtime.setting
    return {
        "num_steps": runtime.num_steps,
        "scheduler": setting.scheduler,
        "guidance_scale": setting.guidance_scale,
        "picture": setting.size,
        "denoiser": model.denoiser_class,
        "parameters_m": model.parameters / 1e6,
        "prompts": prompts,
        "batch": args.batch,
        "machine": machine(runtime, args.threads),
        "backend": runtime.manifest.reference.backend,
        "bundle_id": runtime.manifest.bundle_id,
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def figure(args: argparse.Namespace) -> int:
    """Draws result files side by side, and prints what they say of the goals."""
    contents = [read_json(path, "result file", TmpDiffError) for path in args.results]
    save(lambda: draw(contents), args.out)
    for content in contents:
        found = findings(content["rows"])
        print(f"T = {content['setting']['num_steps']}: {found['goals']}")
        for line in found["by_speedup"]:
            print(
                f"  {line['speedup']:.2f} times as fast: schedule {_number(line['schedule'])}, cache-dit "
                f"{_number(line[CACHE_DIT])}, "
                + ", ".join(f"{name} {_number(value)}" for name, value in line["others"].items() if value is not None)
            )
    print(f"wrote {args.out}")
    return 0


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def loops(args: argparse.Namespace) -> int:
    """Times the schedules of a result file on another bundle."""
    content = read_json(args.like, "result file", TmpDiffError)
    with DenoiseRuntime.load(args.bundle, setting=SettingChoice(steps=args.steps), threads=args.threads) as runtime:
        batches = make_batches(runtime, [args.prompt] * args.batch, args.batch, args.seed, print)
        found = time_choices(runtime, content["rows"], batches[0], args.repeats)
        found["machine"] = machine(runtime, args.threads)
    atomic_write_text(args.out, compact_json(round_numbers(found)) + "\n")
    print(f"wrote {args.out}")
    return 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(prog="python -m tools.headline", description=(__doc__ or "").splitlines()[0])
    commands = whole.add_subparsers(required=True)
    one = commands.add_parser("measure", help="run every method")
    one.add_argument("bundle", type=Path, metavar="BUNDLE")
    one.add_argument("--pipeline", type=Path, required=True, metavar="FOLDER", help="that the bundle was built from")
    one.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    one.add_argument("--steps", type=int, required=True, metavar="T")
    one.add_argument("--schedules", type=Path, nargs="*", default=[], metavar="FILE", help="of that setting")
    one.add_argument(
        "--fewer", type=_counts, default=(), metavar="N,...", help="numbers of steps that the bundle has settings of"
    )
    one.add_argument("--samples", type=int, default=96, metavar="N", help="unseen prompts (default 96)")
    one.add_argument("--batch", type=int, default=8, metavar="N", help="pictures at once (default 8)")
    one.add_argument(
        "--points", type=int, default=5, metavar="N", help="settings of each cache-dit variant (default 5)"
    )
    one.add_argument("--seed", type=int, default=10_000, metavar="S", help="of the first picture's noise")
    one.add_argument("--lpips", type=Path, metavar="FILE", help="weights from tools.experiments.fetch_lpips")
    one.add_argument("--workers", type=int, default=8, metavar="N", help="processes that compare pictures (default 8)")
    one.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of the peers")
    one.add_argument("--compile-backend", default="inductor", help="of the peers")
    one.add_argument("--threads", type=int, metavar="N")
    one.add_argument(
        "--seconds-limit",
        type=float,
        default=float("inf"),
        metavar="S",
        help="begin no method after so long; the least important ones come last",
    )
    one.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    one.set_defaults(run=measure)
    two = commands.add_parser("figure", help="draw results of `measure`")
    two.add_argument("results", type=Path, nargs="+", metavar="FILE.json")
    two.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    two.set_defaults(run=figure)
    three = commands.add_parser("loops", help="time the same choices on another bundle")
    three.add_argument("bundle", type=Path, metavar="BUNDLE")
    three.add_argument("--like", type=Path, required=True, metavar="FILE.json", help="result of `measure`")
    three.add_argument("--steps", type=int, required=True, metavar="T")
    three.add_argument("--prompt", default="a picture of a small blue square in the top left")
    three.add_argument("--batch", type=int, default=1, metavar="N")
    three.add_argument("--seed", type=int, default=0, metavar="S")
    three.add_argument("--repeats", type=int, default=5, metavar="N")
    three.add_argument("--threads", type=int, metavar="N")
    three.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    three.set_defaults(run=loops)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    args = parser().parse_args(arguments)
    return guarded("headline", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
