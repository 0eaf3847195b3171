"""A result file as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engines.documents import read_json
from engines.errors import TmpDiffError
from tools.parity.cells import COMBINED, DEFAULT
from tools.parity.compare import GREY_LEVELS, TOLERANCE

TOOL, VERSION = "parity", 1
COLUMNS = {
    "size": ("size",),
    "text length": ("text_length",),
    "scheduler, steps": ("scheduler", "steps"),
    "odd prompt": ("prompt",),
    "negative prompt": ("negative",),
    "guidance, rescale, clip skip": ("guidance_scale", "guidance_rescale", "clip_skip"),
    "two pictures": ("batch",),
    "attached": ("attached",),
    "all at random": (COMBINED,),
}
"""By the heading of a column: the axes that differ from the default in its cells."""


def table(path: Path) -> str:
    """The largest differences of every family, and what was tried.

    Raises:
        TmpDiffError: the file is no result of this tool.
    """
    result = read_json(path, "result file", TmpDiffError)
    if (result.get("tool"), result.get("version")) != (TOOL, VERSION):
        raise TmpDiffError(f"{path} is no result of tools.parity, version {VERSION}; measure again")
    families = result["families"].values()
    headings = ["", *COLUMNS, "picture, grey levels", "another prompt"]
    tried = ["", "cells", "sizes", "text lengths", "schedulers"]
    return "\n".join(
        [*_lines(headings, map(_differences, families)), "", *_lines(tried, (_tried(family) for family in families))]
    )


def _lines(headings: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]


def _differences(family: dict[str, Any]) -> list[str]:
    rows = family["cells"]
    columns = []
    for axes in COLUMNS.values():
        found = [row["latents"] for row in rows if row["axis"] in axes]
        columns.append(_marked(f"{max(found):.0e}", max(found) <= TOLERANCE) if found else "-")
    grey = max(row["grey_levels"] for row in rows if "grey_levels" in row)
    return [family["title"], *columns, _marked(str(grey), grey <= GREY_LEVELS), f"{family['another_prompt']:.0e}"]


def _tried(family: dict[str, Any]) -> list[str]:
    rows = family["cells"]
    words = [family["title"], str(len(rows))]
    for axis in ("size", "text_length", "scheduler"):
        values = dict.fromkeys(str(row["cell"][axis]) for row in rows if row["axis"] in (DEFAULT, axis))
        words.append("; ".join(value for value in values if value != "None") or "fixed")
    return words


def _marked(text: str, good: bool) -> str:
    return text if good else f"**{text}**"
