"""`tmpdiff-export build`: a pipeline folder in, a bundle out."""

from __future__ import annotations

import argparse
from pathlib import Path

from engines.cli import parse_guidance_scale, parse_seed
from engines.manifest import Manifest
from engines.precision import Precision, parse_precisions
from engines.text import read_prompts

BACKEND_CHOICES = ("auto", "tensorrt", "onnxruntime", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    everything = ",".join(precision.value for precision in Precision)
    parser.add_argument(
        "pipeline", type=Path, metavar="PIPELINE_DIR", help="diffusers pipeline folder (save_pretrained)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="bundle folder to make")
    parser.add_argument("--precisions", default=everything, help=f"comma-separated (default {everything})")
    parser.add_argument("--backend", default="auto", help=f"one of {', '.join(BACKEND_CHOICES)} (default auto)")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="prompts for range calibration")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="num_inference_steps (default 20)")
    parser.add_argument(
        "--seed", type=parse_seed, default=0, metavar="S", help="seed of the first calibration run (default 0)"
    )
    parser.add_argument(
        "--guidance-scale", type=parse_guidance_scale, metavar="G", help="default: that of the pipeline's call"
    )
    parser.add_argument("--height", type=int, metavar="PIXELS", help="default: the pipeline's own")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="default: the pipeline's own")
    parser.add_argument("--onnx-dir", type=Path, metavar="DIR", help="keep the exported <precision>.onnx files there")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Builds and prints what was built."""
    from tmpdiff_export.bundle_build import BuildOptions, build, resolve_backend
    from tmpdiff_export.display import print_json, progress_bar

    precisions = parse_precisions(args.precisions)
    backend = resolve_backend(args.backend)
    options = BuildOptions(
        precisions=precisions,
        prompts=read_prompts(args.prompts).calibration,
        num_steps=args.steps,
        seed=args.seed,
        backend=backend,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        onnx_dir=args.onnx_dir,
        force=args.force,
    )
    with progress_bar() as report:
        manifest = build(args.pipeline, args.out, options, report)
    if args.json:
        print_json({"bundle": str(args.out), **manifest.model_dump(mode="json")})
    else:
        print_engines(manifest)
        print(f"bundle: {args.out}")
    return 0


def print_engines(manifest: Manifest) -> None:
    """The engines of a bundle as a table."""
    from tmpdiff_export.display import print_table

    rows = [
        [
            name,
            entry.backend,
            entry.recipe,
            f"{entry.bytes / 1e6:.1f}",
            f"{entry.sqnr_db:.1f}",
            f"{entry.sqnr_floor_db:.0f}",
        ]
        for name, entry in manifest.engines().items()
    ]
    sampling, model = manifest.sampling, manifest.model
    print_table(
        f"{model.denoiser_class}, {model.parameters / 1e6:.1f} M parameters, {sampling.scheduler}, T = {sampling.num_steps}, "
        f"{sampling.width}x{sampling.height}, guidance {sampling.guidance_scale:g}",
        ["engine", "backend", "recipe", "MB", "SQNR dB", "floor dB"],
        rows,
        [
            *(
                f"{name}: {entry.backend} runs {_lowering(entry.lowering)}"
                for name, entry in manifest.denoisers.items()
            ),
            f"bundle id {manifest.bundle_id[:12]}, built with {manifest.created_with}",
        ],
    )


def _lowering(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in counts.items())
