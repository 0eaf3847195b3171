"""A setting of a bundle as a user asks for it: found, or added to the bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from calibration.measure.evaluator import ShorterLoop
from engines.bundle import MANIFEST_NAME, Bundle
from engines.documents import read_json
from engines.errors import BuildError, BundleError, SamplerError
from engines.files import atomic_write_text
from engines.manifest import Manifest, engine_for, manifest_text
from engines.setting_choice import SettingChoice
from engines.setting_entry import SettingEntry, choose_setting
from tmpdiff_export.pipelines.families.table import FAMILIES, family_of_bundle
from tmpdiff_export.pipelines.settings import PipelineFacts, SettingRequest, resolve, setting_entry, write_setting


@dataclass(frozen=True)
class Wanted:
    """A setting as the command line has it.

    Attributes:
        choice: picks one that is there, and the one that a new one begins with.
        guidance_scale: None for any.
        text_length: None for any.
        scheduler: see `SettingRequest`; None for any.
    """

    choice: SettingChoice = field(default_factory=SettingChoice)
    guidance_scale: float | None = None
    text_length: int | None = None
    scheduler: str | None = None


def open_setting(folder: Path, wanted: Wanted) -> tuple[SettingEntry, bool]:
    """The setting of a bundle that is wanted, and whether it was added to the bundle for that.

    What the user leaves open is that of the first setting that bears the name asked for, or of the bundle's first.

    Raises:
        BundleError: the bundle is damaged, or of a release whose bundles have one setting; or no engine of it runs the
            size or text length; or a scheduler is left open that a file had configured.
        BuildError: the pipeline that the bundle was built from cannot have such a setting.
        SamplerError: the scheduler cannot be compiled to a table.
    """
    bundle = Bundle.open(folder)
    choice, settings = wanted.choice, bundle.manifest.settings
    if wanted.scheduler is None:
        for entry in settings:
            if (
                entry.fits(choice)
                and wanted.guidance_scale in (None, entry.guidance_scale)
                and wanted.text_length in (None, entry.text_length)
            ):
                return entry, False
    base, facts = choose_setting(settings, SettingChoice(named=choice.named)), pipeline_facts(bundle)
    begun = _request(facts, base, wanted.scheduler)
    request = replace(
        begun,
        num_steps=choice.steps or begun.num_steps,
        size=choice.size or begun.size,
        guidance_scale=begun.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale,
        text_length=wanted.text_length or begun.text_length,
    )
    made = resolve(facts, request)
    with _alone(folder):
        manifest = Bundle.open(folder).manifest
        known = next((entry for entry in manifest.settings if entry.name == made.name), None)
        if known is not None:
            return known, False
        _require_engines(manifest, setting_entry(made))
        entry = write_setting(folder, made)
        data = read_json(folder / MANIFEST_NAME, "manifest", BundleError)
        data["settings"].append(entry.model_dump(mode="json"))
        text = manifest_text(data)
        Manifest.model_validate(json.loads(text))
        atomic_write_text(folder / MANIFEST_NAME, text)
    return entry, True


def shorter_loop(bundle: Bundle, entry: SettingEntry, most: int) -> ShorterLoop:
    """A setting's scheduler with fewer steps: the most that take no more than so many loop iterations.

    Raises:
        BundleError: the bundle does not say how its settings are made.
        SamplerError: the scheduler cannot be compiled to a table of so few steps.
    """
    facts = pipeline_facts(bundle)
    request = _request(facts, entry, None)
    # loops of second order have more iterations than steps
    steps = min(most * entry.num_inference_steps // entry.num_steps + 1, entry.num_inference_steps - 1)
    while steps >= 1:
        table = resolve(facts, replace(request, num_steps=steps)).table
        if table.num_steps <= most:
            return ShorterLoop(table.to_json(), table.num_steps)
        steps -= 1
    raise SamplerError(f"scheduler {entry.scheduler} has no loop of at most {most} iterations; allow more latency")


def pipeline_facts(bundle: Bundle) -> PipelineFacts:
    """What settings of a bundle depend on.

    Raises:
        BundleError: the bundle is of a release whose bundles have one setting, or of a family that this one does not know.
    """
    manifest, model = bundle.manifest, bundle.manifest.model
    if manifest.scheduler is None or model.pixels_per_latent is None or model.size_step is None:
        raise BundleError(
            f"bundle {bundle.folder} was built by {manifest.created_with}, whose bundles have one setting "
            f"({manifest.settings[0].described}); build it again to give it more"
        )
    family = family_of_bundle(manifest)
    if family is None:
        raise BundleError(
            f"bundle {bundle.folder} was built from the {model.denoiser_class} of a {model.pipeline_class}; this release adds "
            f"settings to bundles of {', '.join(FAMILIES)}"
        )
    own = manifest.settings[0]
    return PipelineFacts(
        family=family,
        scheduler=json.loads(bundle.read(manifest.scheduler)),
        size=(own.height, own.width),
        pixels_per_latent=model.pixels_per_latent,
        size_step=model.size_step,
        largest_side=model.largest_side,
        latent_channels=own.latents_shape[0],
        guidance_scale=own.guidance_scale,
        takes_guidance_scale=family.takes_guidance_scale,
        text_length=own.text_length,
    )


def _request(facts: PipelineFacts, base: SettingEntry, scheduler: str | None) -> SettingRequest:
    """What makes a setting that is there; with another scheduler, if one is given."""
    request = SettingRequest(
        base.num_inference_steps, (base.height, base.width), base.guidance_scale, base.text_length, scheduler
    )
    if scheduler is not None:
        return request
    for same in (request, replace(request, scheduler=base.scheduler)):
        if resolve(facts, same).name == base.name:
            return same
    raise BundleError(
        f"setting {base.name} has a scheduler that a file configured, which is not in the bundle; pass the file again with "
        "--scheduler FILE.json"
    )


def _require_engines(manifest: Manifest, entry: SettingEntry) -> None:
    for name, entries in {
        "the text encoder": manifest.text_encoder,
        "the VAE decoder": manifest.vae_decoder,
        **{f"the {name} denoiser": entries for name, entries in manifest.denoisers.items()},
    }.items():
        if engine_for(entries, entry) is None:
            raise BundleError(
                f"setting {entry.name} needs an engine of {name} for its size and text length; the bundle has engines for "
                f"{'; '.join(engine.shapes(manifest.model.pixels_per_latent) for engine in entries)}: pick one of these, or build the bundle with that --size and "
                "--text-length"
            )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process changes the manifest of a bundle while the block runs."""
    import fcntl  # not on every system that reads calibrations

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise BuildError(f"bundle {folder} cannot be given a setting: {error.strerror or error}") from error
    finally:
        os.close(descriptor)
