"""The training loops of the demo pipeline: autoencoder, text encoder, then denoiser and text encoder together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from transformers import T5EncoderModel

from tmpdiff_export.demo.drawing import draw
from tmpdiff_export.demo.scenes import COLOURS, POSITIONS, SHAPES
from tools.demo_networks import LATENT_CHANNELS

UNCONDITIONAL_FRACTION = 0.1


def predict_velocity(
    denoiser: PixArtTransformer2DModel, x_t: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Calls the denoiser as the pipeline does, with timestep = 1000 sigma.

    Args:
        denoiser: The denoiser.
        x_t: [n, 4, 32, 32], noisy latents.
        sigma: [n], in [0, 1].
        text: [n, tokens, 128], the text encoder's output.
        mask: [n, tokens], 1 for tokens and 0 for padding.

    Returns:
        [n, 4, 32, 32], noise minus clean latents as predicted.
    """
    output = denoiser(
        x_t, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=1000 * sigma,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
    )[0]  # fmt: skip
    return output[:, :LATENT_CHANNELS]


def draw_batch(arrays: dict[str, torch.Tensor], index: torch.Tensor | slice) -> torch.Tensor:
    """Draws the pictures at `index` of placed scenes, in [-1, 1], channels last in memory."""
    with torch.no_grad():
        pictures = draw({name: array[index] for name, array in arrays.items()}, torch)
        return (2 * pictures - 1).to(memory_format=torch.channels_last)


def train_vae(
    vae: AutoencoderKL, arrays: dict[str, torch.Tensor], iterations: int, batch: int, budget_s: float
) -> None:
    """Trains the autoencoder in place on pictures drawn on the fly, then sets its scaling factor.

    The loss is the mean absolute and squared error of pixels, the mean absolute error of their differences to
    neighbours, and a small Kullback-Leibler term; the squared error keeps small objects from being ignored. The
    scaling factor is 1 / standard deviation of the latents of 1024 pictures.
    """
    device = arrays["centre"].device
    count = arrays["centre"].shape[0]

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            error = vae.decoder(vae.post_quant_conv(z)).float() - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges + 3e-4 * divergence

    vae.to(memory_format=torch.channels_last).train()
    step = torch.compile(loss_of) if device.type == "cuda" else loss_of
    _fit(
        "vae", [(list(vae.parameters()), 1e-3)], iterations, budget_s,
        lambda: step(draw_batch(arrays, torch.randint(count, (batch,), device=device))),
    )  # fmt: skip
    vae.eval().requires_grad_(False)
    std = encode(vae, arrays, min(count, 1024)).float().std()
    vae.register_to_config(scaling_factor=round(1 / std.item(), 4))


def encode(vae: AutoencoderKL, arrays: dict[str, torch.Tensor], count: int, batch: int = 256) -> torch.Tensor:
    """Returns the mean latents of the first `count` placed scenes: [count, 4, 32, 32], float16, unscaled."""
    device = arrays["centre"].device

    def mean_of(x: torch.Tensor) -> torch.Tensor:
        return vae.quant_conv(vae.encoder(x))[:, :LATENT_CHANNELS]

    run = torch.compile(mean_of) if device.type == "cuda" and count >= 10 * batch else mean_of
    latents = torch.empty(count, LATENT_CHANNELS, 32, 32, dtype=torch.float16, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, count, batch):
            part = slice(start, min(start + batch, count))
            latents[part] = run(draw_batch(arrays, part)).half()
    return latents


