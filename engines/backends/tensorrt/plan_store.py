"""Finished plans by what shaped them, so that an interrupted build of several precisions can go on.

An entry is three files: the plan, the inspector's JSON beside it, and a document with the key's
fields and the plan's facts. The document is written last and holds the hashes of the others, so that
an unfinished or damaged entry is never found. A lock per key keeps two processes from building the
same plan.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.backends.cuda.gpu import Gpu
from engines.backends.onnx_references import references
from engines.backends.tensorrt.options import PlanOptions
from engines.documents import canonical_json, read_document, write_document
from engines.errors import BuildError
from engines.files import fsync_folder, sha256_bytes, sha256_file
from engines.plan_entry import LayerShare, Profile

# Raise it when this code builds different plans from the same inputs, or stores them differently.
PLAN_FORMAT = 2


class PlanTensor(BaseModel):
    """An input or output of a plan; dynamic axes are -1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dtype: str
    shape: tuple[int, ...]


class PlanFacts(BaseModel):
    """What is known of a built plan.

    Attributes:
        sha256: of the plan file.
        bytes: size of the plan file.
        inspector_sha256: of the engine inspector's JSON beside it.
        weights_bytes: device memory of its weights.
        streamable_weights_bytes: of them, those that weight streaming can keep in host memory.
        scratch_bytes: device memory of one execution context at the largest shapes of any profile, without weight
            streaming.
        inputs: in the plan's order.
        outputs: in the plan's order.
        layers: by layer precision.
        build_s: seconds the build took.
        warnings: ours first, then TensorRT's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    bytes: int
    inspector_sha256: str
    weights_bytes: int
    streamable_weights_bytes: int
    scratch_bytes: int
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    layers: dict[str, LayerShare]
    build_s: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PlanKey:
    """Everything that shapes a plan.

    Attributes:
        fields: as JSON data, in plain words.
    """

    fields: dict[str, Any]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON; the name of the entry."""
        return sha256_bytes(canonical_json(self.fields))


@dataclass(frozen=True)
class PlanRequest:
    """A plan that is asked for.

    Attributes:
        onnx: strongly typed ONNX file; external data is looked for beside it.
        precision: what the graph is quantized to.
        profiles: shapes of every input, from `profiles.profile`, the ones it runs at by default first.
        options: builder options.
        gpu: the device it is for, from `current_gpu()`.
    """

    onnx: Path
    precision: str
    profiles: tuple[Profile, ...]
    options: PlanOptions
    gpu: Gpu


def plan_key(asked: PlanRequest, tensorrt_version: str) -> PlanKey:
    """The key of the plan that `build_plan` makes of a request.

    The content of the ONNX file and of the files that it refers to is hashed, not the time they were written.

    Raises:
        BackendError: the ONNX file is malformed.
        OSError: it or one that it refers to cannot be read.
    """
    beside = sorted({item.location for item in references(asked.onnx)})
    return PlanKey(
        {
            "format": PLAN_FORMAT,
            "onnx_sha256": sha256_file(asked.onnx),
            "external_data_sha256": {name: sha256_file(asked.onnx.parent / name) for name in beside} or None,
            "precision": asked.precision,
            "tensorrt": tensorrt_version,
            "gpu": asked.gpu.name,
            "compute_capability": list(asked.gpu.compute_capability),
            "options": asked.options.canonical(),
            "profiles": [
                {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
                for profile in asked.profiles
            ],
        }
    )


def inspector_file(plan: Path) -> Path:
    """Where the engine inspector's JSON of a plan is."""
    return plan.with_suffix(plan.suffix + ".layers.json")


@dataclass(frozen=True)
class StoredPlan:
    """A whole entry of a store.

    Attributes:
        path: the plan; copy or link it, the store owns it.
        inspector: the engine inspector's JSON.
        facts: what is known of it.
        reused: whether it was there before.
    """

    path: Path
    inspector: Path
    facts: PlanFacts
    reused: bool


class PlanStore:
    """A folder of finished plans; safe to share between processes on one host."""

    def __init__(self, folder: Path) -> None:
        """Opens `folder`, making it if need be.

        Raises:
            OSError: it cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def find(self, key: PlanKey) -> StoredPlan | None:
        """The plan of `key` if it is there and its hashes match, else None."""
        plan, document = self._plan(key), self._document(key)
        if not document.exists():
            return None
        with contextlib.suppress(BuildError, ValidationError, OSError):  # damaged: the same as not there
            data = read_document(document, "stored plan", PLAN_FORMAT, BuildError)
            facts = PlanFacts.model_validate(data.get("plan"))
            whole = sha256_file(plan) == facts.sha256 and sha256_file(inspector_file(plan)) == facts.inspector_sha256
            if whole and data.get("key") == key.fields:
                return StoredPlan(plan, inspector_file(plan), facts, reused=True)
        return None

    def put(self, key: PlanKey, build: Callable[[Path], PlanFacts]) -> StoredPlan:
        """The plan of `key`: found, or built and stored.

        A second process that asks for the same plan waits for the first and then finds it.

        Args:
            key: what the plan is built from.
            build: writes the plan to the path it is given and the inspector's JSON to `inspector_file` of it.

        Raises:
            TmpDiffError: from `build`; the store is as it was, on Ctrl-C too.
            OSError: the folder is not writable or the disk is full.
        """
        plan = self._plan(key)
        with locked(plan):
            if stored := self.find(key):
                return stored
            for left in self._folder.glob(f".{key.digest}.*.partial"):  # of a process that died: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{key.digest}.", suffix=".partial", dir=self._folder))
            try:
                facts = build(scratch / plan.name)
                self._document(key).unlink(missing_ok=True)
                os.replace(inspector_file(scratch / plan.name), inspector_file(plan))
                os.replace(scratch / plan.name, plan)
                fsync_folder(self._folder)
                entry = {"version": PLAN_FORMAT, "key": key.fields, "plan": facts.model_dump(mode="json")}
                write_document(self._document(key), entry)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return StoredPlan(plan, inspector_file(plan), facts, reused=False)

    def _plan(self, key: PlanKey) -> Path:
        return self._folder / f"{key.digest}.plan"

    def _document(self, key: PlanKey) -> Path:
        return self._folder / f"{key.digest}.json"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes (and other threads) that lock the same `path` waiting; a dead owner's lock is gone.

    The lock is a file `<path>.lock` of its own, since `path` itself is replaced when it is written.

    Raises:
        OSError: the folder is missing or not writable.
    """
    import fcntl  # not on every system that runs plans

    with open(path.with_name(path.name + ".lock"), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
