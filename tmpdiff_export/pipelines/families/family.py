"""What the toolchain has to know of a denoiser class, and of the pipelines around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engines.manifest import LATENTS, TIMESTEP
from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.export import ExportInput

DENOISER = "denoiser"  # attribute of every export wrapper that holds the diffusers module
Axes = Mapping[int, str]

BATCH_AXES: Axes = {0: "batch"}
TEXT_AXES: Axes = {0: "batch", 1: "text"}


@dataclass(frozen=True, kw_only=True)
class DenoiserFamily:
    """One kind of denoiser: how it is called, wrapped for export, and conditioned.

    Attributes:
        denoiser_class: name of the diffusers class.
        component: the pipeline attribute that holds the denoiser.
        inputs: denoiser engine inputs in the wrapper's order, with their symbolic axes: latents [B, C, h, w], timestep
            [B] as the scheduler has it, then the conditioning.
        wrap: makes the export wrapper from (pipeline, height, width), in pixels; of the pipeline it needs the denoiser
            and `vae_scale_factor` only. The wrapper returns `model_output` [B, C, h, w].
        arguments: picks the wrapper's inputs out of the arguments the pipeline calls the denoiser with.
        refusal: why a denoiser of this class is not of this family, or None if it is.
        float32_inputs: inputs that FP16 would round by too much; they are float32 in every graph.
    """

    denoiser_class: str
    component: str
    inputs: Mapping[str, Axes]
    wrap: Callable[[Any, int, int], torch.nn.Module]
    arguments: Callable[[Mapping[str, Any]], Batch]
    refusal: Callable[[torch.nn.Module], str | None]
    float32_inputs: frozenset[str] = frozenset({TIMESTEP})

    def export_inputs(self, batch: Batch) -> list[ExportInput]:
        """The graph inputs of the denoiser, with `batch` (in the order of `inputs`) as the traced example."""
        return [
            ExportInput(name, example, axes, keep_dtype=name in self.float32_inputs)
            for (name, axes), example in zip(self.inputs.items(), batch, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Text:
    """How a pipeline reads the prompt for one of its text encoders.

    Attributes:
        tokenizer: the pipeline attribute that holds the tokenizer; one that is None is left out.
        masked: whether the text encoder takes the attention mask besides the token ids.
        whole_sequence: padded to the `max_sequence_length` of the pipeline's call, not to the model's own length.
    """

    tokenizer: str = "tokenizer"
    masked: bool = False
    whole_sequence: bool = False


def _with_learned_variance(model_output: torch.Tensor, config: Any) -> torch.Tensor:
    """[B, C, h, w] -> [B, `out_channels`, h, w]: engines do not compute those channels, and zeros stand for them."""
    missing = (config.out_channels or model_output.shape[1]) - model_output.shape[1]
    return torch.nn.functional.pad(model_output, (0, 0, 0, 0, 0, missing))


@dataclass(frozen=True, kw_only=True)
class Family(DenoiserFamily):
    """A denoiser family whose pipelines are supported from the prompt to the picture.

    Attributes:
        pipelines: classes whose loop is plain guidance around the denoiser; others add to it.
        wrap_text: makes the text encoder wrapper from (pipeline, height, width), in pixels; it takes the token ids (and
            the mask) of each of `texts` in turn and returns `text_outputs`.
        texts: what the text encoders read, in order.
        text_outputs: names of denoiser inputs, with their symbolic axes.
        lowercase: whether the pipeline lower-cases and strips prompts.
        call_options: arguments of the pipeline's call that keep it from resizing or rewriting.
        pipeline_refusal: what a pipeline has that a bundle would leave out, or None if there is nothing.
        may_lack: components that may be None although the pipeline's class wants them.
        takes_guidance_scale: whether the scale of the pipeline's call has an effect, by classifier-free guidance or as
            the denoiser's input `guidance`.
        packing: side of the square of latents that the pipeline packs into one token, before it calls the denoiser.
        picture_multiple: what the pipeline's call wants height and width to be multiples of, whatever its VAE.
        sampler_options: `mu` and `sigmas` that the pipeline hands its scheduler, from (pipeline, number of inference
            steps, shape (C, h, w) of the latents).
        returned: what the denoiser returns to the pipeline, from `model_output` [B, C, h, w] and the configuration.
        called_timesteps: what reaches `arguments` of the scheduler's timesteps (float32) in a pipeline of some dtype.
    """

    pipelines: tuple[str, ...]
    wrap_text: Callable[[Any, int, int], torch.nn.Module]
    texts: tuple[Text, ...]
    text_outputs: Mapping[str, Axes]
    lowercase: bool
    call_options: Mapping[str, Any]
    pipeline_refusal: Callable[[Any], str | None]
    may_lack: tuple[str, ...] = ()
    takes_guidance_scale: bool = True
    packing: int = 1
    picture_multiple: int = 1
    sampler_options: Callable[[Any, int, tuple[int, int, int]], dict[str, Any]] = lambda pipe, steps, shape: {}
    returned: Callable[[torch.Tensor, Any], torch.Tensor] = _with_learned_variance
    called_timesteps: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = lambda timesteps, dtype: timesteps


def max_sequence_length(pipe: Any) -> int:
    """The text length that the pipeline's call has by default."""
    return int(inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default)


def bind_call(denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a denoiser call by parameter name."""
    return dict(inspect.signature(type(denoiser).forward).bind_partial(denoiser, *args, **kwargs).arguments)


def latents_and_timestep() -> dict[str, Axes]:
    """The inputs that every family has, first."""
    return {LATENTS: BATCH_AXES, TIMESTEP: BATCH_AXES}
