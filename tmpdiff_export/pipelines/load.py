"""A diffusers pipeline folder, opened without its weights, and run to see what its denoiser is handed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.errors import BuildError
from engines.manifest import GUIDANCE
from tmpdiff_export.devices import CPU, Batch
from tmpdiff_export.pipelines.families.family import Family, Text, bind_call, max_sequence_length
from tmpdiff_export.pipelines.families.table import FAMILIES, family_of, require_supported
from tmpdiff_export.pipelines.folder import read_index, require_scheduler, require_variant
from tmpdiff_export.pipelines.models import hollow_pipeline, is_model, loaded_model, require_classes
from tmpdiff_export.pipelines.sizes import picture_size
from tmpdiff_export.weights.source import SourceWeights
from tmpdiff_export.weights.streamed import Read, streamed, taken_weights


@dataclass(frozen=True)
class SourceText:
    """What one of the text encoders reads.

    Attributes:
        tokenizer: the transformers tokenizer.
        max_tokens: length that prompts are padded to.
        part: how the family describes it.
    """

    tokenizer: Any
    max_tokens: int
    part: Text


@dataclass(frozen=True)
class SourcePipeline:
    """A pipeline folder that is open, and what the export needs to know of it.

    Attributes:
        folder: its folder.
        pipe: the diffusers pipeline; its models are hollow (`weights.streamed`), float32, on the CPU, in evaluation mode.
        denoiser_class: class name of its denoiser.
        family: how that class is exported.
        height: picture height in pixels.
        width: picture width in pixels.
        guidance_scale: of classifier-free guidance or of the denoiser's guidance embedding, 1 where it has neither.
        texts: what its text encoders read, in order.
        weights: the denoiser's.
        variant: of the weight files, as for `SourceWeights.open`.
    """

    folder: Path
    pipe: Any
    denoiser_class: str
    family: Family
    height: int
    width: int
    guidance_scale: float
    texts: tuple[SourceText, ...]
    weights: SourceWeights
    variant: str | None = None

    @property
    def denoiser(self) -> torch.nn.Module:
        """The diffusers denoiser module."""
        module: torch.nn.Module = getattr(self.pipe, self.family.component)
        return module

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents."""
        factor = int(self.pipe.vae_scale_factor)
        channels = int(self.denoiser.config.in_channels) // self.family.packing**2
        return channels, self.height // factor, self.width // factor

    @property
    def doubled(self) -> bool:
        """Whether classifier-free guidance doubles the batch of every denoiser call."""
        return self.guidance_scale > 1.0 and GUIDANCE not in self.family.inputs

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

    def sampler_options(self, num_steps: int) -> dict[str, Any]:
        """`mu` and `sigmas` of its scheduler, for `sampler_table`."""
        return self.family.sampler_options(self.pipe, num_steps, self.latents_shape)

    def call_options(self) -> dict[str, Any]:
        """Arguments for a plain call of the pipeline at the bundle's resolution and guidance."""
        options = {
            **self.family.call_options,
            "height": self.height,
            "width": self.width,
            "guidance_scale": self.guidance_scale,
        }
        for text in self.texts:
            if text.part.whole_sequence:
                options["max_sequence_length"] = text.max_tokens
        return options


def open_pipeline(
    folder: Path,
    *,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
) -> SourcePipeline:
    """Opens a pipeline folder as written by `save_pretrained`, from the disk only; of weights, only headers are read.

    Args:
        folder: the folder with `model_index.json`.
        height: picture height in pixels, None for the pipeline's own.
        width: picture width in pixels, None for the pipeline's own.
        guidance_scale: None for the default of the pipeline's call.
        variant: of the weight files, as for `SourceWeights.open`.

    Raises:
        BuildError: the folder is no pipeline, cannot be loaded, its denoiser is not supported, its weights are not
            those of its models, a size does not fit, or a guidance scale was given to one that has none.
    """
    data = read_index(folder)
    require_supported(data["_class_name"], _denoiser_class(data))  # before gigabytes are hashed
    require_classes(data)
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
    height, width = picture_size(pipe, family, height, width)
    return SourcePipeline(
        folder=folder,
        pipe=pipe,
        denoiser_class=name,
        family=family,
        height=height,
        width=width,
        guidance_scale=_guidance_scale(pipe, family, guidance_scale),
        texts=_texts(pipe, family),
        weights=weights,
        variant=variant,
    )


def _guidance_scale(pipe: Any, family: Family, asked: float | None) -> float:
    if family.takes_guidance_scale:
        default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
        return float(default if asked is None else asked)
    if asked not in (None, 1.0):
        raise BuildError(
            f"guidance scale {asked:g} would have no effect: the {family.denoiser_class} of this {type(pipe).__name__} "
            "has no guidance embedding; leave the guidance scale out"
        )
    return 1.0


def _texts(pipe: Any, family: Family) -> tuple[SourceText, ...]:
    texts = []
    for part in family.texts:
        tokenizer = getattr(pipe, part.tokenizer)
        if tokenizer is None:
            continue
        # Whatever its own tokenizer says, every CLIP text encoder gets the length of the first one's.
        length = int((tokenizer if part.whole_sequence else pipe.tokenizer).model_max_length)
        if part.whole_sequence:
            length = min(length, max_sequence_length(pipe))
        texts.append(SourceText(tokenizer, length, part))
    return tuple(texts)


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
    prompts: Sequence[str],
    num_steps: int,
    seed: int,
    on_step: Callable[[], None],
) -> list[Batch]:
    """Runs the real pipeline and keeps every input its denoiser is handed.

    Args:
        source: the pipeline, `computing`; noise is drawn on the CPU.
        prompts: one run each; run i starts from seed + i.
        num_steps: `num_inference_steps` of every run.
        seed: seed of the first run.
        on_step: called after each denoiser call.

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
                    num_inference_steps=num_steps,
                    generator=torch.Generator().manual_seed(seed + index),
                    output_type="latent",
                    **source.call_options(),
                )
    finally:
        handle.remove()
    return batches


def _denoiser_class(index: dict[str, Any]) -> str | None:
    """Class name of the transformer or unet that a model_index.json lists as [library, class]."""
    entries = [index.get(name) for name in ("transformer", "unet")]
    return next((str(entry[1]) for entry in entries if isinstance(entry, list) and entry[1:] and entry[1]), None)
