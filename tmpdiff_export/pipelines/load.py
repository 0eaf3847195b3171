"""A diffusers pipeline folder, opened without its weights, and run to see what its denoiser is handed."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.manifest import GUIDANCE
from tmpdiff_export.devices import CPU, Batch
from tmpdiff_export.pipelines.families.family import Family, bind_call
from tmpdiff_export.pipelines.families.table import FAMILIES, family_of, require_supported
from tmpdiff_export.pipelines.folder import read_index, require_scheduler, require_variant
from tmpdiff_export.pipelines.models import hollow_pipeline, is_model, loaded_model, require_classes
from tmpdiff_export.pipelines.settings import PipelineFacts, Setting, scheduler_form
from tmpdiff_export.pipelines.texts import SourceText, source_texts
from tmpdiff_export.pipelines.tokenizer_files import require_tokenizer_files
from tmpdiff_export.weights.source import SourceWeights
from tmpdiff_export.weights.streamed import Read, streamed, taken_weights

LONGEST_TEXT = 512  # what T5 was trained on, and what FLUX and SD3 pipelines allow


@dataclass(frozen=True, eq=False)
class SourcePipeline:
    """A pipeline folder that is open, and what the export needs to know of it.

    Attributes:
        folder: its folder.
        pipe: the diffusers pipeline; its models are hollow (`weights.streamed`), float32, on the CPU, in evaluation mode.
        denoiser_class: class name of its denoiser.
        family: how that class is exported.
        texts: what its text encoders read, in order.
        weights: the denoiser's.
        variant: of the weight files, as for `SourceWeights.open`.
    """

    folder: Path
    pipe: Any
    denoiser_class: str
    family: Family
    texts: tuple[SourceText, ...]
    weights: SourceWeights
    variant: str | None = None

    @property
    def denoiser(self) -> torch.nn.Module:
        """The diffusers denoiser module."""
        module: torch.nn.Module = getattr(self.pipe, self.family.component)
        return module

    @functools.cached_property
    def facts(self) -> PipelineFacts:
        """What its settings depend on."""
        pipe, family, config = self.pipe, self.family, self.denoiser.config
        pixels = int(pipe.vae_scale_factor)
        variable = [text for text in self.texts if text.part.whole_sequence]
        return PipelineFacts(
            family=family,
            scheduler=scheduler_form(pipe.scheduler),
            size=own_size(pipe, config),
            pixels_per_latent=pixels,
            size_step=pixels * family.token_side(config),
            largest_side=None if (side := family.largest_side(config)) is None else side * pixels,
            latent_channels=int(config.in_channels) // family.packing**2,
            guidance_scale=_own_guidance_scale(pipe) if family.takes_guidance_scale else 1.0,
            takes_guidance_scale=family.takes_guidance_scale,
            text_length=max((text.max_tokens for text in variable), default=None),
            longest_text=max((max(text.max_tokens, LONGEST_TEXT) for text in variable), default=None),
        )

    def doubled(self, setting: Setting) -> bool:
        """Whether classifier-free guidance doubles the batch of every denoiser call."""
        return setting.guidance_scale > 1.0 and GUIDANCE not in self.family.inputs

    @property
    def other_models(self) -> tuple[str, ...]:
        """Names of its models but for the denoiser: text encoders and VAE."""
        models = {name for name, item in self.pipe.components.items() if isinstance(item, torch.nn.Module)}
        return tuple(sorted(models - {self.family.component}))

    def stored(self, name: str) -> SourceWeights:
        """The stored weights of one of its models; reads their headers.

        Raises:
            BuildError: they cannot be read.
        """
        return SourceWeights.open(self.folder / name, self.variant)

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """One of its models with its weights, on the CPU, in evaluation mode.

        Args:
            name: the pipeline's attribute.
            dtype: None for that of its files.

        Raises:
            BuildError: it cannot be loaded.
        """
        return loaded_model(type(getattr(self.pipe, name)), self.folder / name, self.variant, dtype)

    @contextlib.contextmanager
    def filled(self, names: Sequence[str]) -> Iterator[None]:
        """Some of `other_models` are loaded models for the length of a block, in the dtype of their files."""
        hollow_ones = {name: getattr(self.pipe, name) for name in names}
        try:
            for name in hollow_ones:
                setattr(self.pipe, name, self.load(name))
            yield
        finally:
            for name, model in hollow_ones.items():
                setattr(self.pipe, name, model)

    def call_options(self, setting: Setting) -> dict[str, Any]:
        """Arguments for a plain call of the pipeline in a setting but for the number of steps."""
        options = {
            **self.family.call_options,
            "height": setting.height,
            "width": setting.width,
            "guidance_scale": setting.guidance_scale,
        }
        if setting.text_length is not None:
            options["max_sequence_length"] = setting.text_length
        if setting.clip_skip is not None:
            options["clip_skip"] = setting.clip_skip
        return options


def open_pipeline(folder: Path, variant: str | None = None) -> SourcePipeline:
    """Opens a pipeline folder as written by `save_pretrained`, from the disk only; of weights, only headers are read.

    Args:
        folder: the folder with `model_index.json`.
        variant: of the weight files, as for `SourceWeights.open`.

    Raises:
        BuildError: the folder is no pipeline, cannot be loaded, its denoiser is not supported, or its weights are not
            those of its models.
    """
    data = read_index(folder)
    require_supported(data["_class_name"], _denoiser_class(data))  # before gigabytes are hashed
    require_classes(data)
    require_tokenizer_files(folder, data)
    require_scheduler(folder, data)
    require_variant(folder, [name for name, entry in data.items() if is_model(entry)], variant)
    may_lack = {name for family in FAMILIES[data["_class_name"]] for name in family.may_lack}
    pipe = hollow_pipeline(folder, data, [name for name in may_lack if data.get(name) == [None, None]], variant)
    name, family = family_of(pipe)
    weights = SourceWeights.open(folder / family.component, variant)
    denoiser = getattr(pipe, family.component)
    weights.require_names(denoiser, name)
    for label, buffer in denoiser.named_buffers():
        if label in weights.places:
            buffer.copy_(weights.read(label))
    return SourcePipeline(
        folder=folder,
        pipe=pipe,
        denoiser_class=name,
        family=family,
        texts=source_texts(pipe, family),
        weights=weights,
        variant=variant,
    )


def own_size(pipe: Any, config: Any) -> tuple[int, int] | None:
    """(height, width) in pixels that a call of the pipeline has by default; None where its configuration names none."""
    sample = getattr(pipe, "default_sample_size", None) or config.sample_size
    sides = sample if isinstance(sample, list | tuple) else (sample, sample)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    return sides[0] * int(pipe.vae_scale_factor), sides[1] * int(pipe.vae_scale_factor)


def _own_guidance_scale(pipe: Any) -> float:
    return float(inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default)


@contextlib.contextmanager
def computing(source: SourcePipeline, read: Read, device: str) -> Iterator[None]:
    """The whole pipeline computes in float32 on a device for the length of a block.

    Args:
        source: the pipeline, whose other models are loaded (`SourcePipeline.filled`).
        read: the denoiser's weights.
        device: "cpu" or "cuda".
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(streamed(source.denoiser, read, device))
        for name in source.other_models:
            model = getattr(source.pipe, name)
            stack.enter_context(streamed(model, taken_weights(model).__getitem__, device))
        yield


