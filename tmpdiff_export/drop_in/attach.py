"""A bundle inside a diffusers pipeline: its engines take the place of the pipeline's denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from tmpdiff_export.drop_in.denoiser import OUTPUTS, BundleDenoiser
from tmpdiff_export.drop_in.fit import fitting_family, require_scheduler


def attach(
    pipe: Any,
    bundle: Path | str | Bundle | DenoiseRuntime,
    *,
    schedule: Path | str | Schedule | None = None,
) -> Any:
    """Puts a bundle into a diffusers pipeline in place of its transformer or UNet.

    Afterwards every call of `pipe` runs the engines in the order of `schedule`, for any prompt, guidance
    scale, batch and seed, and for calls that start part-way through the loop. Text encoder, VAE and
    scheduler stay the pipeline's own. `pipe.transformer.last_run` tells which engine ran at which step.
    A pipeline that already holds a bundle gets the new one instead.

    From the same starting latents the pipeline's final latents are the runtime's up to rounding: the
    engines get the same inputs but for the last bits (the pipeline's text encoder and scheduler compute in
    torch). Where an engine quantizes activations, such bits can flip a rounding, and the flips add up.

    The weights of the pipeline's denoiser are not compared with those the bundle was built from: a
    bundle of one checkpoint attaches to a pipeline of another one of the same architecture.

    Args:
        pipe: the pipeline; changed in place. Its denoiser stays in memory for `detach`.
        bundle: bundle folder, or one that is open already (a runtime's loaded engines are shared).
        schedule: None for the calibrated one, a schedule file, "uniform:<precision>", or a schedule.

    Returns:
        `pipe`.

    Raises:
        BundleError: the bundle is damaged, was not calibrated, or was built from another denoiser class.
        ScheduleError: the schedule belongs to another bundle.
        SamplerError: the pipeline's scheduler is not the one the bundle was built with.
        BackendError: an engine cannot be loaded.
    """
    runtime = _runtime(bundle)
    denoisers = {name: _original(module) for name in OUTPUTS if (module := getattr(pipe, name, None)) is not None}
    family = fitting_family(type(pipe).__name__, denoisers, runtime)
    require_scheduler(pipe, family, runtime)
    if isinstance(schedule, Schedule):
        schedule.check(bundle_id=runtime.manifest.bundle_id, setting=runtime.setting, precisions=runtime.precisions)
    else:
        schedule = runtime.bundle.schedule(runtime.setting, schedule)
    for precision in dict.fromkeys(schedule.precisions):
        runtime.denoiser(precision)
    component = family.component
    setattr(pipe, component, BundleDenoiser(pipe, denoisers[component], family, runtime, schedule))
    return pipe


def detach(pipe: Any) -> Any:
    """Undoes `attach`.

    Args:
        pipe: changed in place. Its denoiser comes back as it was when the bundle was attached, on the same
            device: a pipeline that was moved since then has to be moved again with `pipe.to()`.

    Returns:
        `pipe`.

    Raises:
        ValueError: no bundle is attached to the pipeline.
    """
    for component in OUTPUTS:
        denoiser = getattr(pipe, component, None)
        if isinstance(denoiser, BundleDenoiser):
            setattr(pipe, component, denoiser.original)
            return pipe
    raise ValueError(f"{type(pipe).__name__} has no bundle attached; nothing to detach")


def _original(denoiser: Any) -> Any:
    """A pipeline's own denoiser, also where a bundle stands in its place."""
    return denoiser.original if isinstance(denoiser, BundleDenoiser) else denoiser


def _runtime(bundle: Path | str | Bundle | DenoiseRuntime) -> DenoiseRuntime:
    if isinstance(bundle, DenoiseRuntime):
        return bundle
    return DenoiseRuntime(bundle) if isinstance(bundle, Bundle) else DenoiseRuntime.load(bundle)
