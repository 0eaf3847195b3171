"""The table of families, and what it says of a pipeline.

Every entry of `DENOISERS` is a kind of denoiser with the pipelines around it; `FAMILIES` has them by pipeline class.
Everything else is generic.
"""

from __future__ import annotations

from typing import Any

from engines.errors import BuildError
from engines.manifest import Manifest
from tmpdiff_export.pipelines.families.family import Family
from tmpdiff_export.pipelines.families.flux import FLUX, FLUX_SCHNELL
from tmpdiff_export.pipelines.families.pixart import PIXART
from tmpdiff_export.pipelines.families.sana import SANA
from tmpdiff_export.pipelines.families.sd3 import SD3
from tmpdiff_export.pipelines.families.unet import UNET, UNET_SDXL
from tmpdiff_export.pipelines.families.vae import vae_refusal

DENOISERS: dict[str, Family] = {
    "pixart": PIXART,
    "sana": SANA,
    "flux": FLUX,
    "flux-schnell": FLUX_SCHNELL,
    "sd3": SD3,
    "unet": UNET,
    "unet-sdxl": UNET_SDXL,
}
FAMILIES: dict[str, tuple[Family, ...]] = {
    pipeline: tuple(family for family in DENOISERS.values() if pipeline in family.pipelines)
    for pipeline in dict.fromkeys(name for family in DENOISERS.values() for name in family.pipelines)
}


def require_supported(pipeline: str, denoiser: str | None) -> None:
    """Refuses a pipeline that cannot be built as a whole, by the names of its classes; nothing needs to be loaded.

    Args:
        pipeline: the pipeline's class name.
        denoiser: class name of its transformer or unet, None if it has none.

    Raises:
        BuildError: says what is supported at which level.
    """
    whole = f"whole pipelines of this release: {', '.join(FAMILIES)}"
    keys = [key for key, family in DENOISERS.items() if family.denoiser_class == denoiser]
    if denoiser is None:
        raise BuildError(f"{pipeline}: a pipeline without a transformer or unet is not supported; {whole}")
    if not keys:
        raise BuildError(
            f"{pipeline}: denoiser class {denoiser} is not supported; this release exports {_listed(DENOISERS)}; {whole}"
        )
    if all(family.denoiser_class != denoiser for family in FAMILIES.get(pipeline, ())):
        raise BuildError(
            f"pipeline class {pipeline} is not supported; its denoiser class {denoiser} is (tmpdiff_export.pipelines.families."
            f"table.DENOISERS: {', '.join(keys)}), the text encoders and the loop around it are not; {whole}"
        )


def family_of(pipe: Any) -> tuple[str, Family]:
    """The denoiser class name and family of a loaded pipeline that can be built as a whole.

    Raises:
        BuildError: the pipeline or its denoiser is not supported; says which, and what is.
    """
    pipeline = type(pipe).__name__
    found = [getattr(pipe, name, None) for name in ("transformer", "unet")]
    denoiser = next((module for module in found if module is not None), None)
    require_supported(pipeline, None if denoiser is None else type(denoiser).__name__)
    families = {family.refusal(denoiser): family for family in FAMILIES[pipeline]}
    if None in families:
        family = families[None]
        reason = family.pipeline_refusal(pipe) or vae_refusal(pipe, family)
        if reason is None:
            return family.denoiser_class, family
        families = {reason: family}
    raise BuildError(f"this {pipeline} cannot be built: {'; '.join(map(str, families))}")


def family_of_bundle(manifest: Manifest) -> Family | None:
    """The family that a bundle was built from, None where this release has none of its classes and engine inputs."""
    taken = {spec.name for spec in manifest.reference.inputs}
    fitting = (
        family
        for family in FAMILIES.get(manifest.model.pipeline_class, ())
        if set(family.inputs) == taken and family.denoiser_class == manifest.model.denoiser_class
    )
    return next(fitting, None)


def _listed(families: dict[str, Family]) -> str:
    return ", ".join(dict.fromkeys(family.denoiser_class for family in families.values()))
