"""Engines for TensorRT for RTX: the exported graphs as they are, compiled where they run."""

from __future__ import annotations

import shutil
from pathlib import Path

from engines.backends.tensorrt.plan_store import data_file
from engines.backends.tensorrt_rtx import COMPUTE_CAPABILITIES, TensorRtRtxEngine, require_device, version
from engines.files import sha256_file
from engines.manifest import EngineEntry
from tmpdiff_export.accuracy import engine_sqnr_db
from tmpdiff_export.engine_build import EngineJob, file_entry, tensor_specs


class RtxTarget:
    """`tmpdiff_export.engine_build.Target`: strongly typed ONNX files, `engines/<name>.onnx`."""

    backend = "tensorrt-rtx"

    def __init__(self) -> None:
        """Checks that there is a GPU to measure the engines on.

        Raises:
            BackendError: no plugin, driver or supported GPU.
        """
        require_device()

    def require_memory(self, parameters: int) -> None:
        """The files are compiled where they run, not here; see `Target.require_memory`."""

    def make(self, job: EngineJob, folder: Path) -> EngineEntry:
        """Copies the graph, runs it on the GPU and measures its SQNR; see `Target.make`."""
        path = folder / "engines" / f"{job.name}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.onnx_file, path)
        weights = data_file(job.onnx_file)
        if weights.exists():
            shutil.copyfile(weights, data_file(path))
        entry = EngineEntry(
            file=file_entry(folder, path),
            weights=file_entry(folder, data_file(path)) if weights.exists() else None,
            backend=self.backend,
            backend_version=version(),
            device="compute capability " + ", ".join(f"{major}.{minor}" for major, minor in COMPUTE_CAPABILITIES),
            lowering={},
            onnx_sha256=sha256_file(job.onnx_file),
            recipe=job.recipe,
            sqnr_db=0.0,
            sqnr_floor_db=job.floor_db,
            inputs=tensor_specs(job.graph.graph.input),
            outputs=tensor_specs(job.graph.graph.output),
        )
        engine, check = TensorRtRtxEngine(path, entry), job.check
        measured = engine_sqnr_db(engine, check.names, check.output, check.batches, check.references)
        return entry.model_copy(update={"sqnr_db": round(measured, 2)})
