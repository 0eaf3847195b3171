"""Reading and writing the JSON documents of a bundle.

Documents that `calibrate` rewrites (schedule, sensitivity) carry their own digest, so that one
atomic file replacement is enough to keep them whole; everything else is hashed in the manifest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.errors import TmpDiffError, first_line
from engines.files import atomic_write_text, sha256_bytes

MAX_DOCUMENT_BYTES = 64 << 20

Sha256 = str


class Document(BaseModel):
    """A part of a document: fixed once it is read, and without fields that it does not name."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FileEntry(Document):
    """A file of the bundle; `path` is relative to the bundle folder, in POSIX form."""

    path: str
    sha256: Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, lt=1 << 63)


def canonical_json(data: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal data gives equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_document(path: Path, data: dict[str, Any]) -> None:
    """Writes `data` with its digest, atomically, for `read_document`."""
    digest = sha256_bytes(canonical_json(data))
    atomic_write_text(path, json.dumps({**data, "sha256": digest}, indent=1, allow_nan=False) + "\n")


def read_document(
    path: Path, kind: str, version: int, error: type[TmpDiffError], *, oldest: int | None = None
) -> dict[str, Any]:
    """Reads a document written by `write_document`, checks its digest and version (`check_version`).

    Returns:
        The data without its digest; fields are not validated yet.

    Raises:
        TmpDiffError: (as the class `error`) missing, not JSON, altered, or of another version.
    """
    data = read_json(path, kind, error)
    check_version(data, path, kind, version, error, oldest=oldest)
    digest = data.pop("sha256", None)
    try:
        found = sha256_bytes(canonical_json(data))
    except (ValueError, RecursionError) as reason:  # infinities such as 1e999, or nested too deeply
        raise error(f"{kind} {path} is malformed: {first_line(reason)}; make it again") from None
    if digest != found:
        raise error(f"{kind} {path} was altered after it was written (its sha256 does not match); make it again")
    return data


def read_json(path: Path, kind: str, error: type[TmpDiffError], *, infinite: bool = False) -> dict[str, Any]:
    """Parses a JSON object from `path`; NaN is refused, and Infinity unless `infinite` is true.

    Raises:
        TmpDiffError: (as the class `error`) missing, too large, or not a JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{kind} {path} is not a regular file; name a {kind} file")
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise error(f"{kind} {path} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB; it is no {kind}")
        data = json.loads(path.read_bytes(), parse_constant=_infinity if infinite else _refuse_constant)
    except FileNotFoundError:
        raise error(f"{kind} {path} does not exist") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{kind} {path} is not valid JSON: {first_line(reason)}") from None
    except OSError as reason:
        raise error(f"{kind} {path} cannot be read: {reason.strerror}") from reason
    if not isinstance(data, dict):
        raise error(f"{kind} {path} holds a JSON {type(data).__name__}, expected an object")
    return data


def check_version(
    data: dict[str, Any], path: Path, kind: str, version: int, error: type[TmpDiffError], *, oldest: int | None = None
) -> None:
    """Refuses documents of another format version than `version` (or `oldest` to `version`), newer ones by name.

    Raises:
        TmpDiffError: (as the class `error`).
    """
    found = data.get("version")
    if type(found) is int and found > version:
        raise error(
            f"{kind} {path} has format version {found}, this release reads up to {version}; upgrade tmpdiff-export"
        )
    if type(found) is not int or not (version if oldest is None else oldest) <= found:
        raise error(f"{kind} {path} has format version {found!r}, expected {version}")


def one_line(error: ValidationError) -> str:
    """The first finding of a pydantic error as `field: message`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "document"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _infinity(name: str) -> float:
    return _refuse_constant(name) if name == "NaN" else float(name)
