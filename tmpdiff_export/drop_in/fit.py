"""Whether a bundle fits a diffusers pipeline: its denoiser, and its scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engines.errors import BundleError, SamplerError
from engines.runtime import DenoiseRuntime
from engines.sampler import SamplerTable
from tmpdiff_export.drop_in.refusals import AttachedError
from tmpdiff_export.drop_in.step_finder import close, listed
from tmpdiff_export.pipelines.families.family import Family
from tmpdiff_export.pipelines.families.table import FAMILIES, family_of_bundle
from tmpdiff_export.pipelines.scheduler_table import TOLERANCE, sampler_table


def fitting_family(pipeline: str, denoisers: Mapping[str, Any], runtime: DenoiseRuntime) -> Family:
    """The family of the bundle, after checking that the pipeline's denoiser is of it too.

    Args:
        pipeline: class name of the pipeline.
        denoisers: its own ones, by the attribute that holds them.
        runtime: with the bundle.

    Raises:
        BundleError: the bundle was built from another denoiser.
    """
    model = runtime.manifest.model
    taken = {spec.name for spec in runtime.manifest.reference.inputs}
    family = family_of_bundle(runtime.manifest)
    wanted = model.denoiser_class
    if family is None:
        raise BundleError(
            f"bundle {runtime.bundle.folder} was built from the {wanted} of a {model.pipeline_class}, and its engines take "
            f"{', '.join(sorted(taken))}; this release attaches bundles of {', '.join(FAMILIES)}"
        )
    component = family.component
    denoiser = denoisers.get(component)
    if type(denoiser).__name__ != wanted:
        received = ", ".join(f"{name} of class {type(module).__name__}" for name, module in denoisers.items())
        raise BundleError(
            f"{pipeline} has {received or 'neither a transformer nor a unet'}; bundle "
            f"{runtime.bundle.folder} was built from a {component} of class {wanted}; build a bundle from this pipeline"
        )
    reason = family.refusal(denoiser)
    if reason is not None:
        raise BundleError(
            f"bundle {runtime.bundle.folder} does not fit the {component} of this {pipeline}: {reason}; "
            "build a bundle from this pipeline"
        )
    return family


def require_plain(pipeline: str, component: str, denoiser: Any) -> None:
    """Refuses a denoiser that does more than its weights and configuration say, which engines do not.

    Args:
        pipeline: class name of the pipeline.
        component: attribute that holds the denoiser.
        denoiser: the pipeline's own.

    Raises:
        AttachedError: it has adapters, FreeU, a cache, or is offloaded layer by layer.
    """
    extras = {
        "LoRA adapters": (getattr(denoiser, "peft_config", None), "pipe.unload_lora_weights()"),
        "an IP adapter": (
            getattr(denoiser, "encoder_hid_proj", None) or getattr(denoiser, "image_proj", None),
            "pipe.unload_ip_adapter()",
        ),
        "FreeU": (
            any(getattr(block, "s1", None) for block in getattr(denoiser, "up_blocks", ())),
            "pipe.disable_freeu()",
        ),
        "sequential offloading": (
            denoiser.device.type == "meta" and hasattr(denoiser, "_hf_hook"),
            "pipe.remove_all_hooks()",
        ),
        "a cache": (getattr(denoiser, "is_cache_enabled", False), f"pipe.{component}.disable_cache()"),
    }
    for what, (present, undo) in extras.items():
        if present:
            raise AttachedError(
                f"the {component} of this {pipeline} has {what}, which a bundle's engines have not; call {undo} before the "
                "bundle is attached"
            )


def require_scheduler(pipe: Any, family: Family, runtime: DenoiseRuntime) -> None:
    """Refuses a scheduler that does not do what the sampler table of the runtime's setting does.

    Compares trajectories, not coefficients: tables read on two machines differ in the last bits.

    Raises:
        SamplerError: it is of another class, or configured otherwise.
    """
    scheduler, expected = pipe.scheduler, runtime.table
    name = type(scheduler).__name__
    if name != expected.scheduler:
        raise SamplerError(
            f"the pipeline's scheduler is a {name}, setting {runtime.setting.name} of the bundle has a {expected.scheduler}; "
            "set pipe.scheduler to one of that class, attach with setting= another one of the bundle's, or build a bundle "
            "from the pipeline as it is"
        )
    steps, (_, rows, columns) = expected.num_inference_steps, runtime.setting.latents_shape
    config = getattr(pipe, family.component).config
    table = sampler_table(
        scheduler, steps, **family.sampler_options(scheduler, steps, rows * columns // family.token_side(config) ** 2)
    )
    if table.num_steps != expected.num_steps or not close(table.timesteps, expected.timesteps).all():
        differs = f"timesteps {listed(table.timesteps)}, the bundle's are {listed(expected.timesteps)}"
    elif (error := _trajectory_error(table, expected)) > TOLERANCE:
        differs = f"samples that are off by {error:.1e} relative from the bundle's ({TOLERANCE:.0e} is allowed)"
    else:
        return
    raise SamplerError(
        f"the pipeline's {name} is configured otherwise than the one the bundle was built with: at "
        f"num_inference_steps={steps} it gives {differs}; load the scheduler from the pipeline "
        "folder that was built from, attach with setting= another one of the bundle's, or build a bundle from the "
        "pipeline as it is"
    )


def _trajectory_error(table: SamplerTable, expected: SamplerTable) -> float:
    """Largest relative difference (L2 norm) of denoiser inputs and samples, over a run with random outputs."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 16, 16))
    state, reference = table.initial(noise), expected.initial(noise)
    worst = 0.0
    for _ in range(expected.num_steps):
        output = rng.standard_normal(noise.shape)
        pairs = [(table.model_input(state), expected.model_input(reference))]
        state, reference = table.advance(state, output), expected.advance(reference, output)
        pairs.append((state.latents, reference.latents))
        for got, wanted in pairs:
            worst = max(worst, float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)))
    return worst
