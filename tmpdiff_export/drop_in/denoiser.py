"""What stands in a diffusers pipeline in place of its denoiser, and runs a bundle's engines."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from numpy.typing import NDArray

from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP
from engines.reuse import order_of, reuse_terms
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from tmpdiff_export.drop_in.fit import require_scheduler
from tmpdiff_export.drop_in.past_outputs import PastOutputs
from tmpdiff_export.drop_in.refusals import refuse
from tmpdiff_export.drop_in.step_finder import StepFinder
from tmpdiff_export.pipelines.families.family import Family, bind_call

OUTPUTS = {"transformer": Transformer2DModelOutput, "unet": UNet2DConditionOutput}

LATENTS_ARGUMENTS = {"hidden_states", "sample"}  # of transformers, of UNets
# What engines make themselves, from the size of the latents: the picture's size, and of FLUX the positions of its tokens.
CONSTANT_ARGUMENTS = {"return_dict", "resolution", "aspect_ratio", "img_ids", "txt_ids"}

# Attributes of these types are read off the replaced denoiser; nothing that is done with them could need its layers.
PLAIN = (bool, int, float, str, list, tuple, torch.dtype, type(None))
IP_ADAPTER_LOADER = "_load_ip_adapter_weights"  # the one private method of a denoiser that pipelines call to change it


class BundleDenoiser(torch.nn.Module):
    """Takes the place of a pipeline's denoiser and runs a bundle's engines; made by `attach`. Not thread-safe.

    To be read it is like the denoiser it replaces: plain attributes, `config`, `state_dict()` and `save_pretrained` are
    that one's. What would change or run the denoiser's layers raises `AttachedError`, which names it. It cannot be
    pickled or copied deeply, as engines cannot.

    Attributes:
        config: the configuration of the denoiser it replaces.
        schedule: the schedule that is followed.
        runtime: the bundle and its loaded engines.
        last_run: (step index, precision or reuse) of every denoiser call of the last run, or of the current one; calls at
            reused steps run no engine.
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
        self._past = PastOutputs(reuse_terms(runtime.table.timesteps.tolist(), schedule.precisions))
        self._pipe = weakref.ref(pipe)
        self._scheduler = pipe.scheduler
        self._timesteps: torch.Tensor | None = None
        # Pipelines read dtype and device of a denoiser and set them with to(); this buffer holds them. A denoiser
        # without weights is on "meta", where no tensor comes back from.
        device = "cpu" if denoiser.device.type == "meta" else denoiser.device
        self.register_buffer("_place", torch.empty(0, dtype=denoiser.dtype, device=device), persistent=False)
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

    @property
    def save_pretrained(self) -> Any:
        """The replaced denoiser's: `save_pretrained` of an attached pipeline writes the denoiser it was loaded with."""
        return self.original.save_pretrained

    def parameters(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """One empty tensor, off which dtype and device can be read, as offloading does."""
        yield self._place

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The replaced denoiser's weights."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `AttachedError`: engines have their weights from the build."""
        self._refuse("load_state_dict")

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Raises `AttachedError`: engines are compiled already."""
        self._refuse("compile")

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Leaves engines where their backend has them; the pipeline's other components are offloaded."""

    def __getattr__(self, name: str) -> Any:
        """What the replaced denoiser has and this module has not: plain values are returned, the rest is refused.

        Raises:
            AttachedError: a method, layer or tensor of the replaced denoiser.
            AttributeError: it has no such attribute either, or a private one, such as the hooks of other libraries.
        """
        if "_original" not in self.__dict__ or (name.startswith("_") and name != IP_ADAPTER_LOADER):
            return super().__getattr__(name)
        value = getattr(self.original, name)
        if isinstance(value, PLAIN):
            return value
        self._refuse(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises `AttachedError` for a layer, which no engine would run."""
        if isinstance(value, torch.nn.Module):
            self._refuse(f"a new {name}")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises `AttachedError`: pickling and deep copies."""
        self._refuse("a pickle or deep copy")

    def _refuse(self, asked: str) -> NoReturn:
        component = self._family.component
        refuse(f"{asked} of the {component}", component)

    def extra_repr(self) -> str:
        """What runs, for the representation of the module, whose class is named after the denoiser it replaces."""
        return f"run by the engines of {self.runtime.bundle.folder}"

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """What FLUX pipelines call their denoiser in; engines cache nothing between calls."""
        yield

    @property
    def calls(self) -> Counter[str]:
        """Engine calls of `last_run` per precision."""
        return Counter(choice for _, choice in self.last_run if order_of(choice) is None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoiser call, at the precision that the schedule has for its timestep, or from past outputs of the run.

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
            ScheduleError: a timestep, or a loop, that the schedule does not cover, or that lacks what a step reuses.
            SamplerError: the pipeline was given another scheduler.
        """
        call = bind_call(self.original, args, kwargs)
        del call["self"]
        inputs = self._inputs(call)
        latents = inputs[LATENTS]
        step_index = self._step_index(inputs[TIMESTEP], call["timestep"])
        choice = self.schedule.precisions[step_index]
        self._past.enter(step_index)
        if order_of(choice) is None:
            values = self._computed(choice, step_index, inputs)
            self._past.add(values)
        else:
            values = self._past.reused(len(latents), rescaled=self._rescales_guidance()).copy()
        self.last_run.append((step_index, choice))
        output = self._family.returned(torch.from_numpy(values), self.config).to(latents.device, latents.dtype)
        return OUTPUTS[self._family.component](sample=output) if call.get("return_dict", True) else (output,)

    def _computed(self, precision: str, step_index: int, inputs: dict[str, torch.Tensor]) -> NDArray[np.float32]:
        """What an engine returns at a step, [B, C, h, w]."""
        step = torch.full((len(inputs[LATENTS]),), float(self.runtime.table.timesteps[step_index]))
        given = {**inputs, TIMESTEP: step}
        arrays = {
            spec.name: np.ascontiguousarray(given[spec.name].detach().to("cpu", getattr(torch, spec.dtype)).numpy())
            for spec in self.runtime.manifest.denoisers[precision][0].inputs
        }
        return np.asarray(self.runtime.denoiser(precision).run(arrays)[MODEL_OUTPUT], np.float32)

    def _rescales_guidance(self) -> bool:
        """Whether the pipeline's current call does more to outputs than a sum of them (SD and SDXL)."""
        pipe = self._pipe()
        guided = getattr(pipe, "do_classifier_free_guidance", True)
        return guided and getattr(pipe, "guidance_rescale", 0.0) > 0.0

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
        setting = self.runtime.setting
        shape = tuple(inputs[LATENTS].shape)
        if shape[1:] != setting.latents_shape:
            raise ValueError(
                f"latents have shape {shape}, the bundle's engines take {('batch', *setting.latents_shape)}; call the "
                f"pipeline with height={setting.height}, width={setting.width} (and use_resolution_binning=False "
                "where it has that), or attach with a setting of that size"
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
            self._begin_run()
        return step_index

    def _follow_scheduler(self) -> None:
        """Begins a run when the pipeline's scheduler was set up for one, after checking what it will run."""
        pipe = self._pipe()
        # None: its components live on in another pipeline, made by from_pipe()
        scheduler = self._scheduler if pipe is None else pipe.scheduler
        if scheduler is not self._scheduler:
            require_scheduler(pipe, self._family, self.runtime)
            self._scheduler = scheduler
        # set_timesteps() makes a new tensor every time; before the first one there is nothing to check
        if getattr(scheduler, "num_inference_steps", None) is None or scheduler.timesteps is self._timesteps:
            return
        start = self._finder.offset(scheduler.timesteps.cpu().numpy())
        self._finder.begin_run(start + (getattr(scheduler, "begin_index", None) or 0))
        self._timesteps = scheduler.timesteps
        self._begin_run()

    def _begin_run(self) -> None:
        self.last_run = []
        self._past.begin_run()


def stand_in(pipe: Any, denoiser: torch.nn.Module, family: Family, runtime: DenoiseRuntime, schedule: Schedule) -> Any:
    """A `BundleDenoiser` that diffusers takes for one of the replaced denoiser's class by its name.

    So the index of a saved pipeline, also of one made by from_pipe(), names the denoiser that is saved. It is no
    subclass of it: from_pipe() leaves out models of a subclass.
    """
    replaced = type(denoiser)
    kind = type(replaced.__name__, (BundleDenoiser,), {"__module__": replaced.__module__, "__doc__": replaced.__doc__})
    # Without it save_pretrained() of a pipeline leaves the component out and only warns.
    LOADABLE_CLASSES.setdefault(__name__, {BundleDenoiser.__name__: ["save_pretrained", "from_pretrained"]})
    return kind(pipe, denoiser, family, runtime, schedule)
