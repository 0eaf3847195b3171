"""The runtime: prompt to picture with numpy, a tokenizer and engines that are swapped step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from engines.backends.choose import HostOptions, open_host
from engines.bundle import Bundle
from engines.engine import Arrays, Engine
from engines.errors import BackendError, BundleError, PromptError
from engines.host import EngineHost
from engines.loop import Loop, StepHook, host_step, named_output
from engines.manifest import GUIDANCE, LATENTS, EngineEntry
from engines.sampler import SamplerState, SamplerTable
from engines.schedule import Schedule
from engines.text import encode_texts, guided_text, load_tokenizer, require_whole


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is conditioned on, for N prompts.

    Attributes:
        guided: arrays by denoiser input name, each [2 N, ...], the unconditional half first.
        size: N.
        embeds_guidance: whether the denoiser takes the guidance scale as an input.
    """

    guided: dict[str, np.ndarray]
    size: int
    embeds_guidance: bool = False

    def batch(self, guidance_scale: float) -> dict[str, np.ndarray]:
        """The arrays for one denoiser call: [2 N, ...] with classifier-free guidance, [N, ...] without."""
        if guidance_scale > 1.0 and not self.embeds_guidance:
            return self.guided
        arrays = {name: values[self.size :] for name, values in self.guided.items()}
        if self.embeds_guidance:
            arrays[GUIDANCE] = np.full(self.size, guidance_scale, np.float32)
        return arrays

    def select(self, indices: Sequence[int]) -> Conditioning:
        """The conditioning of some of the N prompts, in the order given."""
        rows = [*indices, *(self.size + index for index in indices)]
        guided = {name: values[rows] for name, values in self.guided.items()}
        return Conditioning(guided, len(indices), self.embeds_guidance)


