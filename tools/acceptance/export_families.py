"""Exports a small random-weight denoiser of every family at every precision, to show the graphs to a builder.

    python -m tools.acceptance.export_families --out build/families

Writes `<family>.<precision>.onnx`, the strongly typed graphs, and `exports.json`: per file its size, its hash, how many
layers are quantized, and the SQNR of the CPU engine made from it against FP32 torch. Exit status 1 if one cannot be
made, or its engine is less accurate than its precision's floor.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch

from engines.errors import TmpDiffError
from engines.files import atomic_write_text, sha256_file
from engines.manifest import MODEL_OUTPUT
from engines.precision import Precision, parse_precisions
from tmpdiff_export.bundling.engine import DenoiserJob, Workplace, start_denoiser
from tmpdiff_export.bundling.exported import ExportedModel, export_denoiser, with_larger_batch
from tmpdiff_export.pipelines.families.table import DENOISERS
from tmpdiff_export.targets.accuracy import AccuracyCheck
from tmpdiff_export.targets.onnxruntime.cpu import CpuTarget
from tmpdiff_export.targets.target import at_once
from tools.acceptance.miniatures import Miniature, miniature

RANGE_STEPS = 6
CHECK_STEPS = 3
TABLE = "exports.json"
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
    module = small.wrap()
    ranges, checks = small.batches(RANGE_STEPS, seed=1), small.batches(CHECK_STEPS, seed=2)
    layers = [name for name, layer in module.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    rows = []
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
        scratch = Path(folder)
        model = ExportedModel(
            module,
            export_denoiser(module, small.family, ranges[0], scratch),
            AccuracyCheck.of(module, list(small.family.inputs), MODEL_OUTPUT, with_larger_batch(checks)),
            batch_per_picture=2 if small.guided else 1,
            half=True,
            float32_inputs=small.family.float32_inputs,
        )
        place = Workplace(at_once(CpuTarget()), scratch, scratch)
        for precision in precisions:
            entry = start_denoiser(place, model, DenoiserJob(precision, ranges)).finish().entry
            path = out / f"{small.name}.{precision.value}.onnx"
            os.replace(scratch / "onnx" / f"{precision.value}.onnx", path)
            row = {
                "file": path.name,
                "family": small.name,
                "denoiser_class": small.family.denoiser_class,
                "precision": precision.value,
                "parameters": sum(item.numel() for item in module.parameters()),
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
                "layers": len(layers),
                "quantized_layers": quantized_weights(onnx.load(path), precision),
                "recipe": entry.recipe,
                "sqnr_db": entry.sqnr_db,
                "sqnr_floor_db": entry.sqnr_floor_db,
            }
            rows.append(row)
            print(
                f"{row['file']:26} {row['bytes'] / 1e6:6.2f} MB  {row['quantized_layers']:3} of {row['layers']} layers"
                f"  {row['sqnr_db']:6.1f} dB  {row['recipe']}",
                flush=True,
            )
    return rows


def quantized_weights(model: onnx.ModelProto, precision: Precision) -> int:
    """How many weights of a graph are stored as codes of a precision."""
    return sum(item.data_type == CODES.get(precision) and len(item.dims) > 1 for item in model.graph.initializer)


if __name__ == "__main__":
    sys.exit(main())