def reconstruct(vae: AutoencoderKL, arrays: dict[str, torch.Tensor], count: int) -> tuple[np.ndarray, float]:
    """Encodes and decodes the pictures of the first `count` placed scenes.

    Returns:
        The decoded pictures [count, 256, 256, 3], uint8, and their PSNR in dB.
    """
    errors, pictures = [], []
    for start in range(0, count, 32):
        original = draw_batch(arrays, slice(start, min(start + 32, count)))
        with torch.no_grad():
            decoded = vae.decode(vae.encode(original).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - original).square().flatten(1).mean(1))
        pictures.append(((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures), 10 * math.log10(4 / torch.cat(errors).mean().item())


def attribute_targets(tokens: np.ndarray, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Says which object each word of a caption belongs to, and what that object is.

    Args:
        tokens: [n, tokens], token ids of captions.
        ids: The tokenizer's vocabulary.

    Returns:
        `owner` [n, tokens], int64: 0 or 1 for the words that name an object's attributes, else -1; and `targets`
        [n, 2, 4], int64: shape, colour, size (0 small, 1 large) and position of each object, -100 where unnamed.
    """

    def index_in(groups: list[tuple[str, ...]]) -> np.ndarray:
        table = np.full(max(ids.values()) + 1, -1)
        for k, words in enumerate(groups):
            table[[ids[w] for w in words]] = k
        return table[tokens]

    shape = index_in([(s,) for s in SHAPES])
    colour = index_in([(c,) for c in COLOURS])
    size = index_in([("small", "tiny"), ("large", "big")])
    place = index_in([("top",), ("bottom",), ("left",), ("right",), ("center", "middle")])
    shapes_before: np.ndarray = np.cumsum(shape >= 0, axis=1) - (shape >= 0)
    named = (shape >= 0) | (colour >= 0) | (size >= 0)
    owner = np.where(named, shapes_before, np.where(place >= 0, shapes_before - 1, -1))

    targets = np.full((len(tokens), 2, 4), -100)
    for k in (0, 1):
        own = owner == k
        for column, words in enumerate((shape, colour, size)):
            value = np.where(own, words, -1).max(axis=1)
            targets[:, k, column] = np.where(value >= 0, value, -100)
        has = [((place == p) & own).any(axis=1) for p in range(5)]
        row = 1 + has[1].astype(int) - has[0]
        targets[:, k, 3] = np.where(np.any(has, axis=0), 3 * row + 1 + has[3].astype(int) - has[2], -100)
    return owner, targets


def pretrain_text_encoder(
    text_encoder: T5EncoderModel, tokens: np.ndarray, ids: dict[str, int], iterations: int, batch: int
) -> None:
    """Teaches the text encoder which words belong together, before any picture is seen.

    Every word that names an attribute of an object learns to tell all attributes of that object, through four linear
    heads that are then thrown away. Without it the denoiser long mixes up the attributes of two objects.

    Args:
        text_encoder: The text encoder, trained in place.
        tokens: [n, tokens], padded token ids of captions.
        ids: The tokenizer's vocabulary.
        iterations: Number of optimizer steps.
        batch: Captions in each.
    """
    device = text_encoder.device
    owner, targets = (torch.as_tensor(a, device=device) for a in attribute_targets(tokens, ids))
    bank = torch.as_tensor(tokens, device=device)
    classes = (len(SHAPES), len(COLOURS), 2, len(POSITIONS))
    heads = torch.nn.Linear(text_encoder.config.d_model, sum(classes)).to(device)
    text_encoder.train()

    def loss_of() -> torch.Tensor:
        pick = torch.randint(len(bank), (batch,), device=device)
        caption, whose = bank[pick].long(), owner[pick]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = heads(text_encoder(caption, attention_mask=(caption != 0).long())[0])
        wanted = targets[pick].gather(1, whose.clamp(min=0)[:, :, None].expand(-1, -1, 4))
        wanted = wanted.masked_fill((whose < 0)[:, :, None], -100)
        parts = logits.float().split(classes, dim=2)
        return sum(F.cross_entropy(p.flatten(0, 1), wanted[:, :, a].flatten()) for a, p in enumerate(parts))

    _fit("text encoder", [([*text_encoder.parameters(), *heads.parameters()], 1e-3)], iterations, math.inf, loss_of)


def train_denoiser(
    denoiser: PixArtTransformer2DModel, text_encoder: T5EncoderModel, latents: torch.Tensor, tokens: np.ndarray,
    unconditional: np.ndarray, iterations: int, batch: int, budget_s: float,
) -> None:  # fmt: skip
    """Trains denoiser and text encoder together, in place, by flow matching; leaves their averaged weights.

    Args:
        denoiser: The denoiser.
        text_encoder: The text encoder.
        latents: [n, 4, 32, 32], float16, scaled latents of the training scenes.
        tokens: [n, captions, 40], padded token ids of each scene's captions.
        unconditional: [40], token ids of the empty caption, which replaces one caption in ten.
        iterations: Number of optimizer steps.
        batch: Scenes in each.
        budget_s: Does fewer iterations if these would take longer.
    """
    device = latents.device
    count, captions, _ = tokens.shape
    bank = torch.as_tensor(tokens, device=device)
    empty = torch.as_tensor(unconditional, device=device)
    parameters = [*denoiser.parameters(), *text_encoder.parameters()]
    average = [p.detach().clone() for p in parameters]
    denoiser.train()
    text_encoder.train()
    predict = torch.compile(predict_velocity) if device.type == "cuda" else predict_velocity

    def loss_of() -> torch.Tensor:
        pick = torch.randint(count, (batch,), device=device)
        ids = bank[pick, torch.randint(captions, (batch,), device=device)].long()
        ids = torch.where(torch.rand(batch, 1, device=device) < UNCONDITIONAL_FRACTION, empty.long(), ids)
        mask = (ids != 0).long()
        clean = latents[pick].float()
        noise = torch.randn_like(clean)
        # Objects are few and bright, so they show through much noise: where they go is decided at high sigmas, which
        # is why those are drawn more often. Some uniform sigmas keep the rest of the trajectory in view.
        sigma = torch.sigmoid(1.5 + 1.2 * torch.randn(batch, device=device))
        sigma = torch.where(torch.rand(batch, device=device) < 0.25, torch.rand(batch, device=device), sigma)
        x_t = torch.lerp(clean, noise, sigma[:, None, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            text = text_encoder(ids, attention_mask=mask)[0]
            velocity = predict(denoiser, x_t, sigma, text, mask)
        return F.mse_loss(velocity.float(), noise - clean)

    def update_average() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 0.001)

    groups = [(list(denoiser.parameters()), 7e-4), (list(text_encoder.parameters()), 2e-4)]
    _fit("denoiser", groups, iterations, budget_s, loss_of, after=update_average)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    denoiser.eval().requires_grad_(False)
    text_encoder.eval().requires_grad_(False)


def _fit(
    name: str,
    groups: list[tuple[list[torch.nn.Parameter], float]],
    iterations: int,
    budget_s: float,
    loss_of: Callable[[], torch.Tensor],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Runs AdamW on groups of (parameters, learning rate): warm-up, cosine decay to zero, clipped gradients.

    The speed is measured once, past compilation; if `iterations` would overrun the budget, fewer are done.
    """
    parameters = [p for group, _ in groups for p in group]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in groups],
        weight_decay=0.01, betas=(0.9, 0.99), fused=parameters[0].is_cuda,
    )  # fmt: skip
    warm_up = min(300, iterations // 10 + 1)
    start = time.perf_counter()
    i = 0
    while i < iterations:
        decay = min(1, (i + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * i / iterations))
        for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * decay
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after()
        i += 1
        if i % 500 == 0 or i in (1, 50, 100, iterations):
            value, seconds = loss.item(), time.perf_counter() - start
            print(f"{name} iteration {i}/{iterations} loss {value:.5f} after {seconds:.0f} s", flush=True)
            if i == 50:
                compiled = seconds
            elif i == 100 and math.isfinite(budget_s):
                iterations = min(iterations, i + int((budget_s - seconds) / ((seconds - compiled) / 50)))
