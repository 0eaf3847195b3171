"""Resolution-dependent timestep shifting, as flow-matching pipelines hand it to their scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dynamic_shift(config: Mapping[str, Any], tokens: int, *, max_shift: float) -> float:
    """The scheduler's `mu`: linear in the number of image tokens.

    Args:
        config: the scheduler's.
        tokens: image tokens of the denoiser.
        max_shift: what the pipeline takes where the scheduler's configuration has none.
    """
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (most - fewest)
    return float(tokens * slope + (low - slope * fewest))
