"""A torch package compiled for the CPU, as an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.backends.torch.library import torch
from engines.backends.torch.package import package_of
from engines.backends.torch.runner import load_package, run_in_pieces
from engines.backends.torch.weights import Tensors, in_order, new_block, weights_of
from engines.engine import Arrays
from engines.errors import BackendError
from engines.manifest import EngineEntry


class TorchCpuEngine:
    """See `engines.engine.Engine`."""

    def __init__(
        self, name: str, entry: EngineEntry, path: Path, threads: int | None, loaded: dict[Path, Tensors]
    ) -> None:
        """Loads package and weights.

        Args:
            name: for messages.
            entry: its manifest entry.
            path: the package, its weight files beside it; hashes have been checked.
            threads: torch's worker threads, of the whole process; None leaves them alone.
            loaded: the weight files that engines of the same bundle have read, by path; those of this one are added.

        Raises:
            BackendError: torch refuses the package, it is of another version, or its weights do not fit into memory.
        """
        self._name, self._entry = name, entry
        package = package_of(name, entry)
        self._batch = package.batch
        if threads is not None:
            torch.set_num_threads(threads)
        self._runner = load_package(name, package, path, None)
        files = weights_of(name, path, entry)
        for file in files:
            if file.path not in loaded:
                loaded[file.path] = file.fill(new_block(name, file, "cpu"))
        self._weights = in_order(loaded[file.path] for file in files)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One inference; see `engines.engine.Engine`."""
        arrays = []
        for spec in self._entry.inputs:
            if spec.name not in inputs:
                raise BackendError(f"engine {self._name} needs input {spec.name}; received {', '.join(inputs)}")
            values = inputs[spec.name]
            if values.ndim != len(spec.shape) or any(
                isinstance(size, int) and size != given for size, given in zip(spec.shape, values.shape, strict=True)
            ):
                raise BackendError(f"engine {self._name}: {spec.name} has shape {values.shape}, expected {spec.shape}")
            # Writable, because torch warns of what is not; it is only read.
            arrays.append(torch.from_numpy(np.require(values, spec.dtype, ["C", "W"])))
        results = {
            spec.name: np.empty((len(arrays[0]), *map(int, spec.shape[1:])), spec.dtype) for spec in self._entry.outputs
        }
        with torch.inference_mode():
            outputs = [torch.from_numpy(values) for values in results.values()]
            run_in_pieces(self._runner, self._weights, arrays, outputs, self._batch)
        return results
