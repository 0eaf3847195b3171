"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.shape_folding import Sizes
from tmpdiff_export.pipelines.families.components import (
    ClipT5TextEncoder,
    clip_refusal,
    layers_of,
    projection_refusal,
    t5_refusal,
)
from tmpdiff_export.pipelines.families.family import (
    BATCH_AXES,
    TEXT_AXES,
    Family,
    Text,
    VaeCall,
    latents_and_timestep,
    max_sequence_length,
)
from tmpdiff_export.pipelines.families.shifting import dynamic_shift


class Sd3Denoiser(torch.nn.Module):
    """`SD3Transformer2DModel` as (latents, timestep, text, pooled text) -> flow prediction."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sizes = Sizes(int(denoiser.config.patch_size), _largest_side(denoiser.config))

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
    ) -> torch.Tensor:
        """latents [B, C, h, w], timestep [B], text [B, L, D], pooled text [B, P] -> [B, C, h, w]."""
        return self.denoiser(
            latents,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            return_dict=False,
        )[0]


def _largest_side(config: Any) -> int:
    """How many rows and columns of latents the denoiser has positions for."""
    return int(config.pos_embed_max_size) * int(config.patch_size)


def _arguments(call: Mapping[str, Any]) -> Batch:
    return (
        call["hidden_states"],
        call["timestep"].float(),
        call["encoder_hidden_states"],
        call["pooled_projections"],
    )


def _wrap_text(pipe: Any, clip_skip: int | None) -> ClipT5TextEncoder:
    return ClipT5TextEncoder(
        pipe.text_encoder,
        pipe.text_encoder_2,
        pipe.text_encoder_3,
        width=int(pipe.transformer.config.joint_attention_dim),
        max_sequence_length=max_sequence_length(pipe),
        clip_skip=clip_skip,
    )


def _pipeline_refusal(pipe: Any) -> str | None:
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        if getattr(pipe, name) is None:
            return f"its {name} is None, and without it the pipeline encodes no prompt; only T5 may be left out"
    if (pipe.text_encoder_3 is None) is not (pipe.tokenizer_3 is None):
        return "it has only one of text_encoder_3 and tokenizer_3; give both, or set both to None"
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    refusals = [refusal(encoder) for encoder in encoders for refusal in (clip_refusal, projection_refusal)]
    if pipe.text_encoder_3 is not None:
        refusals.append(t5_refusal(pipe.text_encoder_3))
    return next(filter(None, refusals), None)


def _sampler_options(scheduler: Any, num_steps: int, tokens: int) -> dict[str, Any]:
    config = scheduler.config
    return {"mu": dynamic_shift(config, tokens, max_shift=1.16)} if config.get("use_dynamic_shifting") else {}


SD3 = Family(
    denoiser_class="SD3Transformer2DModel",
    component="transformer",
    inputs={**latents_and_timestep(), "encoder_hidden_states": TEXT_AXES, "pooled_projections": BATCH_AXES},
    wrap=lambda pipe: Sd3Denoiser(pipe.transformer),
    arguments=_arguments,
    refusal=lambda denoiser: None,
    pipelines=("StableDiffusion3Pipeline",),
    wrap_text=_wrap_text,
    texts=(
        Text(),
        Text(tokenizer="tokenizer_2", length_of="tokenizer"),
        Text(tokenizer="tokenizer_3", whole_sequence=True),
    ),
    text_outputs={"encoder_hidden_states": TEXT_AXES, "pooled_projections": BATCH_AXES},
    lowercase=False,
    call_options={},
    pipeline_refusal=_pipeline_refusal,
    vae=VaeCall(shifts=True),
    deepest_clip_skip=lambda pipe: layers_of(pipe.text_encoder, pipe.text_encoder_2) - 1,
    may_lack=("text_encoder_3", "tokenizer_3"),
    sampler_options=_sampler_options,
    largest_side=_largest_side,
)
