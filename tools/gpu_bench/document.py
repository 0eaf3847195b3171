"""The result file: written whole after every row, so that a killed run keeps what it measured."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from engines.documents import read_json
from engines.errors import TmpDiffError
from engines.files import atomic_write_text

TOOL = "bench_gpu"
VERSION = 1
DIGITS = 6


class Document:
    """A JSON result file under construction."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        """Writes `content` at once, which shows whether the folder can be written.

        Raises:
            TmpDiffError: the folder does not exist.
        """
        if not path.parent.is_dir():
            raise TmpDiffError(f"output folder {path.parent} does not exist; make it first")
        self.path = path
        self.content: dict[str, Any] = {"tool": TOOL, "version": VERSION, **content}
        self.save()

    def put(self, key: str, value: Any, *, inside: str | None = None) -> None:
        """Sets an entry, of the dictionary `inside` if one is named, and saves."""
        target = self.content if inside is None else self.content.setdefault(inside, {})
        target[key] = value
        self.save()

    def save(self) -> None:
        """Replaces the file."""
        atomic_write_text(self.path, json.dumps(rounded(self.content), indent=1) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        TmpDiffError: it is none, or of another version.
    """
    content: dict[str, Any] = read_json(path, "result file", TmpDiffError)
    if (content.get("tool"), content.get("version")) != (TOOL, VERSION):
        raise TmpDiffError(
            f"{path} holds {content.get('tool')!r} version {content.get('version')!r}, expected {TOOL!r} version "
            f"{VERSION}; measure again with python -m tools.gpu_bench"
        )
    return content


def rounded(data: Any) -> Any:
    """JSON data with floats of six significant digits; NaN and infinities become None."""
    if isinstance(data, dict):
        return {str(key): rounded(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [rounded(value) for value in data]
    if isinstance(data, float):
        return float(f"{data:.{DIGITS}g}") if math.isfinite(data) else None
    return data


def error_text(error: BaseException) -> str:
    """Type and message of an error on one line of bearable length; of files their names, not where they lie."""
    text = re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:600]}"
