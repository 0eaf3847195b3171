"""Exports a small random-weight denoiser of every family at every precision, to show the graphs to a builder.

    python -m tools.acceptance.export_families --out build/families

Writes `<family>.<precision>.onnx` and `<family>.nvfp4-rank32.onnx`, the strongly typed graphs, their weights beside them in
`.safetensors` files, and `exports.json`: per graph its size with the weights, its hash, how many layers are quantized, and
the SQNR of the CPU engine of the same codes against FP32 torch. Exit status 1 if one cannot be made, or its engine is less
accurate than its precision's floor.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from engines.errors import TmpDiffError
from engines.files import atomic_write_text, sha256_file
from engines.manifest import MODEL_OUTPUT, EngineEntry
from engines.precision import REFERENCE, Precision, parse_precisions
from tmpdiff_export.bundling.checked import with_larger_batch
from tmpdiff_export.bundling.engine import require_floor
from tmpdiff_export.devices import CPU, Batch
from tmpdiff_export.onnx_graphs.stored import plain_tensor
from tmpdiff_export.pipelines.families.family import DENOISER, LATENT_AXES
from tmpdiff_export.pipelines.families.table import DENOISERS
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.quantization.observers import observe
from tmpdiff_export.quantization.ranges import calibrate_ranges, quantizable_layers
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE
from tmpdiff_export.targets.exported import OnnxForm, plain_tensors, strong_graph, write_graph
from tmpdiff_export.targets.onnxruntime.cpu import CpuTarget
from tmpdiff_export.targets.target import EngineJob, Form, SourceModel, file_entry
from tmpdiff_export.weights.files import write_tensors
from tmpdiff_export.weights.streamed import streamed, taken_weights
from tools.acceptance.checks import check_of
from tools.acceptance.miniatures import Miniature, miniature

RANGE_STEPS = 6
CHECK_STEPS = 3
TABLE = "exports.json"
JUDGED_RANK = 32
CODES = {
    Precision.FP8: onnx.TensorProto.FLOAT8E4M3FN,
    Precision.INT8: onnx.TensorProto.INT8,
    Precision.INT4: onnx.TensorProto.INT4,
    Precision.NVFP4: onnx.TensorProto.FLOAT4E2M1,
}


def main() -> int:
    """Runs the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the ONNX files and the table")
    parser.add_argument("--families", default=",".join(DENOISERS), help="default: %(default)s")
    parser.add_argument("--precisions", default=",".join(Precision), help="default: %(default)s")
    args = parser.parse_args()
    names = args.families.split(",")
    unknown = [name for name in names if name not in DENOISERS]
    if unknown:
        parser.error(f"unknown family {unknown[0]!r}; choose from {', '.join(DENOISERS)}")
    try:
        precisions = parse_precisions(args.precisions)
        args.out.mkdir(parents=True, exist_ok=True)
        rows = [row for name in names for row in export_family(miniature(name), precisions, args.out)]
    except TmpDiffError as error:
        print(f"export_families: {error}", file=sys.stderr)
        return 1
    atomic_write_text(args.out / TABLE, json.dumps(rows, indent=1) + "\n")
    return 0


def export_family(small: Miniature, precisions: tuple[Precision, ...], out: Path) -> list[dict[str, Any]]:
    """Writes the ONNX files of one family and returns their rows of the table.

    Raises:
        BuildError: the export failed, or an engine is below its floor.
    """
    batches = small.batches(RANGE_STEPS, seed=1)
    model = family_model(small, with_larger_batch(small.batches(CHECK_STEPS, seed=2)))
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [name for name, layer in model.module.named_modules() if isinstance(layer, kinds)]
    rows = []
    for precision, rank in [(item, rank) for item in precisions for rank in ranks(item)]:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as scratch:
            job, entry = best_cpu_engine(model, precision, batches, Path(scratch), rank)
        require_floor(precision.value, entry)
        suffix = f"-rank{rank}" if rank else ""
        path = write_strong_graph(job, out / f"{small.name}.{precision.value}{suffix}.onnx")
        row = {
            "file": path.name,
            "family": small.name,
            "denoiser_class": small.family.denoiser_class,
            "precision": precision.value,
            "parameters": sum(item.numel() for item in model.module.parameters()),
            "bytes": sum(item.stat().st_size for item in (path, path.with_suffix(".safetensors"))),
            "sha256": sha256_file(path),
            "layers": len(layers),
            "quantized_layers": quantized_weights(onnx.load(path, load_external_data=False), precision),
            "recipe": entry.recipe,
            "sqnr_db": entry.sqnr_db,
            "sqnr_floor_db": entry.sqnr_floor_db,
        }
        rows.append(row)
        print(
            f"{row['file']:31} {row['bytes'] / 1e6:6.2f} MB  {row['quantized_layers']:3} of {row['layers']} layers"
            f"  {row['sqnr_db']:6.1f} dB  {row['recipe']}",
            flush=True,
        )
    return rows


