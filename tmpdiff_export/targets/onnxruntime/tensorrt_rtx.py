"""Engines for TensorRT for RTX: the exported graphs as they are, compiled where they run."""

from __future__ import annotations

from pathlib import Path

from engines.backends.onnxruntime.tensorrt_rtx import COMPUTE_CAPABILITIES, TensorRtRtxEngine, require_device, version
from engines.manifest import EngineEntry
from tmpdiff_export.targets.onnxruntime.graph_copy import copy_graph
from tmpdiff_export.targets.target import EngineJob


class RtxTarget:
    """`tmpdiff_export.targets.target.Target`: strongly typed ONNX files, `engines/<name>.onnx`."""

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
        capabilities = ", ".join(f"{major}.{minor}" for major, minor in COMPUTE_CAPABILITIES)
        path, entry = copy_graph(
            job, folder, backend=self.backend, version=version(), device=f"compute capability {capabilities}"
        )
        measured = job.check.sqnr_db(TensorRtRtxEngine(path, entry))
        return entry.model_copy(update={"sqnr_db": round(measured, 2)})
