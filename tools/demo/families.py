"""The denoiser families that the training tool knows: what is trained, what it predicts, and the pipeline around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)

from tools.demo.autoencoders import DEEP_LATENT_CHANNELS, Autoencoder
from tools.demo.corruption import flow_matching, v_prediction
from tools.demo.networks import (
    CAPTION_TOKENS,
    CLIP_TOKENS,
    LATENT_CHANNELS,
    make_clip_text_encoder,
    make_clip_tokenizer,
    make_denoiser,
    make_gemma_text_encoder,
    make_gemma_tokenizer,
    make_mmdit,
    make_sana,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)

FLOW_SHIFT = 3.0

Text = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class DemoFamily:
    """One kind of denoiser with what it is trained with.

    Attributes:
        denoiser: the untrained denoiser.
        text_encoders: trained with it, untrained.
        tokenizer: of its captions.
        token_ids: captions, and "" for an absent one, to rows of `caption_tokens` token ids, as `embed` takes them.
        caption_tokens: length that captions are padded to.
        causal: whether a word's hidden state knows only what stands before it.
        text_width: D of the hidden states that `embed` returns.
        embed: token ids [n, tokens] to conditioning; hidden states [n, tokens, D] come first.
        corrupt: clean latents [n, C, h, w] to (noisy latents, timestep [n], what the denoiser is to predict).
        predict: calls the denoiser as its pipeline does, with (denoiser, noisy latents, timestep, *conditioning).
        assemble: makes the pipeline from an autoencoder.
        guidance_scales: what to evaluate it at; the first is the default of its pipeline's call.
        call_options: what its pipeline's call needs besides.
    """

    denoiser: torch.nn.Module
    text_encoders: tuple[torch.nn.Module, ...]
    tokenizer: Any
    token_ids: Callable[[Sequence[str]], list[list[int]]]
    caption_tokens: int
    causal: bool
    text_width: int
    embed: Callable[[torch.Tensor], Text]
    corrupt: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    predict: Callable[..., torch.Tensor]
    assemble: Callable[[Autoencoder], DiffusionPipeline]
    guidance_scales: tuple[float, ...]
    call_options: Mapping[str, Any]


def padded(tokenizer: Any, length: int) -> Callable[[Sequence[str]], list[list[int]]]:
    """Returns what makes a row of token ids of every caption, filled up to a length."""
    return lambda captions: tokenizer(list(captions), padding="max_length", max_length=length)["input_ids"]


def make_dpm_scheduler(flow_shift: float) -> DPMSolverMultistepScheduler:
    """Returns DPM-Solver++ (2M) for a denoiser that predicts velocity, with the given shift of its sigmas."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, solver_order=2
    )


