"""`tmpdiff-export build`: a pipeline folder in, a bundle out."""

from __future__ import annotations

import argparse
from pathlib import Path

from engines.backends.table import BACKENDS
from engines.backends.tensorrt.options import HARDWARE_COMPATIBILITY, PlanOptions
from engines.backends.tensorrt.profiles import ShapeRange
from engines.cli import parse_guidance_scale, parse_seed
from engines.errors import BuildError
from engines.files import require_replaceable
from engines.manifest import EngineEntry, Manifest
from engines.precision import DEFAULT_PRECISIONS, Precision, parse_precisions
from engines.text import read_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    everything = ",".join(precision.value for precision in DEFAULT_PRECISIONS)
    parser.add_argument(
        "pipeline", type=Path, metavar="PIPELINE_DIR", help="diffusers pipeline folder (save_pretrained)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="bundle folder to make")
    parser.add_argument(
        "--precisions", default=everything, help=f"comma-separated, of {', '.join(Precision)} (default {everything})"
    )
    parser.add_argument(
        "--backend",
        default="auto",
        help=f"one of auto, {', '.join(BACKENDS)} (default auto: tensorrt where its builder and a GPU are, torch where it sees a GPU, else onnxruntime)",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what engines of torch (default: the GPU) and of ONNX Runtime (default: the CPU) are for",
    )
    parser.add_argument(
        "--share-weights",
        type=_precision,
        metavar="PRECISION",
        help="torch packages: make the fp16 engine of the stored weights of this precision, so that both need one copy",
    )
    parser.add_argument(
        "--range-device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the pipeline runs in FP32, for the ranges and for what engines are checked against (default cpu)",
    )
    parser.add_argument(
        "--fp8-attention",
        type=_quantized_precisions,
        default=(),
        metavar="PRECISIONS",
        help="torch packages: quantized precisions, comma-separated, whose attention is in FP8 as well, through cuDNN (pip "
        "install nvidia-cudnn-frontend; a Hopper GPU or later)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="torch packages: processes that compile and measure them side by side, worker i on GPU i modulo the number of "
        "visible GPUs, or on a CPU with its share of the threads (default 1: all in this process)",
    )
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
    _add_plan_arguments(parser.add_argument_group("TensorRT plans"))


def _add_plan_arguments(group: argparse._ArgumentGroup) -> None:
    default = PlanOptions()
    group.add_argument(
        "--batch",
        type=_shape_range,
        default=ShapeRange(1, 1, 4),
        metavar="MIN:OPT:MAX",
        help="pictures at once (default 1:1:4); OPT is what plans are tuned for and torch packages compiled for",
    )
    group.add_argument(
        "--shape",
        type=_named_shape_range,
        action="append",
        default=[],
        metavar="SYMBOL=MIN:OPT:MAX",
        help="sizes of another symbolic axis of the exported graphs; repeat it for several",
    )
    group.add_argument(
        "--builder-optimization-level",
        type=int,
        default=default.builder_optimization_level,
        metavar="0..5",
        help=f"how long the builder searches (default {default.builder_optimization_level})",
    )
    group.add_argument(
        "--workspace-mib", type=int, metavar="MIB", help="most scratch a layer may use (default: no limit)"
    )
    group.add_argument("--weight-streaming", action="store_true", help="let weights stay in host memory at run time")
    group.add_argument(
        "--version-compatible", action="store_true", help="run on the lean runtime and on later TensorRT versions"
    )
    group.add_argument(
        "--hardware-compatibility",
        choices=HARDWARE_COMPATIBILITY,
        default=default.hardware_compatibility,
        help="which other GPUs the plans must run on (default none)",
    )
    group.add_argument("--refittable", action="store_true", help="let TensorRT's Refitter replace weights; costs speed")
    group.add_argument(
        "--plan-cache",
        type=Path,
        metavar="DIR",
        help="finished plans and timing caches (default: the user's cache folder)",
    )


def _precision(text: str) -> Precision:
    try:
        return Precision(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no precision; choose from {', '.join(Precision)}") from None


def _quantized_precisions(text: str) -> tuple[Precision, ...]:
    return tuple(dict.fromkeys(_precision(name.strip()) for name in text.split(",")))


def _shape_range(text: str) -> ShapeRange:
    try:
        return ShapeRange.parse(text)
    except BuildError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _named_shape_range(text: str) -> tuple[str, ShapeRange]:
    symbol, equals, sizes = text.partition("=")
    if not (symbol and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not SYMBOL=MIN:OPT:MAX")
    return symbol, _shape_range(sizes)


def run(args: argparse.Namespace) -> int:
    """Builds and prints what was built."""
    # before the imports, which take seconds
    require_replaceable(args.out, replace=args.force)
    prompts = read_prompts(args.prompts).calibration

    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.display import print_json, progress_bar
    from tmpdiff_export.targets.choose import resolve_backend
    from tmpdiff_export.targets.tensorrt.settings import PlanSettings

    precisions = parse_precisions(args.precisions)
    backend = resolve_backend(args.backend)
    plans = PlanSettings(
        options=PlanOptions(
            builder_optimization_level=args.builder_optimization_level,
            workspace_bytes=None if args.workspace_mib is None else args.workspace_mib << 20,
            weight_streaming=args.weight_streaming,
            version_compatible=args.version_compatible,
            hardware_compatibility=args.hardware_compatibility,
            refittable=args.refittable,
        ),
        batch=args.batch,
        shapes=dict(args.shape),
        cache=args.plan_cache,
    )
    options = BuildOptions(
        precisions=precisions,
        prompts=prompts,
        num_steps=args.steps,
        seed=args.seed,
        backend=backend,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        onnx_dir=args.onnx_dir,
        force=args.force,
        plans=plans,
        device=args.device,
        share_weights=args.share_weights,
        workers=args.workers,
        fp8_attention=args.fp8_attention,
        range_device=args.range_device,
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
            *(f"{name}: {entry.backend} runs {what_runs(entry)}" for name, entry in manifest.denoisers.items()),
            f"bundle id {manifest.bundle_id[:12]}, built with {manifest.created_with}",
        ],
    )


def what_runs(entry: EngineEntry) -> str:
    """What the backend made of the graph, in words: its rewrites and fused operators, or the layers of a plan by precision."""
    if entry.plan is None:
        return ", ".join(f"{count} x {what}" for what, count in entry.lowering.items()) or "the ONNX graph as it is"
    return ", ".join(
        f"{share.layers} {name} layers" + ("" if share.time_share is None else f" ({share.time_share:.0%} of the time)")
        for name, share in entry.plan.layers.items()
    )
