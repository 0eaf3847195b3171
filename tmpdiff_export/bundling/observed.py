"""The denoiser in real runs: what it is handed, what FP32 torch makes of it, and the ranges of its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.precision import REFERENCE, Precision
from engines.setting_choice import size_text
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.stage_record import Kept
from tmpdiff_export.devices import Batch, on
from tmpdiff_export.pipelines.families.family import DENOISER
from tmpdiff_export.pipelines.load import computing, gather_batches
from tmpdiff_export.pipelines.settings import Setting
from tmpdiff_export.quantization.codes import AttentionRange, LayerRange
from tmpdiff_export.quantization.observers import Observed, observe
from tmpdiff_export.quantization.ranges import calibrate_ranges, observable_layers, quantizable_layers, spread
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.weights.files import places, write_tensors
from tmpdiff_export.weights.streamed import OnDevice, Read, streamed

# Prompts whose runs give the ranges, and one more whose run only checks the engines.
RANGE_PROMPTS = 3
SEARCH_BATCHES = 6
CHECK_BATCHES = 6
# Steps that a prompt is run for at other sizes and text lengths, and the inputs that are kept of them.
OTHER_STEPS = 4
OTHER_CHECKS = 2
_PREFIX = f"{DENOISER}."
_BATCHES = "batches.safetensors"
_READ = "read.safetensors"
_SCALES = "scales.safetensors"


@dataclass(frozen=True)
class Runs:
    """What real runs handed the denoiser and its layers.

    Attributes:
        observed: what layers have read in the runs of all prompts but the last.
        attention: what attention has, by name of the layer; empty where nobody asked.
        search: inputs of the denoiser in these runs, for searches of scales.
        checks: inputs of the last prompt's run, which only check engines.
        num_prompts: how many prompts were observed.
        num_batches: how many calls of the denoiser were.
        digest: of all that.
    """

    observed: Observed
    attention: Mapping[str, AttentionRange]
    search: list[Batch]
    checks: list[Batch]
    num_prompts: int
    num_batches: int
    digest: str


def gather(site: Site, module: torch.nn.Module, read: OnDevice) -> Runs:
    """Runs the pipeline in the default setting, or finds what it once gave.

    Args:
        site: the build.
        module: the denoiser's export wrapper.
        read: the denoiser's weights.

    Raises:
        BuildError: attention in FP8 is asked for, and no layer can have it.
    """
    source, options = site.source, site.options
    prompts = options.prompts[: min(RANGE_PROMPTS, len(options.prompts) - 1)]
    last = options.prompts[-1]
    inputs, steps = list(source.family.inputs), site.setting.table.num_steps
    layers = observable_layers(module, DENOISER)
    searched = spread(range(steps * len(prompts)), SEARCH_BATCHES)
    seen = 0

    def on_step() -> None:
        nonlocal seen
        seen += 1
        site.report("run pipeline", seen, steps * (len(prompts) + 1))

    def run(folder: Path) -> dict[str, Any]:
        site.report("load text encoders", 0, 1)
        batches: list[Batch] = []
        attention: dict[str, AttentionRange] = {}
        with source.filled(source.other_models), computing(source, read, options.range_device):
            site.report("run pipeline", seen, steps * (len(prompts) + 1))
            with _attention_watched(site, attention):
                observed = observe(
                    source.denoiser,
                    [name.removeprefix(_PREFIX) for name in layers],
                    lambda: batches.extend(gather_batches(source, site.setting, prompts, options.seed, on_step)),
                    searched,
                )
            checks = gather_batches(source, site.setting, [last], options.seed + len(prompts), on_step)
        kept = {"search": [batches[index] for index in searched], "check": spread(checks, CHECK_BATCHES)}
        _write_batches(folder, inputs, kept)
        write_tensors(folder / _READ, observed.tensors())
        return {
            "search": len(searched),
            "check": len(kept["check"]),
            "groups": [list(group) for group in observed.groups],
            "attention": {name: [item.query, item.key, item.value] for name, item in attention.items()},
        }

    key = site.key(
        source=site.pipeline_sha256,
        call=source.call_options(site.setting),
        steps=site.setting.table.num_inference_steps,
        seed=options.seed,
        prompts=[*prompts, last],
        attention=bool(options.fp8_attention),
        device=options.range_device,
    )
    stage = site.stages.keep("runs", key, run)
    found = _read_batches(stage, inputs)
    observed = Observed.of(
        {name: place.read() for name, place in places(stage.folder / _READ).items()}, stage.result["groups"]
    )
    return Runs(
        observed.renamed(_PREFIX),
        {f"{_PREFIX}{name}": AttentionRange(*item) for name, item in stage.result["attention"].items()},
        found["search"],
        found["check"],
        len(prompts),
        steps * len(prompts),
        stage.digest,
    )


def gather_checks(site: Site, setting: Setting, read: OnDevice) -> list[Batch]:
    """Inputs of the denoiser at another size or text length, which only check engines: a few steps of the last prompt.

    Args:
        site: the build.
        setting: one of `Site.shapes`.
        read: the denoiser's weights.
    """
    source, options = site.source, site.options
    inputs, prompt = list(source.family.inputs), options.prompts[-1]
    step = f"run pipeline at {size_text(setting.height, setting.width)}"
    seen = 0

    def on_step() -> None:
        nonlocal seen
        seen += 1
        site.report(step, seen, max(seen, OTHER_STEPS))

    def run(folder: Path) -> dict[str, Any]:
        site.report("load text encoders", 0, 1)
        with source.filled(source.other_models), computing(source, read, options.range_device):
            site.report(step, seen, OTHER_STEPS)
            batches = gather_batches(source, setting, [prompt], options.seed, on_step, OTHER_STEPS)
        kept = {"check": spread(batches, OTHER_CHECKS)}
        _write_batches(folder, inputs, kept)
        return {"check": len(kept["check"])}

    key = site.key(
        source=site.pipeline_sha256,
        call=source.call_options(setting),
        seed=options.seed,
        prompt=prompt,
        device=options.range_device,
    )
    return _read_batches(site.stages.keep(f"runs-{shape_name(site, setting)}", key, run), inputs)["check"]


def shape_name(site: Site, setting: Setting) -> str:
    """What tells engines of a picture size and text length from those of others, "" for the default ones."""
    parts = [
        "" if setting.latents_shape == site.setting.latents_shape else size_text(setting.height, setting.width),
        "" if setting.text_length == site.setting.text_length else f"t{setting.text_length}",
    ]
    return ".".join(part for part in parts if part)


def _write_batches(folder: Path, inputs: Sequence[str], kinds: Mapping[str, Sequence[Batch]]) -> None:
    write_tensors(
        folder / _BATCHES,
        {
            f"{kind}/{index}/{name}": item
            for kind, chosen in kinds.items()
            for index, batch in enumerate(chosen)
            for name, item in zip(inputs, batch, strict=True)
        },
    )


def _read_batches(kept: Kept, inputs: Sequence[str]) -> dict[str, list[Batch]]:
    tensors = {name: place.read() for name, place in places(kept.folder / _BATCHES).items()}
    return {
        kind: [tuple(tensors[f"{kind}/{index}/{name}"] for name in inputs) for index in range(kept.result[kind])]
        for kind in ("search", "check")
        if kind in kept.result
    }


@contextlib.contextmanager
def _attention_watched(site: Site, found: dict[str, AttentionRange]) -> Iterator[None]:
    if not site.options.fp8_attention:
        yield
        return
    # it registers an operator with torch, which other backends do not need
    from tmpdiff_export.targets.torch.attention import require_ranges, watch_attention

    with watch_attention(site.source.denoiser, found):
        yield
    require_ranges(site.source.denoiser, found)


Ranges = Mapping[Precision, Mapping[str, Mapping[str, LayerRange]]]
"""By precision, variant of its recipe and layer."""


def find_all_ranges(site: Site, runs: Runs, module: torch.nn.Module, read: OnDevice) -> Ranges:
    """The ranges of every precision and variant, or those that were once found.

    Raises:
        BuildError: a recipe finds no layer to quantize.
    """
    device = site.options.range_device
    wanted = [item for item in site.options.precisions if item is not REFERENCE]
    names = {item: quantizable_layers(module, DENOISER, RECIPES[item]) for item in wanted}
    weights = wrapped(read, module)

    def search() -> None:
        with torch.inference_mode(), streamed(module, weights, device):
            for index, batch in enumerate(runs.search):
                site.report("search scales", index, len(runs.search))
                module(*on(batch, device))

    def find(folder: Path) -> dict[str, Any]:
        site.report("find ranges", 0, 1)
        found = calibrate_ranges(module, names, runs.observed, search, lambda layer: weights(f"{layer}.weight"))
        return _written(folder, found)

    key = site.key(runs=runs.digest, precisions=[item.value for item in wanted], device=device)
    return _read(site.stages.keep("ranges", key, find))


def _written(folder: Path, layers: Ranges) -> dict[str, Any]:
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
    return numbers


def _read(kept: Kept) -> Ranges:
    scales = {name: place.read() for name, place in places(kept.folder / _SCALES).items()}
    layers: dict[Precision, dict[str, dict[str, LayerRange]]] = {}
    for precision, recipe in RECIPES.items():
        for variant in recipe.variants:
            label = f"{precision.value}/{variant.name}"
            if label in kept.result:
                layers.setdefault(precision, {})[variant.name] = {
                    name: LayerRange(amax, scales.get(f"{label}/{name}"), shared, variant.rank)
                    for name, (amax, shared) in kept.result[label].items()
                }
    return layers


def wrapped(read: Read, module: torch.nn.Module) -> Read:
    """The tensors of an export wrapper by name: buffers are its own, parameters those of its denoiser."""
    buffers = dict(module.named_buffers())
    return lambda name: buffers[name] if name in buffers else read(name.removeprefix(_PREFIX))
