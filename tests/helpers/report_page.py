"""Pages that `tmpdiff-export report` writes, taken apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from xml.etree import ElementTree

from helpers import made_up

from calibration.document import Sensitivity
from tmpdiff_export.report.page import page
from tmpdiff_export.report.pictures import Row

SECTIONS = (
    "what", "schedule", "precisions", "scores", "gram", "fit", "guard", "pareto", "validation", "cost", "pictures",
)  # fmt: skip
HOSTILE = '<img src=x onerror="alert(1)"> </title></style><script>alert(2)</script> & $x^2$'


def page_of(found: Sensitivity, rows: Sequence[Row] = ()) -> str:
    """The page of a made-up calibration."""
    manifest = made_up.manifest(found)
    return page(manifest, manifest.settings[0], found, rows)


def with_reuse(found: Sensitivity) -> Sensitivity:
    """A calibration whose schedule, also among the guard's candidates and on validation prompts, reuses steps at every order."""
    reused = {5: "reuse0", 8: "reuse1", 9: "reuse2", 13: "reuse1"}
    choices = tuple(reused.get(k % 20, name) for k, name in enumerate(found.schedule))
    assert found.guard is not None
    first, *others = found.guard.candidates
    guard = found.guard.model_copy(update={"candidates": (first.model_copy(update={"precisions": choices}), *others)})
    rows = tuple(
        row.model_copy(update={"schedules": (choices,), "counts": dict(Counter(choices))})
        if row is found.chosen
        else row
        for row in found.validation
    )
    return found.model_copy(update={"schedule": choices, "guard": guard, "validation": rows})


class Parsed(HTMLParser):
    """Elements of a page, and its text by section (the header under "")."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.text: dict[str, str] = {"": ""}
        self.tables: dict[str, list[list[str]]] = {}
        self._section = ""
        self._table: list[list[str]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag == "section":
            self._section = values["id"]
            self.text[self._section] = ""
        self.elements.append((tag, values, self._section))
        if values.get("role") == "region":
            self._table = self.tables.setdefault(values["aria-label"], [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table:
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        self.text[self._section] += data
        if self._table and self._table[-1]:
            self._table[-1][-1] += data

    def named(self, tag: str, section: str | None = None) -> list[dict[str, str]]:
        return [a for name, a, where in self.elements if name == tag and section in (None, where)]


def figures(text: str) -> dict[str, ElementTree.Element]:
    """The SVG elements of a page by the prefix of their ids."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]
    return {str(svg.find("g").get("id")).removesuffix("-figure_1"): svg for svg in found}  # type: ignore[union-attr]


def marks(svg: ElementTree.Element, name: str) -> list[tuple[float, float, str]]:
    """(x, y, style) of the markers of the curves, those of the legend and the ticks left out."""
    axes = next(group for group in svg.iter("g") if group.get("id") == f"{name}-axes_1")
    lines = [group for group in axes if str(group.get("id")).startswith(f"{name}-line2d")]
    return [
        (float(use.get("x", "nan")), float(use.get("y", "nan")), use.get("style", ""))
        for line in lines
        for use in line.iter("use")
    ]
