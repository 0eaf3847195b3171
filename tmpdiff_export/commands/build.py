"""`tmpdiff-export build`: a pipeline folder in, a bundle out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.arguments import parse_guidance_scale, parse_seed, parse_size, parse_steps, parse_text_length
from engines.backends.table import BACKENDS
from engines.files import require_replaceable
from engines.manifest import EngineEntry, Manifest
from engines.precision import DEFAULT_PRECISIONS, Precision, parse_precisions
from engines.terminal import print_json
from engines.text import read_prompts
from tmpdiff_export.targets import settings as shared_settings
from tmpdiff_export.targets.tensorrt import settings as tensorrt_settings
from tmpdiff_export.targets.torch import settings as torch_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    everything = ",".join(precision.value for precision in DEFAULT_PRECISIONS)
    parser.add_argument(
        "pipeline", type=Path, metavar="PIPELINE_DIR", help="diffusers pipeline folder (save_pretrained)"
    )
    group = parser.add_argument_group("any backend")
    group.add_argument("--out", type=_folder, required=True, metavar="BUNDLE", help="bundle folder to make")
    group.add_argument(
        "--precisions", default=everything, help=f"comma-separated, of {', '.join(Precision)} (default {everything})"
    )
    group.add_argument(
        "--backend",
        default="auto",
        help=f"one of auto, {', '.join(BACKENDS)} (default auto: tensorrt where its builder and a GPU are, torch where it sees a GPU, else onnxruntime)",
    )
    group.add_argument(
        "--range-device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the pipeline runs in FP32, for the ranges and for what engines are checked against (default cpu)",
    )
    group.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="prompts for range calibration")
    group.add_argument(
        "--steps", type=_several(parse_steps), default=(20,), metavar="N,...", help="num_inference_steps (default 20)"
    )
    group.add_argument(
        "--size",
        type=_several(parse_size),
        default=(),
        metavar="WIDTHxHEIGHT,...",
        help="picture sizes in pixels (default: the pipeline's own). There is a setting for every size, text length and number "
        "of steps, the first of each by default",
    )
    group.add_argument(
        "--text-length",
        type=_several(parse_text_length),
        default=(),
        metavar="TOKENS,...",
        help="of text encoders whose length may vary, such as FLUX.1's T5 (default: the pipeline's own)",
    )
    group.add_argument(
        "--seed", type=parse_seed, default=0, metavar="S", help="seed of the first calibration run (default 0)"
    )
    group.add_argument(
        "--guidance-scale", type=parse_guidance_scale, metavar="G", help="default: that of the pipeline's call"
    )
    group.add_argument(
        "--clip-skip",
        type=int,
        metavar="N",
        help="last layers that CLIP text encoders leave out (default: as the pipeline)",
    )
    group.add_argument(
        "--variant",
        metavar="NAME",
        help="weight files that save_pretrained(variant=NAME) wrote, such as fp16 (default: those without a variant, or the only one)",
    )
    group.add_argument("--onnx-dir", type=_folder, metavar="DIR", help="keep the exported <precision>.onnx files there")
    group.add_argument("--force", action="store_true", help="replace an existing bundle")
    group.add_argument(
        "--keep-stages",
        action="store_true",
        help="keep the finished stages of the build beside the bundle (.BUNDLE.stages), for another build with other options; "
        "without, they stay only until the build succeeds",
    )
    group.add_argument(
        "--restart", action="store_true", help="begin anew, without finished stages of a build that was cut short"
    )
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    for settings in (shared_settings, torch_settings, tensorrt_settings):
        settings.add_arguments(parser)


def _several(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An argument of several values with commas between them."""
    return lambda text: tuple(parse(part) for part in text.split(","))


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' names no folder")
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """Builds and prints what was built."""
    # before the imports, which take seconds
    require_replaceable(args.out, replace=args.force)
    prompts = read_prompts(args.prompts).calibration

    from tmpdiff_export.bundling.options import BuildOptions, require_buildable
    from tmpdiff_export.targets.choose import resolve_backend

    precisions = parse_precisions(args.precisions)
    backend = resolve_backend(args.backend)
    options = BuildOptions(
        precisions=precisions,
        prompts=prompts,
        steps=args.steps,
        sizes=args.size,
        text_lengths=args.text_length,
        clip_skip=args.clip_skip,
        seed=args.seed,
        backend=backend,
        guidance_scale=args.guidance_scale,
        variant=args.variant,
        onnx_dir=args.onnx_dir,
        force=args.force,
        plans=tensorrt_settings.plan_settings(args),
        device=args.device,
        share_weights=args.share_weights,
        workers=args.workers,
        fp8_attention=args.fp8_attention,
        compile=args.compile,
        text_encoder_weights=args.text_encoder_weights,
        range_device=args.range_device,
        keep_stages=args.keep_stages,
        restart=args.restart,
    )
    require_buildable(options, args.out, backend)

    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.display import print_note, progress_bar

    with progress_bar() as report:
        manifest = build(args.pipeline, args.out, options, report, print_note)
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
    model = manifest.model
    print_table(
        f"{model.denoiser_class}, {model.parameters / 1e6:.1f} M parameters",
        ["engine", "backend", "recipe", "MB", "SQNR dB", "floor dB"],
        rows,
        [
            *(
                f"{name}: {entries[0].backend} runs {what_runs(entries[0])}{_coverage(entries[0])}"
                for name, entries in manifest.denoisers.items()
            ),
            *(f"setting {setting.name}: {setting.described}" for setting in manifest.settings),
            f"bundle id {manifest.bundle_id[:12]}, built with {manifest.created_with}",
        ],
    )


def _coverage(entry: EngineEntry) -> str:
    """How much of the denoiser is quantized, in words; empty where it is not said."""
    found = entry.coverage
    if found is None:
        return ""
    return (
        f"; {found.quantized_layers} of {found.layers} layers quantized, {found.quantized_share:.0%} of the operations"
    )


def what_runs(entry: EngineEntry) -> str:
    """What the backend made of the graph, in words: rewrites and fused operators, or a plan's layers by precision."""
    if entry.plan is None:
        as_it_is = "the ONNX graph as it is" if entry.package is None else f"the module in {entry.package.dtype}"
        return ", ".join(f"{count} x {what}" for what, count in entry.lowering.items()) or as_it_is
    return ", ".join(
        f"{share.layers} {name} layers" + ("" if share.time_share is None else f" ({share.time_share:.0%} of the time)")
        for name, share in entry.plan.layers.items()
    )
