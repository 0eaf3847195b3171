"""How much of a denoiser is quantized: its layers, and their part of the multiply-adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from engines.manifest import CoverageEntry
from tmpdiff_export.devices import Batch
from tmpdiff_export.weights.streamed import on_meta

LEAST_SHARE = 0.5
"""Of the multiply-adds; an engine with less of them quantized is little faster, and is not what its name says."""

_KINDS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def warning(name: str, found: CoverageEntry) -> str | None:
    """One line where less than `LEAST_SHARE` of an engine is quantized, None where it is enough."""
    if found.quantized_share >= LEAST_SHARE:
        return None
    return (
        f"{name}: only {found.quantized_layers} of {found.layers} layers are quantized, with {found.quantized_share:.0%} of "
        "the multiply-adds; the others are too narrow or too sensitive, and stay in 16 bit"
    )


def multiply_adds(module: torch.nn.Module, batch: Batch) -> dict[str, int]:
    """Multiply-adds of every linear layer and convolution in one call; 0 for those that are not called.

    Nothing is computed: the call is one of shapes.

    Args:
        module: the export wrapper, on any device; not changed.
        batch: its inputs.

    Returns:
        By name in `module.named_modules()`.
    """
    shapes = on_meta(module)
    found = {name: 0 for name, layer in shapes.named_modules() if isinstance(layer, _KINDS)}

    def count(name: str, layer: Any, output: torch.Tensor) -> None:
        places = output.numel() // layer.weight.shape[0]  # rows, or positions, of all samples
        found[name] += places * layer.weight.numel()

    for name in found:
        shapes.get_submodule(name).register_forward_hook(
            lambda layer, inputs, output, name=name: count(name, layer, output)
        )
    with torch.inference_mode():
        shapes(*(tensor.to("meta") for tensor in batch))
    return found


def coverage(counts: Mapping[str, int], quantized: Collection[str]) -> CoverageEntry:
    """What of a denoiser is quantized.

    Args:
        counts: from `multiply_adds`.
        quantized: names of the layers that are, as `EngineJob.ranges` has them.
    """
    total = sum(counts.values())
    chosen = [name for name in counts if name in quantized]
    share = sum(counts[name] for name in chosen) / total if total else 0.0
    return CoverageEntry(quantized_layers=len(chosen), layers=len(counts), quantized_share=share)
