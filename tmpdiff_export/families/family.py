"""What the toolchain has to know of a denoiser class, and of the pipelines around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engines.manifest import LATENTS, TIMESTEP
from tmpdiff_export.onnx_export import ExportInput
from tmpdiff_export.ranges import Batch

DENOISER = "denoiser"  # attribute of every export wrapper that holds the diffusers module
Axes = Mapping[int, str]

BATCH_AXES: Axes = {0: "batch"}
TEXT_AXES: Axes = {0: "batch", 1: "text"}


@dataclass(frozen=True, kw_only=True)
class DenoiserFamily:
    """One kind of denoiser: how it is called, wrapped for export, and conditioned.

    Attributes:
        denoiser_class: name of the diffusers class.
        component: the pipeline attribute that holds the denoiser.
        inputs: denoiser engine inputs in the wrapper's order, with their symbolic axes: latents [B, C, h, w], timestep
            [B] as the scheduler has it, then the conditioning.
        wrap: makes the export wrapper from (pipeline, height, width), in pixels; of the pipeline it needs the denoiser
            and `vae_scale_factor` only. The wrapper returns `model_output` [B, C, h, w].
        arguments: picks the wrapper's inputs out of the arguments the pipeline calls the denoiser with.
        refusal: why a denoiser of this class is not of this family, or None if it is.
        float32_inputs: inputs that FP16 would round by too much; they are float32 in every graph.
    """

    denoiser_class: str
    component: str
    inputs: Mapping[str, Axes]
    wrap: Callable[[Any, int, int], torch.nn.Module]
    arguments: Callable[[Mapping[str, Any]], Batch]
    refusal: Callable[[torch.nn.Module], str | None]
    float32_inputs: frozenset[str] = frozenset({TIMESTEP})

    def export_inputs(self, batch: Batch) -> list[ExportInput]:
        """The graph inputs of the denoiser, with `batch` (in the order of `inputs`) as the traced example."""
        return [
            ExportInput(name, example, axes, keep_dtype=name in self.float32_inputs)
            for (name, axes), example in zip(self.inputs.items(), batch, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Family(DenoiserFamily):
    """A denoiser family whose pipelines are supported from the prompt to the picture.

    Attributes:
        pipelines: classes whose loop is plain guidance around the denoiser; others add to it.
        wrap_text: makes the text encoder wrapper from (pipeline, height, width), in pixels; it returns `text_outputs`.
        text_inputs: which of input_ids and attention_mask it takes.
        text_outputs: names of denoiser inputs, with their symbolic axes.
        lowercase: whether the pipeline lower-cases and strips prompts.
        call_options: arguments of the pipeline's call that keep it from resizing or rewriting.
        pipeline_refusal: what a pipeline has that a bundle would leave out, or None if there is nothing.
    """

    pipelines: tuple[str, ...]
    wrap_text: Callable[[Any, int, int], torch.nn.Module]
    text_inputs: tuple[str, ...]
    text_outputs: Mapping[str, Axes]
    lowercase: bool
    call_options: Mapping[str, Any]
    pipeline_refusal: Callable[[Any], str | None]


def latents_and_timestep() -> dict[str, Axes]:
    """The inputs that every family has, first."""
    return {LATENTS: BATCH_AXES, TIMESTEP: BATCH_AXES}
