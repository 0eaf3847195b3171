"""Graphs as bundles for ONNX Runtime's CUDA provider hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from helpers.small_plans import SmallModel

from engines.documents import FileEntry
from engines.files import sha256_file
from engines.manifest import EngineEntry

DEVICE = "sm90 Fake H200"


def saved(small: SmallModel, path: Path, **changed: Any) -> tuple[EngineEntry, Path]:
    """A file and its manifest entry."""
    onnx.save(small.model, path)
    file = FileEntry(path=path.name, sha256=sha256_file(path), bytes=path.stat().st_size)
    entry = EngineEntry(
        file=file,
        backend="onnxruntime",
        backend_version="1.30.0",
        device=DEVICE,
        lowering={},
        onnx_sha256=file.sha256,
        recipe="none",
        sqnr_db=99.0,
        sqnr_floor_db=1.0,
        inputs=small.inputs,
        outputs=small.outputs,
    )
    return entry.model_copy(update=changed), path
