"""How latents are noised in training, and what a denoiser is to predict of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def flow_matching(clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixes noise into latents: x_t = (1 - sigma) clean + sigma noise, timestep = 1000 sigma.

    Args:
        clean: [n, C, h, w].

    Returns:
        x_t, the timestep [n], and the velocity: noise minus clean.
    """
    batch, device = len(clean), clean.device
    noise = torch.randn_like(clean)
    # Objects are few and bright, so they show through much noise: where they go is decided at high sigmas, which
    # is why those are drawn more often, and higher ones where more latents show the same scene. Some uniform sigmas
    # keep the rest of the trajectory in view.
    middle = 1.5 + math.log(max(1.0, clean.shape[-1] / 32))
    sigma = torch.sigmoid(middle + 1.2 * torch.randn(batch, device=device))
    sigma = torch.where(torch.rand(batch, device=device) < 0.25, torch.rand(batch, device=device), sigma)
    return torch.lerp(clean, noise, sigma[:, None, None, None]), 1000 * sigma, noise - clean


def v_prediction(
    alphas_cumprod: torch.Tensor,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns the same for x_t = a clean + b noise with a^2 = alphas_cumprod[t] and a^2 + b^2 = 1, t uniform.

    The denoiser is to predict v = a noise - b clean.
    """

    def corrupt(clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        noise = torch.randn_like(clean)
        timestep = torch.randint(len(alphas_cumprod), (len(clean),), device=clean.device)
        kept = alphas_cumprod.to(clean.device)[timestep][:, None, None, None]
        a, b = kept.sqrt(), (1 - kept).sqrt()
        return a * clean + b * noise, timestep.float(), a * noise - b * clean

    return corrupt
