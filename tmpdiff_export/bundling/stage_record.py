"""A finished stage of a build on the disk: its folder, what is recorded of it, and the check of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.documents import FileEntry, canonical_json, one_line, read_document, write_document
from engines.errors import TmpDiffError
from engines.files import sha256_bytes
from tmpdiff_export.bundling.stage_files import hashes, plain_files

DOCUMENT = "stage.json"
DOCUMENT_VERSION = 1


@dataclass(frozen=True)
class Kept:
    """A finished stage.

    Attributes:
        folder: where its files are; not to be changed.
        result: what its maker returned, as JSON gives it back.
        reused: whether it was found, and not made now.
        digest: of its key, result and files; part of the key of a stage that is made from this one.
        files: by path inside the folder.
    """

    folder: Path
    result: Any
    reused: bool
    digest: str
    files: Mapping[str, FileEntry]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int
    name: str
    key: Any
    result: Any
    files: list[FileEntry]


def record_stage(path: Path, name: str, key: Any, result: Any) -> Kept:
    """Writes `stage.json` beside the files of a stage; arguments and errors as of `Stages.finish`."""
    sizes = plain_files(path)
    if DOCUMENT in sizes:
        raise ValueError(f"stage {name} writes a file {DOCUMENT}, the name of its own record; choose another")
    digests = hashes(path, sizes)
    files = [FileEntry(path=file, sha256=digests[file], bytes=size) for file, size in sorted(sizes.items())]
    data = {
        "version": DOCUMENT_VERSION,
        "name": name,
        "key": key,
        "result": result,
        "files": [item.model_dump(mode="json") for item in files],
    }
    data = json.loads(canonical_json(data))  # what a later run reads, so that both go on with equal data
    write_document(path / DOCUMENT, data)
    return Kept(path, data["result"], False, sha256_bytes(canonical_json(data)), _by_path(files))


def read_stage(folder: Path, name: str, key: Any) -> Kept:
    """A stage, checked.

    Raises:
        TmpDiffError: it is not what was finished; says why.
        OSError: it cannot be read.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise TmpDiffError(f"{folder} is no folder")
    sizes = plain_files(folder)
    data = read_document(folder / DOCUMENT, "stage", DOCUMENT_VERSION, TmpDiffError)
    try:
        record = _Record.model_validate(data)
    except ValidationError as error:
        raise TmpDiffError(f"{folder / DOCUMENT} is malformed ({one_line(error)})") from None
    if record.name != name or canonical_json(record.key) != canonical_json(key):
        raise TmpDiffError(f"{folder / DOCUMENT} is of another stage")
    files = _by_path(record.files)
    del sizes[DOCUMENT]
    if other := sorted(sizes.keys() ^ files.keys()):
        raise TmpDiffError(f"{folder / other[0]} is {'not listed' if other[0] in sizes else 'missing'}")
    for path, size in sizes.items():
        if size != files[path].bytes:
            raise TmpDiffError(f"{folder / path} has {size} bytes, expected {files[path].bytes}")
    for path, digest in hashes(folder, sizes).items():
        if digest != files[path].sha256:
            raise TmpDiffError(f"{folder / path} was altered (its sha256 does not match)")
    return Kept(folder, record.result, True, sha256_bytes(canonical_json(data)), files)


def _by_path(files: list[FileEntry]) -> dict[str, FileEntry]:
    return {item.path: item for item in files}