def make_ddim_scheduler() -> DDIMScheduler:
    """Returns DDIM for v-prediction from pure noise on (zero terminal SNR), without clipping, which is not linear."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip


def make_pixart_family(device: torch.device) -> DemoFamily:
    """Returns a PixArt-Sigma with a T5 encoder, flow prediction, DPM-Solver++."""
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(len(tokenizer)).to(device)
    denoiser = make_denoiser().to(device)

    def embed(ids: torch.Tensor) -> Text:
        mask = (ids != tokenizer.pad_token_id).long()
        return text_encoder(ids, attention_mask=mask)[0], mask

    def predict(
        denoiser: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        output = denoiser(
            x_t, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        return output[:, :LATENT_CHANNELS]

    return DemoFamily(
        denoiser=denoiser,
        text_encoders=(text_encoder,),
        tokenizer=tokenizer,
        token_ids=padded(tokenizer, CAPTION_TOKENS),
        caption_tokens=CAPTION_TOKENS,
        causal=False,
        text_width=text_encoder.config.d_model,
        embed=embed,
        corrupt=flow_matching,
        predict=predict,
        assemble=lambda vae: PixArtSigmaPipeline(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=denoiser,
            scheduler=make_dpm_scheduler(FLOW_SHIFT),
        ),
        guidance_scales=(4.5, 3.0),
        call_options={"max_sequence_length": CAPTION_TOKENS, "clean_caption": False},
    )  # fmt: skip


def make_unet_family(device: torch.device, size: int) -> DemoFamily:
    """Returns a Stable Diffusion for pictures of `size` pixels: UNet, CLIP text encoder, v-prediction, DDIM."""
    tokenizer = make_clip_tokenizer()
    text_encoder = make_clip_text_encoder(tokenizer, projection=False).to(device)
    unet = make_unet(size // 8, text_encoder.config.hidden_size).to(device)
    scheduler = make_ddim_scheduler()

    def predict(unet: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return unet(x_t, timestep, encoder_hidden_states=text, return_dict=False)[0]

    return DemoFamily(
        denoiser=unet,
        text_encoders=(text_encoder,),
        tokenizer=tokenizer,
        token_ids=padded(tokenizer, CLIP_TOKENS),
        caption_tokens=CLIP_TOKENS,
        causal=True,
        text_width=text_encoder.config.hidden_size,
        embed=lambda ids: (text_encoder(ids)[0],),
        corrupt=v_prediction(scheduler.alphas_cumprod),
        predict=predict,
        assemble=lambda vae: StableDiffusionPipeline(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ),
        guidance_scales=(7.5, 4.5, 3.0),
        call_options={},
    )  # fmt: skip


def make_mmdit_family(device: torch.device, size: int) -> DemoFamily:
    """Returns a Stable Diffusion 3 for pictures of `size` pixels, with two CLIP encoders and no T5; flow matching.

    In place of T5's hidden states there are zeros, in training as many as in the pipeline by default: the denoiser
    attends to them, and another number of them would be another conditioning. Smaller latents than the pipeline's get
    as many zeros for each of them.
    """
    zeros = int(inspect.signature(StableDiffusion3Pipeline.__call__).parameters["max_sequence_length"].default)
    tokenizer = make_clip_tokenizer()
    encoders = tuple(make_clip_text_encoder(tokenizer, projection=True).to(device) for _ in range(2))
    width = sum(encoder.config.hidden_size for encoder in encoders)
    pooled_width = sum(encoder.config.projection_dim for encoder in encoders)
    mmdit = make_mmdit(size // 8, width, pooled_width).to(device)

    def embed(ids: torch.Tensor) -> Text:
        outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return hidden, torch.cat([output.text_embeds for output in outputs], dim=-1)

    def predict(
        mmdit: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        share = (x_t.shape[-1] / mmdit.config.sample_size) ** 2
        text = torch.nn.functional.pad(text, (0, 0, 0, round(zeros * share)))
        return mmdit(x_t, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep, return_dict=False)[
            0
        ]

    return DemoFamily(
        denoiser=mmdit,
        text_encoders=encoders,
        tokenizer=tokenizer,
        token_ids=padded(tokenizer, CLIP_TOKENS),
        caption_tokens=CLIP_TOKENS,
        causal=True,
        text_width=width,
        embed=embed,
        corrupt=flow_matching,
        predict=predict,
        assemble=lambda vae: StableDiffusion3Pipeline(
            tokenizer=tokenizer, text_encoder=encoders[0], tokenizer_2=tokenizer, text_encoder_2=encoders[1],
            tokenizer_3=None, text_encoder_3=None, vae=vae, transformer=mmdit,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        ),
        guidance_scales=(7.0, 4.5, 3.0),
        call_options={},
    )  # fmt: skip


def make_sana_family(device: torch.device, size: int) -> DemoFamily:
    """Returns a Sana for pictures of `size` pixels: Gemma-2 text encoder, 16 pixels a latent, DPM-Solver++.

    As its pipeline does, captions follow an instruction, of which the denoiser gets the first and the last token; absent
    ones follow none. A row of token ids is what the denoiser gets.
    """
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    instruction = "\n".join(lines)
    tokenizer = make_gemma_tokenizer()
    text_encoder = make_gemma_text_encoder(len(tokenizer)).to(device)
    denoiser = make_sana(size // 16, DEEP_LATENT_CHANNELS, text_encoder.config.hidden_size).to(device)
    first = tokenizer.encode(instruction)
    plain = padded(tokenizer, CAPTION_TOKENS)
    before = torch.tensor(first[:-1], device=device)

    def token_ids(captions: Sequence[str]) -> list[list[int]]:
        framed = padded(tokenizer, len(first) - 2 + CAPTION_TOKENS)([instruction + caption for caption in captions])
        absent = plain([""])[0]
        return [
            [row[0], *row[len(first) - 1 :]] if caption else absent
            for caption, row in zip(captions, framed, strict=True)
        ]

    def states(ids: torch.Tensor) -> torch.Tensor:
        return text_encoder(ids, attention_mask=(ids != tokenizer.pad_token_id).long(), use_cache=False)[0]

    def embed(ids: torch.Tensor) -> Text:
        framed = states(torch.cat([before.expand(len(ids), -1), ids[:, 1:]], dim=1))
        framed = torch.cat([framed[:, :1], framed[:, len(before) :]], dim=1)
        absent = (ids[:, 1] == tokenizer.pad_token_id)[:, None, None]
        nothing = states(torch.nn.functional.pad(ids[:1, :1], (0, CAPTION_TOKENS - 1), value=tokenizer.pad_token_id))
        return torch.where(absent, nothing, framed), (ids != tokenizer.pad_token_id).long()

    def predict(
        denoiser: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return denoiser(
            x_t, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timestep, return_dict=False
        )[0]

    return DemoFamily(
        denoiser=denoiser,
        text_encoders=(text_encoder,),
        tokenizer=tokenizer,
        token_ids=token_ids,
        caption_tokens=CAPTION_TOKENS,
        causal=True,
        text_width=text_encoder.config.hidden_size,
        embed=embed,
        corrupt=flow_matching,
        predict=predict,
        assemble=lambda vae: SanaPipeline(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=denoiser,
            scheduler=make_dpm_scheduler(FLOW_SHIFT),
        ),
        guidance_scales=(4.5, 3.0),
        call_options={
            "max_sequence_length": CAPTION_TOKENS, "clean_caption": False, "use_resolution_binning": False,
            "height": size, "width": size,
        },
    )  # fmt: skip
