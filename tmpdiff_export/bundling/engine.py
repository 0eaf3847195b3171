"""From an exported graph to a checked engine file: quantize, hand to the target backend, compare with torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch

from engines.errors import BuildError
from engines.manifest import EngineEntry
from engines.precision import REFERENCE, Precision
from tmpdiff_export.bundling.exported import ExportedModel
from tmpdiff_export.devices import CPU, Batch
from tmpdiff_export.onnx_graphs.external import save_checked
from tmpdiff_export.onnx_graphs.qdq import insert_qdq
from tmpdiff_export.pipelines.families.family import DENOISER
from tmpdiff_export.quantization.codes import AttentionRange, QuantizedLayer, quantize_layer
from tmpdiff_export.quantization.ranges import calibrate_ranges, quantizable_layers
from tmpdiff_export.quantization.recipes import RECIPES, Variant
from tmpdiff_export.targets.target import EngineJob, Start

# Text encoder and VAE decoder run once per picture, in FP32 math from FP16 weights.
COMPONENT_FLOOR_DB = 40.0


@dataclass(frozen=True, eq=False)
class Workplace:
    """Where the engines of a build are made.

    Attributes:
        start: begins an engine of the backend.
        bundle: bundle folder in the making; engines go to `engines/` in it.
        scratch: folder on the same file system; `onnx/<name>.onnx` in it receives the strongly typed graphs.
    """

    start: Start
    bundle: Path
    scratch: Path


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that is in its place.

    Attributes:
        entry: its manifest entry.
        layers: its quantized layers by name, where they were to be kept.
    """

    entry: EngineEntry
    layers: Mapping[str, QuantizedLayer]


@dataclass(frozen=True, eq=False)
class StartedEngine:
    """An engine in the making.

    Attributes:
        entries: of every recipe variant, in the order of the recipe.
        finish: waits for them, keeps the best one and puts its files in their place; to be called once. Raises
            BuildError where it is below its SQNR floor, and what making a variant raised.
    """

    entries: tuple[Future[EngineEntry], ...]
    finish: Callable[[], BuiltEngine]

    def ready(self) -> bool:
        """Whether every variant is made, so that `finish` need not wait.

        Raises:
            TmpDiffError: a variant failed; what making it raised.
        """
        made = [entry for entry in self.entries if entry.done()]
        for entry in made:
            entry.result()
        return len(made) == len(self.entries)


@dataclass(frozen=True, eq=False)
class _Trial:
    """One recipe variant in the making, in a folder of its own."""

    entry: Future[EngineEntry]
    layers: Mapping[str, QuantizedLayer]
    folder: Path


@dataclass(frozen=True, eq=False)
class DenoiserJob:
    """The denoiser at one precision.

    Attributes:
        precision: what to build.
        range_batches: inputs for range calibration.
        range_device: where that runs, "cpu" or "cuda".
        weights_of: for the reference only: the engine whose stored weights it is made of. Its floor is then that
            engine's.
        keep_layers: keep the quantized layers, for a `weights_of`; they are as large as the weights.
        attention: see `EngineJob`.
    """

    precision: Precision
    range_batches: Sequence[Batch]
    range_device: str = CPU
    weights_of: BuiltEngine | None = None
    keep_layers: bool = False
    attention: Mapping[str, AttentionRange] = field(default_factory=dict)


def start_denoiser(place: Workplace, model: ExportedModel, asked: DenoiserJob) -> StartedEngine:
    """Starts the engine of one precision; of several recipe variants the one with the best SQNR is kept.

    Raises:
        BuildError: the graph is not valid.
    """
    precision, weights_of = asked.precision, asked.weights_of
    recipe = RECIPES[precision]
    trials: list[_Trial] = []
    for variant in recipe.variants or (None,):
        name = "none" if variant is None else variant.name
        layers = {} if variant is None else _quantized(model.module, asked, variant)
        graph = insert_qdq(model.graph, layers, recipe) if layers else model.graph
        trial = place.scratch / f"{precision.value}-{name}"
        job = EngineJob(
            name=precision.value,
            graph=graph,
            onnx_file=_checked(graph, trial, precision.value),
            recipe=name,
            quantized=None if variant is None else precision,
            check=model.check,
            floor_db=recipe.sqnr_floor_db if weights_of is None else weights_of.entry.sqnr_floor_db,
            batch_per_picture=model.batch_per_picture,
            module=model.module,
            layers=layers if weights_of is None else weights_of.layers,
            half=model.half,
            float32_inputs=model.float32_inputs,
            weights_of=None if weights_of is None else weights_of.entry,
            attention=asked.attention,
        )
        trials.append(_Trial(place.start(job, trial), layers if asked.keep_layers else {}, trial))

    def finish() -> BuiltEngine:
        best = max(trials, key=lambda trial: trial.entry.result().sqnr_db)  # the first of equals
        for trial in trials:
            if trial is not best:
                shutil.rmtree(trial.folder)
        entry = best.entry.result()
        require_floor(precision.value, entry)
        _move_files(best.folder / "onnx", place.scratch / "onnx")
        _move_files(best.folder / "engines", place.bundle / "engines")
        return BuiltEngine(entry, best.layers)

    return StartedEngine(tuple(trial.entry for trial in trials), finish)


def start_component(place: Workplace, model: ExportedModel, name: str) -> StartedEngine:
    """Starts the text encoder or the VAE decoder, from FP16 weights.

    Raises:
        BuildError: the graph is not valid.
    """
    job = EngineJob(
        name=name,
        graph=model.graph,
        onnx_file=_checked(model.graph, place.scratch, name),
        recipe="none",
        quantized=None,
        check=model.check,
        floor_db=COMPONENT_FLOOR_DB,
        batch_per_picture=model.batch_per_picture,
        module=model.module,
        layers={},
        half=model.half,
    )
    made = place.start(job, place.bundle)

    def finish() -> BuiltEngine:
        require_floor(name, made.result())
        return BuiltEngine(made.result(), {})

    return StartedEngine((made,), finish)


def require_floor(name: str, entry: EngineEntry) -> None:
    """Refuses an engine that is less accurate than its precision can be.

    Raises:
        BuildError: naming the measured SQNR and the floor.
    """
    if not entry.sqnr_db >= entry.sqnr_floor_db:
        quantized = name in {precision.value for precision in Precision} - {REFERENCE.value}
        fix = (
            "leave this precision out of --precisions, or give more varied --prompts"
            if quantized
            else "the model loses too much on this backend; build with another --backend"
        )
        raise BuildError(
            f"{name}: the built engine has an SQNR of {entry.sqnr_db:.1f} dB against FP32 torch on real inputs, "
            f"its floor is {entry.sqnr_floor_db:.1f} dB; {fix}"
        )


def _checked(graph: onnx.ModelProto, folder: Path, name: str) -> Path:
    """Writes `onnx/<name>.onnx` in a folder."""
    path = folder / "onnx" / f"{name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checked(graph, path)
    return path


def _quantized(module: torch.nn.Module, asked: DenoiserJob, variant: Variant) -> dict[str, QuantizedLayer]:
    recipe = RECIPES[asked.precision]
    names = quantizable_layers(module, DENOISER, recipe)
    ranges = calibrate_ranges(module, names, recipe, variant, asked.range_batches, asked.range_device)
    return {name: quantize_layer(found, asked.precision, recipe.block_size) for name, found in ranges.items()}


def _move_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        os.replace(path, target / path.name)
