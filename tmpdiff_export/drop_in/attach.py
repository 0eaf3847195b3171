"""A bundle inside a diffusers pipeline: its engines take the place of the pipeline's denoiser."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from engines.bundle import Bundle
from engines.errors import BundleError, SamplerError
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP
from engines.runtime import DenoiseRuntime
from engines.sampler import SamplerTable
from engines.schedule import Schedule
from tmpdiff_export.drop_in.step_finder import StepFinder, close, listed
from tmpdiff_export.pipelines.families import FAMILIES, Family, bind_call
from tmpdiff_export.pipelines.scheduler_table import TOLERANCE, sampler_table

OUTPUTS = {"transformer": Transformer2DModelOutput, "unet": UNet2DConditionOutput}

LATENTS_ARGUMENTS = {"hidden_states", "sample"}  # of transformers, of UNets
# The picture size is part of the engine; of FLUX, so are the positions of its tokens.
CONSTANT_ARGUMENTS = {"return_dict", "resolution", "aspect_ratio", "img_ids", "txt_ids"}


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
    family = _family(pipe, runtime)
    component = family.component
    denoiser = getattr(pipe, component)
    if isinstance(denoiser, BundleDenoiser):
        denoiser = denoiser.original
    _check_scheduler(pipe, family, runtime)
    if isinstance(schedule, Schedule):
        schedule.check(bundle_id=runtime.manifest.bundle_id, num_steps=runtime.num_steps, precisions=runtime.precisions)
    else:
        schedule = runtime.bundle.schedule(schedule)
    for precision in dict.fromkeys(schedule.precisions):
        runtime.denoiser(precision)
    setattr(pipe, component, BundleDenoiser(pipe, denoiser, family, runtime, schedule))
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


class BundleDenoiser(torch.nn.Module):
    """Takes the place of a pipeline's denoiser and runs a bundle's engines; made by `attach`. Not thread-safe.

    Attributes:
        config: the configuration of the denoiser it replaces.
        schedule: the schedule that is followed.
        runtime: the bundle and its loaded engines.
        last_run: (step index, precision) of every denoiser call of the last run, or of the current one.
    """

    def __init__(
        self, pipe: Any, denoiser: torch.nn.Module, family: Family, runtime: DenoiseRuntime, schedule: Schedule
    ) -> None:
        """Everything has been checked by `attach`."""
        super().__init__()
        self.config = denoiser.config
        self.schedule = schedule
        self.runtime = runtime
        self.last_run: list[tuple[int, str]] = []
        self._original = [denoiser]  # in a list, so that moving this module leaves it where it is
        self._family = family
        self._finder = StepFinder(runtime.table)
        self._pipe = weakref.ref(pipe)
        self._scheduler = pipe.scheduler
        self._timesteps: torch.Tensor | None = None
        # Pipelines read dtype and device of a denoiser and set them with to(); this buffer holds them.
        self.register_buffer("_place", torch.empty(0, dtype=denoiser.dtype, device=denoiser.device), persistent=False)
        self.eval()

    @property
    def original(self) -> Any:
        """The denoiser that was replaced."""
        return self._original[0]

    @property
    def dtype(self) -> torch.dtype:
        """The pipeline's dtype; engines compute in their own."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """The pipeline's device; engines run on their own."""
        return self._place.device

    @property
    def add_embedding(self) -> Any:
        """The replaced UNet's; SDXL pipelines read its width."""
        return self.original.add_embedding

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """What FLUX pipelines call their denoiser in; engines cache nothing between calls."""
        yield

    @property
    def calls(self) -> Counter[str]:
        """Denoiser calls of `last_run` per precision."""
        return Counter(precision for _, precision in self.last_run)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoiser call, at the precision that the schedule has for its timestep.

        Args:
            args, kwargs: what the replaced denoiser takes; latents [B, C, h, w] of the bundle's size, any
                floating dtype and device, and one timestep for the whole batch.

        Returns:
            What the replaced denoiser returns (a tuple with `return_dict=False`, an output object otherwise),
            [B, `config.out_channels`, h, w] (of FLUX as tokens) in the dtype and on the device of the latents. Engines
            do not compute the learned variance, which no deterministic scheduler reads: those channels are zero.

        Raises:
            ValueError: latents of another size, different timesteps in one batch, or an argument that the
                engines do not take.
            ScheduleError: a timestep, or a loop, that the schedule does not cover.
            SamplerError: the pipeline was given another scheduler.
        """
        call = bind_call(self.original, args, kwargs)
        del call["self"]
        inputs = self._inputs(call)
        latents = inputs[LATENTS]
        step_index = self._step_index(inputs[TIMESTEP], call["timestep"])
        precision = self.schedule.precisions[step_index]
        inputs[TIMESTEP] = torch.full((len(latents),), float(self.runtime.table.timesteps[step_index]))
        arrays = {
            spec.name: np.ascontiguousarray(inputs[spec.name].detach().to("cpu", getattr(torch, spec.dtype)).numpy())
            for spec in self.runtime.manifest.denoisers[precision].inputs
        }
        values = torch.from_numpy(self.runtime.denoiser(precision).run(arrays)[MODEL_OUTPUT])
        self.last_run.append((step_index, precision))
        output = self._family.returned(values, self.config).to(latents.device, latents.dtype)
        return OUTPUTS[self._family.component](sample=output) if call.get("return_dict", True) else (output,)

    def _inputs(self, call: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Engine inputs by name, still as the pipeline passed them."""
        taken = LATENTS_ARGUMENTS | CONSTANT_ARGUMENTS | set(self._family.inputs)
        passed = {**call, **(call.get("added_cond_kwargs") or {})}
        passed.pop("added_cond_kwargs", None)
        given = {
            name for name, value in passed.items() if not (value is None or (isinstance(value, dict) and not value))
        }
        if given - taken:
            raise ValueError(
                f"the denoiser was called with {', '.join(sorted(given - taken))}, which the bundle's engines do not "
                "take; call the pipeline without it, or detach the bundle"
            )
        needed = set(self._family.inputs) - {LATENTS}
        if needed - given or not given & LATENTS_ARGUMENTS:
            raise ValueError(
                f"the denoiser was called with {', '.join(sorted(given))} only; the bundle's engines take latents and "
                f"{', '.join(sorted(needed))}"
            )
        inputs = dict(zip(self._family.inputs, self._family.arguments(call), strict=True))
        sampling = self.runtime.manifest.sampling
        shape = tuple(inputs[LATENTS].shape)
        if shape[1:] != sampling.latents_shape:
            raise ValueError(
                f"latents have shape {shape}, the bundle's engines take {('batch', *sampling.latents_shape)}; call the "
                f"pipeline with height={sampling.height}, width={sampling.width} (and use_resolution_binning=False "
                "where it has that), or build a bundle of that size"
            )
        return inputs

    def _step_index(self, timestep: torch.Tensor, called: Any) -> int:
        """The position in the loop; notes where a run begins.

        Args:
            timestep: in the scheduler's units.
            called: as the pipeline passed it; of a 16-bit FLUX pipeline it is rounded to its dtype.
        """
        values = set(timestep.reshape(-1).tolist())
        if len(values) != 1:
            raise ValueError(
                f"the denoiser was called with timesteps {sorted(values)} in one batch; a schedule has one precision "
                "per step, so every sample of a batch must be at the same timestep"
            )
        self._follow_scheduler()
        handed = torch.from_numpy(self.runtime.table.timesteps.astype(np.float32))
        if isinstance(called, torch.Tensor):
            handed = self._family.called_timesteps(handed, called.dtype)
        step_index, new_run = self._finder.find(values.pop(), handed.numpy())
        if new_run:
            self.last_run = []
        return step_index

    def _follow_scheduler(self) -> None:
        """Begins a run when the pipeline's scheduler was set up for one, after checking what it will run."""
        pipe = self._pipe()
        if pipe is None:  # its components live on in another pipeline
            return
        scheduler = pipe.scheduler
        if scheduler is not self._scheduler:
            _check_scheduler(pipe, self._family, self.runtime)
            self._scheduler = scheduler
        # set_timesteps() makes a new tensor every time; before the first one there is nothing to check
        if getattr(scheduler, "num_inference_steps", None) is None or scheduler.timesteps is self._timesteps:
            return
        start = self._finder.offset(scheduler.timesteps.cpu().numpy())
        self._finder.begin_run(start + (getattr(scheduler, "begin_index", None) or 0))
        self._timesteps = scheduler.timesteps
        self.last_run = []


