"""From a torch module to a checked engine file: export, quantize, lower, load, compare with torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch

from engines.backends import load_engine
from engines.backends.onnxruntime import version as onnxruntime_version
from engines.errors import BuildError
from engines.files import sha256_file
from engines.manifest import EngineEntry, FileEntry, TensorSpec
from engines.precision import Precision
from tmpdiff_export.accuracy import engine_sqnr_db, torch_outputs
from tmpdiff_export.cpu_lowering import lower_for_cpu
from tmpdiff_export.onnx_export import save_checked, save_graph
from tmpdiff_export.qdq import insert_qdq
from tmpdiff_export.ranges import Batch, calibrate_ranges, quantizable_linears
from tmpdiff_export.recipes import RECIPES, Variant
from tmpdiff_export.scales import quantize_layer

BACKEND = "onnxruntime"
# Text encoder and VAE decoder run once per picture, in FP32 math from FP16 weights.
COMPONENT_FLOOR_DB = 40.0

_DTYPES: dict[int, Literal["float32", "float16", "int64"]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
}


@dataclass(frozen=True)
class AccuracyCheck:
    """Real inputs and what FP32 torch makes of them.

    Attributes:
        names: engine input names in the order of each batch.
        output: the engine output that is compared.
        batches: inputs that range calibration has not seen.
        references: float32 torch outputs, one per batch.
    """

    names: tuple[str, ...]
    output: str
    batches: tuple[Batch, ...]
    references: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, module: torch.nn.Module, names: Sequence[str], output: str, batches: Sequence[Batch]) -> AccuracyCheck:
        """Runs `module` on `batches` for the references."""
        return cls(tuple(names), output, tuple(batches), tuple(torch_outputs(module, batches)))


def with_larger_batch(batches: Sequence[Batch]) -> list[Batch]:
    """`batches` and one of twice the size: a batch size baked into a graph shows there."""
    first, last = batches[0], batches[-1]
    return [*batches, tuple(torch.cat(pair) for pair in zip(first, last, strict=True))]


def build_denoiser(
    module: torch.nn.Module,
    prefix: str,
    base: onnx.ModelProto,
    precision: Precision,
    range_batches: Sequence[Batch],
    check: AccuracyCheck,
    bundle: Path,
    onnx_folder: Path,
) -> EngineEntry:
    """Builds the engine of one precision; of several recipe variants the one with the best SQNR is kept.

    Args:
        module: float32 export wrapper.
        prefix: attribute of the wrapper that holds the denoiser.
        base: its FP16 graph.
        precision: what to build.
        range_batches: inputs for range calibration.
        check: inputs for the comparison with torch.
        bundle: bundle folder in the making; the engine goes to `engines/<precision>.onnx`.
        onnx_folder: receives `<precision>.onnx`, the strongly typed graph for TensorRT.

    Raises:
        BuildError: no variant reaches the precision's SQNR floor, or the graph is not valid.
    """
    recipe = RECIPES[precision]
    best: EngineEntry | None = None
    for variant in recipe.variants or (None,):
        name = "none" if variant is None else variant.name
        graph = base if variant is None else _quantized(module, prefix, base, precision, variant, range_batches)
        trial = onnx_folder / f"{precision.value}.{name}.onnx"
        save_checked(graph, trial)
        engine_file = bundle / "engines" / f"{precision.value}.{name}.onnx"
        entry = lower_and_check(
            graph,
            engine_file,
            bundle,
            check,
            onnx_sha256=sha256_file(trial),
            recipe=name,
            floor_db=recipe.sqnr_floor_db,
        )
        if best is not None and best.sqnr_db >= entry.sqnr_db:
            _remove(trial, engine_file)
            continue
        if best is not None:
            _remove(onnx_folder / f"{precision.value}.{best.recipe}.onnx", bundle / best.file.path)
        best = entry
    assert best is not None  # every recipe has a variant, and the reference counts as one
    engine_path = bundle / "engines" / f"{precision.value}.onnx"
    weights = _rename_graph(bundle / best.file.path, engine_path)
    _rename_graph(onnx_folder / f"{precision.value}.{best.recipe}.onnx", onnx_folder / f"{precision.value}.onnx")
    final = best.model_copy(
        update={
            "file": file_entry(bundle, engine_path),
            "weights": None if weights is None else file_entry(bundle, weights),
            "onnx_sha256": sha256_file(onnx_folder / f"{precision.value}.onnx"),
        }
    )
    require_floor(precision.value, final)
    return final


def build_component(
    module: torch.nn.Module, graph: onnx.ModelProto, name: str, check: AccuracyCheck, bundle: Path, onnx_folder: Path
) -> EngineEntry:
    """Builds the text encoder or the VAE decoder as `engines/<name>.onnx`, FP16 weights.

    Raises:
        BuildError: its SQNR is below `COMPONENT_FLOOR_DB`, or the graph is not valid.
    """
    path = onnx_folder / f"{name}.onnx"
    save_checked(graph, path)
    entry = lower_and_check(
        graph,
        bundle / "engines" / f"{name}.onnx",
        bundle,
        check,
        onnx_sha256=sha256_file(path),
        recipe="none",
        floor_db=COMPONENT_FLOOR_DB,
    )
    require_floor(name, entry)
    return entry


def lower_and_check(
    graph: onnx.ModelProto,
    engine_file: Path,
    bundle: Path,
    check: AccuracyCheck,
    *,
    onnx_sha256: str,
    recipe: str,
    floor_db: float,
) -> EngineEntry:
    """Lowers a graph for the CPU, writes the engine file, loads it as the runtime would, and measures its SQNR.

    Raises:
        BackendError: ONNX Runtime refuses it.
    """
    lowered, counts = lower_for_cpu(graph)
    engine_file.parent.mkdir(parents=True, exist_ok=True)
    weights = save_graph(lowered, engine_file)
    engine = load_engine(BACKEND, engine_file)
    measured = engine_sqnr_db(engine, check.names, check.output, check.batches, check.references)
    return EngineEntry(
        file=file_entry(bundle, engine_file),
        weights=None if weights is None else file_entry(bundle, weights),
        backend=BACKEND,
        backend_version=onnxruntime_version(),
        device="cpu",
        lowering=counts,
        onnx_sha256=onnx_sha256,
        recipe=recipe,
        sqnr_db=round(measured, 2),
        sqnr_floor_db=floor_db,
        inputs=_specs(lowered.graph.input),
        outputs=_specs(lowered.graph.output),
    )


def require_floor(name: str, entry: EngineEntry) -> None:
    """Refuses an engine that is less accurate than its precision can be.

    Raises:
        BuildError: naming the measured SQNR and the floor.
    """
    if not entry.sqnr_db >= entry.sqnr_floor_db:
        raise BuildError(
            f"{name}: the built engine has an SQNR of {entry.sqnr_db:.1f} dB against FP32 torch on real inputs, "
            f"its floor is {entry.sqnr_floor_db:.1f} dB; leave this precision out of --precisions, or give more varied --prompts"
        )


def file_entry(bundle: Path, path: Path) -> FileEntry:
    """The manifest entry of a file in a bundle."""
    return FileEntry(path=path.relative_to(bundle).as_posix(), sha256=sha256_file(path), bytes=path.stat().st_size)


def _quantized(
    module: torch.nn.Module,
    prefix: str,
    base: onnx.ModelProto,
    precision: Precision,
    variant: Variant,
    batches: Sequence[Batch],
) -> onnx.ModelProto:
    recipe = RECIPES[precision]
    names = quantizable_linears(module, prefix, recipe)
    ranges = calibrate_ranges(module, names, recipe, variant, batches)
    layers = {name: quantize_layer(found, precision, recipe.block_size) for name, found in ranges.items()}
    return insert_qdq(base, layers, recipe)


def _specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=_DTYPES[value.type.tensor_type.elem_type],
            shape=tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def _weight_file(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".data")


def _remove(*graphs: Path) -> None:
    for path in graphs:
        path.unlink()
        _weight_file(path).unlink(missing_ok=True)


def _rename_graph(old: Path, new: Path) -> Path | None:
    """Renames a graph file; one with a weight file is written anew, because it names that file."""
    if not _weight_file(old).exists():
        old.rename(new)
        return None
    weights = save_graph(onnx.load(old), new)
    _remove(old)
    return weights
