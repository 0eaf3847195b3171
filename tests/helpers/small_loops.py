"""Loops over the small denoisers of `small_plans`, for tests of several backends' device loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from helpers.small_plans import CHANNELS, SIDE, TOKENS, WIDTH

from engines.loop import Loop
from engines.reuse import REUSES
from engines.sampler import SamplerTable

Opened = Callable[..., Any]
"""Opens a host with the small denoisers in it; its arguments are those of the `opened` of the backend's folder."""


def loop_of(
    sampler: SamplerTable,
    precisions: tuple[str, ...],
    *,
    samples: int = 2,
    size: tuple[int, int] = (SIDE, SIDE),
    guidance_scale: float = 4.5,
    **options: Any,
) -> Loop:
    random = np.random.default_rng(5)
    batch = 2 * samples if guidance_scale > 1 else samples
    return Loop(
        table=sampler,
        precisions=precisions,
        conditioning={"hidden_states": random.standard_normal((batch, TOKENS, WIDTH)).astype(np.float32)},
        noise=random.standard_normal((samples, CHANNELS, *size)).astype(np.float32),
        guidance_scale=guidance_scale,
        **options,
    )


def schedule(pattern: str) -> tuple[str, ...]:
    """Letters are precisions; "a", "b" and "c" reuse at order 0, 1 and 2."""
    names = {"h": "fp16", "8": "fp8", "i": "int8", "4": "int4"} | dict(zip("abc", REUSES, strict=True))
    return tuple(names[letter] for letter in pattern)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
