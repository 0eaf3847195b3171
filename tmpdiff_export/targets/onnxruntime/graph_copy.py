"""Engines that are the exported graph as it is, for backends that take ONNX files."""

from __future__ import annotations

import shutil
from pathlib import Path

from engines.backends.tensorrt.plan_store import data_file
from engines.files import sha256_file
from engines.manifest import EngineEntry
from tmpdiff_export.targets.target import EngineJob, file_entry, tensor_specs


def copy_graph(job: EngineJob, folder: Path, *, backend: str, version: str, device: str) -> tuple[Path, EngineEntry]:
    """Copies a graph, and its weights where they are in a file of their own, to `engines/<name>.onnx`.

    Args:
        job: what is made.
        folder: a bundle folder, or one that stands for it.
        backend: see `EngineEntry`.
        version: see `EngineEntry.backend_version`.
        device: see `EngineEntry`.

    Returns:
        The copy and its manifest entry, whose SQNR is still to be measured (0).
    """
    path = folder / "engines" / f"{job.name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(job.onnx_file, path)
    weights = data_file(job.onnx_file)
    if weights.exists():
        shutil.copyfile(weights, data_file(path))
    entry = EngineEntry(
        file=file_entry(folder, path),
        weights=(file_entry(folder, data_file(path)),) if weights.exists() else (),
        backend=backend,
        backend_version=version,
        device=device,
        lowering={},
        onnx_sha256=sha256_file(job.onnx_file),
        recipe=job.recipe,
        sqnr_db=0.0,
        sqnr_floor_db=job.floor_db,
        inputs=tensor_specs(job.graph.graph.input),
        outputs=tensor_specs(job.graph.graph.output),
    )
    return path, entry
