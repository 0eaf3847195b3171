"""ONNX Runtime on the CPU: the backend of machines without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from engines.backends.onnxruntime.session import OnnxSession, library
from engines.engine import Arrays

PROVIDER = "CPUExecutionProvider"
_VNNI = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
"""Flags of CPUs whose products of u8 and s8 do not saturate."""


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
        options = library().SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not _exact_products():
            # Products of u8 and s8 saturate in their pair sums: 18.7 dB in place of 41.4 on a small denoiser. With this
            # ONNX Runtime multiplies u8 by u8, on CPUs that need it and, slower, on others too.
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = OnnxSession(path, options, name=path.name, providers=[PROVIDER])

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One inference; see `engines.engine.Engine`."""
        return self._session.run(inputs)


def _exact_products() -> bool:
    """Whether this CPU sums products of u8 and s8 in 32 bits; False where that is not known."""
    try:
        return not _VNNI.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def version() -> str:
    """Version of the installed ONNX Runtime."""
    return str(library().__version__)
