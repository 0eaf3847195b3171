"""What the engines that run in an ONNX Runtime session have in common, on whichever execution provider."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.engine import Arrays
from engines.errors import BackendError, first_line
from engines.manifest import TensorSpec

# ONNX Runtime's names of the tensor types that an engine may have.
DTYPES: dict[str, np.dtype] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
}
# These come behind hundreds of characters of C++ signatures.
_FAILURE = re.compile(
    r"\b(?:CUDA|CUBLAS|CUDNN|CUFFT) failure \d+: [^;\n]*|Failed to allocate memory for requested buffer of size \d+"
)
_STATUS = "[ONNXRuntimeError]"  # a status wraps another behind C++ signatures


class OnnxSession:
    """An ONNX file in an `onnxruntime.InferenceSession`, its inputs checked and its failures raised as BackendError.

    Attributes:
        inputs: dtype of every input, by name.
        outputs: names of the outputs.
    """

    def __init__(
        self,
        path: Path,
        options: Any,
        *,
        name: str,
        providers: Sequence[str | tuple[str, dict[str, str]]] | None = None,
    ) -> None:
        """Loads `path`.

        Args:
            path: the ONNX file.
            options: its `onnxruntime.SessionOptions`.
            name: what error messages call the engine.
            providers: execution providers by name, or by name and options; None if `options` has them.

        Raises:
            BackendError: ONNX Runtime refuses the file.
        """
        onnxruntime = library()
        try:
            # The Python class would answer a provider's failure with a second try on the CPU.
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        except Exception as error:  # its exception classes share no public base
            raise BackendError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {words(error)}") from error
        self.inputs = {item.name: _dtype(item.type) for item in self._session.get_inputs()}
        self.outputs = [item.name for item in self._session.get_outputs()]
        self._name = name

    @property
    def library_session(self) -> Any:
        """The `onnxruntime.InferenceSession`; do not keep it."""
        return self._session

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One inference; see `engines.engine.Engine`."""
        require_names(self._name, self.inputs, inputs)
        for name, expected in self.inputs.items():
            if inputs[name].dtype != expected:
                raise BackendError(
                    f"engine {self._name}: input {name} must be {expected}, received {inputs[name].dtype}"
                )
        try:
            values = self._session.run(self.outputs, dict(inputs))
        except Exception as error:
            raise BackendError(f"engine {self._name} failed: {words(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


def library() -> Any:
    """The `onnxruntime` module, its telemetry off.

    Its official builds send trace events to Microsoft unless this variable is set before they are first
    imported (Privacy.md in the package). A value that the user has set stays.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def require_names(engine: str, expected: Iterable[str], inputs: Arrays) -> None:
    """Checks that `inputs` are the ones an engine takes.

    Raises:
        BackendError: some are missing or unknown.
    """
    names = set(expected)
    if set(inputs) != names:
        raise BackendError(f"engine {engine} takes inputs {sorted(names)}, received {sorted(inputs)}")


def axis_sizes(engine: str, specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The size of every symbolic axis of a call's inputs, by symbol.

    Args:
        engine: what error messages call it.
        specs: of all inputs.
        shapes: by input name; one for each spec.

    Raises:
        BackendError: an axis differs from its spec, is empty, or one symbol has two sizes.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        shape = shapes[spec.name]
        expected = tuple(axis if isinstance(axis, int) else sizes.get(axis, axis) for axis in spec.shape)
        fits = len(shape) == len(expected) and all(
            size == axis if isinstance(axis, int) else size > 0 for size, axis in zip(shape, expected, strict=True)
        )
        if not fits:
            raise BackendError(
                f"engine {engine}: input {spec.name} must have shape [{', '.join(map(str, expected))}], "
                f"received [{', '.join(map(str, shape))}]"
            )
        sizes.update({axis: size for axis, size in zip(spec.shape, shape, strict=True) if isinstance(axis, str)})
    return sizes


def words(error: Exception) -> str:
    """What the library said, cut to one line of a message: a failure of CUDA alone, else that of its innermost part."""
    failure = _FAILURE.search(str(error))
    return failure.group().strip() if failure else first_line(error).rpartition(_STATUS)[2].strip(" :")[:300]


def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise BackendError(f"engine input of type {name} is not supported; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]
