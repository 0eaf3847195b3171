"""Sana."""

from __future__ import annotations

import torch

from tmpdiff_export.onnx_graphs.shape_folding import Sizes
from tmpdiff_export.pipelines.families.family import TEXT_AXES, DenoiserFamily, latents_and_timestep
from tmpdiff_export.pipelines.families.pixart import masked_arguments
from tmpdiff_export.pipelines.families.positions import adding, computed_positions


class SanaDenoiser(torch.nn.Module):
    """`SanaTransformer2DModel` as (latents, timestep, text, mask) -> flow prediction."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sizes = Sizes(int(denoiser.config.patch_size))
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
            return self.denoiser(
                latents,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
                return_dict=False,
            )[0]


def _refusal(denoiser: torch.nn.Module) -> str | None:
    config = denoiser.config
    if config.guidance_embeds or config.timestep_scale != 1.0:
        return "it has a guidance embedding or scaled timesteps (Sana-Sprint), whose sampler draws noise"
    return None


SANA = DenoiserFamily(
    denoiser_class="SanaTransformer2DModel",
    component="transformer",
    inputs={**latents_and_timestep(), "encoder_hidden_states": TEXT_AXES, "encoder_attention_mask": TEXT_AXES},
    wrap=lambda pipe: SanaDenoiser(pipe.transformer),
    arguments=masked_arguments,
    refusal=_refusal,
)
