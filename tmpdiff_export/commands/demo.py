"""`tmpdiff-export demo`: everything, on the embedded pipeline."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from calibration import Sensitivity
from calibration.measure.bundle_evaluator import VALIDATION_SEED_OFFSET
from engines.arguments import parse_seed
from engines.files import atomic_write_text
from engines.manifest import Manifest
from engines.pictures import write_pictures
from engines.precision import DEFAULT_PRECISIONS, REFERENCE
from engines.runtime import DenoiseRuntime
from engines.text import PromptFile, read_prompts

PROMPT_SETS = ("plain", "composed", "unusual")
NUM_STEPS = 20
SHEET_NAME = "side_by_side.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default build/demo")
    parser.add_argument("--prompt-set", choices=PROMPT_SETS, default="composed", help="default composed")
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="calibration and validation prompts each")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="validation prompts drawn (default 4)")
    parser.add_argument("--seed", type=parse_seed, default=0, metavar="S", help="default 0")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Builds, calibrates, draws and writes `summary.json`."""
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.calibrate.bundle import calibrate_bundle
    from tmpdiff_export.commands.build import print_engines
    from tmpdiff_export.commands.calibrate import print_sensitivity
    from tmpdiff_export.demo import pipeline_folder
    from tmpdiff_export.display import print_json, progress_bar

    for name in ("samples", "pictures"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    begin = time.perf_counter()
    prompts = read_prompts(Path(str(files("calibration") / "prompts" / f"{args.prompt_set}.txt")))
    used = PromptFile(prompts.calibration[: args.samples], prompts.validation[: args.samples])
    bundle = args.out / "bundle"
    try:
        with progress_bar() as report:
            manifest = build(
                pipeline_folder(),
                bundle,
                BuildOptions(
                    precisions=DEFAULT_PRECISIONS,
                    prompts=prompts.calibration,
                    num_steps=NUM_STEPS,
                    seed=args.seed,
                    onnx_dir=args.out / "onnx",
                    force=True,
                ),
                report,
            )
            found = calibrate_bundle(bundle, used, seed=args.seed, progress=report)
            pictures = draw(args.out, bundle, used.validation[: args.pictures], args.seed, report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the demo starts over when it is run again") from None
    summary = summarise(args.prompt_set, used, manifest, found, pictures, time.perf_counter() - begin)
    atomic_write_text(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    if args.json:
        print_json(summary)
        return 0
    print_engines(manifest)
    print_sensitivity(found)
    print(f"bundle: {bundle}")
    print(f"pictures: {args.out / 'pictures' / SHEET_NAME}")
    print(f"summary: {args.out / 'summary.json'}")
    print(f"took {summary['seconds']:.0f} s")
    return 0


def draw(
    out: Path, bundle: Path, prompts: tuple[str, ...], seed: int, report: Callable[[str, int, int], None]
) -> list[str]:
    """Draws validation prompts at every uniform precision and with the schedule; returns the file names.

    The starting noise is that of the validation samples, so that the pictures are the ones that were
    measured.
    """
    with DenoiseRuntime.load(bundle) as runtime:
        schedules = {
            **{name: runtime.bundle.schedule(f"uniform:{name}") for name in runtime.precisions},
            "schedule": runtime.bundle.schedule(),
        }
        folder = out / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[np.ndarray]] = {}
        names = []
        total = len(prompts) * len(schedules)
        for index, prompt in enumerate(prompts):
            for name, schedule in schedules.items():
                picture = runtime.generate([prompt], [seed + VALIDATION_SEED_OFFSET + index], schedule)
                path = folder / f"{index}-{name}.png"
                write_pictures([path], picture)
                names.append(path.name)
                rows.setdefault(name, []).append(picture[0])
                report("pictures", len(names), total)
        _sheet(folder / SHEET_NAME, prompts, rows)
        return [*names, SHEET_NAME]


def summarise(
    prompt_set: str,
    prompts: PromptFile,
    manifest: Manifest,
    found: Sensitivity,
    pictures: list[str],
    seconds: float,
) -> dict[str, Any]:
    """`summary.json`: the rows of the table, the prompts they were measured on, and what the search cost."""
    reference = found.precisions[0]
    return {
        "prompt_set": prompt_set,
        "calibration_prompts": list(prompts.calibration),
        "validation_prompts": list(prompts.validation),
        "num_steps": found.num_steps,
        "guidance_scale": manifest.sampling.guidance_scale,
        "backend": manifest.denoisers[reference].backend,
        "engines": {
            name: {"recipe": entry.recipe, "sqnr_db": entry.sqnr_db, "bytes": entry.bytes}
            for name, entry in manifest.denoisers.items()
        },
        "latencies_ms": found.latencies_ms,
        "schedule": list(found.schedule),
        "machine": found.settings.machine if found.settings else None,
        "budget": found.budget,
        "loses_to": list(found.loses_to),
        "rows": [
            {
                "name": row.name,
                "steps": row.counts,
                "latency": row.latency,
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


def _sheet(path: Path, prompts: tuple[str, ...], rows: dict[str, list[np.ndarray]]) -> None:
    """Pictures side by side: a row per prompt, a column per schedule."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from engines.files import atomic_write_bytes

    figure, axes = pyplot.subplots(
        len(prompts), len(rows), figsize=(1.9 * len(rows), 2.1 * len(prompts)), squeeze=False
    )
    for column, (name, pictures) in enumerate(rows.items()):
        for row, picture in enumerate(pictures):
            axis = axes[row][column]
            axis.imshow(picture)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name if name in (REFERENCE.value, "schedule") else f"uniform {name}", fontsize=10)
    for row, prompt in enumerate(prompts):
        axes[row][0].annotate(prompt, (0, -0.06), xycoords="axes fraction", fontsize=7, va="top", annotation_clip=False)
    figure.subplots_adjust(left=0, right=1, bottom=0.02, top=0.96, wspace=0.03, hspace=0.14)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", pad_inches=0.05)
    pyplot.close(figure)
    atomic_write_bytes(path, buffer.getvalue())
