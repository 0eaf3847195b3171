"""The pipelines: published configurations of denoisers, and text encoders and autoencoders, full-size or small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tools.gpu_bench.models import BenchModel, Sizes
from tools.gpu_bench.zoo import FLUX, PIXART, SANA, SD3, SDXL

SMALL, FULL = "small", "full"
CLIP_TOKENS = 77
T5_TOKENS = {"FluxPipeline": 512, "StableDiffusion3Pipeline": 256}  # that their calls ask for
_DEFAULT_T5_TOKENS = 300


@dataclass(frozen=True)
class Component:
    """A model of a pipeline: its class in a library, and its configuration."""

    library: str
    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ScalePipeline:
    """A pipeline to make.

    Attributes:
        bench: its denoiser.
        pipeline_class: of diffusers.
        denoiser: the denoiser's name in the pipeline.
        latent_channels: of the autoencoder.
        scheduler: its class, and its configuration.
        texts: makes the text encoders by name, from (full-size, tiny).
        settings: further entries of `model_index.json`.
        vae: makes the autoencoder from (latent channels, side of its pictures, full-size).
    """

    bench: BenchModel
    pipeline_class: str
    denoiser: str
    latent_channels: int
    scheduler: tuple[str, Mapping[str, Any]]
    texts: Callable[[bool, bool], dict[str, Component]]
    settings: Mapping[str, Any]
    vae: Callable[[int, int, bool], Component]

    def sizes(self, *, tiny: bool) -> Sizes:
        """Of its latents."""
        return self.bench.tiny_sizes if tiny else self.bench.sizes

    def components(self, *, text: str, vae: str, tiny: bool) -> dict[str, Component]:
        """Every model by its name in the pipeline.

        Args:
            text: SMALL or FULL, the text encoders.
            vae: the same, the autoencoder.
            tiny: a small denoiser, and encoders that fit it.
        """
        denoiser = Component("diffusers", self.bench.denoiser_class, self.bench.tiny if tiny else self.bench.config)
        channels = 4 if tiny else self.latent_channels
        return {
            self.denoiser: denoiser,
            **self.texts(text == FULL, tiny),
            "vae": self.vae(channels, self.sizes(tiny=tiny).side, vae == FULL),
        }


def t5_tokens(pipeline_class: str) -> int:
    """Length of a T5 condition."""
    return T5_TOKENS.get(pipeline_class, _DEFAULT_T5_TOKENS)


def _vae(channels: int, side: int, full: bool) -> Component:
    widths, layers = ((128, 256, 512, 512), 2) if full else ((16, 16, 16, 16), 1)
    config = {
        "latent_channels": channels, "block_out_channels": widths, "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 32 if full else 8, "sample_size": 8 * side,
    }  # fmt: skip
    if channels == 16:
        config |= {
            "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
        }  # fmt: skip
    return Component("diffusers", "AutoencoderKL", config)


def _dc_vae(channels: int, side: int, full: bool) -> Component:
    """The autoencoder of Sana, 32 pixels to a latent; its published configuration is dc-ae-f32c32-sana-1.1's."""
    widths = (128, 256, 512, 512, 1024, 1024) if full else (16, 16, 16, 32, 32, 32)
    config = {
        "latent_channels": channels, "attention_head_dim": 32,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "encoder_block_out_channels": widths, "decoder_block_out_channels": widths,
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3) if full else (1,) * 6,
        "decoder_layers_per_block": (3,) * 6 if full else (1,) * 6,
        "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)), "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
        "upsample_block_type": "interpolate", "downsample_block_type": "conv", "scaling_factor": 0.41407,
    }  # fmt: skip
    return Component("diffusers", "AutoencoderDC", config)


def _gemma(full: bool, tiny: bool) -> dict[str, Component]:
    """Gemma-2's 2 B, or two layers of it."""
    width = 128 if tiny else 2304
    shape = (
        {"num_hidden_layers": 26, "intermediate_size": 9216}
        if full
        else {"num_hidden_layers": 2, "intermediate_size": 256}
    )
    config = {
        **shape, "vocab_size": 256000 if full else 512, "hidden_size": width, "num_attention_heads": 8 if full else 2,
        "num_key_value_heads": 4 if full else 1, "head_dim": 256 if full else 64, "query_pre_attn_scalar": 256 if full else 64,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "use_cache": False,
    }  # fmt: skip
    return {"text_encoder": Component("transformers", "Gemma2Model", config)}


