"""The parts of the demo pipelines, untrained: tokenizers, text encoders and denoisers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tmpdiff_export.demo.scenes import vocabulary

LATENT_CHANNELS = 4
CAPTION_TOKENS = 40
"""Tokens that training pads captions to; longer than any caption of the grammar."""
MMDITS = {16: (4, 3), 32: (6, 8), 64: (16, 12)}
"""Heads of 64 and layers of MMDiTs, by the side of their latents."""
CLIP_TOKENS = 32
"""The same for the pipelines with CLIP text encoders, whose captions begin and end with a mark."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a word-level tokenizer of the captions' vocabulary: lower case, marks apart, `</s>` at the end."""
    return _word_tokenizer("</s>", "$A </s>", eos_token="</s>")


def make_gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the same for Gemma-2, with `<bos>` at the beginning as its own tokenizer has it."""
    return _word_tokenizer("<bos>", "<bos> $A", bos_token="<bos>")


def _word_tokenizer(mark: str, template: str, **marks: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts one mark around texts."""
    ids = {token: i for i, token in enumerate(["<pad>", mark, "<unk>", *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(mark, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CAPTION_TOKENS,
        **marks,
    )


def make_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    """Returns an untrained T5 encoder of width 128, 3 layers, without dropout."""
    return T5EncoderModel(
        T5Config(
            vocab_size=-(-vocabulary_size // 64) * 64, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def make_gemma_text_encoder(vocabulary_size: int) -> Gemma2Model:
    """Returns an untrained Gemma-2 of width 128, 4 layers, of which every other one attends to 64 tokens before it."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=-(-vocabulary_size // 64) * 64, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=64,
            max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=1, use_cache=False,
        )
    )  # fmt: skip


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


def make_clip_tokenizer() -> CLIPTokenizer:
    """Returns CLIP's byte-pair tokenizer with every word of the captions' vocabulary as one token.

    Other words become more tokens, down to bytes. Prompts are padded with the token that ends them.
    """
    letters = list(bytes_to_unicode().values())
    merges = word_merges(vocabulary())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])},
        merges=merges,
        model_max_length=CLIP_TOKENS,
        pad_token="<|endoftext|>",
    )


def word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Returns byte-pair merges, highest rank first, that make one token of every word.

    A word's new merges rank below all before it, so they cannot change how an earlier word is put together.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := _pieces(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    return list(ranks)


def _pieces(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of a word: joins the neighbours of the best rank until none are left that may be joined."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        i = min(found)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def make_clip_text_encoder(
    tokenizer: CLIPTokenizer, *, projection: bool
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Returns an untrained CLIP text encoder, width 128, 3 layers, with a projection of the pooled text or without."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def make_unet(sample_size: int, text_width: int) -> UNet2DConditionModel:
    """Returns an untrained UNet for square latents: 4 M parameters for a side of 16, 39 M for one of 32.

    Widths are multiples of 128 where most weights are, so that INT4's blocks fit.
    """
    shape: dict[str, Any]
    if sample_size == 16:
        shape = {
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
    else:
        shape = {
            "block_out_channels": (128, 256, 256),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }
    return UNet2DConditionModel(
        sample_size=sample_size, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        cross_attention_dim=text_width, attention_head_dim=4, use_linear_projection=True, **shape,
    )  # fmt: skip


def make_mmdit(sample_size: int, text_width: int, pooled_width: int) -> SD3Transformer2DModel:
    """Returns an untrained MMDiT for square latents: parameters are 7 M, 42 M or 445 M for a side of 16, 32 or 64.

    As in the DiT paper, modulation and output start at zero: every block begins as the identity. The large one
    normalizes queries and keys, as Stable Diffusion 3.5 does.
    """
    heads, layers = MMDITS[sample_size]
    denoiser = SD3Transformer2DModel(
        sample_size=sample_size, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        num_layers=layers, attention_head_dim=64, num_attention_heads=heads, caption_projection_dim=64 * heads,
        joint_attention_dim=text_width, pooled_projection_dim=pooled_width, pos_embed_max_size=sample_size // 2,
        qk_norm="rms_norm" if sample_size == 64 else None,
    )  # fmt: skip
    norms = [block.norm1 for block in denoiser.transformer_blocks]
    norms += [block.norm1_context for block in denoiser.transformer_blocks]
    for linear in [*(norm.linear for norm in norms), denoiser.norm_out.linear, denoiser.proj_out]:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return denoiser


def make_sana(sample_size: int, channels: int, text_width: int) -> SanaTransformer2DModel:
    """Returns an untrained Sana for square latents: 6 layers of width 512, a token a latent, 26 M parameters.

    With positions, as the published ones for large pictures have them.
    """
    return SanaTransformer2DModel(
        sample_size=sample_size, patch_size=1, in_channels=channels, out_channels=channels, num_layers=6,
        num_attention_heads=16, attention_head_dim=32, num_cross_attention_heads=8, cross_attention_head_dim=64,
        cross_attention_dim=512, caption_channels=text_width, interpolation_scale=1,
    )  # fmt: skip