def gather_batches(
    source: SourcePipeline,
    setting: Setting,
    prompts: Sequence[str],
    seed: int,
    on_step: Callable[[], None],
    num_steps: int | None = None,
) -> list[Batch]:
    """Runs the real pipeline and keeps every input its denoiser is handed.

    Args:
        source: the pipeline, `computing`; noise is drawn on the CPU.
        setting: of every run; its scheduler has to be the pipeline's own.
        prompts: one run each; run i starts from seed + i.
        seed: seed of the first run.
        on_step: called after each denoiser call.
        num_steps: `num_inference_steps`, None for the setting's.

    Returns:
        Inputs, on the CPU, in the order of `Family.inputs`, for every prompt and then every loop iteration.
    """
    batches: list[Batch] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        picked = source.family.arguments(bind_call(module, args, kwargs))
        batches.append(tuple(tensor.detach().to(CPU, copy=True) for tensor in picked))
        on_step()

    handle = source.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.inference_mode():
            for index, prompt in enumerate(prompts):
                source.pipe(
                    prompt,
                    num_inference_steps=num_steps or setting.table.num_inference_steps,
                    generator=torch.Generator().manual_seed(seed + index),
                    output_type="latent",
                    **source.call_options(setting),
                )
    finally:
        handle.remove()
    return batches


def _denoiser_class(index: dict[str, Any]) -> str | None:
    """Class name of the transformer or unet that a model_index.json lists as [library, class]."""
    entries = [index.get(name) for name in ("transformer", "unet")]
    return next((str(entry[1]) for entry in entries if isinstance(entry, list) and entry[1:] and entry[1]), None)
