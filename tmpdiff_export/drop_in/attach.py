"""A bundle inside a diffusers pipeline: its engines take the place of the pipeline's denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.reuse import engines_of
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from engines.setting_choice import SettingChoice
from tmpdiff_export.drop_in.denoiser import OUTPUTS, BundleDenoiser, stand_in
from tmpdiff_export.drop_in.fit import fitting_family, require_plain, require_scheduler
from tmpdiff_export.drop_in.refusals import refuse_methods, restore_methods


def attach(
    pipe: Any,
    bundle: Path | str | Bundle | DenoiseRuntime,
    *,
    setting: SettingChoice | None = None,
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

    What needs the denoiser's own layers (LoRA and IP adapters, FreeU, attention processors and slicing, caches,
    deep copies) is refused until `detach`. `save_pretrained` writes the pipeline with its own denoiser;
    offloading moves the other components. Reused steps extrapolate what the run's earlier calls returned; a call that has no
    such outputs (it begins too late, or changes its batch) is refused. A pipeline made by `from_pipe` runs the engines as well, as long as it
    keeps the scheduler; attach a bundle to it where it gets another one.

    The weights of the pipeline's denoiser are not compared with those the bundle was built from: a
    bundle of one checkpoint attaches to a pipeline of another one of the same architecture.

    Args:
        pipe: the pipeline; changed in place. Its denoiser stays in memory for `detach`.
        bundle: bundle folder, or one that is open already (a runtime's loaded engines are shared).
        setting: which of the bundle's, None for its first (or the one that a runtime was opened for). The pipeline is to be
            called with its number of steps and size.
        schedule: None for the calibrated one, a schedule file, "uniform:<precision>", or a schedule.

    Returns:
        `pipe`.

    Raises:
        BundleError: the bundle is damaged, was not calibrated, or was built from another denoiser class.
        AttachedError: the denoiser has something that engines would leave out, such as LoRA adapters.
        ScheduleError: the schedule belongs to another bundle or setting, or reuses more than it has computed.
        SamplerError: the pipeline's scheduler is not the one of the setting.
        BackendError: an engine cannot be loaded.
    """
    runtime = _runtime(bundle, setting)
    denoisers = {name: _original(module) for name in OUTPUTS if (module := getattr(pipe, name, None)) is not None}
    family = fitting_family(type(pipe).__name__, denoisers, runtime)
    component = family.component
    require_plain(type(pipe).__name__, component, denoisers[component])
    require_scheduler(pipe, family, runtime)
    if isinstance(schedule, Schedule):
        runtime.check(schedule)
    else:
        schedule = runtime.bundle.schedule(runtime.setting, schedule)
    for precision in engines_of(schedule.precisions):
        runtime.denoiser(precision)
    setattr(pipe, component, stand_in(pipe, denoisers[component], family, runtime, schedule))
    refuse_methods(pipe, component)
    return pipe


def detach(pipe: Any) -> Any:
    """Undoes `attach`.

    Args:
        pipe: changed in place. Its denoiser comes back as it was when the bundle was attached, on the same
            device and without torch.compile(): a pipeline that was moved, offloaded or compiled since then has to be so again.

    Returns:
        `pipe`.

    Raises:
        ValueError: no bundle is attached to the pipeline.
    """
    for component in OUTPUTS:
        denoiser = _uncompiled(getattr(pipe, component, None))
        if isinstance(denoiser, BundleDenoiser):
            setattr(pipe, component, denoiser.original)
            restore_methods(pipe)
            return pipe
    raise ValueError(f"{type(pipe).__name__} has no bundle attached; nothing to detach")


def _original(denoiser: Any) -> Any:
    """A pipeline's own denoiser, also where a bundle stands in its place."""
    denoiser = _uncompiled(denoiser)
    return denoiser.original if isinstance(denoiser, BundleDenoiser) else denoiser


def _uncompiled(module: Any) -> Any:
    """What torch.compile() was called with, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _runtime(bundle: Path | str | Bundle | DenoiseRuntime, setting: SettingChoice | None) -> DenoiseRuntime:
    if isinstance(bundle, DenoiseRuntime):
        return bundle if setting is None else bundle.at(setting)
    return DenoiseRuntime(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), setting=setting)
