"""A pipeline of every family, random and as small as the export takes it, for tests of opening and attaching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.acceptance.small_text import clip_tokenizer, t5_tokenizer

TEXT_WIDTH = 32
T5_TOKENS = 20


def clip_encoder(width: int, *, projection: bool = False) -> Any:
    """A CLIP text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_encoder(width: int = TEXT_WIDTH) -> Any:
    """A T5 encoder of two layers; `shared` and `encoder.embed_tokens` are one tensor."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer(T5_TOKENS)), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            is_encoder_decoder=False, use_cache=False,
        )
    )  # fmt: skip


def vae(channels: int) -> Any:
    """An AutoencoderKL of 8 pixels per latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, sample_size=64,
        shift_factor=0.0609 if channels == 16 else None,
    )  # fmt: skip


def unet(**changes: Any) -> Any:
    """A UNet of two levels."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 16), "cross_attention_dim": TEXT_WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2, "norm_num_groups": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**{**config, **changes})


def stable_diffusion() -> Any:
    """A StableDiffusionPipeline."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        tokenizer=clip_tokenizer(), text_encoder=clip_encoder(TEXT_WIDTH), unet=unet(), vae=vae(4),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    """A StableDiffusionXLPipeline."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    denoiser = unet(
        cross_attention_dim=2 * TEXT_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8, use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer("!</w>"), text_encoder=clip_encoder(TEXT_WIDTH),
        text_encoder_2=clip_encoder(TEXT_WIDTH, projection=True), unet=denoiser, vae=vae(4),
        scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip


def pixart() -> Any:
    """A PixArtSigmaPipeline."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    denoiser = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, patch_size=2, in_channels=4,
        out_channels=8, cross_attention_dim=32, caption_channels=TEXT_WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(T5_TOKENS), text_encoder=t5_encoder(), vae=vae(4), transformer=denoiser,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def sd3() -> Any:
    """A StableDiffusion3Pipeline with T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    denoiser = SD3Transformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, in_channels=16, out_channels=16,
        joint_attention_dim=2 * TEXT_WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(16),
        text_encoder=clip_encoder(TEXT_WIDTH, projection=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(TEXT_WIDTH, projection=True), tokenizer_2=clip_tokenizer("!</w>"),
        text_encoder_3=t5_encoder(2 * TEXT_WIDTH), tokenizer_3=t5_tokenizer(T5_TOKENS),
    )  # fmt: skip


def flux() -> Any:
    """A FluxPipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    denoiser = FluxTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1, in_channels=64,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(16),
        text_encoder=clip_encoder(TEXT_WIDTH), tokenizer=clip_tokenizer(), text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(T5_TOKENS), transformer=denoiser,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
}


def save_small_pipeline(name: str, folder: Path, **options: Any) -> None:
    """Writes one of `MAKERS` with weights of a fixed seed.

    Args:
        name: of the maker.
        folder: pipeline folder to make.
        options: for `save_pretrained`.
    """
    import torch

    torch.manual_seed(0)
    MAKERS[name]().save_pretrained(folder, **options)
