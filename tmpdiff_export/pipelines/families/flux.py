"""FLUX.1: guidance-distilled (dev) and without a guidance embedding (schnell)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers import transformer_flux
from torch.nn import functional

from engines.errors import SamplerError
from engines.manifest import GUIDANCE, TIMESTEP
from tmpdiff_export.devices import Batch
from tmpdiff_export.pipelines.families.components import PooledT5TextEncoder, clip_refusal, t5_refusal
from tmpdiff_export.pipelines.families.family import BATCH_AXES, TEXT_AXES, Family, Text, VaeCall, latents_and_timestep
from tmpdiff_export.pipelines.families.shifting import dynamic_shift

# The pipeline divides timesteps by this and the denoiser multiplies them, and the guidance, by it again.
TRAIN_TIMESTEPS = 1000
PACKING = 2
# Rows and columns of tokens that there are positions for; the tables of as many take a megabyte.
MOST_TOKENS = 1024


class FluxDenoiser(torch.nn.Module):
    """`FluxTransformer2DModel` as (latents, timestep, text, pooled text[, guidance]) -> flow prediction.

    The pipeline packs 2x2 latents into one token of 4 C channels; here that is done inside, so that latents are
    [B, C, h, w] as everywhere. Rotary tables depend on rows and columns only: they are joined from those of a square's
    diagonal, which are constants, in float32 as diffusers rotates.
    """

    float32_buffers = ("cos", "sin")
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.before_columns = sum(denoiser.pos_embed.axes_dim[:2])
        ids = torch.arange(MOST_TOKENS)[:, None] * torch.tensor([0, 1, 1])
        for name, table in zip(self.float32_buffers, denoiser.pos_embed(ids), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """latents [B, C, h, w], timestep [B] 0..1000, text [B, L, D], pooled [B, P], guidance [B] -> [B, C, h, w]."""
        no_ids = torch.zeros(1, 3, device=latents.device)
        rows, columns = latents.shape[2] // PACKING, latents.shape[3] // PACKING
        rotary = self._rotary(encoder_hidden_states.shape[1], rows, columns)
        with self._exportable(timestep, guidance, rotary):
            tokens = self.denoiser(
                hidden_states=pack(latents),
                timestep=timestep,
                guidance=guidance,
                pooled_projections=pooled_projections,
                encoder_hidden_states=encoder_hidden_states,
                txt_ids=no_ids,
                img_ids=no_ids,
                return_dict=False,
            )[0]
        return unpack(tokens, rows, columns)

    def _rotary(self, text: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, both [text + rows columns, D]; text tokens are all at position 0."""
        after = self.cos.shape[1] - self.before_columns

        def joined(table: torch.Tensor) -> torch.Tensor:
            down = functional.pad(table[:rows, : self.before_columns], (0, after))
            across = functional.pad(table[:columns, self.before_columns :], (self.before_columns, 0))
            return torch.cat([table[:1].expand(text, -1), (down[:, None] + across[None]).reshape(-1, table.shape[1])])

        return joined(self.cos), joined(self.sin)

    @contextlib.contextmanager
    def _exportable(
        self, timestep: torch.Tensor, guidance: torch.Tensor | None, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> Iterator[None]:
        """The denoiser, computing the same from what exports well.

        Its embedders get FP32 timesteps and guidance, which it would round to its own type first. Its rotary tables,
        which it would compute in FP64, are given. Its rotation reshapes by sizes that tracing would take for constants.
        """
        scaled = () if guidance is None else (guidance * TRAIN_TIMESTEPS,)
        handles = [
            self.denoiser.time_text_embed.register_forward_pre_hook(lambda _, args: (timestep, *scaled, args[-1])),
            self.denoiser.pos_embed.register_forward_hook(lambda *_: rotary),
        ]
        original = transformer_flux.apply_rotary_emb
        transformer_flux.apply_rotary_emb = _rotate
        try:
            yield
        finally:
            transformer_flux.apply_rotary_emb = original
            for handle in handles:
                handle.remove()


def _rotate(data: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], sequence_dim: int) -> torch.Tensor:
    """data [B, S, heads, D], rotary two [S, D] -> [B, S, heads, D]; pairs of neighbours are rotated, in FP32."""
    cos, sin = (table[None, :, None, :] for table in rotary)
    real, imaginary = data.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (data.float() * cos + turned * sin).to(data.dtype)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, h w / 4, 4 C], as `FluxPipeline` does."""
    batch, channels, height, width = latents.shape
    blocks = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[B, rows columns, 4 C] -> [B, C, 2 rows, 2 columns], the inverse of `pack`."""
    batch, _, channels = tokens.shape
    blocks = tokens.reshape(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(batch, channels // 4, 2 * rows, 2 * columns)


def _arguments(call: Mapping[str, Any]) -> Batch:
    rows, columns = (int(call["img_ids"][:, axis].max()) + 1 for axis in (1, 2))
    tokens = call["hidden_states"].shape[1]
    if tokens != rows * columns:
        raise ValueError(
            f"the denoiser was called with {tokens} image tokens at {rows} x {columns} positions (of a picture to edit, "
            "or of a control picture); the engines take those of one picture"
        )
    return (
        unpack(call["hidden_states"], rows, columns),
        call["timestep"].float() * TRAIN_TIMESTEPS,
        call["encoder_hidden_states"],
        call["pooled_projections"],
    )


def _called_timesteps(timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (timesteps.to(dtype) / TRAIN_TIMESTEPS).float() * TRAIN_TIMESTEPS


def _refusal(denoiser: torch.nn.Module, guided: bool) -> str | None:
    config = denoiser.config
    if config.out_channels not in (None, config.in_channels):
        return "it takes more channels than it returns (inpainting or control)"
    if config.guidance_embeds is not guided:
        return f"it has {'a' if config.guidance_embeds else 'no'} guidance embedding"
    return None


def _pipeline_refusal(pipe: Any) -> str | None:
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        if getattr(pipe, name) is None:
            return f"its {name} is None, and without it the pipeline encodes no prompt"
    return clip_refusal(pipe.text_encoder) or t5_refusal(pipe.text_encoder_2)


def _sampler_options(scheduler: Any, num_steps: int, tokens: int) -> dict[str, Any]:
    options: dict[str, Any] = {"mu": dynamic_shift(scheduler.config, tokens, max_shift=1.15)}
    if not scheduler.config.get("use_flow_sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    missing = sorted(set(options) - set(inspect.signature(scheduler.set_timesteps).parameters))
    if missing:
        raise SamplerError(
            f"scheduler {type(scheduler).__name__} takes no {' and no '.join(missing)}, which FLUX pipelines hand to "
            "set_timesteps; use FlowMatchEulerDiscreteScheduler"
        )
    return options


FLUX_SCHNELL = Family(
    denoiser_class="FluxTransformer2DModel",
    component="transformer",
    inputs={**latents_and_timestep(), "encoder_hidden_states": TEXT_AXES, "pooled_projections": BATCH_AXES},
    wrap=lambda pipe: FluxDenoiser(pipe.transformer),
    arguments=_arguments,
    refusal=lambda denoiser: _refusal(denoiser, guided=False),
    pipelines=("FluxPipeline",),
    wrap_text=lambda pipe, clip_skip: PooledT5TextEncoder(pipe.text_encoder, pipe.text_encoder_2),
    texts=(Text(), Text(tokenizer="tokenizer_2", whole_sequence=True)),
    text_outputs={"encoder_hidden_states": TEXT_AXES, "pooled_projections": BATCH_AXES},
    lowercase=False,
    call_options={},
    pipeline_refusal=_pipeline_refusal,
    vae=VaeCall(shifts=True),
    takes_guidance_scale=False,
    packing=PACKING,
    sampler_options=_sampler_options,
    largest_side=lambda config: PACKING * MOST_TOKENS,
    returned=lambda model_output, config: pack(model_output),
    called_timesteps=_called_timesteps,
)
# The guidance scale is an input, not a constant: it is chosen per picture, and one engine serves every scale. It is
# float32, because 3600 (a scale of 3.6, times 1000) and its neighbours are 2 apart in FP16.
FLUX = replace(
    FLUX_SCHNELL,
    inputs={**FLUX_SCHNELL.inputs, GUIDANCE: BATCH_AXES},
    arguments=lambda call: (*_arguments(call), call[GUIDANCE].float()),
    refusal=lambda denoiser: _refusal(denoiser, guided=True),
    float32_inputs=frozenset({TIMESTEP, GUIDANCE}),
    takes_guidance_scale=True,
)
