"""`tmpdiff-export demo`: everything, on the embedded pipeline."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.document import Sensitivity
from engines.arguments import parse_seed
from engines.files import atomic_write_text
from engines.manifest import Manifest
from engines.precision import REFERENCE, Precision
from engines.terminal import print_json
from engines.text import PromptFile, read_prompts

if TYPE_CHECKING:
    from tmpdiff_export.demo.gallery import Gallery

PROMPT_SETS = ("plain", "composed", "unusual")
NUM_STEPS = 20

PRECISIONS = (REFERENCE, Precision.INT8)
"""FP8 and INT4 are emulated on a CPU: slower there than INT8, and dropped as soon as they are measured."""

BUILD_PROMPTS = 3
"""Prompts that the build runs in FP32: two for the ranges, one to check the engines with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default build/demo")
    parser.add_argument("--prompt-set", choices=PROMPT_SETS, default="composed", help="default composed")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="calibration and validation prompts each (default 3)"
    )
    parser.add_argument("--pictures", type=int, default=2, metavar="N", help="validation prompts drawn (default 2)")
    parser.add_argument("--seed", type=parse_seed, default=0, metavar="S", help="default 0")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Builds, draws a first picture, calibrates, draws the others, writes report and summary, prints what came out."""
    begin = time.perf_counter()
    # Before torch loads OpenMP, whose waiting threads would spin on cores that other threads and programs need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("samples", "pictures"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected 1 or more")

    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.calibrate.bundle import RunOptions, calibrate_bundle
    from tmpdiff_export.demo import pipeline_folder
    from tmpdiff_export.demo.gallery import SCHEDULE, Gallery
    from tmpdiff_export.display import print_note, progress_bar

    prompts = read_prompts(Path(str(files("calibration") / "prompts" / f"{args.prompt_set}.txt")))
    used = PromptFile(prompts.calibration[: args.samples], prompts.validation[: args.samples])
    bundle, report, summary_file = args.out / "bundle", args.out / "report.html", args.out / "summary.json"
    options = BuildOptions(
        precisions=PRECISIONS,
        prompts=prompts.calibration[:BUILD_PROMPTS],
        steps=(NUM_STEPS,),
        seed=args.seed,
        onnx_dir=args.out / "onnx",
        force=True,
    )
    uniform = [precision.value for precision in PRECISIONS]
    gallery = Gallery(bundle, args.out / "pictures", used.validation[: args.pictures], args.seed)
    try:
        with progress_bar() as progress:
            manifest = build(pipeline_folder(), bundle, options, progress, print_note)
            gallery.draw(uniform, 1, progress)
            print(
                f"first picture after {time.perf_counter() - begin:.0f} s: {gallery.path(0, REFERENCE)}, "
                f"uniform {uniform[-1]} beside it in {gallery.path(0, uniform[-1]).name}",
                file=sys.stderr,
                flush=True,
            )
            found = calibrate_bundle(bundle, used, how=RunOptions(seed=args.seed), progress=progress)
            gallery.draw([*uniform, SCHEDULE], len(gallery.prompts), progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the demo starts over when it is run again, but for finished stages of its build"
        ) from None
    gallery.write_sheet([*uniform, SCHEDULE])
    write_report(report, manifest, found, gallery)
    summary = summarise(args.prompt_set, used, manifest, found, gallery.files(), time.perf_counter() - begin)
    atomic_write_text(summary_file, json.dumps(summary, indent=1) + "\n")
    if args.json:
        print_json(summary)
        return 0
    print_found(found)
    for what, path in (
        ("report", report),
        ("pictures", gallery.sheet_path),
        ("bundle", bundle),
        ("summary", summary_file),
    ):
        print(f"{what}: {path}")
    print(f"took {summary['seconds']:.0f} s")
    return 0


def write_report(path: Path, manifest: Manifest, found: Sensitivity, gallery: Gallery) -> None:
    """The page that `tmpdiff-export report` writes, of pictures that are drawn already."""
    from tmpdiff_export.report.page import page
    from tmpdiff_export.report.pictures import Row, compare

    rows = []
    for index, (prompt, seed) in enumerate(zip(gallery.prompts, gallery.seeds, strict=True)):
        drawn = {name: picture for (row, name), picture in gallery.drawn.items() if row == index}
        reference = drawn[REFERENCE]
        rows.append(Row(prompt, seed, tuple(compare(name, picture, reference) for name, picture in drawn.items())))
    atomic_write_text(path, page(manifest, manifest.settings[0], found, rows))


def print_found(found: Sensitivity) -> None:
    """The schedule beside uniform precisions and rules as one table, and what it says in words."""
    from tmpdiff_export.commands.tables import print_validation

    print_validation(found)
    for line in conclusions(found):
        print(line)


def conclusions(found: Sensitivity) -> Iterator[str]:
    """What the validation rows say of the schedule, in words.

    Args:
        found: a calibration with validation rows.
    """
    from tmpdiff_export.commands.tables import verdict
    from tmpdiff_export.display import interval, schedule_strip

    yield f"schedule: {schedule_strip(found.schedule)}"
    rows = {row.name: row for row in found.validation}
    chosen = rows["schedule"]
    if chosen.typical.value == 0:
        yield from (f"{item.precision}: {item.reason}" for item in found.dropped)
        return
    fastest = min((rows[f"uniform {name}"] for name in found.precisions), key=lambda row: row.latency)
    if fastest.typical.value > 0:
        yield (
            f"it has {interval(fastest.against, '.2f')} of the typical error of {fastest.name}, at "
            f"{chosen.latency / fastest.latency:.2f} times its latency"
        )
    yield from verdict(found)
    yield "nothing was chosen on these prompts; more of them (`--samples N`) tell close rows apart"


def summarise(
    prompt_set: str,
    prompts: PromptFile,
    manifest: Manifest,
    found: Sensitivity,
    pictures: list[str],
    seconds: float,
) -> dict[str, Any]:
    """`summary.json`: the rows of the table, the prompts they were measured on, and what the search cost.

    "typical" is the typical error with its interval, "departures" their count with the interval of their share, "against"
    the schedule's typical error over the row's; "error" is the plain mean of E.
    """

    return {
        "prompt_set": prompt_set,
        "calibration_prompts": list(prompts.calibration),
        "validation_prompts": list(prompts.validation),
        "num_steps": found.num_steps,
        "guidance_scale": manifest.settings[0].guidance_scale,
        "backend": manifest.reference.backend,
        "engines": {
            name: {"recipe": entry.recipe, "sqnr_db": entry.sqnr_db, "bytes": entry.bytes}
            for name, (entry, *_) in manifest.denoisers.items()
        },
        "latencies_ms": found.latencies_ms,
        "schedule": list(found.schedule),
        "machine": found.settings.machine if found.settings else None,
        "budget": found.budget,
        "loses_to": [row.name for row in found.losses],
        "rows": [
            {
                "name": row.name,
                "steps": row.counts,
                "latency": row.latency,
                "typical": row.typical.model_dump(),
                "departures": row.departures.model_dump() if row.departures else None,
                "against": row.against.model_dump() if row.against else None,
                "error": row.error,
                "ssim": row.ssim,
                "psnr_db": row.psnr_db,
                "prompts": "validation",
            }
            for row in found.validation
        ],
        "method": found.method,
        "search_calls": found.search_calls,
        "sweep_calls": found.sweep_calls,
        "pictures": pictures,
        "seconds": seconds,
    }
