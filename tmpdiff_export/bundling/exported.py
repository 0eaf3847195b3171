"""A model of a pipeline, exported: what all its engines are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from engines.manifest import MODEL_OUTPUT
from tmpdiff_export.devices import Batch
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.shape_folding import fold_shapes
from tmpdiff_export.pipelines.families.family import DenoiserFamily
from tmpdiff_export.targets.accuracy import AccuracyCheck


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A model and how its engines are judged.

    Attributes:
        module: float32 export wrapper on the CPU.
        graph: its ONNX graph with weights in memory, of FP16 tensors where `half`.
        check: inputs and references for the SQNR of its engines.
        batch_per_picture: see `EngineJob`.
        half: see `EngineJob`.
        float32_inputs: see `EngineJob`.
    """

    module: torch.nn.Module
    graph: onnx.ModelProto
    check: AccuracyCheck
    batch_per_picture: int
    half: bool
    float32_inputs: frozenset[str] = frozenset()


def export_folded(
    module: torch.nn.Module,
    inputs: Sequence[ExportInput],
    outputs: Mapping[str, Mapping[int, str]],
    scratch: Path,
    *,
    half: bool,
) -> onnx.ModelProto:
    """The graph of a module, without arithmetic on shapes; arguments as for `export_graph`, but for a scratch folder.

    Raises:
        BuildError: the exporter does not support the module.
    """
    graph = export_graph(module, inputs, outputs, scratch / "export.onnx", half=half)
    fold_shapes(graph, scratch / "shapes.onnx")
    return graph


def export_denoiser(module: torch.nn.Module, family: DenoiserFamily, example: Batch, scratch: Path) -> onnx.ModelProto:
    """The FP16 graph of a denoiser.

    Args:
        module: export wrapper, from `family.wrap`.
        family: how it is called.
        example: denoiser inputs to trace with, in the order of `family.inputs`.
        scratch: folder for the exporter's files.

    Raises:
        BuildError: the exporter does not support the module.
    """
    return export_folded(module, family.export_inputs(example), {MODEL_OUTPUT: {0: "batch"}}, scratch, half=True)


def with_larger_batch(batches: Sequence[Batch]) -> list[Batch]:
    """`batches` and one of twice the size: a batch size baked into a graph shows there."""
    first, last = batches[0], batches[-1]
    return [*batches, tuple(torch.cat(pair) for pair in zip(first, last, strict=True))]
