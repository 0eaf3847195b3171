"""Figures as inline SVG, coloured by the page's CSS variables so that light and dark both work."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.optimize import isotonic_regression

# Light and dark shade per precision: Okabe and Ito's colour-blind safe set, lightened for dark pages.
SHADES = (
    ("#0072b2", "#56b4e9"),
    ("#009e73", "#2fc79a"),
    ("#d98e00", "#f0b429"),
    ("#c04a00", "#ff8a50"),
    ("#aa4499", "#e08fc9"),
    ("#7a6a00", "#d8ca4a"),
)
PLACES = {"fp16": 0, "fp8": 1, "int8": 2, "int4": 3}
"""A precision has the same colour in every report; names not listed take the places left over."""

# Colours that stand for a CSS variable until the SVG is finished.
INK, GRID, PAPER, MUTED = "#010203", "#010204", "#010205", "#010206"
LABEL_UNITS = 15.0  # from line to line of a column of labels, some browsers' fonts being higher than matplotlib's
WIDTH, HEIGHT = 5.4, 3.9  # inches: at 72 units each, text of 11 units is near its nominal size on a phone
STYLE = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "image.composite_image": False,
    "font.size": 11,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "tmpdiff",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def places(precisions: Sequence[str]) -> dict[str, int]:
    """The index into `SHADES` (and into the CSS variables --p0, --p1, ...) of each precision."""
    free = [place for place in range(len(SHADES)) if place not in PLACES.values()]
    others = [name for name in precisions if name not in PLACES]
    return {
        name: PLACES[name] if name in PLACES else free[others.index(name) % len(free)]
        for name in dict.fromkeys(precisions)
    }


@contextmanager
def svg_figure(name: str, height: float = HEIGHT, width: float = WIDTH) -> Iterator[tuple[Figure, Axes, list[str]]]:
    """A figure to draw into; its SVG is appended to the list when the block ends. `name` goes before its ids."""
    svg: list[str] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot(), svg
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg.append(_inline(buffer.getvalue(), name))


def _inline(text: str, name: str) -> str:
    """matplotlib's file as an element of a page: no namespaces, fonts or sizes, ids of its own, CSS colours."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # its rule would apply to the whole page
    box = re.search(r'viewBox="[^"]*"', text)
    if box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    text = f'<svg {box[0]} aria-hidden="true">' + text[text.index(">") + 1 :]
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    text = text.replace('xlink:href="data:', 'href="data:')
    colours = {INK: "var(--ink)", GRID: "var(--line)", PAPER: "var(--paper)", MUTED: "var(--muted)"}
    colours |= {light: f"var(--p{index})" for index, (light, _) in enumerate(SHADES)}
    for colour, variable in colours.items():
        text = text.replace(colour, variable)
    return text


def floor_of(values: Sequence[float]) -> float:
    """Lower edge of a logarithmic axis over the positive values, 0 where there are none."""
    positive = [value for value in values if value > 0]
    return min(positive) / 2 if positive else 0.0


def error_tick(value: float, _: int) -> str:
    """An error on an axis, "1e-3" or "2.5e-4"."""
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+00", "") if value else "0"


def log_axis(axes: Axes, floor: float, which: str = "y") -> None:
    """A logarithmic axis from `floor` on, labelled in the form 1e-3."""
    axis: Axis = axes.yaxis if which == "y" else axes.xaxis
    if which == "y":
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
        top = axes.get_ylim()[1]
    else:
        axes.set_xscale("log")
        axes.set_xlim(left=floor)
        top = axes.get_xlim()[1]
    decades = math.log10(top / floor)
    most = 8 if which == "y" else 5
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=most))
    axis.set_major_formatter(FuncFormatter(error_tick))
    axis.set_minor_formatter(NullFormatter())


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places on a line for labels, as near to those wanted as a distance of `gap` lets them be.

    Args:
        wanted: any order.
        gap: least distance of two places.
        low: of the lowest place.
        high: of the highest place; where they do not fit in between, they go beyond it.

    Returns:
        A place per label, in the order of `wanted`; with the least sum of squares of moves.
    """
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    # Without the gaps the places only have to rise.
    rising = isotonic_regression(np.array(wanted, dtype=float)[order] - steps).x if len(wanted) else steps
    placed = np.maximum(np.minimum(rising, high - steps[-1:]), low) + steps
    found = np.empty(len(wanted))
    found[order] = placed
    return found.tolist()


def label_beside(figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Names marks in a column to the right of the axes, each with a line to its mark, none on another.

    Args:
        figure: that of the axes, with everything else drawn and the limits of the axes set.
        axes: where the marks are.
        labels: (x, y, text), x and y as the marks have them.
    """
    drawn = [
        axes.annotate(
            text,
            (x, y),
            (1.06, 0.5),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4},
        )
        for x, y, text in labels
    ]
    figure.draw_without_rendering()  # lays out; the axes have their final size from here on
    box, line = axes.get_window_extent(), LABEL_UNITS * figure.dpi / 72
    heights = [(axes.transData.transform((x, y))[1] - box.y0) / box.height for x, y, _ in labels]
    for label, height in zip(drawn, spread(heights, line / box.height, 0.0, 1.0), strict=True):
        label.set_position((1.06, height))
