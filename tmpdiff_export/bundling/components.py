"""What a bundle has beside the denoiser: tokenizers, text encoder, VAE decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engines.documents import canonical_json
from engines.files import atomic_write_text, sha256_bytes
from engines.manifest import LATENTS
from engines.precision import REFERENCE, Precision
from engines.text import text_inputs
from engines.text_entry import TextEntry
from tmpdiff_export.bundling.engine import (
    COMPONENT_FLOOR_DB,
    NARROW_WEIGHTS,
    NARROW_WEIGHTS_FLOOR_DB,
    EngineName,
    StartedEngine,
    start_trial,
)
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.weights import shared_tensors, store_codes, store_plain, tensors_digest
from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.export import ExportInput
from tmpdiff_export.pipelines.families.family import LATENT_AXES, with_clip_skip
from tmpdiff_export.pipelines.families.vae import picture_axes, vae_decoder
from tmpdiff_export.pipelines.load import SourcePipeline
from tmpdiff_export.pipelines.settings import Setting
from tmpdiff_export.quantization.codes import LayerRange
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE
from tmpdiff_export.targets.accuracy import AccuracyCheck, torch_outputs
from tmpdiff_export.targets.exported import linear_layers
from tmpdiff_export.targets.target import EngineJob, SourceModel
from tmpdiff_export.weights.streamed import taken_weights

TEXT_ENCODER = "text_encoder"
VAE_DECODER = "vae_decoder"

_VAE = "vae"
_IMAGE = "image"
_CHECK = "check.safetensors"
_CHECK_PROMPTS = 3


def write_tokenizers(source: SourcePipeline, bundle: Path) -> list[TextEntry]:
    """Writes `tokenizer.json`, `tokenizer_2.json` and so on.

    Args:
        source: the pipeline.
        bundle: bundle folder in the making.

    Returns:
        Their manifest entries, in the order of the text encoders.
    """
    for text in source.texts:
        atomic_write_text(bundle / text.entry.tokenizer.path, text.json)
    return [text.entry for text in source.texts]


@dataclass(frozen=True, eq=False)
class StartedComponent:
    """A component's engine in the making.

    Attributes:
        engine: in the making.
        job: what it is made from.
        source: hash of the files that it comes from.
        weight: of one of its layers by the layer's name.
    """

    engine: StartedEngine
    job: EngineJob
    source: str
    weight: Callable[[str], torch.Tensor]


def start_text_encoder(site: Site, setting: Setting, name: str = TEXT_ENCODER) -> StartedComponent:
    """Starts all text encoders as one engine, checked on the tokens that the runtime will give them.

    Args:
        site: the build.
        setting: one with the text length that it is for.
        name: of the engine.

    Raises:
        BuildError: a text encoder cannot be exported, or a tokenizer of the pipeline reads otherwise than the runtime.
    """
    source, family, clip_skip = site.source, site.source.family, site.options.clip_skip
    prompts = [*site.options.prompts[:_CHECK_PROMPTS], ""]
    arrays: dict[str, torch.Tensor] = {}
    site.report("read prompts", 0, 1)
    for position, text in enumerate(source.texts):
        text.require_same_reading(prompts)
        tokens = text.tokens(prompts, setting.text_length)
        ids, mask = text_inputs(position)
        arrays[ids] = torch.from_numpy(tokens.input_ids)
        if text.part.masked:
            arrays[mask] = torch.from_numpy(tokens.attention_mask)
    inputs = [ExportInput(name, tensor, {0: "batch"}) for name, tensor in arrays.items()]
    batch = tuple(arrays.values())
    return _start(
        site,
        name,
        lambda: family.wrap_text(source.pipe, clip_skip),
        inputs,
        with_clip_skip(family.text_outputs, clip_skip),
        [batch, tuple(tensor[:1] for tensor in batch)],
    )


def start_vae_decoder(site: Site, latents: Sequence[torch.Tensor], name: str = VAE_DECODER) -> StartedComponent:
    """Starts the VAE decoder, from latents [B, C, h, w] to pictures.

    Args:
        site: the build.
        latents: by picture size that it is to run, one sample close to a clean picture, float32 [1, C, h, w], for the
            check.
        name: of the engine.

    Raises:
        BuildError: the decoder cannot be exported.
    """
    return _start(
        site,
        name,
        lambda: vae_decoder(site.source.pipe, site.source.family),
        [ExportInput(LATENTS, latents[0], LATENT_AXES)],
        {_IMAGE: picture_axes(site.source.pipe)},
        [batch for item in latents for batch in ((item,), (torch.cat([item, item]),))],
    )


def with_narrow_weights(job: EngineJob) -> EngineJob:
    """The engine with its linear layers stored as INT8 codes; inputs of them, and all that is computed, stay as they are."""
    ranges = dict.fromkeys(linear_layers(job.model), LayerRange(None, None))
    return replace(
        job, recipe=NARROW_WEIGHTS, precision=Precision.INT8, ranges=ranges, floor_db=NARROW_WEIGHTS_FLOOR_DB
    )


def _start(
    site: Site,
    name: str,
    wrap: Callable[[], torch.nn.Module],
    inputs: list[ExportInput],
    outputs: Mapping[str, Mapping[int, str]],
    batches: list[Batch],
) -> StartedComponent:
    kind, _, shape = name.partition(".")
    source = site.source
    parts = [part for part in source.other_models if (part == _VAE) == (kind == VAE_DECODER)]
    digest = [site.models_sha256[part] for part in parts]
    largest = max((source.stored(part) for part in parts), key=lambda item: item.parameters)
    site.report(f"build {kind.replace('_', ' ')} {shape}".rstrip(), 0, 1)
    module = wrap().eval()

    @functools.cache
    def weights() -> dict[str, torch.Tensor]:
        with source.filled(parts):
            whole = wrap()
            return {**taken_weights(whole), **dict(whole.named_buffers())}

    def read(tensor: str) -> torch.Tensor:
        return weights()[tensor]

    names, output = [item.name for item in inputs], next(iter(outputs))

    def references(folder: Path) -> None:
        found = torch_outputs(module, read, batches, site.options.range_device)
        AccuracyCheck(tuple(names), output, tuple(batches), tuple(found)).save(folder / _CHECK)

    key = site.key(
        source=digest,
        inputs=tensors_digest(batches),
        clip_skip=site.options.clip_skip,
        device=site.options.range_device,
    )
    kept = site.stages.keep(f"check-{name}", key, references)
    model = SourceModel(
        module=module,
        read=read,
        inputs=inputs,
        outputs=outputs,
        check=AccuracyCheck.load(kept.folder / _CHECK, names, output),
        checked=kept.digest,
        batch_per_picture=1 if kind == VAE_DECODER else 2,
        dtype=largest.dtype,
        half=False,
        sizes=tuple(dict.fromkeys(tuple(b[0].shape[2:]) for b in batches)) if kind == VAE_DECODER else (),
    )
    job = EngineJob(name, model, NO_RECIPE, REFERENCE, {}, COMPONENT_FLOOR_DB)
    if kind == TEXT_ENCODER and site.options.text_encoder_weights is not None:
        job = with_narrow_weights(job)

    def weight(layer: str) -> torch.Tensor:
        return read(f"{layer}.weight")

    prepared = site.target.prepare(job)
    hashed = sha256_bytes(canonical_json(digest))
    stored = [
        store_plain(site, site.target.form, model, readers, tensors, hashed)
        for readers, tensors in shared_tensors({kind: prepared.tensors}).items()
    ]
    if job.ranges:
        stored.append(store_codes(site, site.target.form, job, hashed, weight))
    weights.cache_clear()  # they may be larger than all that the denoiser will need
    trial = start_trial(site, EngineName(name, job.recipe), prepared, stored, {"check": kept.digest})
    return StartedComponent(StartedEngine(name, [trial]), job, hashed, weight)
