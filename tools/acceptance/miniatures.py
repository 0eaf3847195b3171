"""Pipelines of every family around a small denoiser with random weights, to try exports, graphs and builders on.

They have no text encoder and no VAE: prompts are random embeddings. Everything else is the real diffusers pipeline, so
that a denoiser is called as it will be. At least two blocks of each kind; most input widths are multiples of 128,
INT4's block size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tmpdiff_export.devices import Batch
from tmpdiff_export.pipelines.families.family import Family, bind_call
from tmpdiff_export.pipelines.families.table import DENOISERS

WIDTH = 128
TEXT_TOKENS = 16
POOLED = 64
HEADS = {"num_attention_heads": 4, "attention_head_dim": WIDTH // 4}
_PLAIN_CALL = {"use_resolution_binning": False, "negative_prompt": None}


@dataclass(frozen=True, eq=False)
class Miniature:
    """A small pipeline of one family.

    Attributes:
        name: key in `DENOISERS`.
        pipe: the diffusers pipeline, float32 on the CPU, without text encoders and VAE.
        conditions: which of prompt_embeds, pooled_prompt_embeds and prompt_attention_mask its call takes.
        guided: whether it takes negative ones of them too, and calls the denoiser with a batch of two.
        height: picture height in pixels.
        width: picture width in pixels.
    """

    name: str
    pipe: Any
    conditions: tuple[str, ...]
    guided: bool
    height: int
    width: int

    @property
    def family(self) -> Family:
        """The family it stands for."""
        return DENOISERS[self.name]

    @property
    def denoiser(self) -> torch.nn.Module:
        """Its denoiser."""
        module: torch.nn.Module = getattr(self.pipe, self.family.component)
        return module

    def wrap(self) -> torch.nn.Module:
        """The export wrapper around its denoiser."""
        return self.family.wrap(self.pipe).eval()

    def calls(self, num_steps: int, seed: int) -> tuple[list[Batch], list[torch.Tensor]]:
        """Runs the pipeline on one random prompt.

        Args:
            num_steps: `num_inference_steps`.
            seed: of prompt and noise.

        Returns:
            For every denoiser call the wrapper's inputs (in the order of `family.inputs`) and what the denoiser
            returned to the pipeline.
        """
        batches: list[Batch] = []
        outputs: list[torch.Tensor] = []

        def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            picked = self.family.arguments(bind_call(module, args, kwargs))
            batches.append(tuple(tensor.clone() for tensor in picked))
            outputs.append(output[0].clone())

        generator = torch.Generator().manual_seed(seed)
        known = inspect.signature(type(self.pipe).__call__).parameters
        # PixArt and Sana pipelines would choose another size, and have a default negative prompt.
        plain = {name: value for name, value in _PLAIN_CALL.items() if name in known}
        handle = self.denoiser.register_forward_hook(note, with_kwargs=True)
        try:
            with torch.inference_mode():
                self.pipe(
                    num_inference_steps=num_steps,
                    generator=generator,
                    output_type="latent",
                    height=self.height,
                    width=self.width,
                    **plain,
                    **self._embeddings(generator),
                )
        finally:
            handle.remove()
        return batches, outputs

    def batches(self, num_steps: int, seed: int) -> list[Batch]:
        """Wrapper inputs as of `calls`, but with unit normal latents at every step.

        An untrained denoiser removes no noise, so that its own latents leave the range that trained ones keep.
        """
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.randn(latents.shape, generator=generator), *rest)
            for latents, *rest in self.calls(num_steps, seed)[0]
        ]

    def _embeddings(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        mask = torch.ones(1, TEXT_TOKENS)
        mask[:, TEXT_TOKENS // 2 :] = 0
        make: dict[str, Callable[[], torch.Tensor]] = {
            "prompt_embeds": lambda: torch.randn(1, TEXT_TOKENS, WIDTH, generator=generator),
            "pooled_prompt_embeds": lambda: torch.randn(1, POOLED, generator=generator),
            "prompt_attention_mask": mask.clone,
        }
        prefixes = ("", "negative_") if self.guided else ("",)
        return {f"{prefix}{name}": make[name]() for prefix in prefixes for name in self.conditions}


def miniature(name: str) -> Miniature:
    """The small pipeline of a family, the same weights every time.

    Args:
        name: key in `DENOISERS`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _MAKERS:
        raise ValueError(f"family is {name!r}, expected one of {', '.join(_MAKERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _MAKERS[name]()
    made.denoiser.eval().requires_grad_(False)
    made.pipe.set_progress_bar_config(disable=True)
    return made


def _pixart() -> Miniature:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    denoiser = PixArtTransformer2DModel(
        **HEADS, num_layers=2, sample_size=16, patch_size=2, in_channels=4, out_channels=8, cross_attention_dim=WIDTH,
        caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=denoiser, scheduler=DPMSolverMultistepScheduler()
    )
    return Miniature("pixart", pipe, ("prompt_embeds", "prompt_attention_mask"), guided=True, height=128, width=64)


def _sana() -> Miniature:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    denoiser = SanaTransformer2DModel(
        **HEADS, num_layers=2, sample_size=8, in_channels=4, out_channels=4, num_cross_attention_heads=4,
        cross_attention_head_dim=WIDTH // 4, cross_attention_dim=WIDTH, caption_channels=WIDTH,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=denoiser, scheduler=scheduler)
    return Miniature("sana", pipe, ("prompt_embeds", "prompt_attention_mask"), guided=True, height=512, width=256)


def _flux(name: str, *, guidance_embeds: bool) -> Miniature:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    denoiser = FluxTransformer2DModel(
        **HEADS, num_layers=2, num_single_layers=2, in_channels=16, joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED, guidance_embeds=guidance_embeds, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=denoiser,
    )  # fmt: skip
    return Miniature(name, pipe, ("prompt_embeds", "pooled_prompt_embeds"), guided=False, height=128, width=64)


def _sd3() -> Miniature:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    denoiser = SD3Transformer2DModel(
        **HEADS, num_layers=3, sample_size=16, in_channels=4, out_channels=4, joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH, pooled_projection_dim=POOLED, pos_embed_max_size=16,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    return Miniature("sd3", pipe, ("prompt_embeds", "pooled_prompt_embeds"), guided=True, height=128, width=64)


def _unet() -> Miniature:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    denoiser = UNet2DConditionModel(
        sample_size=16, layers_per_block=2, block_out_channels=(WIDTH, WIDTH), cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=denoiser, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    )  # fmt: skip
    return Miniature("unet", pipe, ("prompt_embeds",), guided=True, height=128, width=64)


def _unet_sdxl() -> Miniature:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    ids = 32  # width of the embedding of each of the six time ids
    denoiser = UNet2DConditionModel(
        sample_size=16, layers_per_block=2, block_out_channels=(WIDTH, WIDTH), cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2, attention_head_dim=4, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=ids,
        projection_class_embeddings_input_dim=POOLED + 6 * ids,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, unet=denoiser,
        scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip
    conditions = ("prompt_embeds", "pooled_prompt_embeds")
    return Miniature("unet-sdxl", pipe, conditions, guided=True, height=128, width=64)


_MAKERS: dict[str, Callable[[], Miniature]] = {
    "pixart": _pixart,
    "sana": _sana,
    "flux": lambda: _flux("flux", guidance_embeds=True),
    "flux-schnell": lambda: _flux("flux-schnell", guidance_embeds=False),
    "sd3": _sd3,
    "unet": _unet,
    "unet-sdxl": _unet_sdxl,
}
