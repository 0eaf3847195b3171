"""Engines that are the strongly typed graph as it is, for backends that take ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from engines.documents import FileEntry
from engines.files import sha256_file
from engines.manifest import EngineEntry
from tmpdiff_export.targets.exported import OnnxForm, plain_tensors, strong_graph, write_graph
from tmpdiff_export.targets.target import EngineJob, PreparedEngine, file_entry, tensor_specs

Measure = Callable[[str, Path, EngineEntry], EngineEntry]
"""Loads an engine, by name, file and manifest entry, and returns the entry with its SQNR and lowering."""


@dataclass(frozen=True, eq=False)
class GraphCopy:
    """What is left to do for an engine whose weights are stored.

    Attributes:
        name: of the engine; stem of its file.
        folder: a bundle folder, or one that stands for it.
        weights: its weight files in the folder.
        graph: without weights.
        unmeasured: its manifest entry but for files and measurements.
        measure: what the backend does with it.
    """

    name: str
    folder: Path
    weights: tuple[FileEntry, ...]
    graph: ModelProto
    unmeasured: Mapping[str, object]
    measure: Measure

    def __call__(self) -> EngineEntry:
        """Writes the graph beside its weights, and measures it.

        Raises:
            BuildError: the graph is not valid, or a weight is missing.
            BackendError: the backend refuses the graph.
        """
        path = self.folder / "engines" / f"{self.name}.onnx"
        write_graph(self.graph, path, [self.folder / file.path for file in self.weights])
        entry = EngineEntry.model_validate(
            {
                **self.unmeasured,
                "file": file_entry(self.folder, path),
                "weights": self.weights,
                "onnx_sha256": sha256_file(path),
                "inputs": tensor_specs(self.graph.graph.input),
                "outputs": tensor_specs(self.graph.graph.output),
            }
        )
        return self.measure(self.name, path, entry)


def prepare_copy(job: EngineJob, measure: Measure, *, backend: str, version: str, device: str) -> PreparedEngine:
    """Begins an engine: `engines/<name>.onnx` and weights in `OnnxForm`.

    Args:
        job: what is made.
        measure: called when the file is written; its entry has an SQNR of 0.
        backend: see `EngineEntry`.
        version: see `EngineEntry.backend_version`.
        device: see `EngineEntry`.

    Raises:
        BuildError: the model cannot be exported.
    """
    graph = strong_graph(job)
    unmeasured = {
        "backend": backend,
        "backend_version": version,
        "device": device,
        "lowering": {},
        "recipe": job.recipe,
        "sqnr_db": 0.0,
        "sqnr_floor_db": job.floor_db,
    }
    return PreparedEngine(
        plain_tensors(job, graph, OnnxForm()),
        lambda folder, weights: GraphCopy(job.name, folder, tuple(weights), graph, unmeasured, measure),
    )