def ranks(precision: Precision) -> list[int]:
    """Of the branches of the graphs that are written at a precision; 0 for none."""
    return sorted({variant.rank for variant in RECIPES[precision].variants} & {JUDGED_RANK} | {0})


def family_model(small: Miniature, checks: Sequence[Batch]) -> SourceModel:
    """A miniature's denoiser, checked on inputs."""
    module = small.wrap()
    check = check_of(module, tuple(small.family.inputs), MODEL_OUTPUT, checks)
    weights = {**taken_weights(module), **dict(module.named_buffers())}
    return SourceModel(
        module=module,
        read=weights.__getitem__,
        inputs=small.family.export_inputs(checks[0]),
        outputs={MODEL_OUTPUT: LATENT_AXES},
        check=check,
        checked=small.name,
        batch_per_picture=2 if small.guided else 1,
        dtype=torch.float32,
        half=True,
    )


def find_ranges(model: SourceModel, precision: Precision, batches: Sequence[Batch]) -> dict[str, dict[str, LayerRange]]:
    """The ranges of a precision by variant of its recipe and layer; of the reference one variant without any."""
    if precision is REFERENCE:
        return {NO_RECIPE: {}}
    names = quantizable_layers(model.module, DENOISER, RECIPES[precision])

    def run() -> None:
        for batch in batches:
            model.module(*batch)

    def search() -> None:
        with torch.inference_mode(), streamed(model.module, model.read, CPU):
            run()

    with torch.inference_mode(), streamed(model.module, model.read, CPU):
        observed = observe(model.module, names, run, range(len(batches)))
    found = calibrate_ranges(
        model.module, {precision: names}, observed, search, lambda name: model.read(f"{name}.weight")
    )
    return found[precision]


def best_cpu_engine(
    model: SourceModel, precision: Precision, batches: Sequence[Batch], folder: Path, rank: int = 0
) -> tuple[EngineJob, EngineEntry]:
    """Makes the CPU engines of all variants with branches of a rank in an empty folder; the best one's job and entry."""
    made = []
    others = {item.name for item in RECIPES[precision].variants if item.rank != rank}
    for variant, ranges in find_ranges(model, precision, batches).items():
        if variant in others:
            continue
        job = EngineJob(precision.value, model, variant, precision, ranges, RECIPES[precision].sqnr_floor_db)
        target, place = CpuTarget(), folder / variant
        prepared = target.prepare(job)
        (place / "engines").mkdir(parents=True)
        file = store(job, prepared.tensors, target.form, place / "engines" / f"{precision.value}.safetensors")
        made.append((job, prepared.task(place, [file_entry(place, file)])()))
    return max(made, key=lambda item: item[1].sqnr_db)


def write_strong_graph(job: EngineJob, path: Path) -> Path:
    """Writes a job's strongly typed graph, and its weights beside it."""
    graph = strong_graph(job)
    weights = path.with_suffix(".safetensors")
    weights.unlink(missing_ok=True)
    store(job, plain_tensors(job, graph, OnnxForm()), OnnxForm(), weights)
    write_graph(graph, path, [weights])
    return path


def store(job: EngineJob, plain: Mapping[str, torch.Tensor], form: Form, path: Path) -> Path:
    """Writes all that an engine reads into one file."""
    model = job.model
    tensors = {name: plain_tensor(name, model.read, wanted.dtype) for name, wanted in plain.items()}
    for name, found in job.ranges.items():
        weight = model.read(f"{name}.weight").flatten(1)
        layer = quantize_layer(weight, found, job.precision, RECIPES[job.precision].block_size)
        tensors |= form.codes(model, name, layer)
    write_tensors(path, tensors)
    return path


def quantized_weights(model: onnx.ModelProto, precision: Precision) -> int:
    """How many weights of a graph are stored as codes of a precision."""
    return sum(item.data_type == CODES.get(precision) and len(item.dims) > 1 for item in model.graph.initializer)


if __name__ == "__main__":
    sys.exit(main())