def _t5(full: bool, tiny: bool) -> Component:
    shape = (
        {"vocab_size": 32128, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        if full
        else {"vocab_size": 128, "d_ff": 256, "num_layers": 2, "num_heads": 2}
    )
    config = {
        **shape, "d_model": 128 if tiny else 4096, "d_kv": 64, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0,
        "is_encoder_decoder": False, "use_cache": False,
    }  # fmt: skip
    return Component("transformers", "T5EncoderModel", config)


def _clip(width: int, layers: int, *, full: bool, projection: bool) -> Component:
    config = {
        "vocab_size": 49408, "hidden_size": width, "num_hidden_layers": layers if full else 2,
        "intermediate_size": 4 * width if full else 128, "num_attention_heads": max(width // 64, 1),
        "hidden_act": "quick_gelu" if width == 768 else "gelu", "max_position_embeddings": CLIP_TOKENS,
        "projection_dim": width,
    }  # fmt: skip
    return Component("transformers", "CLIPTextModelWithProjection" if projection else "CLIPTextModel", config)


def _flux_texts(full: bool, tiny: bool) -> dict[str, Component]:
    clip = _clip(64 if tiny else 768, 12, full=full, projection=False)
    return {"text_encoder": clip, "text_encoder_2": _t5(full, tiny)}


def _two_clips(full: bool, tiny: bool, *, first_projects: bool, widths: tuple[int, int]) -> dict[str, Component]:
    first, second = widths if tiny else (768, 1280)
    return {
        "text_encoder": _clip(first, 12, full=full, projection=first_projects),
        "text_encoder_2": _clip(second, 32, full=full, projection=True),
    }


def _sdxl_texts(full: bool, tiny: bool) -> dict[str, Component]:
    return _two_clips(full, tiny, first_projects=False, widths=(64, 64))


def _sd3_texts(full: bool, tiny: bool) -> dict[str, Component]:
    clips = _two_clips(full, tiny, first_projects=True, widths=(32, 32))
    return {**clips, "text_encoder_3": _t5(full, tiny)}


_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
_DPM = ("DPMSolverMultistepScheduler", {**_FLOW, "algorithm_type": "dpmsolver++", "solver_order": 2})
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

_PIXART_1B = replace(
    PIXART,
    name="pixart-1b",
    title="PixArt of 1.0 B, 256px",
    config={
        **PIXART.config, "num_attention_heads": 16, "attention_head_dim": 96, "num_layers": 26, "sample_size": 32,
        "cross_attention_dim": 1536, "interpolation_scale": 1,
    },
    sizes=Sizes(batch=2, side=32, text_tokens=_DEFAULT_T5_TOKENS),
    published=1.0e9,
)  # fmt: skip

_PIXART = ScalePipeline(
    bench=PIXART,
    pipeline_class="PixArtSigmaPipeline",
    denoiser="transformer",
    latent_channels=4,
    scheduler=_DPM,
    texts=lambda full, tiny: {"text_encoder": _t5(full, tiny)},
    settings={},
    vae=_vae,
)

PIPELINES = {
    "flux": ScalePipeline(
        bench=FLUX,
        pipeline_class="FluxPipeline",
        denoiser="transformer",
        latent_channels=16,
        scheduler=("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 3.0}),
        texts=_flux_texts,
        settings={},
        vae=_vae,
    ),
    "sd3": ScalePipeline(
        bench=SD3,
        pipeline_class="StableDiffusion3Pipeline",
        denoiser="transformer",
        latent_channels=16,
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        texts=_sd3_texts,
        settings={},
        vae=_vae,
    ),
    "sdxl": ScalePipeline(
        bench=SDXL,
        pipeline_class="StableDiffusionXLPipeline",
        denoiser="unet",
        latent_channels=4,
        scheduler=("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "leading", "steps_offset": 1}),
        texts=_sdxl_texts,
        settings={"force_zeros_for_empty_prompt": True},
        vae=_vae,
    ),
    "pixart": _PIXART,
    "pixart-1b": replace(_PIXART, bench=_PIXART_1B),
    "sana": ScalePipeline(
        bench=SANA,
        pipeline_class="SanaPipeline",
        denoiser="transformer",
        latent_channels=32,
        scheduler=_DPM,
        texts=_gemma,
        settings={},
        vae=_dc_vae,
    ),
}
