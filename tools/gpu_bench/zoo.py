"""Configurations and inputs of the five denoisers.

The configurations are those of the published checkpoints' config.json; text lengths and conditions are those that the
diffusers pipelines pass at 1024x1024.
"""

from __future__ import annotations

from typing import Any

import torch

from tools.gpu_bench.models import BenchModel, Inputs, Sizes, Source

_TINY_HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}
_SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}


def _flux(config: Any, sizes: Sizes, sigma: float, source: Source) -> Inputs:
    """Packed latents [B, (side / 2)^2, 64]; guidance is distilled, so that one batch entry is one picture."""
    half = sizes.side // 2
    ids = torch.zeros(half, half, 3, device=source.device, dtype=source.dtype)
    ids[..., 1] += torch.arange(half, device=source.device)[:, None]
    ids[..., 2] += torch.arange(half, device=source.device)[None, :]
    return {
        "hidden_states": source.normal(sizes.batch, half * half, config.in_channels),
        "encoder_hidden_states": source.normal(sizes.batch, sizes.text_tokens, config.joint_attention_dim),
        "pooled_projections": source.normal(sizes.batch, config.pooled_projection_dim),
        "timestep": source.full((sizes.batch,), sigma),
        "img_ids": ids.reshape(half * half, 3),
        "txt_ids": torch.zeros(sizes.text_tokens, 3, device=source.device, dtype=source.dtype),
        "guidance": source.full((sizes.batch,), 4.0, torch.float32),
    }


def _latents(config: Any, sizes: Sizes, source: Source) -> torch.Tensor:
    return source.normal(sizes.batch, config.in_channels, sizes.side, sizes.side)


def _sana(config: Any, sizes: Sizes, sigma: float, source: Source) -> Inputs:
    return {
        "hidden_states": _latents(config, sizes, source),
        "encoder_hidden_states": source.normal(sizes.batch, sizes.text_tokens, config.caption_channels),
        "timestep": source.full((sizes.batch,), 1000 * sigma, torch.float32),
        "encoder_attention_mask": source.mask(sizes.batch, sizes.text_tokens),
    }


def _pixart(config: Any, sizes: Sizes, sigma: float, source: Source) -> Inputs:
    return {
        **_sana(config, sizes, sigma, source),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3(config: Any, sizes: Sizes, sigma: float, source: Source) -> Inputs:
    return {
        "hidden_states": _latents(config, sizes, source),
        "encoder_hidden_states": source.normal(sizes.batch, sizes.text_tokens, config.joint_attention_dim),
        "pooled_projections": source.normal(sizes.batch, config.pooled_projection_dim),
        "timestep": source.full((sizes.batch,), 1000 * sigma, torch.float32),
    }


def _sdxl(config: Any, sizes: Sizes, sigma: float, source: Source) -> Inputs:
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pixels = 8.0 * sizes.side
    size = torch.tensor([pixels, pixels, 0.0, 0.0, pixels, pixels], device=source.device, dtype=source.dtype)
    return {
        "sample": _latents(config, sizes, source),
        "timestep": source.full((), 1000 * sigma, torch.float32),
        "encoder_hidden_states": source.normal(sizes.batch, sizes.text_tokens, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": source.normal(sizes.batch, pooled),
            "time_ids": size.repeat(sizes.batch, 1),
        },
    }


FLUX = BenchModel(
    name="flux",
    title="FLUX.1-dev transformer",
    denoiser_class="FluxTransformer2DModel",
    config={"guidance_embeds": True},
    tiny={
        **_TINY_HEADS, "num_layers": 2, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 128,
        "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": (8, 12, 12),
    },
    dtype=torch.bfloat16,
    sizes=Sizes(batch=1, side=128, text_tokens=512),
    tiny_sizes=Sizes(batch=1, side=16, text_tokens=16),
    published=11.90e9,
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    inputs=_flux,
)  # fmt: skip

SANA = BenchModel(
    name="sana",
    title="Sana 1.6B 1024px transformer",
    denoiser_class="SanaTransformer2DModel",
    config={},
    tiny={
        **_TINY_HEADS, "num_layers": 3, "sample_size": 8, "in_channels": 4, "out_channels": 4,
        "num_cross_attention_heads": 4, "cross_attention_head_dim": 32, "cross_attention_dim": 128,
        "caption_channels": 128,
    },
    dtype=torch.bfloat16,
    sizes=Sizes(batch=2, side=32, text_tokens=300),
    tiny_sizes=Sizes(batch=2, side=8, text_tokens=16),
    published=1.604e9,
    blocks=("SanaTransformerBlock",),
    inputs=_sana,
)  # fmt: skip

PIXART = BenchModel(
    name="pixart",
    title="PixArt-Sigma XL 1024px transformer",
    denoiser_class="PixArtTransformer2DModel",
    config={"caption_channels": 4096, "use_additional_conditions": False, "interpolation_scale": 2},
    tiny={
        **_TINY_HEADS, "num_layers": 3, "sample_size": 16, "cross_attention_dim": 128, "caption_channels": 128,
        "use_additional_conditions": False,
    },
    dtype=torch.bfloat16,
    sizes=Sizes(batch=2, side=128, text_tokens=300),
    tiny_sizes=Sizes(batch=2, side=16, text_tokens=16),
    published=0.611e9,
    blocks=("BasicTransformerBlock",),
    inputs=_pixart,
)  # fmt: skip

SD3 = BenchModel(
    name="sd3",
    title="Stable Diffusion 3.5 medium transformer",
    denoiser_class="SD3Transformer2DModel",
    config={
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
    },
    tiny={
        **_TINY_HEADS, "num_layers": 4, "sample_size": 16, "in_channels": 4, "out_channels": 4,
        "joint_attention_dim": 128, "caption_projection_dim": 128, "pooled_projection_dim": 64,
        "pos_embed_max_size": 16, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
    },
    dtype=torch.bfloat16,
    sizes=Sizes(batch=2, side=128, text_tokens=333),
    tiny_sizes=Sizes(batch=2, side=16, text_tokens=16),
    published=2.47e9,
    blocks=("JointTransformerBlock",),
    inputs=_sd3,
)  # fmt: skip

SDXL = BenchModel(
    name="sdxl",
    title="Stable Diffusion XL UNet",
    denoiser_class="UNet2DConditionModel",
    config={
        **_SDXL_BLOCKS, "sample_size": 128, "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    tiny={
        **_SDXL_BLOCKS, "sample_size": 16, "block_out_channels": (32, 64, 128), "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (1, 2, 4), "cross_attention_dim": 128,
        "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 256,
    },
    dtype=torch.float16,
    sizes=Sizes(batch=2, side=128, text_tokens=77),
    tiny_sizes=Sizes(batch=2, side=16, text_tokens=7),
    published=2.567e9,
    blocks=("BasicTransformerBlock", "ResnetBlock2D"),
    inputs=_sdxl,
)  # fmt: skip

MODELS = {model.name: model for model in (FLUX, SANA, PIXART, SD3, SDXL)}
