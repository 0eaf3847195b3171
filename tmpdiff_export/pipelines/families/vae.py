"""VAE decoders: export wrappers, and which are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

from tmpdiff_export.pipelines.families.family import Axes, Family, VaeCall


class VaeDecoder(torch.nn.Module):
    """A VAE as latents of a pipeline -> pictures in 0..1 (before clamping), at any size."""

    mean: torch.Tensor | None
    std: torch.Tensor | None

    def __init__(self, vae: torch.nn.Module, call: VaeCall) -> None:
        super().__init__()
        self.vae = vae
        self.factor = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor) if call.shifts else None
        mean, std = _normalization(vae, call) or (None, None)
        self.register_buffer(
            "mean", None if mean is None else torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False
        )
        self.register_buffer("std", None if std is None else torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, 3, H, W]."""
        scaled = (latents if self.std is None else latents * self.std) / self.factor
        if self.shift is not None:
            scaled = scaled + self.shift
        if self.mean is not None:
            scaled = scaled + self.mean
        with _linear_attention(self.vae):
            return self.vae.decode(scaled, return_dict=False)[0] / 2 + 0.5


@contextlib.contextmanager
def _linear_attention(vae: torch.nn.Module) -> Iterator[None]:
    """Has a traced `AutoencoderDC` attend in linear time, as it does at all sizes but a few tokens; the result is equal.

    It looks at the number of tokens, and a graph for all sizes would do as the traced one.
    """
    layers = [part for part in vae.modules() if isinstance(part, SanaMultiscaleLinearAttention)]
    if not torch.jit.is_tracing():
        layers = []
    for layer in layers:
        layer.apply_quadratic_attention = layer.apply_linear_attention
    try:
        yield
    finally:
        for layer in layers:
            del layer.apply_quadratic_attention


def vae_decoder(pipe: Any, family: Family) -> VaeDecoder:
    """The export wrapper around a pipeline's VAE, which `vae_refusal` has nothing against."""
    return VaeDecoder(pipe.vae, family.vae)


def picture_axes(pipe: Any) -> Axes:
    """The symbolic axes of pictures, whose sizes are multiples of those of latents."""
    return {0: "batch", 2: f"{pipe.vae_scale_factor}*height", 3: f"{pipe.vae_scale_factor}*width"}


def vae_refusal(pipe: Any, family: Family) -> str | None:
    """Why a pipeline's VAE is not exported, or None if it is."""
    vae, call = pipe.vae, family.vae
    if vae is None:
        return "its vae is None, and without it the pipeline draws no picture"
    name = type(vae).__name__
    if name == "ConsistencyDecoderVAE":
        return f"its VAE is a {name}, which draws noise of its own"
    if name not in call.classes:
        return f"its VAE is a {name}, not one of {', '.join(call.classes)}"
    config = vae.config
    for factor in ("scaling_factor", *(["shift_factor"] if call.shifts else [])):
        if getattr(config, factor, None) is None:
            return f"its VAE, a {name}, has no {factor}, which the pipeline reads"
    channels = int(getattr(pipe, family.component).config.in_channels) // family.packing**2
    if config.latent_channels != channels:
        return f"its VAE takes latents of {config.latent_channels} channels, and the denoiser's have {channels}"
    lengths = {len(values) for values in _normalization(vae, call) or ()}
    if lengths - {channels}:
        return f"its VAE has latents_mean and latents_std of {sorted(lengths)} channels, and latents have {channels}"
    return None


def _normalization(vae: torch.nn.Module, call: VaeCall) -> tuple[list[float], list[float]] | None:
    """`latents_mean` and `latents_std` where the pipeline reads them."""
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    return (list(mean), list(std)) if call.normalizes and mean is not None and std is not None else None
