"""What the toolchain has to know of a denoiser class, and of the pipelines around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from engines.errors import BuildError
from engines.manifest import LATENTS, TIMESTEP
from engines.text import NEGATIVE
from engines.text_entry import Reading
from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.export import ExportInput

HIDDEN = "encoder_hidden_states"
DENOISER = "denoiser"  # attribute of every export wrapper that holds the diffusers module
Axes = Mapping[int, str]

BATCH_AXES: Axes = {0: "batch"}
TEXT_AXES: Axes = {0: "batch", 1: "text"}
LATENT_AXES: Axes = {0: "batch", 2: "height", 3: "width"}
KL_VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")


@dataclass(frozen=True, kw_only=True)
class Text:
    """How a pipeline reads the prompt for one of its text encoders.

    Attributes:
        tokenizer: the pipeline attribute that holds the tokenizer; one that is None is left out.
        length_of: the tokenizer whose `model_max_length` the prompt is padded to, if that is another one's.
        masked: whether the text encoder takes the attention mask besides the token ids.
        whole_sequence: padded to the `max_sequence_length` of the pipeline's call, not to a tokenizer's length.
        padding_side: which the pipeline sets, None for the tokenizer's own.
        readings: from the pipeline, how prompts and how negative prompts are put before the text encoder: what stands
            around them and which positions are kept. Which hidden state is taken is the matter of `Family.wrap_text`.
    """

    tokenizer: str = "tokenizer"
    length_of: str | None = None
    masked: bool = False
    whole_sequence: bool = False
    padding_side: Literal["left", "right"] | None = None
    readings: Callable[[Any], tuple[Reading, Reading]] = lambda pipe: (Reading(), Reading())


@dataclass(frozen=True)
class VaeCall:
    """How a pipeline has its VAE decode latents; all of them divide by `scaling_factor` of the VAE's configuration.

    Attributes:
        classes: VAEs that it works with.
        shifts: whether it adds `shift_factor`.
        normalizes: whether it multiplies by `latents_std` and adds `latents_mean`, channel by channel, where the VAE has
            both.
    """

    classes: tuple[str, ...] = KL_VAES
    shifts: bool = False
    normalizes: bool = False


def _with_learned_variance(model_output: torch.Tensor, config: Any) -> torch.Tensor:
    """[B, C, h, w] -> [B, `out_channels`, h, w]: engines do not compute those channels, and zeros stand for them."""
    missing = (config.out_channels or model_output.shape[1]) - model_output.shape[1]
    return torch.nn.functional.pad(model_output, (0, 0, 0, 0, 0, missing))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of denoiser, and the pipelines around it: how it is called, wrapped for export, and conditioned.

    Attributes:
        denoiser_class: name of the diffusers class.
        component: the pipeline attribute that holds the denoiser.
        inputs: denoiser engine inputs in the wrapper's order, with their symbolic axes: latents [B, C, h, w], timestep
            [B] as the scheduler has it, then the conditioning.
        wrap: makes the export wrapper of a pipeline, of which it needs the denoiser and `vae_scale_factor` only. The
            wrapper returns `model_output` [B, C, h, w], at any size of tokens up to `largest_side`.
        arguments: picks the wrapper's inputs out of the arguments the pipeline calls the denoiser with.
        refusal: why a denoiser of this class is not of this family, or None if it is.
        float32_inputs: inputs that FP16 would round by too much; they are float32 in every graph.
        pipelines: classes whose loop is plain guidance around the denoiser; others add to it.
        wrap_text: makes the text encoder wrapper from (pipeline, clip skip or None); it takes the token ids (and the mask)
            of each of `texts` in turn and returns `text_outputs`, with a clip skip `with_clip_skip` of them.
        texts: what the text encoders read, in order.
        text_outputs: names of denoiser inputs, with their symbolic axes.
        lowercase: whether the pipeline lower-cases and strips prompts.
        call_options: arguments of the pipeline's call that keep it from resizing or rewriting.
        pipeline_refusal: what a pipeline has that a bundle would leave out, or None if there is nothing.
        vae: what the pipeline does with latents before it decodes them.
        constants: denoiser inputs that are the same for all pictures, one sample each, from (height, width) in pixels.
        zero_absent_negative: whether the pipeline takes zeros for a negative prompt that is absent.
        deepest_clip_skip: the largest `clip_skip` of the pipeline's call, None where it has none.
        may_lack: components that may be None although the pipeline's class wants them.
        takes_guidance_scale: whether the scale of the pipeline's call has an effect, by classifier-free guidance or as
            the denoiser's input `guidance`.
        packing: side of the square of latents that the pipeline packs into one token, before it calls the denoiser.
        sampler_options: `mu` and `sigmas` that the pipeline hands its scheduler, from (scheduler, number of inference
            steps, number of image tokens).
        picture_multiple: what the pipeline's call wants height and width to be multiples of, whatever its VAE.
        largest_side: most latents that height or width may have, from the denoiser's configuration; None for any number.
        rescales_guidance: whether the pipeline's call has a `guidance_rescale`.
        returned: what the denoiser returns to the pipeline, from `model_output` [B, C, h, w] and the configuration.
        called_timesteps: what reaches `arguments` of the scheduler's timesteps (float32) in a pipeline of some dtype.
    """

    denoiser_class: str
    component: str
    inputs: Mapping[str, Axes]
    wrap: Callable[[Any], torch.nn.Module]
    arguments: Callable[[Mapping[str, Any]], Batch]
    refusal: Callable[[torch.nn.Module], str | None]
    pipelines: tuple[str, ...]
    wrap_text: Callable[[Any, int | None], torch.nn.Module]
    texts: tuple[Text, ...]
    text_outputs: Mapping[str, Axes]
    lowercase: bool
    call_options: Mapping[str, Any]
    pipeline_refusal: Callable[[Any], str | None]
    vae: VaeCall
    float32_inputs: frozenset[str] = frozenset({TIMESTEP})
    constants: Callable[[int, int], dict[str, tuple[float, ...]]] = lambda height, width: {}
    zero_absent_negative: Callable[[Any], bool] = lambda pipe: False
    deepest_clip_skip: Callable[[Any], int | None] = lambda pipe: None
    may_lack: tuple[str, ...] = ()
    takes_guidance_scale: bool = True
    packing: int = 1
    sampler_options: Callable[[Any, int, int], dict[str, Any]] = lambda scheduler, steps, tokens: {}
    picture_multiple: int = 1
    largest_side: Callable[[Any], int | None] = lambda config: None
    rescales_guidance: bool = False
    returned: Callable[[torch.Tensor, Any], torch.Tensor] = _with_learned_variance
    called_timesteps: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = lambda timesteps, dtype: timesteps

    def export_inputs(self, batch: Batch) -> list[ExportInput]:
        """The graph inputs of the denoiser, with `batch` (in the order of `inputs`) as the traced example."""
        return [
            ExportInput(name, example, axes, keep_dtype=name in self.float32_inputs)
            for (name, axes), example in zip(self.inputs.items(), batch, strict=True)
        ]

    def token_side(self, config: Any) -> int:
        """Side of the square of latents that is one image token, from the denoiser's configuration."""
        return int(getattr(config, "patch_size", 1) or 1) * self.packing


