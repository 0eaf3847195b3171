"""A pipeline with all its weights, for tests that hold engines to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.setting_entry import SettingEntry
    from tmpdiff_export.pipelines.load import SourcePipeline
    from tmpdiff_export.pipelines.settings import Setting


def whole_pipeline(folder: Path) -> SourcePipeline:
    """As `open_pipeline`, with float32 models in place of the hollow ones."""
    import torch

    from tmpdiff_export.pipelines.load import open_pipeline

    source = open_pipeline(folder)
    for name in (source.family.component, *source.other_models):
        setattr(source.pipe, name, source.load(name, torch.float32))
    return source


def setting_of(source: SourcePipeline, entry: SettingEntry) -> Setting:
    """A setting of a bundle, made anew from the pipeline."""
    from tmpdiff_export.pipelines.settings import SettingRequest, resolve

    size = entry.height, entry.width
    request = SettingRequest(entry.num_inference_steps, size, entry.guidance_scale, entry.text_length)
    return resolve(source.facts, request)
