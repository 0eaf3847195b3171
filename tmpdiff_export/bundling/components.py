"""What a bundle has beside the denoiser: tokenizers, text encoder, VAE decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.documents import canonical_json
from engines.errors import BuildError
from engines.files import atomic_write_text, sha256_bytes
from engines.manifest import LATENTS
from engines.precision import REFERENCE
from engines.text import text_inputs
from engines.text_entry import TextEntry
from tmpdiff_export.bundling.engine import COMPONENT_FLOOR_DB, EngineName, StartedEngine, start_trial
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.weights import shared_tensors, store_plain, tensors_digest
from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.export import ExportInput
from tmpdiff_export.pipelines.families.components import VaeDecoder
from tmpdiff_export.pipelines.load import SourcePipeline
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE
from tmpdiff_export.targets.accuracy import AccuracyCheck, torch_outputs
from tmpdiff_export.targets.target import EngineJob, SourceModel, file_entry
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

    Raises:
        BuildError: a tokenizer has no form that the runtime reads.
    """
    texts = []
    for position, text in enumerate(source.texts):
        path = bundle / (f"tokenizer_{position + 1}.json" if position else "tokenizer.json")
        try:
            atomic_write_text(path, text.tokenizer.backend_tokenizer.to_str())
        except AttributeError:
            raise BuildError(
                f"{text.part.tokenizer} {type(text.tokenizer).__name__} has no `tokenizers` form; load the pipeline "
                "with a fast tokenizer"
            ) from None
        texts.append(
            TextEntry(
                tokenizer=file_entry(bundle, path),
                max_tokens=text.max_tokens,
                pad_token_id=int(text.tokenizer.pad_token_id),
                lowercase=source.family.lowercase,
            )
        )
    return texts


@dataclass(frozen=True, eq=False)
class StartedComponent:
    """A component's engine in the making.

    Attributes:
        engine: in the making.
        job: what it is made from.
        source: hash of the files that it comes from.
    """

    engine: StartedEngine
    job: EngineJob
    source: str


def start_text_encoder(site: Site) -> StartedComponent:
    """Starts all text encoders as one engine, checked on the tokens that the pipeline's own tokenizers give.

    Raises:
        BuildError: a text encoder cannot be exported.
    """
    source, family = site.source, site.source.family
    written = [*site.options.prompts[:_CHECK_PROMPTS], ""]
    read = [prompt.lower().strip() if family.lowercase else prompt for prompt in written]
    arrays: dict[str, torch.Tensor] = {}
    for position, text in enumerate(source.texts):
        tokens = text.tokenizer(
            read, padding="max_length", max_length=text.max_tokens, truncation=True, return_tensors="pt"
        )
        ids, mask = text_inputs(position)
        arrays[ids] = tokens.input_ids
        if text.part.masked:
            arrays[mask] = tokens.attention_mask
    inputs = [ExportInput(name, tensor, {0: "batch"}) for name, tensor in arrays.items()]
    batch = tuple(arrays.values())
    return _start(
        site,
        TEXT_ENCODER,
        lambda: family.wrap_text(source.pipe, source.height, source.width),
        inputs,
        family.text_outputs,
        [batch, tuple(tensor[:1] for tensor in batch)],
    )


def start_vae_decoder(site: Site, latents: torch.Tensor) -> StartedComponent:
    """Starts the VAE decoder, from latents [B, C, h, w] to pictures.

    Args:
        site: the build.
        latents: one sample close to a clean picture, float32 [1, C, h, w], for the check.

    Raises:
        BuildError: the decoder cannot be exported.
    """
    return _start(
        site,
        VAE_DECODER,
        lambda: VaeDecoder(site.source.pipe.vae),
        [ExportInput(LATENTS, latents, {0: "batch"})],
        {_IMAGE: {0: "batch"}},
        [(latents,), (torch.cat([latents, latents]),)],
    )


def _start(
    site: Site,
    name: str,
    wrap: Callable[[], torch.nn.Module],
    inputs: list[ExportInput],
    outputs: Mapping[str, Mapping[int, str]],
    batches: list[Batch],
) -> StartedComponent:
    source = site.source
    parts = [part for part in source.other_models if (part == _VAE) == (name == VAE_DECODER)]
    digest = [site.models_sha256[part] for part in parts]
    largest = max((source.stored(part) for part in parts), key=lambda item: item.parameters)
    module = wrap().eval()
    site.report(f"build {name.replace('_', ' ')}", 0, 1)

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

    size = [source.height, source.width, source.guidance_scale]
    key = site.key(source=digest, size=size, inputs=tensors_digest(batches), device=site.options.range_device)
    kept = site.stages.keep(f"check-{name}", key, references)
    model = SourceModel(
        module=module,
        read=read,
        inputs=inputs,
        outputs=outputs,
        check=AccuracyCheck.load(kept.folder / _CHECK, names, output),
        checked=kept.digest,
        batch_per_picture=1 if name == VAE_DECODER else 2,
        dtype=largest.dtype,
        half=False,
    )
    job = EngineJob(name, model, NO_RECIPE, REFERENCE, {}, COMPONENT_FLOOR_DB)
    prepared = site.target.prepare(job)
    hashed = sha256_bytes(canonical_json(digest))
    stored = [
        store_plain(site, site.target.form, model, readers, tensors, hashed)
        for readers, tensors in shared_tensors({name: prepared.tensors}).items()
    ]
    weights.cache_clear()  # they may be larger than all that the denoiser will need
    trial = start_trial(site, EngineName(name), prepared, stored, {"check": kept.digest})
    return StartedComponent(StartedEngine(name, [trial]), job, hashed)