class DenoiseRuntime:
    """A loaded bundle.

    Engines are loaded when a schedule first needs them and swapped by name. They live on the host of
    their backend: `close` frees what they hold on a device, and so does leaving a `with` block. Not
    thread-safe.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, resident_engines: int | None = None) -> None:
        """Reads the sampler table; engines are loaded later.

        Raises:
            BundleError, SamplerError: a file is damaged, or the table does not fit the manifest.
            BackendError: `resident_engines` is given for a backend that has no such limit.
        """
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.table = SamplerTable.from_json(bundle.read(self.manifest.sampler))
        if self.table.num_steps != self.manifest.sampling.num_steps:
            raise BundleError(
                f"sampler table has {self.table.num_steps} steps, the manifest says {self.manifest.sampling.num_steps}"
            )
        backend = self.manifest.denoisers[self.precisions[0]].backend
        device = self.manifest.denoisers[self.precisions[0]].device
        if resident_engines is not None and (backend == "tensorrt-rtx" or device == "cpu"):
            raise BackendError(
                "a limit on resident engines is for bundles of the tensorrt, torch and onnxruntime backends on a GPU; this "
                f"one's engines run on {backend} ({device})"
            )
        self._options = HostOptions(threads=threads, resident_engines=resident_engines)
        self._hosts: dict[str, EngineHost] = {}
        self._added: set[str] = set()
        self._tokenizers: tuple[object, ...] | None = None

    @classmethod
    def load(
        cls, path: Path | str, *, threads: int | None = None, resident_engines: int | None = None
    ) -> DenoiseRuntime:
        """Opens the bundle at `path`.

        Args:
            path: bundle folder.
            threads: worker threads of a CPU backend, None for one per core.
            resident_engines: denoiser engines that a GPU backend keeps in device memory at once, None for
                all; with fewer than a schedule uses, engines are loaded and dropped during the loop.

        Raises:
            BundleError: the folder is no bundle, or is damaged.
        """
        return cls(Bundle.open(path), threads=threads, resident_engines=resident_engines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees every engine; the runtime loads them again if it is used once more."""
        self._added.clear()
        while self._hosts:
            self._hosts.popitem()[1].close()

    @property
    def num_steps(self) -> int:
        """T, the number of loop iterations."""
        return self.table.num_steps

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions of the denoiser engines, the reference first."""
        return self.manifest.precisions

    def preload(self, schedule: Schedule) -> None:
        """Loads every engine a prompt-to-image run with `schedule` needs, or as many as may be resident."""
        for precision in tuple(dict.fromkeys(schedule.precisions))[: self._options.resident_engines]:
            self.denoiser(precision)
        self._engine("text encoder", self.manifest.text_encoder)
        self._engine("VAE decoder", self.manifest.vae_decoder)

    def denoiser(self, precision: str) -> Engine:
        """The denoiser engine of a precision, loaded at its first use.

        Raises:
            BackendError: the bundle holds no such precision, or its backend is not available.
            BundleError: its file is damaged.
        """
        return self._denoiser_host(precision).engine(precision)

    def encode(self, prompts: Sequence[str], negative_prompt: str | None = None) -> Conditioning:
        """Runs the text encoder on prompts and on the negative prompt.

        Args:
            prompts: N of them.
            negative_prompt: None for none, which is not the same as an empty one for every bundle.

        Returns:
            Conditioning for N = len(prompts).

        Raises:
            PromptError: no prompts, one longer than a text encoder takes, or a negative prompt where the denoiser
                embeds the guidance scale.
            BundleError: the text encoder engine takes inputs that no tokenizer of the bundle gives.
        """
        manifest = self.manifest
        if negative_prompt and manifest.embeds_guidance:
            raise PromptError(
                "a negative prompt has no effect on this bundle: its denoiser embeds the guidance scale instead of being "
                "guided by a second prompt; leave it out"
            )
        if self._tokenizers is None:
            self._tokenizers = tuple(load_tokenizer(self.bundle.read(text.tokenizer)) for text in manifest.texts)
        arrays: dict[str, np.ndarray] = {}
        halves = (prompts, [negative_prompt or ""])
        for position, (tokenizer, text) in enumerate(zip(self._tokenizers, manifest.texts, strict=True)):
            length = text.max_tokens
            width = length + max(text.positive.extra_tokens, text.negative.extra_tokens)
            found = []
            for written, reading in zip(halves, (text.positive, text.negative), strict=True):
                require_whole(tokenizer, written, text, reading, length)
                found.append(encode_texts(tokenizer, written, text, reading, length, width))
            arrays |= found[0].followed_by(found[1]).inputs(position)
        wanted = [spec.name for spec in manifest.text_encoder.inputs]
        if unknown := [name for name in wanted if name not in arrays]:
            raise BundleError(
                f"the text encoder takes {', '.join(unknown)}; the manifest has {len(manifest.texts)} tokenizers, which "
                f"give {', '.join(arrays)}; build the bundle again"
            )
        encoder = self._engine("text encoder", manifest.text_encoder)
        outputs = encoder.run({name: arrays[name] for name in wanted})
        size = len(prompts)
        zeros = negative_prompt is None and manifest.zero_absent_negative
        guided = guided_text(outputs, size, zeros=zeros)
        for name, values in manifest.sampling.constants.items():
            guided[name] = np.tile(np.array(values, np.float32), (2 * size, 1))
        return Conditioning(guided, size, manifest.embeds_guidance)

    def noise(self, seeds: Sequence[int]) -> np.ndarray:
        """Starting noise, float32 [N, C, h, w], one independent generator per seed."""
        shape = self.manifest.sampling.latents_shape
        return np.stack([np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds])

    def step(self, state: SamplerState, precision: str, conditioning: Arrays, guidance_scale: float) -> SamplerState:
        """One loop iteration: a denoiser call (with classifier-free guidance: one batch of 2 N) and the sampler update.

        Args:
            state: latents [N, C, h, w] and history; not changed.
            precision: which engine runs.
            conditioning: `Conditioning.batch(guidance_scale)`.
            guidance_scale: at most 1 turns classifier-free guidance off.

        Returns:
            The next state; its arrays are new.
        """
        scale = self._classifier_free(guidance_scale)
        return host_step(self.table, state, self.denoiser(precision), conditioning, scale)

    def denoise(
        self,
        conditioning: Conditioning,
        schedule: Schedule,
        noise: np.ndarray,
        *,
        guidance_scale: float | None = None,
        on_step: StepHook | None = None,
    ) -> np.ndarray:
        """The whole loop.

        Args:
            conditioning: for N prompts.
            schedule: checked against this bundle.
            noise: unit normal, float32 [N, C, h, w]; not changed.
            guidance_scale: None for the bundle's own.
            on_step: called with step index, precision and seconds of each step; after each step where
                the loop runs on the CPU, after the last where it runs on a GPU.

        Returns:
            Final latents, float32 [N, C, h, w], owned by the caller.

        Raises:
            ScheduleError: the schedule belongs to another bundle.
            ValueError: `noise` has another shape.
        """
        schedule.check(bundle_id=self.manifest.bundle_id, num_steps=self.num_steps, precisions=self.precisions)
        expected = (conditioning.size, *self.manifest.sampling.latents_shape)
        if noise.shape != expected:
            raise ValueError(f"noise has shape {noise.shape}, expected {expected}")
        scale = self.manifest.sampling.guidance_scale if guidance_scale is None else guidance_scale
        for precision in dict.fromkeys(schedule.precisions):
            host = self._denoiser_host(precision)
        batch, scale = conditioning.batch(scale), self._classifier_free(scale)
        return host.denoise(Loop(self.table, schedule.precisions, batch, noise, scale, on_step))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures of final latents [N, C, h, w]: uint8 [N, H, W, 3].

        Raises:
            BackendError: the decoder returned numbers that are not finite, as it does for latents that overflowed.
        """
        decoder = self._engine("VAE decoder", self.manifest.vae_decoder)
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
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        on_step: StepHook | None = None,
    ) -> np.ndarray:
        """Prompt to picture for N prompts with a seed each: uint8 [N, H, W, 3].

        Raises:
            ValueError: there are not as many seeds as prompts.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed per prompt")
        latents = self.denoise(
            self.encode(prompts, negative_prompt),
            schedule,
            self.noise(seeds),
            guidance_scale=guidance_scale,
            on_step=on_step,
        )
        return self.decode(latents)

    def _classifier_free(self, guidance_scale: float) -> float:
        """The scale of classifier-free guidance: 1 where the denoiser has the guidance scale as an input."""
        return 1.0 if self.manifest.embeds_guidance else guidance_scale

    def _denoiser_host(self, precision: str) -> EngineHost:
        """The host of the denoisers, which knows `precision`."""
        if precision not in self.manifest.denoisers:
            raise BackendError(f"no engine of precision {precision!r}; the bundle holds {', '.join(self.precisions)}")
        return self._host_of(precision, self.manifest.denoisers[precision])

    def _engine(self, name: str, entry: EngineEntry) -> Engine:
        return self._host_of(name, entry).engine(name)

    def _host_of(self, name: str, entry: EngineEntry) -> EngineHost:
        """The host of an entry's backend, with the entry's files checked and added to it."""
        if name not in self._added:
            paths = self.bundle.paths_of(entry.files())
            if entry.backend not in self._hosts:
                self._hosts[entry.backend] = open_host(entry.backend, entry.device, self._options)
            self._hosts[entry.backend].add(name, entry, paths[0])
            self._added.add(name)
        return self._hosts[entry.backend]
