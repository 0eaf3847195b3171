"""The parts of the demo pipeline, untrained: tokenizer, text encoder, autoencoder and denoiser."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tmpdiff_export.demo.scenes import vocabulary

LATENT_CHANNELS = 4
CAPTION_TOKENS = 40
"""Tokens that training pads captions to; longer than any caption of the grammar."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a word-level tokenizer of the captions' vocabulary: lower case, marks apart, `</s>` at the end."""
    special = ["<pad>", "</s>", "<unk>"]
    ids = {token: i for i, token in enumerate([*special, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CAPTION_TOKENS,
    )


def make_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    """Returns an untrained T5 encoder of width 128, 3 layers, without dropout."""
    return T5EncoderModel(
        T5Config(
            vocab_size=-(-vocabulary_size // 64) * 64, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def make_vae() -> AutoencoderKL:
    """Returns an untrained AutoencoderKL: 256 x 256 pictures to 4 x 32 x 32 latents."""
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=256,
    )


def make_denoiser() -> PixArtTransformer2DModel:
    """Returns an untrained denoiser: 4 layers of width 512 over 256 tokens, 19 M parameters.

    As in PixArt, the pipeline uses the first half of the 8 output channels; the weights of the rest are zero.
    """
    denoiser = PixArtTransformer2DModel(
        num_attention_heads=8, attention_head_dim=64, num_layers=4, sample_size=32, patch_size=2,
        in_channels=LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS, cross_attention_dim=512, caption_channels=128,
        use_additional_conditions=False,
    )  # fmt: skip
    unused = torch.arange(denoiser.proj_out.out_features) % (2 * LATENT_CHANNELS) >= LATENT_CHANNELS
    with torch.no_grad():
        denoiser.proj_out.weight[unused] = 0
        denoiser.proj_out.bias[unused] = 0
    return denoiser
