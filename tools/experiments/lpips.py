"""LPIPS, the learned distance between pictures, with AlexNet's features (Zhang et al., CVPR 2018, arXiv 1801.03924).

Weights are no part of this project: `python -m tools.experiments.fetch_lpips` fetches them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load

from engines.errors import TmpDiffError
from engines.files import sha256_bytes

WEIGHTS_SHA256 = "b277f01d5eca8708c936cbf452795218c5170d8a4832461e410daa8f0c72b222"
"""Of the file that `tools.experiments.fetch_lpips` writes: version 0.1 of the weights."""

# output channels, input channels, side of the kernel, stride, padding; pooled before?
LAYERS = (
    (64, 3, 11, 4, 2, False),
    (192, 64, 5, 1, 2, True),
    (384, 192, 3, 1, 1, True),
    (256, 384, 3, 1, 1, False),
    (256, 256, 3, 1, 1, False),
)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
TINY = 1e-10

SHAPES: dict[str, tuple[int, ...]] = {
    name: shape
    for i, (out, inner, side, *_) in enumerate(LAYERS)
    for name, shape in (
        (f"convolutions.{i}.weight", (out, inner, side, side)),
        (f"convolutions.{i}.bias", (out,)),
        (f"heads.{i}", (out,)),
    )
}
"""Tensors of the weights file, float32."""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights by name, see `SHAPES`; nothing is parsed before the file's hash is checked.

    Raises:
        TmpDiffError: there is no such file, or another one than `tools.experiments.fetch_lpips` makes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TmpDiffError(
            f"LPIPS weights {path} cannot be read ({error.strerror}); make them with tools.experiments.fetch_lpips"
        ) from error
    found = sha256_bytes(data)
    if found != WEIGHTS_SHA256:
        raise TmpDiffError(
            f"LPIPS weights {path} have sha256 {found[:16]}..., expected {WEIGHTS_SHA256[:16]}...; make them with "
            "tools.experiments.fetch_lpips"
        )
    return load(data)


def lpips(weights: dict[str, torch.Tensor], picture: np.ndarray, reference: np.ndarray) -> float:
    """LPIPS of two pictures, uint8 [H, W, 3] of at least 31 x 31 pixels; 0 for equal ones.

    Args:
        weights: float32, see `SHAPES`.
    """
    both = torch.from_numpy(np.stack([picture, reference])).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = (both - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]
    distance = 0.0
    with torch.inference_mode():
        for i, (*_, stride, padding, pooled) in enumerate(LAYERS):
            if pooled:
                x = F.max_pool2d(x, 3, 2)
            bias = weights[f"convolutions.{i}.bias"]
            x = F.relu(F.conv2d(x, weights[f"convolutions.{i}.weight"], bias, stride, padding))
            unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + TINY)
            difference = (unit[0] - unit[1]).square() * weights[f"heads.{i}"][:, None, None]
            distance += difference.sum(dim=0).mean().item()
    return distance
