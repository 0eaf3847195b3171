"""The denoiser in real runs: what it is handed, what FP32 torch makes of it, and the ranges of its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.manifest import MODEL_OUTPUT
from engines.precision import REFERENCE, Precision
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.stages import Kept
from tmpdiff_export.devices import Batch
from tmpdiff_export.pipelines.families.family import DENOISER
from tmpdiff_export.pipelines.load import computing, gather_batches
from tmpdiff_export.quantization.codes import AttentionRange, LayerRange
from tmpdiff_export.quantization.ranges import calibrate_ranges, quantizable_layers, spread
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.targets.accuracy import AccuracyCheck, step_sizes, torch_outputs
from tmpdiff_export.targets.target import SourceModel
from tmpdiff_export.weights.files import places, write_tensors
from tmpdiff_export.weights.streamed import OnDevice, Read, streamed

# Prompts whose runs give the ranges, and one more whose run only checks the engines.
RANGE_PROMPTS = 3
RANGE_BATCHES = 24
CHECK_BATCHES = 6
_CHECK = "check.safetensors"
_BATCHES = "batches.safetensors"
_SCALES = "scales.safetensors"


@dataclass(frozen=True)
class Runs:
    """What real runs handed the denoiser.

    Attributes:
        ranges: inputs for range calibration.
        checks: inputs of the last prompt's run, which only check engines.
        num_prompts: how many prompts gave `ranges`.
        digest: of all that.
    """

    ranges: list[Batch]
    checks: list[Batch]
    num_prompts: int
    digest: str


def gather(site: Site, read: OnDevice) -> Runs:
    """Runs the pipeline, or finds what it once gave.

    Args:
        site: the build.
        read: the denoiser's weights.
    """
    source, options = site.source, site.options
    prompts = (*options.prompts[: min(RANGE_PROMPTS, len(options.prompts) - 1)], options.prompts[-1])
    names = list(source.family.inputs)
    steps = site.table.num_steps
    seen = 0

    def on_step() -> None:
        nonlocal seen
        seen += 1
        site.report("run pipeline", seen, steps * len(prompts))

    def run(folder: Path) -> dict[str, int]:
        site.report("load text encoders", 0, 1)
        with source.filled(), computing(source, read, options.range_device):
            batches = gather_batches(source, prompts, options.num_steps, options.seed, on_step)
        kept = [*spread(batches[:-steps], RANGE_BATCHES), *spread(batches[-steps:], CHECK_BATCHES)]
        tensors = {
            f"{index}.{name}": item for index, batch in enumerate(kept) for name, item in zip(names, batch, strict=True)
        }
        write_tensors(folder / _BATCHES, tensors)
        return {"checks": min(steps, CHECK_BATCHES), "count": len(kept)}

    key = site.key(
        source=site.pipeline_sha256,
        call=source.call_options(),
        steps=options.num_steps,
        seed=options.seed,
        prompts=list(prompts),
        device=options.range_device,
    )
    stage = site.stages.keep("runs", key, run)
    found = {name: place.read() for name, place in places(stage.folder / _BATCHES).items()}
    batches = [tuple(found[f"{index}.{name}"] for name in names) for index in range(stage.result["count"])]
    split = len(batches) - stage.result["checks"]
    return Runs(batches[:split], batches[split:], len(prompts) - 1, stage.digest)


def denoiser_model(site: Site, runs: Runs, read: OnDevice) -> tuple[SourceModel, str]:
    """The denoiser with its check, and a digest of the latter.

    FP32 torch says what it makes of the inputs that range calibration has not seen. Samples count for as much as the
    steps that they are from move the latents.
    """
    source, family = site.source, site.source.family
    module = family.wrap(source.pipe, source.height, source.width).eval()
    weights = _wrapped(read, module)
    batches = with_larger_batch(runs.checks)
    sizes = spread(step_sizes(site.table).tolist(), CHECK_BATCHES)
    rows = [(torch.full((len(batch[0]),), size),) for batch, size in zip(runs.checks, sizes, strict=True)]
    counts = tuple(item.numpy() for (item,) in with_larger_batch(rows))

    def references(folder: Path) -> None:
        site.report("run FP32 denoiser", 0, 1)
        found = torch_outputs(module, weights, batches, site.options.range_device)
        AccuracyCheck(tuple(family.inputs), MODEL_OUTPUT, tuple(batches), tuple(found), counts).save(folder / _CHECK)

    key = site.key(runs=runs.digest, device=site.options.range_device)
    kept = site.stages.keep("check-denoiser", key, references)
    model = SourceModel(
        module=module,
        read=_wrapped(source.weights.read, module),
        inputs=family.export_inputs(runs.ranges[0]),
        outputs={MODEL_OUTPUT: {0: "batch"}},
        check=AccuracyCheck.load(kept.folder / _CHECK, list(family.inputs), MODEL_OUTPUT),
        batch_per_picture=2 if source.doubled else 1,
        dtype=source.weights.dtype,
        half=True,
    )
    return model, kept.digest


@dataclass(frozen=True, eq=False)
class Ranges:
    """What range calibration found.

    Attributes:
        layers: by precision, variant and layer.
        attention: by name of the attention layer; empty where nobody asked.
    """

    layers: Mapping[Precision, Mapping[str, Mapping[str, LayerRange]]]
    attention: Mapping[str, AttentionRange]


def find_all_ranges(site: Site, runs: Runs, module: torch.nn.Module, read: OnDevice) -> Ranges:
    """The ranges of every precision and variant, or those that were once found.

    Raises:
        BuildError: a recipe finds no layer to quantize, or attention in FP8 none that can have it.
    """
    options = site.options
    wanted = [item for item in options.precisions if item is not REFERENCE]
    names = {item: quantizable_layers(module, DENOISER, RECIPES[item]) for item in wanted}
    weights = _wrapped(read, module)

    def find(folder: Path) -> dict[str, Any]:
        attention: dict[str, AttentionRange] = {}
        with contextlib.ExitStack() as stack:
            if options.fp8_attention:
                # it registers an operator with torch, which other backends do not need
                from tmpdiff_export.targets.torch.attention import require_ranges, watch_attention

                stack.callback(require_ranges, module, attention)
                stack.enter_context(watch_attention(module, attention))
            stack.enter_context(torch.inference_mode())
            stack.enter_context(streamed(module, weights, options.range_device))
            site.report("find ranges", 0, 1)
            found = calibrate_ranges(
                module, names, runs.ranges, lambda layer: weights(f"{layer}.weight"), options.range_device
            )
        return _written(folder, found, attention)

    key = site.key(
        runs=runs.digest,
        precisions=[item.value for item in wanted],
        attention=bool(options.fp8_attention),
        device=options.range_device,
    )
    kept = site.stages.keep("ranges", key, find)
    return _read(kept)


def _written(
    folder: Path,
    layers: Mapping[Precision, Mapping[str, Mapping[str, LayerRange]]],
    attention: Mapping[str, AttentionRange],
) -> dict[str, Any]:
    """Scales go to a file, numbers into the stage's result."""
    scales: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for precision, variants in layers.items():
        for variant, found in variants.items():
            label = f"{precision.value}/{variant}"
            numbers[label] = {name: [item.input_amax, item.shared_weight_amax] for name, item in found.items()}
            scales |= {
                f"{label}/{name}": item.pre_quant_scale
                for name, item in found.items()
                if item.pre_quant_scale is not None
            }
    write_tensors(folder / _SCALES, scales)
    return {
        "layers": numbers,
        "attention": {name: [item.query, item.key, item.value] for name, item in attention.items()},
    }


