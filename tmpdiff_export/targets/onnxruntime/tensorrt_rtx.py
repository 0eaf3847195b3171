"""Engines for TensorRT for RTX: the exported graphs as they are, compiled where they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.backends.onnxruntime.tensorrt_rtx import COMPUTE_CAPABILITIES, TensorRtRtxEngine, require_device, version
from engines.manifest import EngineEntry
from tmpdiff_export.targets.exported import OnnxForm
from tmpdiff_export.targets.onnxruntime.graph_copy import prepare_copy
from tmpdiff_export.targets.target import EngineJob, PreparedEngine


class RtxTarget:
    """`tmpdiff_export.targets.target.Target`: strongly typed ONNX files, `engines/<name>.onnx`."""

    backend = "tensorrt-rtx"
    fixed_shapes = False

    def __init__(self) -> None:
        """Checks that there is a GPU to measure the engines on.

        Raises:
            BackendError: no plugin, driver or supported GPU.
        """
        require_device()

    def require_memory(self, parameters: int) -> None:
        """The files are compiled where they run, not here; see `Target.require_memory`."""

    @property
    def key(self) -> dict[str, Any]:
        """See `Target.key`."""
        return {"backend": self.backend, "version": version()}

    @property
    def form(self) -> OnnxForm:
        """See `Target.form`."""
        return OnnxForm()

    def prepare(self, job: EngineJob) -> PreparedEngine:
        """Exports the graph; see `Target.prepare`."""
        capabilities = ", ".join(f"{major}.{minor}" for major, minor in COMPUTE_CAPABILITIES)
        check = job.model.check

        def measured(_: str, path: Path, entry: EngineEntry) -> EngineEntry:
            return entry.model_copy(update={"sqnr_db": round(check.sqnr_db(TensorRtRtxEngine(path, entry)), 2)})

        return prepare_copy(
            job, measured, backend=self.backend, version=version(), device=f"compute capability {capabilities}"
        )
