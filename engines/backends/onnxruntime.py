"""ONNX Runtime on the CPU: the embedded default backend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from engines.engine import Arrays
from engines.errors import BackendError

PROVIDER = "CPUExecutionProvider"


class OnnxRuntimeEngine:
    """An ONNX file in an ONNX Runtime session.

    The graph was lowered at build time, so the session's own Q/DQ rewriting stays off. Threads do not
    spin while idle: sessions of several precisions share the cores, and one that has just finished
    would take them from the next.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        """Loads `path`.

        Raises:
            BackendError: ONNX Runtime refuses the file.
        """
        onnxruntime = _library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])
        except Exception as error:  # its exception classes share no public base
            raise BackendError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {_short(error)}") from error
        self._inputs = {item.name: _dtype(item.type) for item in self._session.get_inputs()}
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._path = path

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One inference; see `engines.engine.Engine`."""
        if set(inputs) != set(self._inputs):
            raise BackendError(
                f"engine {self._path.name} takes inputs {sorted(self._inputs)}, received {sorted(inputs)}"
            )
        for name, expected in self._inputs.items():
            if inputs[name].dtype != expected:
                raise BackendError(
                    f"engine {self._path.name}: input {name} must be {expected}, received {inputs[name].dtype}"
                )
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise BackendError(f"engine {self._path.name} failed: {_short(error)}") from error
        return dict(zip(self._outputs, values, strict=True))


def version() -> str:
    """Version of the installed ONNX Runtime."""
    return str(_library().__version__)


def _library() -> Any:
    """The `onnxruntime` module, its telemetry off.

    Its official builds send trace events to Microsoft unless this variable is set before they are first
    imported (Privacy.md in the package). A value that the user has set stays.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def _dtype(name: str) -> np.dtype:
    known = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    if name not in known:
        raise BackendError(f"engine input of type {name} is not supported; expected one of {', '.join(known)}")
    return np.dtype(known[name])


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
