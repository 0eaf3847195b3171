"""Engines for ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine, version
from engines.files import sha256_file
from engines.manifest import EngineEntry
from tmpdiff_export.onnx_graphs.external import save_graph
from tmpdiff_export.targets.onnxruntime.lowering import lower_for_cpu
from tmpdiff_export.targets.target import EngineJob, file_entry, tensor_specs


class CpuTarget:
    """`tmpdiff_export.targets.target.Target`: graphs lowered for the CPU, `engines/<name>.onnx`."""

    backend = "onnxruntime"

    def require_memory(self, parameters: int) -> None:
        """Any model that could be loaded for export can be tried; see `Target.require_memory`."""

    def make(self, job: EngineJob, folder: Path) -> EngineEntry:
        """Lowers the graph, writes it, loads it and measures its SQNR; see `Target.make`."""
        lowered, counts = lower_for_cpu(job.graph)
        path = folder / "engines" / f"{job.name}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = save_graph(lowered, path)
        measured = job.check.sqnr_db(OnnxRuntimeEngine(path))
        return EngineEntry(
            file=file_entry(folder, path),
            weights=() if weights is None else (file_entry(folder, weights),),
            backend=self.backend,
            backend_version=version(),
            device="cpu",
            lowering=counts,
            onnx_sha256=sha256_file(job.onnx_file),
            recipe=job.recipe,
            sqnr_db=round(measured, 2),
            sqnr_floor_db=job.floor_db,
            inputs=tensor_specs(lowered.graph.input),
            outputs=tensor_specs(lowered.graph.output),
        )
