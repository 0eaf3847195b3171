"""From an exported graph to a checked engine file: quantize, hand to the target backend, compare with torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnx
import torch

from engines.errors import BuildError
from engines.files import sha256_file
from engines.manifest import EngineEntry, FileEntry, TensorSpec
from engines.precision import Precision
from tmpdiff_export.accuracy import torch_outputs
from tmpdiff_export.onnx_export import save_checked
from tmpdiff_export.qdq import insert_qdq
from tmpdiff_export.ranges import Batch, calibrate_ranges, quantizable_layers
from tmpdiff_export.recipes import RECIPES, Variant
from tmpdiff_export.scales import QuantizedLayer, quantize_layer

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


@dataclass(frozen=True, eq=False)
class EngineJob:
    """One engine to make.

    Attributes:
        name: "fp16", "int8", ..., "text_encoder" or "vae_decoder"; stem of its files.
        graph: its ONNX graph with weights in memory; not changed.
        onnx_file: the same graph on disk, checked.
        recipe: quantization variant, "none" where nothing is quantized.
        quantized: precision of its quantized layers, None where nothing is quantized.
        check: inputs and references for its SQNR.
        floor_db: the least SQNR the build accepts.
        batch_per_picture: samples of an engine call for one picture; 2 where guidance doubles the batch.
        module: the float32 export wrapper that the graph was made from; not changed.
        layers: its quantized layers by name.
        half: whether the engine computes in a 16-bit type; text encoder and VAE decoder do not.
        float32_inputs: inputs that are not rounded to that type.
        weights_of: the engine whose weights file the reference reads, in which `layers` are; None where every engine has its
            own. Only the torch backend can do this.
    """

    name: str
    graph: onnx.ModelProto
    onnx_file: Path
    recipe: str
    quantized: Precision | None
    check: AccuracyCheck
    floor_db: float
    batch_per_picture: int
    module: torch.nn.Module
    layers: Mapping[str, QuantizedLayer]
    half: bool
    float32_inputs: frozenset[str] = frozenset()
    weights_of: EngineEntry | None = None


@dataclass(frozen=True)
class BuiltDenoiser:
    """A denoiser engine.

    Attributes:
        entry: its manifest entry.
        layers: its quantized layers by name.
    """

    entry: EngineEntry
    layers: Mapping[str, QuantizedLayer]


class Target(Protocol):
    """A backend that engines are built for."""

    @property
    def backend(self) -> str:
        """Its key in `engines.backends.BACKENDS`."""
        ...

    def require_memory(self, parameters: int) -> None:
        """Refuses a denoiser that cannot be built here, before any work.

        Args:
            parameters: number of its parameters.

        Raises:
            BuildError: naming what would fit.
        """
        ...

    def make(self, job: EngineJob, folder: Path) -> EngineEntry:
        """Writes the engine under `folder`, loads it as the runtime would, and measures its SQNR.

        Args:
            job: what to make.
            folder: a bundle folder, or one that stands for it; files go to `engines/` in it.

        Raises:
            BackendError: the backend refuses the graph.
        """
        ...


def build_denoiser(
    target: Target,
    module: torch.nn.Module,
    prefix: str,
    base: onnx.ModelProto,
    precision: Precision,
    range_batches: Sequence[Batch],
    check: AccuracyCheck,
    bundle: Path,
    scratch: Path,
    *,
    batch_per_picture: int,
    float32_inputs: frozenset[str],
    weights_of: BuiltDenoiser | None = None,
) -> BuiltDenoiser:
    """Builds the engine of one precision; of several recipe variants the one with the best SQNR is kept.

    Args:
        target: the backend to build for.
        module: float32 export wrapper.
        prefix: attribute of the wrapper that holds the denoiser.
        base: its FP16 graph.
        precision: what to build.
        range_batches: inputs for range calibration.
        check: inputs for the comparison with torch.
        bundle: bundle folder in the making; the engine goes to `engines/` in it.
        scratch: folder on the same file system; `onnx/<precision>.onnx` in it receives the strongly typed graph.
        batch_per_picture: see `EngineJob`.
        float32_inputs: see `EngineJob`.
        weights_of: for the reference only: the engine whose stored weights it is made of. Its floor is then that
            engine's.

    Raises:
        BuildError: no variant reaches the precision's SQNR floor, or the graph is not valid.
    """
    recipe = RECIPES[precision]
    best: tuple[BuiltDenoiser, Path] | None = None
    for variant in recipe.variants or (None,):
        name = "none" if variant is None else variant.name
        layers = {} if variant is None else _quantized(module, prefix, precision, variant, range_batches)
        graph = insert_qdq(base, layers, recipe) if layers else base
        trial = scratch / f"{precision.value}-{name}"
        onnx_file = trial / "onnx" / f"{precision.value}.onnx"
        onnx_file.parent.mkdir(parents=True)
        save_checked(graph, onnx_file)
        quantized = None if variant is None else precision
        floor = recipe.sqnr_floor_db if weights_of is None else weights_of.entry.sqnr_floor_db
        job = EngineJob(
            precision.value,
            graph,
            onnx_file,
            name,
            quantized,
            check,
            floor,
            batch_per_picture,
            module,
            layers if weights_of is None else weights_of.layers,
            half=True,
            float32_inputs=float32_inputs,
            weights_of=None if weights_of is None else weights_of.entry,
        )
        entry = target.make(job, trial)
        if best is None or entry.sqnr_db > best[0].entry.sqnr_db:
            if best is not None:
                shutil.rmtree(best[1])
            best = BuiltDenoiser(entry, layers), trial
        else:
            shutil.rmtree(trial)
    assert best is not None  # every recipe has a variant, and the reference counts as one
    built, trial = best
    require_floor(precision.value, built.entry)
    _move_files(trial / "onnx", scratch / "onnx")
    _move_files(trial / "engines", bundle / "engines")
    return built


def build_component(
    target: Target,
    module: torch.nn.Module,
    graph: onnx.ModelProto,
    name: str,
    check: AccuracyCheck,
    bundle: Path,
    scratch: Path,
    *,
    batch_per_picture: int,
) -> EngineEntry:
    """Builds the text encoder or the VAE decoder from FP16 weights; arguments as for `build_denoiser`.

    Raises:
        BuildError: its SQNR is below `COMPONENT_FLOOR_DB`, or the graph is not valid.
    """
    onnx_file = scratch / "onnx" / f"{name}.onnx"
    onnx_file.parent.mkdir(parents=True, exist_ok=True)
    save_checked(graph, onnx_file)
    job = EngineJob(
        name, graph, onnx_file, "none", None, check, COMPONENT_FLOOR_DB, batch_per_picture, module, {}, half=False
    )
    entry = target.make(job, bundle)
    require_floor(name, entry)
    return entry


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
    precision: Precision,
    variant: Variant,
    batches: Sequence[Batch],
) -> dict[str, QuantizedLayer]:
    recipe = RECIPES[precision]
    names = quantizable_layers(module, prefix, recipe)
    ranges = calibrate_ranges(module, names, recipe, variant, batches)
    return {name: quantize_layer(found, precision, recipe.block_size) for name, found in ranges.items()}


def tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """The specs of graph inputs or outputs."""
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=_DTYPES[value.type.tensor_type.elem_type],
            shape=tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def _move_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        os.replace(path, target / path.name)
