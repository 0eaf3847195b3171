"""The figures of the report as inline SVG, coloured by the page's CSS variables so that light and dark both work."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.stats import rankdata

from calibration import Sensitivity
from calibration.document import ValidationRow
from calibration.scores.bisection import adaptive_bisection

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
MARKERS = "osD^vP"
BASELINE_MARKERS = "v^<>Pd"
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


def score_curves(found: Sensitivity, direction: str) -> str:
    """Scores over step indices, a curve per precision; filled where measured, hollow where interpolated.

    The axis is logarithmic; scores of 0 or less lie on its lower edge, as crosses. Dotted: risks, where they are large
    enough to show.
    """
    records = [record for record in found.scores if record.direction == direction]
    place = places(found.precisions)
    floor = floor_of([score for record in records for score in record.scores])
    risky = False
    with svg_figure(f"scores-{direction}") as (figure, axes, svg):
        for record in records:
            colour, marker = SHADES[place[record.precision]][0], MARKERS[place[record.precision]]
            steps = np.arange(len(record.scores))
            scores = np.array(record.scores)
            heights = np.maximum(scores, floor) if floor else scores
            axes.plot(steps, heights, color=colour, linewidth=1.4)
            below, measured = (scores <= 0) & (floor > 0), np.array(record.measured)
            for chosen, face in ((measured & ~below, colour), (~measured & ~below, PAPER)):
                axes.plot(
                    steps[chosen], heights[chosen], marker, color=colour, markerfacecolor=face, markersize=6, zorder=3
                )
            if below.any():
                axes.plot(steps[below], heights[below], "x", color=colour, markersize=7, zorder=3, clip_on=False)
            risk = np.array(record.risk)
            if (risk > floor).any():
                axes.plot(steps, np.where(risk > floor, risk, np.nan), ":", color=colour, linewidth=1.6)
                risky = True
        if floor:
            log_axis(axes, floor)
        axes.set_xlabel("step index")
        axes.set_ylabel("score (change of E)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        handles = [
            Line2D([], [], color=SHADES[place[r.precision]][0], marker=MARKERS[place[r.precision]], label=r.precision)
            for r in records
        ]
        handles += [
            Line2D([], [], color=INK, marker="o", linestyle="none", label="measured"),
            Line2D([], [], color=INK, marker="o", linestyle="none", markerfacecolor=PAPER, label="interpolated"),
        ]
        if risky:
            handles.append(Line2D([], [], color=INK, linestyle=":", label="risk of another picture"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return svg[0]


def fit_scatter(found: Sensitivity) -> str:
    """Predicted against measured E of the random schedules, by the predictor in use; needs a fit point."""
    predicted = np.array([point.predicted[found.predictor] for point in found.fit_points])
    measured = np.array([point.measured for point in found.fit_points])
    with svg_figure("fit") as (figure, axes, svg):
        top = 1.08 * max(predicted.max(), measured.max()) or 1.0
        axes.plot([0, top], [0, top], "--", color=INK, linewidth=1, label="predicted = measured")
        if len(set(predicted)) > 2:
            slope, intercept = np.polyfit(predicted, measured, 1)
            ends = np.array([predicted.min(), predicted.max()])
            axes.plot(ends, slope * ends + intercept, color=INK, linewidth=1.6, label="regression line")
        axes.plot(predicted, measured, "o", color=INK, markersize=7, label="random schedule")
        axes.set(xlim=(0, top), ylim=(0, top), xlabel="predicted E", ylabel="measured E")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4))
            axis.set_major_formatter(FuncFormatter(_tick))
        figure.legend(loc="outside lower center", ncols=2)
    return svg[0]


def trade_off(found: Sensitivity) -> str:
    """E against latency: the predicted Pareto front, and every validation row where it was measured.

    Rows with E = 0, as the reference, lie on the lower edge of the logarithmic axis.
    """
    place = places(found.precisions)
    errors = [point.error for point in found.pareto] + [row.error for row in found.validation]
    floor = floor_of([*errors, found.predicted_error])
    with svg_figure("pareto", height=5.2) as (figure, axes, svg):

        def height(error: float) -> float:
            return max(error, floor) if floor else error

        front = [(point.latency, height(point.error)) for point in found.pareto]
        axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.8, label="front, predicted")
        others = iter(BASELINE_MARKERS * (1 + len(found.validation)))
        for row in found.validation[::-1]:  # the schedule last, on top
            style = _row_style(row, place, others)
            axes.plot(row.latency, height(row.error), linestyle="none", label=row.name, **style)
            if row.error_spread is not None:
                axes.errorbar(row.latency, height(row.error), row.error_spread, color=INK, linewidth=1, capsize=3)
        axes.plot(
            found.predicted_latency,
            height(found.predicted_error),
            marker="*",
            markersize=15,
            linestyle="none",
            color=INK,
            markerfacecolor=PAPER,
            label="schedule, predicted",
        )
        if floor:
            log_axis(axes, floor)
        axes.set_xlabel(f"mean step latency / {found.precisions[0]}")
        axes.set_ylabel("E")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
    return svg[0]


def error_rows(found: Sensitivity) -> str:
    """Measured E of every validation row, smallest on top; one of 0 lies on the left edge."""
    place = places(found.precisions)
    rows = sorted(found.validation, key=lambda row: -row.error)
    floor = floor_of([row.error for row in rows])
    with svg_figure("rows", height=1.2 + 0.33 * len(rows)) as (_, axes, svg):
        for index, row in enumerate(rows):
            style = _row_style(row, place, iter("o"))
            if row.name in found.loses_to and "markerfacecolor" in style:
                style["markerfacecolor"] = INK
            axes.plot(max(row.error, floor), index, linestyle="none", **style | {"clip_on": False})
            if row.error_spread is not None:
                axes.errorbar(row.error, index, xerr=row.error_spread, color=INK, linewidth=1, capsize=3)
        axes.axvline(max(found.validation[0].error, floor), color=INK, linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.grid(axis="x")
        axes.set_xlabel("measured E")
        if floor:
            log_axis(axes, floor, "x")
    return svg[0]


def rank_deviation(found: Sensitivity) -> str:
    """Mean rank deviation of a replayed bisection over its evaluations; needs curves measured at every step."""
    place = places(found.precisions)
    with svg_figure("ranks") as (figure, axes, svg):
        for record in found.scores:
            replays = [
                adaptive_bisection(record.scores.__getitem__, found.num_steps, max_evaluations=count)
                for count in range(min(3, found.num_steps), found.num_steps + 1)
            ]
            points = {len(replay.order): _deviation(record.scores, replay.scores) for replay in replays}
            axes.plot(
                *zip(*sorted(points.items()), strict=True),
                "-" if record.direction == "downcast" else "--",
                marker=MARKERS[place[record.precision]],
                color=SHADES[place[record.precision]][0],
                label=f"{record.direction} {record.precision}",
            )
        axes.set(xlabel="steps measured", ylabel="mean rank deviation")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.legend(loc="outside lower center", ncols=2)
    return svg[0]


def _deviation(truth: Sequence[float], found: np.ndarray) -> float:
    ranks = [rankdata(np.maximum(scores, 0)) for scores in (np.array(truth), found)]  # below 0 counts as 0, as in use
    return float(np.abs(ranks[0] - ranks[1]).mean())


def _row_style(row: ValidationRow, place: dict[str, int], others: Iterator[str]) -> dict[str, Any]:
    if row.name == "schedule":
        return {"marker": "*", "color": INK, "markersize": 16, "zorder": 5}
    if row.name.startswith("uniform ") and len(row.counts) == 1:
        (precision,) = row.counts
        index = place.get(precision, 0)
        return {"marker": MARKERS[index], "color": SHADES[index][0], "markersize": 9, "zorder": 4, "clip_on": False}
    return {"marker": next(others), "color": INK, "markerfacecolor": PAPER, "markersize": 8, "zorder": 3}


@contextmanager
def svg_figure(name: str, height: float = HEIGHT) -> Iterator[tuple[Figure, Axes, list[str]]]:
    """A figure to draw into; its SVG is appended to the list when the block ends. `name` goes before its ids."""
    svg: list[str] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
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
    colours = {INK: "var(--ink)", GRID: "var(--line)", PAPER: "var(--paper)", MUTED: "var(--muted)"}
    colours |= {light: f"var(--p{index})" for index, (light, _) in enumerate(SHADES)}
    for colour, variable in colours.items():
        text = text.replace(colour, variable)
    return text


def floor_of(values: Sequence[float]) -> float:
    """Lower edge of a logarithmic axis over the positive values, 0 where there are none."""
    positive = [value for value in values if value > 0]
    return min(positive) / 2 if positive else 0.0


def _tick(value: float, _: int) -> str:
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
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(NullFormatter())