def _read(kept: Kept) -> Ranges:
    scales = {name: place.read() for name, place in places(kept.folder / _SCALES).items()}
    layers: dict[Precision, dict[str, dict[str, LayerRange]]] = {}
    for precision, recipe in RECIPES.items():
        for variant in recipe.variants:
            label = f"{precision.value}/{variant.name}"
            if label in kept.result["layers"]:
                layers.setdefault(precision, {})[variant.name] = {
                    name: LayerRange(amax, scales.get(f"{label}/{name}"), shared)
                    for name, (amax, shared) in kept.result["layers"][label].items()
                }
    return Ranges(layers, {name: AttentionRange(*item) for name, item in kept.result["attention"].items()})


def _wrapped(read: Read, module: torch.nn.Module) -> Read:
    """The tensors of an export wrapper by name: buffers are its own, parameters those of its denoiser."""
    buffers = dict(module.named_buffers())
    return lambda name: buffers[name] if name in buffers else read(name.removeprefix(f"{DENOISER}."))


def with_larger_batch(batches: Sequence[Batch]) -> list[Batch]:
    """`batches` and one of twice the size: a batch size baked into a graph shows there."""
    first, last = batches[0], batches[-1]
    return [*batches, tuple(torch.cat(pair) for pair in zip(first, last, strict=True))]