def max_sequence_length(pipe: Any) -> int:
    """The text length that the pipeline's call has by default."""
    return int(inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default)


def with_clip_skip(text_outputs: Mapping[str, Axes], clip_skip: int | None) -> Mapping[str, Axes]:
    """What the text encoder returns: with a clip skip, hidden states for negative prompts as well, which skip no layer."""
    return text_outputs if not clip_skip else {**text_outputs, f"{NEGATIVE}{HIDDEN}": text_outputs[HIDDEN]}


def require_clip_skip(family: Family, pipe: Any, clip_skip: int | None) -> None:
    """Refuses a clip skip that the pipeline would not take.

    Raises:
        BuildError: says what it takes.
    """
    if clip_skip is None:
        return
    deepest = family.deepest_clip_skip(pipe)
    if deepest is None:
        raise BuildError(f"clip skip {clip_skip} would have no effect: {type(pipe).__name__} has none; leave it out")
    if not 0 <= clip_skip <= deepest:
        raise BuildError(
            f"clip skip {clip_skip} is out of range: the text encoders of this {type(pipe).__name__} allow 0 to {deepest}"
        )


def bind_call(denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a denoiser call by parameter name."""
    return dict(inspect.signature(type(denoiser).forward).bind_partial(denoiser, *args, **kwargs).arguments)


def latents_and_timestep() -> dict[str, Axes]:
    """The inputs that every family has, first."""
    return {LATENTS: LATENT_AXES, TIMESTEP: BATCH_AXES}
