"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tmpdiff_export.families.family import BATCH_AXES, TEXT_AXES, DenoiserFamily, latents_and_timestep
from tmpdiff_export.ranges import Batch


class Sd3Denoiser(torch.nn.Module):
    """`SD3Transformer2DModel` as (latents, timestep, text, pooled text) -> flow prediction."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

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


def _arguments(call: Mapping[str, Any]) -> Batch:
    return (
        call["hidden_states"],
        call["timestep"].float(),
        call["encoder_hidden_states"],
        call["pooled_projections"],
    )


SD3 = DenoiserFamily(
    denoiser_class="SD3Transformer2DModel",
    component="transformer",
    inputs={**latents_and_timestep(), "encoder_hidden_states": TEXT_AXES, "pooled_projections": BATCH_AXES},
    wrap=lambda pipe, height, width: Sd3Denoiser(pipe.transformer),
    arguments=_arguments,
    refusal=lambda denoiser: None,
)
