"""The manifest of a bundle, once its engines are in their places."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.bundle import MANIFEST_NAME
from engines.files import atomic_write_text
from engines.manifest import (
    EngineEntry,
    Manifest,
    ModelEntry,
    RangeCalibrationEntry,
    SamplingEntry,
    manifest_identity,
)
from engines.text_entry import TextEntry
from engines.version import VERSION
from tmpdiff_export.bundling.components import TEXT_ENCODER, VAE_DECODER
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.targets.target import file_entry


def write_manifest(
    bundle: Path,
    site: Site,
    texts: Sequence[TextEntry],
    entries: Mapping[str, EngineEntry],
    range_calibration: RangeCalibrationEntry,
) -> Manifest:
    """Writes `sampler.json` and `manifest.json`.

    Args:
        bundle: bundle folder in the making; holds every other file.
        site: the build.
        texts: from `write_tokenizers`.
        entries: of the text encoder, the VAE decoder and then the denoisers, in the order of their precisions.
        range_calibration: what the ranges were found on.

    Returns:
        What was written.
    """
    source, table = site.source, site.table
    sampler = bundle / "sampler.json"
    atomic_write_text(sampler, table.to_json())
    denoisers = dict(entries)
    text_encoder, vae_decoder = denoisers.pop(TEXT_ENCODER), denoisers.pop(VAE_DECODER)
    data = Manifest.model_construct(
        created_with=f"tmpdiff-export {VERSION}",
        bundle_id="",
        model=ModelEntry(
            pipeline_class=type(source.pipe).__name__,
            denoiser_class=source.denoiser_class,
            denoiser_sha256=site.denoiser_sha256,
            parameters=sum(item.numel() for item in source.denoiser.parameters()),
        ),
        sampling=SamplingEntry(
            scheduler=table.scheduler,
            num_inference_steps=table.num_inference_steps,
            num_steps=table.num_steps,
            guidance_scale=source.guidance_scale,
            latents_shape=source.latents_shape,
            height=source.height,
            width=source.width,
            constants=source.family.constants(source.height, source.width),
        ),
        sampler=file_entry(bundle, sampler),
        text=texts[0],
        further_texts=tuple(texts[1:]),
        zero_absent_negative=source.family.zero_absent_negative(source.pipe),
        text_encoder=text_encoder,
        vae_decoder=vae_decoder,
        denoisers=denoisers,
        range_calibration=range_calibration,
    ).model_dump(mode="json")
    data["bundle_id"] = manifest_identity(data)
    manifest = Manifest.model_validate_json(json.dumps(data))
    atomic_write_text(bundle / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")
    return manifest
