"""Engines that take host arrays: ONNX Runtime sessions on the CPU or on an RTX GPU, torch packages on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.onnx_references import require_listed
from engines.engine import Engine
from engines.errors import BackendError
from engines.loop import Loop, host_loop
from engines.manifest import EngineEntry


class SessionHost:
    """`engines.host.EngineHost` over engines that take host arrays; they stay loaded until `close`."""

    def __init__(self, backend: str, threads: int | None) -> None:
        """
        Args:
            backend: "onnxruntime", "tensorrt-rtx", or "torch" for packages compiled for the CPU.
            threads: worker threads on the CPU, None for one per core.
        """
        self._backend = backend
        self._threads = threads
        self._files: dict[str, tuple[EngineEntry, Path]] = {}
        self._engines: dict[str, Engine] = {}
        self._weights: dict[Path, Any] = {}  # of torch packages, by file: engines share them

    def add(self, name: str, entry: EngineEntry, path: Path) -> None:
        """See `EngineHost.add`."""
        self._files[name] = (entry, path)

    def engine(self, name: str) -> Engine:
        """See `EngineHost.engine`."""
        if name not in self._engines:
            if name not in self._files:
                raise BackendError(f"no engine {name!r} was added; there are {', '.join(self._files) or 'none'}")
            self._engines[name] = self._load(name, *self._files[name])
        return self._engines[name]

    def denoise(self, loop: Loop) -> NDArray[np.float32]:
        """See `EngineHost.denoise`."""
        return host_loop(loop, self.engine)

    def close(self) -> None:
        """See `EngineHost.close`."""
        self._engines.clear()
        self._weights.clear()
        self._files.clear()

    def _load(self, name: str, entry: EngineEntry, path: Path) -> Engine:
        if self._backend == "torch":
            from engines.backends.torch.cpu import TorchCpuEngine

            return TorchCpuEngine(name, entry, path, self._threads, self._weights)
        require_listed(name, path, entry)
        if self._backend == "tensorrt-rtx":
            from engines.backends.onnxruntime.tensorrt_rtx import TensorRtRtxEngine

            return TensorRtRtxEngine(path, entry)
        from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, threads=self._threads)
