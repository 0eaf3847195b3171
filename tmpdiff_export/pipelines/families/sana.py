"""Sana."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from engines.errors import BuildError
from engines.text_entry import Reading
from tmpdiff_export.pipelines.families.components import CausalTextEncoder, gemma_refusal
from tmpdiff_export.pipelines.families.family import TEXT_AXES, Family, Text, VaeCall, latents_and_timestep
from tmpdiff_export.pipelines.families.pixart import masked_arguments
from tmpdiff_export.pipelines.families.positions import adding, computed_positions

_PICTURE_MULTIPLE = 32  # the pipeline refuses other sizes, whatever its VAE
_HEAD = 1  # position 0 is kept, and of the others the last ones


class SanaDenoiser(torch.nn.Module):
    """`SanaTransformer2DModel` as (latents, timestep, text, mask) -> flow prediction.

    A learned variance is cut off, as the pipeline does.
    """

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.halve = denoiser.config.out_channels // 2 == denoiser.config.in_channels
        self.positions = computed_positions(denoiser.patch_embed)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """latents [B, C, h, w], timestep [B], text [B, L, D], mask [B, L] (1 on real tokens) -> [B, C, h, w]."""
        with adding(self.positions, self.denoiser.patch_embed, latents):
            output = self.denoiser(
                latents,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
                return_dict=False,
            )[0]
        return output.chunk(2, dim=1)[0] if self.halve else output


def _refusal(denoiser: torch.nn.Module) -> str | None:
    config = denoiser.config
    if config.guidance_embeds or config.timestep_scale != 1.0:
        return "it has a guidance embedding or scaled timesteps (Sana-Sprint), whose sampler draws noise"
    return None


def _readings(pipe: Any) -> tuple[Reading, Reading]:
    """Prompts follow the instruction that the pipeline's call has by default, negative prompts none.

    The pipeline counts the instruction's tokens with the one before it, and takes two of them back.
    """
    lines = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    prefix = "\n".join(lines)
    extra = len(pipe.tokenizer.encode(prefix)) - 2
    if extra < 0:
        raise BuildError(
            f"tokenizer {type(pipe.tokenizer).__name__} reads the instruction before prompts as {extra + 2} token, where two "
            "or more were expected; save the pipeline with the tokenizer of its text encoder"
        )
    return Reading(prefix=prefix, extra_tokens=extra, head=_HEAD), Reading()


SANA = Family(
    denoiser_class="SanaTransformer2DModel",
    component="transformer",
    inputs={**latents_and_timestep(), "encoder_hidden_states": TEXT_AXES, "encoder_attention_mask": TEXT_AXES},
    wrap=lambda pipe: SanaDenoiser(pipe.transformer),
    arguments=masked_arguments,
    refusal=_refusal,
    pipelines=("SanaPipeline",),
    wrap_text=lambda pipe, clip_skip: CausalTextEncoder(pipe.text_encoder),
    texts=(Text(masked=True, whole_sequence=True, padding_side="right", readings=_readings),),
    text_outputs={"encoder_hidden_states": TEXT_AXES, "encoder_attention_mask": TEXT_AXES},
    lowercase=True,
    call_options={"use_resolution_binning": False, "clean_caption": False},
    pipeline_refusal=lambda pipe: gemma_refusal(pipe.text_encoder),
    vae=VaeCall(classes=("AutoencoderDC",)),
    picture_multiple=_PICTURE_MULTIPLE,
)
