"""How tests call `tmpdiff-runtime run`, what they expect of its errors, and bundles whose manifest was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.bundle import MANIFEST_NAME
from engines.cli import PROGRAM
from engines.manifest import manifest_text

PROMPT = "a large red circle on the left"


def arguments(bundle: Path, out: Path, *more: str, schedule: str = "uniform:int8") -> list[str]:
    return ["run", str(bundle), "--prompt", PROMPT, "--seed", "7", "--out", str(out), "--schedule", schedule, *more]


def assert_one_error_line(err: str, expected: str) -> None:
    assert err.startswith(f"{PROGRAM}: error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    assert err.rstrip("\n").isprintable(), err
    assert expected in err


def manifest_data(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / MANIFEST_NAME).read_text())
    return data


def replace(path: Path, content: bytes) -> None:
    """Puts a new file in place of one that may be a hard link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def rewrite_manifest(bundle: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Changes the manifest; with `sign` its hashes are made to fit, as a forger would."""
    data = manifest_data(bundle)
    change(data)
    replace(bundle / MANIFEST_NAME, (manifest_text(data) if sign else json.dumps(data)).encode())


def entries_of(data: Any) -> list[dict[str, Any]]:
    """Every file that a manifest vouches for, wherever in it."""
    if isinstance(data, list):
        return [entry for value in data for entry in entries_of(value)]
    if not isinstance(data, dict):
        return []
    found = [data] if {"path", "sha256", "bytes"} <= set(data) else []
    return found + entries_of(list(data.values()))
