"""UNets of Stable Diffusion: 1.x and 2.x, and SDXL with its pooled text and size conditions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from engines.manifest import TIMESTEP
from tmpdiff_export.devices import Batch
from tmpdiff_export.pipelines.families.components import (
    PlainTextEncoder,
    SdxlTextEncoder,
    clip_refusal,
    layers_of,
    projection_refusal,
)
from tmpdiff_export.pipelines.families.family import BATCH_AXES, TEXT_AXES, Family, Text, VaeCall, latents_and_timestep

TEXT_TIME = "text_time"  # SDXL's `addition_embed_type`
_NO_SIZE = 30  # no latents can be halved so often


class UNetDenoiser(torch.nn.Module):
    """`UNet2DConditionModel` as (latents, timestep, text[, pooled text, time ids]) -> noise prediction."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """latents [B, C, h, w], timestep [B], text [B, L, D]; SDXL: pooled text [B, P], ids [B, 6] -> [B, C, h, w]."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        with _any_size(self.denoiser):
            return self.denoiser(
                latents,
                timestep,
                encoder_hidden_states=encoder_hidden_states,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]


@contextlib.contextmanager
def _any_size(denoiser: torch.nn.Module) -> Iterator[None]:
    """Has a traced denoiser upsample to the sizes that it has downsampled from.

    It does so only for latents that cannot be halved as often as it halves them, else it doubles sizes, and a graph
    for all sizes would be that of the traced one.
    """
    if not torch.jit.is_tracing():
        yield
        return
    upsamplers, denoiser.num_upsamplers = denoiser.num_upsamplers, _NO_SIZE
    try:
        yield
    finally:
        denoiser.num_upsamplers = upsamplers


def _arguments(call: Mapping[str, Any]) -> Batch:
    latents = call["sample"]
    return latents, call["timestep"].float().expand(latents.shape[0]), call["encoder_hidden_states"]


def _refusal(denoiser: torch.nn.Module, addition: str | None) -> str | None:
    config = denoiser.config
    if config.in_channels != config.out_channels:
        return "it takes more channels than it returns (inpainting, depth or editing)"
    for name in ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds"):
        if getattr(config, name) is not None:
            return f"it is conditioned by {name}={getattr(config, name)!r}"
    if config.addition_embed_type != addition:
        return f"its addition_embed_type is {config.addition_embed_type!r}, not {addition!r}"
    return None


def _pipeline_refusal(pipe: Any) -> str | None:
    if pipe.safety_checker is not None:
        return (
            "it has a safety checker, and the pictures of a bundle pass through none; if they are checked elsewhere, "
            "save the pipeline with safety_checker=None, requires_safety_checker=False"
        )
    return clip_refusal(pipe.text_encoder)


def _sdxl_pipeline_refusal(pipe: Any) -> str | None:
    if pipe.text_encoder is None or pipe.tokenizer is None:
        return "it has one text encoder only (a refiner)"
    lengths = [int(tokenizer.model_max_length) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
    if lengths[0] != lengths[1]:
        return f"its two tokenizers have model_max_length {lengths[0]} and {lengths[1]}, and texts of one length are joined"
    refusals = (
        clip_refusal(pipe.text_encoder),
        clip_refusal(pipe.text_encoder_2),
        projection_refusal(pipe.text_encoder_2),
    )
    return next(filter(None, refusals), None)


UNET = Family(
    denoiser_class="UNet2DConditionModel",
    component="unet",
    inputs={**latents_and_timestep(), "encoder_hidden_states": TEXT_AXES},
    wrap=lambda pipe: UNetDenoiser(pipe.unet),
    arguments=_arguments,
    refusal=lambda denoiser: _refusal(denoiser, None),
    pipelines=("StableDiffusionPipeline",),
    wrap_text=lambda pipe, clip_skip: PlainTextEncoder(pipe.text_encoder, clip_skip),
    texts=(Text(),),
    text_outputs={"encoder_hidden_states": TEXT_AXES},
    lowercase=False,
    call_options={},
    picture_multiple=8,
    pipeline_refusal=_pipeline_refusal,
    rescales_guidance=True,
    vae=VaeCall(),
    deepest_clip_skip=lambda pipe: layers_of(pipe.text_encoder),
)
# Time ids are an input, so that a pipeline a bundle is attached to may pass others; they are pixels, up to thousands,
# which FP16 rounds.
UNET_SDXL = replace(
    UNET,
    inputs={**UNET.inputs, "text_embeds": BATCH_AXES, "time_ids": BATCH_AXES},
    arguments=lambda call: (
        *_arguments(call),
        *(call["added_cond_kwargs"][name] for name in ("text_embeds", "time_ids")),
    ),
    refusal=lambda denoiser: _refusal(denoiser, TEXT_TIME),
    float32_inputs=frozenset({TIMESTEP, "time_ids"}),
    pipelines=("StableDiffusionXLPipeline",),
    wrap_text=lambda pipe, clip_skip: SdxlTextEncoder(pipe.text_encoder, pipe.text_encoder_2, clip_skip),
    texts=(Text(), Text(tokenizer="tokenizer_2")),
    text_outputs={"encoder_hidden_states": TEXT_AXES, "text_embeds": BATCH_AXES},
    pipeline_refusal=_sdxl_pipeline_refusal,
    vae=VaeCall(normalizes=True),
    constants=lambda height, width: {"time_ids": (height, width, 0, 0, height, width)},  # of an uncropped picture
    zero_absent_negative=lambda pipe: bool(pipe.config.force_zeros_for_empty_prompt),
    deepest_clip_skip=lambda pipe: layers_of(pipe.text_encoder, pipe.text_encoder_2) - 1,
)
