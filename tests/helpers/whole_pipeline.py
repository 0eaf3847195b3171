"""A pipeline with all its weights, for tests that hold engines to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmpdiff_export.pipelines.load import SourcePipeline


def whole_pipeline(
    folder: Path, *, height: int | None = None, width: int | None = None, guidance_scale: float | None = None
) -> SourcePipeline:
    """As `open_pipeline`, with float32 models in place of the hollow ones."""
    import torch

    from tmpdiff_export.pipelines.load import open_pipeline

    source = open_pipeline(folder, height=height, width=width, guidance_scale=guidance_scale)
    for name in (source.family.component, *source.other_models):
        setattr(source.pipe, name, source.load(name, torch.float32))
    return source
