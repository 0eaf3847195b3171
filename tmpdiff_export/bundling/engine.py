"""From an exported graph to a checked engine file: quantize, hand to the target backend, compare with torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch

from engines.errors import BuildError
from engines.manifest import EngineEntry
from engines.precision import REFERENCE, Precision
from tmpdiff_export.devices import CPU, Batch
from tmpdiff_export.onnx_graphs.export import save_checked
from tmpdiff_export.onnx_graphs.qdq import insert_qdq
from tmpdiff_export.quantization.codes import QuantizedLayer, quantize_layer
from tmpdiff_export.quantization.ranges import calibrate_ranges, quantizable_layers
from tmpdiff_export.quantization.recipes import RECIPES, Variant
from tmpdiff_export.targets.target import AccuracyCheck, EngineJob, Start

if TYPE_CHECKING:  # it registers an operator with torch, which other backends do not need
    from tmpdiff_export.targets.torch.attention import AttentionRange

# Text encoder and VAE decoder run once per picture, in FP32 math from FP16 weights.
COMPONENT_FLOOR_DB = 40.0


def with_larger_batch(batches: Sequence[Batch]) -> list[Batch]:
    """`batches` and one of twice the size: a batch size baked into a graph shows there."""
    first, last = batches[0], batches[-1]
    return [*batches, tuple(torch.cat(pair) for pair in zip(first, last, strict=True))]


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


def start_denoiser(
    start: Start,
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
    weights_of: BuiltEngine | None = None,
    keep_layers: bool = False,
    attention: Mapping[str, AttentionRange] | None = None,
    range_device: str = CPU,
) -> StartedEngine:
    """Starts the engine of one precision; of several recipe variants the one with the best SQNR is kept.

    Args:
        start: begins an engine of the backend.
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
        keep_layers: keep the quantized layers, for a `weights_of`; they are as large as the weights.
        attention: see `EngineJob`.
        range_device: where range calibration runs, "cpu" or "cuda".

    Raises:
        BuildError: the graph is not valid.
    """
    recipe = RECIPES[precision]
    trials: list[_Trial] = []
    for variant in recipe.variants or (None,):
        name = "none" if variant is None else variant.name
        layers = {} if variant is None else _quantized(module, prefix, precision, variant, range_batches, range_device)
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
            attention=attention or {},
        )
        trials.append(_Trial(start(job, trial), layers if keep_layers else {}, trial))

    def finish() -> BuiltEngine:
        best = max(trials, key=lambda trial: trial.entry.result().sqnr_db)  # the first of equals
        for trial in trials:
            if trial is not best:
                shutil.rmtree(trial.folder)
        entry = best.entry.result()
        require_floor(precision.value, entry)
        _move_files(best.folder / "onnx", scratch / "onnx")
        _move_files(best.folder / "engines", bundle / "engines")
        return BuiltEngine(entry, best.layers)

    return StartedEngine(tuple(trial.entry for trial in trials), finish)


def start_component(
    start: Start,
    module: torch.nn.Module,
    graph: onnx.ModelProto,
    name: str,
    check: AccuracyCheck,
    bundle: Path,
    scratch: Path,
    *,
    batch_per_picture: int,
) -> StartedEngine:
    """Starts the text encoder or the VAE decoder, from FP16 weights; arguments as for `start_denoiser`.

    Raises:
        BuildError: the graph is not valid.
    """
    onnx_file = scratch / "onnx" / f"{name}.onnx"
    onnx_file.parent.mkdir(parents=True, exist_ok=True)
    save_checked(graph, onnx_file)
    job = EngineJob(
        name, graph, onnx_file, "none", None, check, COMPONENT_FLOOR_DB, batch_per_picture, module, {}, half=False
    )
    made = start(job, bundle)

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


def _quantized(
    module: torch.nn.Module,
    prefix: str,
    precision: Precision,
    variant: Variant,
    batches: Sequence[Batch],
    device: str,
) -> dict[str, QuantizedLayer]:
    recipe = RECIPES[precision]
    names = quantizable_layers(module, prefix, recipe)
    ranges = calibrate_ranges(module, names, recipe, variant, batches, device)
    return {name: quantize_layer(found, precision, recipe.block_size) for name, found in ranges.items()}


def _move_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        os.replace(path, target / path.name)
