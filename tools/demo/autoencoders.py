"""The autoencoders of the demo pipelines, untrained, and what training needs to know of each kind."""

from __future__ import annotations

from typing import TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL

from tools.demo.networks import LATENT_CHANNELS

DEEP_LATENT_CHANNELS = 32
_LATENT_NOISE = 0.1
_DEEP = {
    "block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",),
    "block_out_channels": (32, 64, 64, 128, 256),
    "layers_per_block": (1, 1, 1, 1, 1),
    "qkv_multiscales": ((), (), (), (), (5,)),
}

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderDC


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


def make_deep_vae() -> AutoencoderDC:
    """Returns an untrained AutoencoderDC: 256 x 256 pictures to 32 x 16 x 16 latents.

    Sana's own has 32 pixels a latent; these pictures would be 8 x 8 latents of it.
    """
    parts = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in _DEEP.items()}
    return AutoencoderDC(latent_channels=DEEP_LATENT_CHANNELS, attention_head_dim=32, **parts)


def pixels_per_latent(vae: Autoencoder) -> int:
    """Returns the side of the square of pixels that one latent stands for."""
    deep = isinstance(vae, AutoencoderDC)
    blocks = vae.config.encoder_block_out_channels if deep else vae.config.block_out_channels
    return 2 ** (len(blocks) - 1)


def latent_means(vae: Autoencoder, pictures: torch.Tensor) -> torch.Tensor:
    """Returns the unscaled latents [n, C, h, w] of pictures, without noise."""
    if isinstance(vae, AutoencoderDC):
        return vae.encoder(pictures)
    return vae.quant_conv(vae.encoder(pictures))[:, : vae.config.latent_channels]


def noisy_latents(vae: Autoencoder, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns latents as decoders are trained on them, and what is held against their spread, a Kullback-Leibler term.

    An AutoencoderDC has no variance of its own; its latents get the same noise everywhere, so that what is near in them
    looks alike.
    """
    if isinstance(vae, AutoencoderDC):
        mean = vae.encoder(pictures).float()
        return mean + _LATENT_NOISE * torch.randn_like(mean), 0.5 * mean.square().mean()
    mean, log_variance = vae.quant_conv(vae.encoder(pictures)).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean), divergence


def decoded(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Returns the pictures [n, 3, H, W] of unscaled latents."""
    return vae.decoder(latents if isinstance(vae, AutoencoderDC) else vae.post_quant_conv(latents))
