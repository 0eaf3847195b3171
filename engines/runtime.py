"""The runtime: prompt to picture with numpy, a tokenizer and engines that are swapped step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from engines.backends.choose import HostOptions
from engines.bundle import Bundle
from engines.conditioning import Conditioning, Encoder
from engines.engine import Arrays, Engine
from engines.errors import BackendError, BundleError
from engines.loaded import VAE_DECODER, LoadedEngines
from engines.loop import Loop, StepHook, guided_output, named_output
from engines.manifest import LATENTS
from engines.noise import gaussian_noise
from engines.reuse import engines_of, order_of, reuse_terms
from engines.sampler import SamplerTable
from engines.sampler_state import SamplerState
from engines.schedule import Schedule
from engines.setting_choice import SettingChoice


class DenoiseRuntime:
    """A loaded bundle, for one of its settings; `at` gives the same engines for another.

    Engines are loaded when a schedule first needs them and swapped by name. They live on the host of
    their backend: `close` frees what they hold on a device, and so does leaving a `with` block. Not
    thread-safe.

    Attributes:
        bundle: the bundle.
        manifest: its manifest.
        setting: what pictures are drawn with.
        table: the sampler of the setting.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        setting: SettingChoice | None = None,
        threads: int | None = None,
        resident_engines: int | None = None,
        loaded: LoadedEngines | None = None,
    ) -> None:
        """Reads the sampler table; engines are loaded later.

        Args:
            bundle: open.
            setting: which of its settings, None for the first.
            threads: see `load`.
            resident_engines: see `load`.
            loaded: engines of this bundle that another runtime has; they keep its options.

        Raises:
            BundleError, SamplerError: there is no such setting, a file is damaged, or the table does not fit the manifest.
            BackendError: `resident_engines` is given for a backend that has no such limit.
        """
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.setting = bundle.setting(setting)
        self.table = SamplerTable.from_json(bundle.read(self.setting.sampler))
        if self.table.num_steps != self.setting.num_steps:
            raise BundleError(
                f"sampler table of setting {self.setting.name} has {self.table.num_steps} steps, the manifest says "
                f"{self.setting.num_steps}"
            )
        self._loaded = loaded or LoadedEngines(bundle, HostOptions(threads=threads, resident_engines=resident_engines))
        self._encoder = Encoder(bundle, self._loaded, self.setting)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        setting: SettingChoice | None = None,
        threads: int | None = None,
        resident_engines: int | None = None,
    ) -> DenoiseRuntime:
        """Opens the bundle at `path`.

        Args:
            path: bundle folder.
            setting: which of its settings, None for the first.
            threads: worker threads of a CPU backend, None for one per core.
            resident_engines: denoiser engines that a GPU backend keeps in device memory at once, None for
                all; with fewer than a schedule uses, engines are loaded and dropped during the loop.

        Raises:
            BundleError, SamplerError: the folder is no bundle, or is damaged, or has no such setting.
            BackendError: `resident_engines` is given for a backend that has no such limit.
        """
        return cls(Bundle.open(path), setting=setting, threads=threads, resident_engines=resident_engines)

    def at(self, setting: SettingChoice | None) -> DenoiseRuntime:
        """A runtime for another setting that shares the loaded engines; `close` of either frees those of both.

        Raises:
            BundleError, SamplerError: as `load`.
        """
        return DenoiseRuntime(self.bundle, setting=setting, loaded=self._loaded)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees every engine; the runtime loads them again if it is used once more."""
        self._loaded.close()

    @property
    def num_steps(self) -> int:
        """T, the number of loop iterations."""
        return self.table.num_steps

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions of the denoiser engines, the reference first."""
        return self.manifest.precisions

    def schedule(self, choice: str | Path | None = None) -> Schedule:
        """A schedule of the setting.

        Raises:
            ScheduleError, BundleError: as `Bundle.schedule`, which says what a choice is.
        """
        return self.bundle.schedule(self.setting, choice)

    def check(self, schedule: Schedule) -> None:
        """Refuses a schedule that this bundle and setting cannot run.

        Raises:
            ScheduleError: for another bundle, setting, T or set of precisions, or a step reuses more than was computed before.
        """
        schedule.check(bundle_id=self.manifest.bundle_id, setting=self.setting, precisions=self.precisions)
        reuse_terms(self.table.timesteps.tolist(), schedule.precisions)

    def preload(self, schedule: Schedule) -> None:
        """Loads every engine a prompt-to-image run with `schedule` needs, or as many as may be resident.

        Raises:
            BackendError, BundleError: as `denoiser`.
        """
        for precision in engines_of(schedule.precisions)[: self._loaded.resident_engines]:
            self.denoiser(precision)
        self._encoder.preload()
        self._loaded.component(VAE_DECODER, self.setting)

    def denoiser(self, precision: str) -> Engine:
        """The denoiser engine of a precision for the setting, loaded at its first use.

        Raises:
            BackendError: the bundle holds no such precision, or its backend is not available.
            BundleError: its file is damaged, or no engine is for the setting's size and text length.
        """
        return self._loaded.denoiser(precision, self.setting)

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | str | None = None) -> Conditioning:
        """Runs the text encoder on prompts and on negative prompts.

        Args:
            prompts: N of them.
            negative_prompts: one for all, or one each; None for none, which pipelines tell from an empty one.

        Returns:
            Conditioning for N = len(prompts), with what was cut of prompts that are too long.

        Raises:
            PromptError: no prompts, another number of negative prompts, or negative prompts where the denoiser embeds the
                guidance scale.
            BundleError: the text encoder engine takes inputs that no tokenizer of the bundle gives.
        """
        return self._encoder.encode(prompts, negative_prompts)

    def noise(self, seeds: Sequence[int]) -> np.ndarray:
        """Starting noise, float32 [N, C, h, w]: what torch's generator on the CPU gives diffusers for each seed."""
        return gaussian_noise(seeds, self.setting.latents_shape)

    def step(
        self, state: SamplerState, choice: str, conditioning: Arrays, guidance_scale: float, keep: int = 0
    ) -> SamplerState:
        """One loop iteration: a denoiser call (with classifier-free guidance: one batch of 2 N) and the sampler update.

        Args:
            state: latents [N, C, h, w] and history; not changed.
            choice: the precision of the engine that runs, or one of `engines.reuse.REUSES`, which calls none.
            conditioning: `Conditioning.batch(guidance_scale)`.
            guidance_scale: at most 1 turns classifier-free guidance off.
            keep: how many computed outputs the next state keeps, for later steps that reuse them.

        Returns:
            The next state; its arrays are new, or those of `state`.

        Raises:
            ScheduleError: `state` has too few computed outputs for the reuse.
        """
        order = order_of(choice)
        if order is not None:
            return self.table.reuse(state, order, keep)
        scale = self._classifier_free(guidance_scale)
        output = guided_output(self.table, state, self.denoiser(choice), conditioning, scale)
        return self.table.advance(state, output, keep)

    def denoise(
        self,
        conditioning: Conditioning,
        schedule: Schedule,
        noise: np.ndarray,
        *,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        on_step: StepHook | None = None,
    ) -> np.ndarray:
        """The whole loop.

        Args:
            conditioning: for N prompts.
            schedule: checked against this bundle and setting.
            noise: unit normal, float32 [N, C, h, w]; not changed.
            guidance_scale: None for the setting's own.
            guidance_rescale: see `Loop`.
            on_step: called with step index, choice (precision or reuse) and seconds of each step; after each step
                where the loop runs on the CPU, after the last where it runs on a GPU.

        Returns:
            Final latents, float32 [N, C, h, w], owned by the caller.

        Raises:
            ScheduleError: the schedule belongs to another bundle or setting, or reuses more than it has computed.
            BackendError: an engine is not available or failed.
            ValueError: `noise` has another shape, or guidance is to be rescaled where the pipeline does not.
        """
        self.check(schedule)
        expected = (conditioning.size, *self.setting.latents_shape)
        if noise.shape != expected:
            raise ValueError(f"noise has shape {noise.shape}, expected {expected}")
        self.require_guidance_rescale(guidance_rescale)
        scale = self.setting.guidance_scale if guidance_scale is None else guidance_scale
        host, names = self._loaded.denoisers(schedule.precisions, self.setting)

        def stepped(step_index: int, name: str, seconds: float) -> None:
            if on_step is not None:
                on_step(step_index, schedule.precisions[step_index], seconds)

        batch, scale = conditioning.batch(scale), self._classifier_free(scale)
        return host.denoise(Loop(self.table, names, batch, noise, scale, stepped, guidance_rescale))

    def require_guidance_rescale(self, guidance_rescale: float) -> None:
        """Refuses a rescaling of guidance that the bundle's pipeline does not have.

        Raises:
            ValueError: naming the pipeline.
        """
        if guidance_rescale and not self.manifest.model.rescales_guidance:
            raise ValueError(
                f"guidance rescale is {guidance_rescale:g}, and a {self.manifest.model.pipeline_class} does not rescale its "
                "guidance; leave it out"
            )

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures of final latents [N, C, h, w]: uint8 [N, H, W, 3].

        Raises:
            BackendError: the decoder returned numbers that are not finite, as it does for latents that overflowed.
        """
        decoder = self._loaded.component(VAE_DECODER, self.setting)
        image = named_output(decoder.run({LATENTS: np.ascontiguousarray(latents, np.float32)}), "image")
        if not np.isfinite(image).all():
            raise BackendError(
                "the decoded picture is not finite: the latents overflowed in the loop; lower the guidance scale, or try "
                f"--schedule uniform:{self.precisions[0]}"
            )
        return np.rint(np.clip(image, 0.0, 1.0).transpose(0, 2, 3, 1) * 255.0).astype(np.uint8)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        schedule: Schedule,
        *,
        negative_prompts: Sequence[str] | str | None = None,
        guidance_scale: float | None = None,
        on_step: StepHook | None = None,
    ) -> np.ndarray:
        """Prompt to picture for N prompts with a seed each: uint8 [N, H, W, 3].

        Raises:
            ValueError: there are not as many seeds as prompts.
            PromptError, ScheduleError, BackendError, BundleError: as `encode`, `denoise` and `decode`.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed per prompt")
        latents = self.denoise(
            self.encode(prompts, negative_prompts),
            schedule,
            self.noise(seeds),
            guidance_scale=guidance_scale,
            on_step=on_step,
        )
        return self.decode(latents)

    def _classifier_free(self, guidance_scale: float) -> float:
        """The scale of classifier-free guidance: 1 where the denoiser has the guidance scale as an input."""
        return 1.0 if self.manifest.embeds_guidance else guidance_scale
