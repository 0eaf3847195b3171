"""The training loops of the demo pipelines: autoencoder, text encoders, then denoiser and text encoders together."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tmpdiff_export.demo.drawing import draw
from tmpdiff_export.demo.scenes import COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, vocabulary
from tools.demo.autoencoders import Autoencoder, decoded, latent_means, noisy_latents, pixels_per_latent
from tools.demo.caption_words import attribute_targets, last_words
from tools.demo.families import DemoFamily
from tools.demo.parallel import agreed, average_gradients, same_start

UNCONDITIONAL_FRACTION = 0.1
ENCODE_BATCH = 256
CHECK_EVERY = 20
"""Iterations between two looks at clock and loss."""
REPORT_S = 10
STOP = threading.Event()
"""Once set, what is being trained ends as it stands within `CHECK_EVERY` iterations."""


def draw_batch(arrays: dict[str, torch.Tensor], index: torch.Tensor | slice, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Draws the pictures [n, 3, size, size] at `index` of placed scenes, in [-1, 1], channels last in memory."""
    with torch.no_grad():
        drawn = max(size, IMAGE_SIZE)
        pictures = draw({name: array[index] for name, array in arrays.items()}, torch, drawn)
        if size < drawn:
            pictures = F.avg_pool2d(pictures, drawn // size)
        return (2 * pictures - 1).to(memory_format=torch.channels_last)


def train_vae(vae: Autoencoder, arrays: dict[str, torch.Tensor], iterations: int, batch: int, budget_s: float) -> None:
    """Trains the autoencoder in place on pictures drawn on the fly, then sets its scaling factor.

    The loss is the mean absolute and squared error of pixels, the mean absolute error of their differences to
    neighbours, and a small Kullback-Leibler term; the squared error keeps small objects from being ignored. The
    scaling factor is 1 / standard deviation of the latents of 1024 pictures.
    """
    device = arrays["centre"].device
    count = arrays["centre"].shape[0]

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            z, divergence = noisy_latents(vae, x)
            error = decoded(vae, z).float() - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
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


def encode(vae: Autoencoder, arrays: dict[str, torch.Tensor], count: int, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Returns mean latents of the first `count` placed scenes, [count, C, h, w], float16, unscaled."""
    device = arrays["centre"].device
    batch = ENCODE_BATCH // max(1, size // IMAGE_SIZE) ** 2
    side = size // pixels_per_latent(vae)
    latents = torch.empty(count, vae.config.latent_channels, side, side, dtype=torch.float16, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, count, batch):
            part = slice(start, min(start + batch, count))
            latents[part] = latent_means(vae, draw_batch(arrays, part, size)).half()
    return latents


def reconstruct(
    vae: Autoencoder, arrays: dict[str, torch.Tensor], count: int, size: int = IMAGE_SIZE
) -> tuple[np.ndarray, float]:
    """Encodes and decodes the pictures of the first `count` placed scenes.

    Returns:
        The decoded pictures [count, size, size, 3], uint8, and their PSNR in dB.
    """
    errors, pictures = [], []
    for start in range(0, count, 32):
        original = draw_batch(arrays, slice(start, min(start + 32, count)), size)
        with torch.no_grad():
            drawn = decoded(vae, latent_means(vae, original)).clamp(-1, 1)
        errors.append((drawn - original).square().flatten(1).mean(1))
        pictures.append(((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures), 10 * math.log10(4 / torch.cat(errors).mean().item())


def pretrain_text_encoders(family: DemoFamily, tokens: np.ndarray, iterations: int, batch: int) -> None:
    """Teaches the text encoders which words belong together, before any picture is seen.

    Every word that names an attribute of an object learns to tell all attributes of that object, through four linear
    heads that are then thrown away; of a causal encoder only the object's last word, which has seen the others. Without
    it the denoiser long mixes up the attributes of two objects.

    Args:
        family: Its text encoders are trained in place.
        tokens: [n, tokens], padded token ids of captions.
        iterations: Number of optimizer steps.
        batch: Captions in each.
    """
    device = family.denoiser.device
    ids = {word: family.tokenizer.convert_tokens_to_ids(token) for word, token in _word_tokens(family).items()}
    named, wanted_of = attribute_targets(tokens, ids)
    if family.causal:
        named = last_words(named)
    owner, targets = (torch.as_tensor(a, device=device) for a in (named, wanted_of))
    bank = torch.as_tensor(tokens, device=device)
    classes = (len(SHAPES), len(COLOURS), 2, len(POSITIONS))
    heads = torch.nn.Linear(family.text_width, sum(classes)).to(device)
    for encoder in family.text_encoders:
        encoder.train()

    def loss_of() -> torch.Tensor:
        pick = torch.randint(len(bank), (batch,), device=device)
        caption, whose = bank[pick].long(), owner[pick]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = heads(family.embed(caption)[0])
        wanted = targets[pick].gather(1, whose.clamp(min=0)[:, :, None].expand(-1, -1, 4))
        wanted = wanted.masked_fill((whose < 0)[:, :, None], -100)
        parts = logits.float().split(classes, dim=2)
        return sum(F.cross_entropy(p.flatten(0, 1), wanted[:, :, a].flatten()) for a, p in enumerate(parts))

    parameters = [p for encoder in family.text_encoders for p in encoder.parameters()]
    _fit("text encoder", [([*parameters, *heads.parameters()], 1e-3)], iterations, math.inf, loss_of)


@dataclass(frozen=True)
class DenoiserTraining:
    """How long a denoiser is trained, and when it is saved.

    Attributes:
        iterations: Number of optimizer steps.
        batch: Scenes in each.
        budget_s: Does fewer iterations if these would take longer.
        rate: Largest learning rate of the denoiser.
        save: Called with the averaged weights in place, on the way and at the end.
        save_every_s: Seconds between two such calls.
    """

    iterations: int
    batch: int
    budget_s: float
    rate: float
    save: Callable[[], None]
    save_every_s: float = math.inf


def train_denoiser(
    family: DemoFamily,
    latents: torch.Tensor,
    tokens: np.ndarray,
    unconditional: np.ndarray,
    plan: DenoiserTraining,
) -> None:
    """Trains denoiser and text encoders together, in place; leaves their averaged weights.

    Args:
        family: What to train.
        latents: [n, C, h, w], float16, scaled latents of the training scenes.
        tokens: [n, captions, tokens], padded token ids of each scene's captions.
        unconditional: [tokens], token ids of the empty caption, which replaces one caption in ten.
        plan: How long, and when it is saved.
    """
    device = latents.device
    count, captions, _ = tokens.shape
    bank = torch.as_tensor(tokens, device=device)
    empty = torch.as_tensor(unconditional, device=device)
    groups = [
        (list(family.denoiser.parameters()), plan.rate),
        ([p for encoder in family.text_encoders for p in encoder.parameters()], 2e-4),
    ]
    parameters = [p for group, _ in groups for p in group]
    average = [p.detach().clone() for p in parameters]
    modules = (family.denoiser, *family.text_encoders)
    for module in modules:
        module.train().requires_grad_(True)
    predict = _compiled(family) if device.type == "cuda" else family.predict
    saved = time.perf_counter()

    def loss_of() -> torch.Tensor:
        pick = torch.randint(count, (plan.batch,), device=device)
        ids = bank[pick, torch.randint(captions, (plan.batch,), device=device)].long()
        ids = torch.where(torch.rand(plan.batch, 1, device=device) < UNCONDITIONAL_FRACTION, empty.long(), ids)
        x_t, timestep, target = family.corrupt(latents[pick].float())
        with torch.autocast(device.type, torch.bfloat16):
            output = predict(family.denoiser, x_t, timestep, *family.embed(ids))
        return F.mse_loss(output.float(), target)

    def after(planned: int) -> None:
        nonlocal saved
        with torch.no_grad():  # a short training must forget its first weights sooner
            torch._foreach_lerp_(average, parameters, max(0.001, min(1.0, 8 / planned)))
        if time.perf_counter() - saved >= plan.save_every_s:
            trained = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                torch._foreach_copy_(parameters, average)
                plan.save()
                torch._foreach_copy_(parameters, trained)
            saved = time.perf_counter()

    _fit("denoiser", groups, plan.iterations, plan.budget_s, loss_of, after)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    for module in modules:
        module.eval().requires_grad_(False)
    plan.save()


@contextmanager
def smaller_latents(denoiser: torch.nn.Module, side: int) -> Iterator[None]:
    """Lets an MMDiT take latents of a smaller side as the same scene seen from afar: its positions, averaged."""
    embed = denoiser.pos_embed
    own, own_side = embed.pos_embed, embed.pos_embed_max_size
    shrink = denoiser.config.sample_size // side
    grid = own.reshape(1, own_side, own_side, -1).permute(0, 3, 1, 2)
    embed.pos_embed = F.avg_pool2d(grid, shrink).flatten(2).transpose(1, 2).contiguous()
    embed.pos_embed_max_size = own_side // shrink
    yield
    embed.pos_embed, embed.pos_embed_max_size = own, own_side


def _compiled(family: DemoFamily) -> Callable[..., torch.Tensor]:
    """What predicts, compiled: a transformer by its blocks, which are alike and so are compiled once."""
    blocks = getattr(family.denoiser, "transformer_blocks", None)
    if blocks is None:
        return torch.compile(family.predict)
    for block in blocks:
        block.compile(dynamic=False)
    return family.predict


def _word_tokens(family: DemoFamily) -> dict[str, str]:
    """The token of each word of the captions' vocabulary."""
    return {word: family.tokenizer.tokenize(word)[0] for word in vocabulary()}


def _fit(
    name: str,
    groups: list[tuple[list[torch.nn.Parameter], float]],
    iterations: int,
    budget_s: float,
    loss_of: Callable[[], torch.Tensor],
    after: Callable[[int], None] = lambda planned: None,
) -> None:
    """Runs AdamW on groups of (parameters, learning rate): warm-up, cosine decay to zero, clipped gradients.

    The speed is measured past compilation, again at every look at the clock; if `iterations` would overrun the budget,
    fewer are done. `after` is called after each with the number of iterations planned. Of several processes the first
    one's clock decides.
    """
    parameters = [p for group, _ in groups for p in group]
    same_start(parameters)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in groups],
        weight_decay=0.01, betas=(0.9, 0.99), fused=parameters[0].is_cuda,
    )  # fmt: skip
    asked, warm_up = iterations, min(300, iterations // 10 + 1)
    start = shown = time.perf_counter()
    compiled_s = 0.0
    i = 0
    while i < iterations:
        decay = min(1, (i + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * i / iterations))
        for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * decay
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after(iterations)
        i += 1
        if i % CHECK_EVERY and i not in (1, iterations):
            continue
        value = loss.item()  # waits for the GPU
        seconds = time.perf_counter() - start
        if i == CHECK_EVERY:
            compiled_s = seconds
        elif i > CHECK_EVERY and math.isfinite(budget_s):
            left = (budget_s - seconds) * (i - CHECK_EVERY) / (seconds - compiled_s)
            iterations = min(asked, i + max(0, int(left)))
            warm_up = min(warm_up, iterations // 10 + 1)
        iterations = agreed(i if STOP.is_set() else iterations, loss.device)
        if i in (1, iterations) or start + seconds - shown >= REPORT_S:
            shown = start + seconds
            print(f"{name} iteration {i}/{iterations} loss {value:.5f} after {seconds:.0f} s", flush=True)