def _runtime(bundle: Path | str | Bundle | DenoiseRuntime) -> DenoiseRuntime:
    if isinstance(bundle, DenoiseRuntime):
        return bundle
    return DenoiseRuntime(bundle) if isinstance(bundle, Bundle) else DenoiseRuntime.load(bundle)


def _family(pipe: Any, runtime: DenoiseRuntime) -> Family:
    """The family of the bundle, after checking that the pipeline's denoiser is of it too."""
    model = runtime.manifest.model
    taken = {spec.name for spec in runtime.manifest.denoisers[runtime.precisions[0]].inputs}
    fitting = [family for family in FAMILIES.get(model.pipeline_class, ()) if set(family.inputs) == taken]
    wanted = model.denoiser_class
    if not fitting or fitting[0].denoiser_class != wanted:
        raise BundleError(
            f"bundle {runtime.bundle.folder} was built from the {wanted} of a {model.pipeline_class}, and its engines take "
            f"{', '.join(sorted(taken))}; this release attaches bundles of {', '.join(FAMILIES)}"
        )
    family = fitting[0]
    component = family.component
    found = {name: getattr(pipe, name) for name in OUTPUTS if getattr(pipe, name, None) is not None}
    denoiser = found.get(component)
    if isinstance(denoiser, BundleDenoiser):
        denoiser = denoiser.original
    if type(denoiser).__name__ != wanted:
        received = ", ".join(f"{name} of class {type(module).__name__}" for name, module in found.items())
        raise BundleError(
            f"{type(pipe).__name__} has {received or 'neither a transformer nor a unet'}; bundle "
            f"{runtime.bundle.folder} was built from a {component} of class {wanted}; build a bundle from this pipeline"
        )
    reason = family.refusal(denoiser)
    if reason is not None:
        raise BundleError(
            f"bundle {runtime.bundle.folder} does not fit the {component} of this {type(pipe).__name__}: {reason}; "
            "build a bundle from this pipeline"
        )
    return family


def _check_scheduler(pipe: Any, family: Family, runtime: DenoiseRuntime) -> None:
    """Refuses a scheduler that does not do what the bundle's sampler table does.

    Compares trajectories, not coefficients: tables read on two machines differ in the last bits.
    """
    scheduler, expected = pipe.scheduler, runtime.table
    name = type(scheduler).__name__
    if name != expected.scheduler:
        raise SamplerError(
            f"the pipeline's scheduler is a {name}, the bundle was built with a {expected.scheduler}; set "
            "pipe.scheduler to the one the bundle was built with, or build a bundle from the pipeline as it is"
        )
    steps = expected.num_inference_steps
    table = sampler_table(
        scheduler, steps, **family.sampler_options(pipe, steps, runtime.manifest.sampling.latents_shape)
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
        "folder that was built from, or build a bundle from the pipeline as it is"
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
