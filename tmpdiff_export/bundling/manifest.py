"""The manifest of a bundle, once its engines are in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.bundle import MANIFEST_NAME, SCHEDULER_NAME
from engines.documents import canonical_json
from engines.files import atomic_write_text
from engines.manifest import (
    MANIFEST_VERSION,
    EngineEntry,
    Manifest,
    ModelEntry,
    RangeCalibrationEntry,
    manifest_text,
)
from engines.text_entry import TextEntry
from engines.version import VERSION
from tmpdiff_export.bundling.components import TEXT_ENCODER, VAE_DECODER
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.pipelines.settings import write_setting
from tmpdiff_export.targets.target import file_entry


def write_manifest(
    bundle: Path,
    site: Site,
    texts: Sequence[TextEntry],
    entries: Mapping[str, Sequence[EngineEntry]],
    range_calibration: RangeCalibrationEntry,
) -> Manifest:
    """Writes the settings' sampler tables, `scheduler.json` and `manifest.json`.

    Args:
        bundle: bundle folder in the making; holds every other file.
        site: the build.
        texts: from `write_tokenizers`.
        entries: engines of the text encoder, of the VAE decoder and then of the denoisers, in the order of their precisions.
        range_calibration: what the ranges were found on.

    Returns:
        What was written.
    """
    source, facts = site.source, site.source.facts
    atomic_write_text(bundle / SCHEDULER_NAME, canonical_json(facts.scheduler).decode())
    denoisers = {name: tuple(several) for name, several in entries.items()}
    text_encoder, vae_decoder = denoisers.pop(TEXT_ENCODER), denoisers.pop(VAE_DECODER)
    data = Manifest.model_construct(
        version=MANIFEST_VERSION,
        created_with=f"tmpdiff-export {VERSION}",
        bundle_id="",
        settings_sha256="",
        model=ModelEntry(
            pipeline_class=type(source.pipe).__name__,
            denoiser_class=source.denoiser_class,
            denoiser_sha256=site.denoiser_sha256,
            parameters=sum(item.numel() for item in source.denoiser.parameters()),
            pixels_per_latent=facts.pixels_per_latent,
            size_step=facts.size_step,
            largest_side=facts.largest_side,
            rescales_guidance=source.family.rescales_guidance,
        ),
        settings=tuple(write_setting(bundle, setting) for setting in site.settings),
        scheduler=file_entry(bundle, bundle / SCHEDULER_NAME),
        texts=tuple(texts),
        zero_absent_negative=source.family.zero_absent_negative(source.pipe),
        text_encoder=text_encoder,
        vae_decoder=vae_decoder,
        denoisers=denoisers,
        range_calibration=range_calibration,
    ).model_dump(mode="json")
    text = manifest_text(data)
    manifest = Manifest.model_validate_json(text)
    atomic_write_text(bundle / MANIFEST_NAME, text)
    return manifest
