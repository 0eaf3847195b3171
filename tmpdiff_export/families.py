"""What differs between denoiser classes: how they are called, wrapped for export, and conditioned.

A family is an entry in `FAMILIES`; everything else in the toolchain is generic.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engines.errors import BuildError
from engines.manifest import LATENTS, TIMESTEP

DENOISER = "denoiser"  # attribute of every export wrapper that holds the diffusers module
Axes = Mapping[int, str]


@dataclass(frozen=True)
class Family:
    """One kind of denoiser.

    Attributes:
        component: the pipeline attribute that holds the denoiser.
        pipelines: classes whose loop is plain guidance around the denoiser; others add to it.
        inputs: denoiser engine inputs in the wrapper's order, with their symbolic axes.
        wrap: makes the export wrapper from (pipeline, height, width).
        arguments: picks the wrapper's inputs out of the arguments the pipeline calls the denoiser with.
        wrap_text: makes the text encoder wrapper; it returns `text_outputs`.
        text_inputs: which of input_ids and attention_mask it takes.
        text_outputs: names of denoiser inputs, with their symbolic axes.
        lowercase: whether the pipeline lower-cases and strips prompts.
        call_options: arguments of the pipeline's call that keep it from resizing or rewriting.
    """

    component: str
    pipelines: tuple[str, ...]
    inputs: Mapping[str, Axes]
    wrap: Callable[[Any, int, int], torch.nn.Module]
    arguments: Callable[[Mapping[str, Any]], tuple[torch.Tensor, ...]]
    wrap_text: Callable[[Any], torch.nn.Module]
    text_inputs: tuple[str, ...]
    text_outputs: Mapping[str, Axes]
    lowercase: bool
    call_options: Mapping[str, Any]


class PixArtDenoiser(torch.nn.Module):
    """`PixArtTransformer2DModel` as (latents, timestep, text, mask) -> noise prediction.

    The second half of the output channels (the learned variance) is cut off, as the pipelines do.
    """

    def __init__(self, denoiser: torch.nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        # The module resolves a configured None by its size; the configuration does not.
        self.extra = bool(denoiser.use_additional_conditions)
        self.halve = denoiser.config.out_channels // 2 == denoiser.config.in_channels
        self.register_buffer("resolution", torch.tensor([[float(height), float(width)]]), persistent=False)
        self.register_buffer("aspect_ratio", torch.tensor([[height / width]]), persistent=False)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """latents [B, C, h, w], timestep [B], text [B, L, D], mask [B, L] -> [B, C, h, w]."""
        size = latents.shape[0]
        conditions = {
            "resolution": self.resolution.expand(size, -1) if self.extra else None,
            "aspect_ratio": self.aspect_ratio.expand(size, -1) if self.extra else None,
        }
        output = self.denoiser(
            latents,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return output.chunk(2, dim=1)[0] if self.halve else output


class MaskedTextEncoder(torch.nn.Module):
    """A T5 encoder as (input_ids, attention_mask) -> (hidden states, the mask as floats)."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both int64 [B, L] -> [B, L, D] and [B, L]."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return hidden, attention_mask.to(hidden.dtype)


class VaeDecoder(torch.nn.Module):
    """`AutoencoderKL.decode` from scaled latents to pictures in 0..1 (before clamping)."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.factor = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, 3, H, W]."""
        image = self.vae.decode(latents / self.factor + self.shift, return_dict=False)[0]
        return image / 2 + 0.5


def _pixart_arguments(call: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    return (
        call["hidden_states"],
        call["timestep"].float(),
        call["encoder_hidden_states"],
        call["encoder_attention_mask"].to(call["encoder_hidden_states"].dtype),
    )


_TEXT_AXES = {0: "batch", 1: "text"}

FAMILIES: dict[str, Family] = {
    "PixArtTransformer2DModel": Family(
        component="transformer",
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        inputs={
            LATENTS: {0: "batch"},
            TIMESTEP: {0: "batch"},
            "encoder_hidden_states": _TEXT_AXES,
            "encoder_attention_mask": _TEXT_AXES,
        },
        wrap=lambda pipe, height, width: PixArtDenoiser(pipe.transformer, height, width),
        arguments=_pixart_arguments,
        wrap_text=lambda pipe: MaskedTextEncoder(pipe.text_encoder),
        text_inputs=("input_ids", "attention_mask"),
        text_outputs={"encoder_hidden_states": _TEXT_AXES, "encoder_attention_mask": _TEXT_AXES},
        lowercase=True,
        call_options={"use_resolution_binning": False, "clean_caption": False},
    ),
}


def family_of(pipe: Any) -> tuple[str, Family]:
    """The denoiser class name and family of a loaded pipeline.

    Raises:
        BuildError: no component of the pipeline is a supported denoiser.
    """
    found = []
    for component in ("transformer", "unet"):
        denoiser = getattr(pipe, component, None)
        if denoiser is not None:
            name = type(denoiser).__name__
            found.append(name)
            family = FAMILIES.get(name)
            if family is not None and family.component == component:
                if type(pipe).__name__ not in family.pipelines:
                    raise BuildError(
                        f"pipeline class {type(pipe).__name__} is not supported for {name}; this release exports "
                        f"{', '.join(family.pipelines)}"
                    )
                return name, family
    what = f"denoiser class {found[0]}" if found else "a pipeline without a transformer or unet"
    raise BuildError(
        f"{type(pipe).__name__}: {what} is not supported; this release exports {', '.join(sorted(FAMILIES))}"
    )


def bind_call(denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a denoiser call by parameter name."""
    return dict(inspect.signature(type(denoiser).forward).bind_partial(denoiser, *args, **kwargs).arguments)
