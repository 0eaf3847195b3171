"""Pipelines of every family with small random text encoders, to hold what is made of prompts to diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tools.acceptance.miniatures import POOLED, WIDTH, miniature
from tools.acceptance.small_text import clip_tokenizer, gemma_tokenizer, t5_tokenizer

LAYERS = 3
LONG = 512  # `model_max_length` of T5's tokenizer
MASKED = 120  # of PixArt's: shorter, so that prompts are cut


def clip_encoder(tokenizer: Any, width: int, projection: int | None = None) -> Any:
    """A CLIP text encoder for a tokenizer, with a projection to so many channels or without one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=LAYERS,
        num_attention_heads=2, projection_dim=projection or width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, initializer_factor=2.0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(tokenizer: Any, width: int) -> Any:
    """A T5 encoder for a tokenizer."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def gemma_encoder(tokenizer: Any, width: int) -> Any:
    """A Gemma-2 decoder for a tokenizer; the window of its first layer is shorter than any prompt."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
        attn_logit_softcapping=2.0, initializer_range=0.2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Gemma2Model(config).eval()


def deep_compression_vae(channels: int) -> Any:
    """An AutoencoderDC of 32 pixels a latent with attention in its last blocks."""
    from diffusers import AutoencoderDC

    blocks, scales = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2, ((),) * 4 + ((5,),) * 2
    return AutoencoderDC(
        latent_channels=channels, attention_head_dim=8, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8, 8, 16, 16, 16), decoder_block_out_channels=(8, 8, 8, 16, 16, 16),
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1), decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales, encoder_out_shortcut=False,
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    ).eval()  # fmt: skip


def kl_vae(channels: int, *, shifted: bool) -> Any:
    """An AutoencoderKL of 8 pixels a latent; SD3 and FLUX.1 pipelines want a shift."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, sample_size=64,
        shift_factor=0.0609 if shifted else None,
    ).eval()  # fmt: skip


def text_pipeline(name: str, **parts: Any) -> Any:
    """The miniature of a family (`tools.acceptance.miniatures`) with a VAE, text encoders and tokenizers put in."""
    pipe = miniature(name).pipe
    options = {"requires_safety_checker": False} if name == "unet" else {}
    vae = deep_compression_vae(4) if name == "sana" else kl_vae(4, shifted=name.startswith(("sd3", "flux")))
    return type(pipe)(**{**pipe.components, "vae": vae, **parts}, **options)


def _sd(**options: Any) -> Any:
    tokenizer = clip_tokenizer(**options)
    return text_pipeline("unet", tokenizer=tokenizer, text_encoder=clip_encoder(tokenizer, WIDTH))


def _sdxl(first: Any, second: Any, *, zeros: bool = True) -> Any:
    pipe = text_pipeline(
        "unet-sdxl",
        tokenizer=first,
        tokenizer_2=second,
        text_encoder=clip_encoder(first, 48),
        text_encoder_2=clip_encoder(second, WIDTH - 48, projection=POOLED),
    )
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    return pipe


def _sd3(third: Any) -> Any:
    first, second = clip_tokenizer(), clip_tokenizer("!", model_max_length=64)
    return text_pipeline(
        "sd3", tokenizer=first, tokenizer_2=second, tokenizer_3=third, text_encoder=clip_encoder(first, 32, 24),
        text_encoder_2=clip_encoder(second, 48, POOLED - 24),
        text_encoder_3=None if third is None else t5_encoder(third, WIDTH),
    )  # fmt: skip


def _flux(name: str) -> Any:
    first, second = clip_tokenizer(model_max_length=60), t5_tokenizer(LONG)
    return text_pipeline(
        name,
        tokenizer=first,
        tokenizer_2=second,
        text_encoder=clip_encoder(first, POOLED),
        text_encoder_2=t5_encoder(second, WIDTH),
    )


def _pixart(**options: Any) -> Any:
    tokenizer = t5_tokenizer(MASKED, **options)
    return text_pipeline("pixart", tokenizer=tokenizer, text_encoder=t5_encoder(tokenizer, WIDTH))


def _pixart_alpha() -> Any:
    """As published for pictures of 1024 pixels, whose denoiser is told size and shape of the picture."""
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    heads, size = 6, WIDTH // 4  # three parts of the width are embeddings of height, width and their ratio
    denoiser = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=size, num_layers=2, sample_size=128, in_channels=4, out_channels=8,
        cross_attention_dim=heads * size, caption_channels=WIDTH,
    ).eval()  # fmt: skip
    return PixArtAlphaPipeline(**{**_pixart().components, "transformer": denoiser})


def _with_ring() -> Any:
    """A tokenizer with one word more than the others'."""
    tokenizer = clip_tokenizer("!")
    tokenizer.add_tokens(["ring"])
    return tokenizer


def _sana(**options: Any) -> Any:
    tokenizer = gemma_tokenizer(**options)
    return text_pipeline("sana", tokenizer=tokenizer, text_encoder=gemma_encoder(tokenizer, WIDTH))


def _with_added_tokens() -> Any:
    """As after `load_textual_inversion` of one embedding of three vectors and one of one."""
    pipe = _sd()
    pipe.tokenizer.add_tokens(["<ring>", "<ring>_1", "<ring>_2", "<dot>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    return pipe


def _seeded(make: Callable[[], Any]) -> Callable[[], Any]:
    def seeded() -> Any:
        torch.manual_seed(0)
        return make()

    return seeded


TEXT_PIPELINES: dict[str, Callable[[], Any]] = {
    name: _seeded(make)
    for name, make in {
        "sd": _sd,
        "sd-sd2": lambda: _sd(pad_token="!"),
        "sd-left": lambda: _sd(padding_side="left", truncation_side="left"),
        "sd-inversion": _with_added_tokens,
        "sdxl": lambda: _sdxl(clip_tokenizer(), clip_tokenizer("!")),
        "sdxl-no-zeros": lambda: _sdxl(clip_tokenizer("!"), clip_tokenizer(), zeros=False),
        "sdxl-vocabularies": lambda: _sdxl(clip_tokenizer(), _with_ring()),
        "sd3": lambda: _sd3(None),
        "sd3-t5": lambda: _sd3(t5_tokenizer(LONG)),
        "flux": lambda: _flux("flux"),
        "flux-schnell": lambda: _flux("flux-schnell"),
        "pixart": _pixart,
        "pixart-alpha": _pixart_alpha,
        "pixart-left": lambda: _pixart(padding_side="left"),
        "sana": _sana,
        "sana-eos": lambda: _sana(add_eos_token=True, padding_side="right"),
        "sana-short": lambda: _sana(model_max_length=MASKED),
    }.items()
}
"""Makers by name; what follows a dash is what is unusual about it."""
