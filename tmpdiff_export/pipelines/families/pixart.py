"""PixArt-Alpha and PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.shape_folding import Sizes
from tmpdiff_export.pipelines.families.components import MaskedTextEncoder
from tmpdiff_export.pipelines.families.family import TEXT_AXES, Family, Text, VaeCall, latents_and_timestep
from tmpdiff_export.pipelines.families.positions import adding, computed_positions


class PixArtDenoiser(torch.nn.Module):
    """`PixArtTransformer2DModel` as (latents, timestep, text, mask) -> noise prediction.

    The second half of the output channels (the learned variance) is cut off, as the pipelines do. Where the denoiser
    is told the picture's size, that is the size of the latents in pixels.
    """

    def __init__(self, denoiser: torch.nn.Module, vae_scale_factor: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        # The module resolves a configured None by its size; the configuration does not.
        self.extra = bool(denoiser.use_additional_conditions)
        self.halve = denoiser.config.out_channels // 2 == denoiser.config.in_channels
        self.sizes = Sizes(int(denoiser.config.patch_size))
        self.vae_scale_factor = vae_scale_factor
        self.positions = computed_positions(denoiser.pos_embed)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """latents [B, C, h, w], timestep [B], text [B, L, D], mask [B, L] -> [B, C, h, w]."""
        with adding(self.positions, self.denoiser.pos_embed, latents):
            output = self.denoiser(
                latents,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                encoder_attention_mask=encoder_attention_mask,
                added_cond_kwargs=self._size(latents) if self.extra else {"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
        return output.chunk(2, dim=1)[0] if self.halve else output

    def _size(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """The picture's height and width [B, 2] and their ratio [B, 1], in float32: FP16 rounds most ratios."""
        one = latents.new_ones(latents.shape[0], 1, dtype=torch.float32)
        height, width = one * latents.shape[2], one * latents.shape[3]
        resolution = torch.cat([height, width], dim=1) * self.vae_scale_factor
        return {"resolution": resolution, "aspect_ratio": height / width}


def masked_arguments(call: Mapping[str, Any]) -> Batch:
    """Latents, timestep, text and its mask, as PixArt and Sana pipelines hand them over."""
    return (
        call["hidden_states"],
        call["timestep"].float(),
        call["encoder_hidden_states"],
        call["encoder_attention_mask"].to(call["encoder_hidden_states"].dtype),
    )


PIXART = Family(
    denoiser_class="PixArtTransformer2DModel",
    component="transformer",
    inputs={**latents_and_timestep(), "encoder_hidden_states": TEXT_AXES, "encoder_attention_mask": TEXT_AXES},
    wrap=lambda pipe: PixArtDenoiser(pipe.transformer, int(pipe.vae_scale_factor)),
    arguments=masked_arguments,
    refusal=lambda denoiser: None,
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    wrap_text=lambda pipe, clip_skip: MaskedTextEncoder(pipe.text_encoder),
    texts=(Text(masked=True, whole_sequence=True),),
    text_outputs={"encoder_hidden_states": TEXT_AXES, "encoder_attention_mask": TEXT_AXES},
    lowercase=True,
    call_options={"use_resolution_binning": False, "clean_caption": False},
    picture_multiple=8,
    pipeline_refusal=lambda pipe: None,
    vae=VaeCall(),
)
