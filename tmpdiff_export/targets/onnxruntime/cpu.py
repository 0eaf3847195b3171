"""Engines for ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine, version
from engines.documents import FileEntry
from engines.manifest import EngineEntry
from engines.precision import Precision
from tmpdiff_export.onnx_graphs.stored import BLOCK_SCALE, CODES, SCALE, branch_tensors, layer_tensors
from tmpdiff_export.quantization.codes import QuantizedLayer
from tmpdiff_export.quantization.packing import pack
from tmpdiff_export.quantization.sixteen_bit import narrow_type
from tmpdiff_export.targets.accuracy import AccuracyCheck
from tmpdiff_export.targets.exported import plain_tensors, typed_graph, write_graph
from tmpdiff_export.targets.onnxruntime.convolution import taps_matrix
from tmpdiff_export.targets.onnxruntime.lowering import lower_for_cpu
from tmpdiff_export.targets.onnxruntime.nvfp4 import whole_codes
from tmpdiff_export.targets.target import EngineJob, PreparedEngine, SourceModel, file_entry, tensor_specs


class CpuTarget:
    """`tmpdiff_export.targets.target.Target`: graphs lowered for the CPU, `engines/<name>.onnx`."""

    backend = "onnxruntime"
    fixed_shapes = False

    @property
    def key(self) -> dict[str, Any]:
        """See `Target.key`."""
        return {"backend": self.backend, "version": version(), "device": "cpu"}

    @property
    def form(self) -> CpuForm:
        """See `Target.form`."""
        return CpuForm()

    def require_memory(self, parameters: int) -> None:
        """Nothing beyond what is estimated for every build; see `Target.require_memory`."""

    def prepare(self, job: EngineJob) -> PreparedEngine:
        """Lowers the graph; see `Target.prepare`."""
        lowered, counts = lower_for_cpu(typed_graph(job), job.model.dtype if not job.model.half else torch.float16)
        check, recipe, floor_db = job.model.check, job.recipe, job.floor_db
        return PreparedEngine(
            plain_tensors(job, lowered, self.form),
            lambda folder, weights: CpuTask(job.name, folder, tuple(weights), lowered, counts, check, recipe, floor_db),
        )


@dataclass(frozen=True, eq=False)
class CpuTask:
    """What is left to do for an engine whose weights are stored.

    Attributes:
        name: of the engine; stem of its file.
        folder: a bundle folder, or one that stands for it.
        weights: its weight files in the folder.
        graph: lowered, without weights.
        lowering: see `EngineEntry`.
        check: inputs and references for its SQNR.
        recipe: see `EngineEntry`.
        floor_db: the least SQNR the build accepts.
    """

    name: str
    folder: Path
    weights: tuple[FileEntry, ...]
    graph: ModelProto
    lowering: dict[str, int]
    check: AccuracyCheck
    recipe: str
    floor_db: float

    def __call__(self) -> EngineEntry:
        """Writes the graph beside its weights, and measures it.

        Raises:
            BuildError: a weight is missing.
            BackendError: ONNX Runtime refuses the graph.
        """
        path = self.folder / "engines" / f"{self.name}.onnx"
        write_graph(self.graph, path, [self.folder / file.path for file in self.weights])
        measured = self.check.sqnr_db(OnnxRuntimeEngine(path))
        return EngineEntry(
            file=file_entry(self.folder, path),
            weights=self.weights,
            backend=CpuTarget.backend,
            backend_version=version(),
            device="cpu",
            lowering=self.lowering,
            onnx_sha256=None,
            recipe=self.recipe,
            sqnr_db=round(measured, 2),
            sqnr_floor_db=self.floor_db,
            inputs=tensor_specs(self.graph.graph.input),
            outputs=tensor_specs(self.graph.graph.output),
        )


class CpuForm:
    """`tmpdiff_export.targets.target.Form`: tensors as `lower_for_cpu` has them."""

    name = "onnxruntime-cpu"

    def codes(self, model: SourceModel, name: str, layer: QuantizedLayer) -> dict[str, torch.Tensor]:
        """See `Form.codes`."""
        return cpu_layer_tensors(name, layer, model.module.get_submodule(name).weight.shape)


def cpu_layer_tensors(name: str, layer: QuantizedLayer, weight_shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """`stored.layer_tensors`, in the forms of `lower_for_cpu`.

    Returns:
        `<name>.weight_codes`: int8 or FP8 [K, N], of a convolution int8 [kh kw C, N] or FP8 [N, C, kh, kw]; INT4's, uint8
        [N, K / block, block / 2] with zero point 8, for MatMulNBits; NVFP4's are twice the numbers, int8 [K, N].
        `<name>.weight_scale`: float32 [N], of INT4 [N, K / block], else []; NVFP4's is halved.
        `<name>.weight_block_scale` of NVFP4: [K / 16, N]. Of a branch, as `stored.branch_tensors`; small ones in float32.
    """
    codes, scale = layer.codes, layer.weight_scale.float()
    if layer.precision is Precision.INT4:
        blocks = (codes + 8).view(torch.uint8).unflatten(1, (scale.shape[1], -1))
        stored = {CODES: pack(blocks), SCALE: scale}
    elif layer.block_scale is not None:
        stored = {CODES: whole_codes(codes).T, SCALE: scale / 2, BLOCK_SCALE: layer.block_scale.T}
    else:
        as_read = layer_tensors(name, layer, weight_shape)[f"{name}.{CODES}"]
        product = as_read.ndim == 4 and layer.precision is Precision.INT8  # of FP8 a convolution stays one
        stored = {CODES: taps_matrix(as_read) if product else as_read, SCALE: scale}
    branch = branch_tensors(name, layer)
    return {f"{name}.{part}": item.contiguous() for part, item in stored.items()} | {
        part: item.to(narrow_type(item.shape, torch.float16)) for part, item in branch.items()
    }
