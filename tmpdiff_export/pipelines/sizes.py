"""The size of the pictures that a pipeline draws: its own, or one that was asked for and fits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from engines.errors import BuildError

if TYPE_CHECKING:
    from tmpdiff_export.pipelines.families.family import Family

MAX_SIDE = 16384
"""Pixels; four times what any family was trained at."""


def require_side(label: str, pixels: int) -> None:
    """Refuses a height or width that no pipeline has; nothing of it needs to be known.

    Raises:
        BuildError: says what is accepted.
    """
    if not 1 <= pixels <= MAX_SIDE:
        raise BuildError(f"{label} {pixels} is no size of a picture; give 1 to {MAX_SIDE} pixels")


def picture_size(pipe: Any, family: Family, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the pictures, in pixels.

    Args:
        pipe: the pipeline.
        family: of its denoiser.
        height: that was asked for, None for the pipeline's own.
        width: the same.

    Raises:
        BuildError: the pipeline has no size of its own and none was asked for, or the one asked for does not fit.
    """
    config, scale = getattr(pipe, family.component).config, int(pipe.vae_scale_factor)
    if height is None or width is None:
        own = own_size(getattr(pipe, "default_sample_size", None) or config.sample_size)
        if own is None:
            raise BuildError(
                f"this {type(pipe).__name__} has no picture size of its own (sample_size {config.sample_size!r}); give "
                "--height and --width"
            )
        height, width = (
            side * scale if asked is None else asked for side, asked in zip(own, (height, width), strict=True)
        )
    multiple = math.lcm(scale * int(getattr(config, "patch_size", 1) or 1) * family.packing, family.picture_multiple)
    for label, value in (("height", height), ("width", width)):
        require_side(label, value)
        if value % multiple:
            raise BuildError(f"{label} {value} does not fit this pipeline; give a positive multiple of {multiple}")
    return height, width


def own_size(sample_size: Any) -> tuple[int, int] | None:
    """(height, width) in latents of a configuration's `sample_size`, which is one number or two; None for others."""
    sides = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    return sides[0], sides[1]
