"""Style of the figures: white ground, so that they read on light and dark pages, and colour-blind safe colours."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engines.files import atomic_write_bytes
from tmpdiff_export.report.marks import MARKERS
from tmpdiff_export.report.svg import SHADES, places

INK, GRID = "#1a1a1a", "#dddddd"
RANDOM = "#8a8a8a"
STYLE = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "figure.facecolor": "white",
    "figure.titlesize": 10,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "savefig.facecolor": "white",
}
DPI = 130
LETTERS_PER_INCH = 12
"""Of a title, in the style's size."""
NVFP4, RANK = "nvfp4", "rank"
"""The precision, and what the recipes of those of its engines begin with that have 16-bit branches."""
SIMULATED = ("onnxruntime", "torch")
"""The backends that have no kernels for NVFP4 and compute what they would give."""


def panels(rows: int, columns: int, *, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure of `rows` by `columns` axes."""
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draws a figure in the style of all and writes it as PNG."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        draw().savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue())


def headline(figure: Figure, words: str) -> None:
    """A title over all axes, in as many lines as the width of the figure needs."""
    letters = int(LETTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.wrap(words, letters)))


def label(precision: str, setting: Mapping[str, Any]) -> str:
    """A precision as figures and tables name it; what has no kernels on the backend is named as simulated.

    Args:
        precision: its name.
        setting: of a result file; older ones have no "recipes".
    """
    if precision != NVFP4:
        return precision
    recipe = str(setting.get("recipes", {}).get(precision, ""))
    form = f"W4A4R{recipe.removeprefix(RANK)}" if recipe.startswith(RANK) else "W4A4"
    return f"{precision} ({form}, simulated)" if setting["backend"] in SIMULATED else f"{precision} ({form})"


def colour(precision: str) -> str:
    """The same in every figure and in the report."""
    return SHADES[places([precision])[precision]][0]


def marker(precision: str) -> str:
    """The same in every figure and in the report."""
    return MARKERS[places([precision])[precision] % len(MARKERS)]
