"""Schedules as marks in the figures of the report: what each is called and looks like, and how far it may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from calibration.document import Sensitivity
from calibration.records import IntervalRecord
from tmpdiff_export.report.svg import INK, PAPER, SHADES, floor_of, log_axis, places, svg_figure

MARKERS = "osD^vP"
LONGEST = 26
"""Characters of a name in a figure; the tables have it whole."""

BEST_RULE = "best rule: "


@dataclass(frozen=True)
class Mark:
    """A schedule that was run.

    Attributes:
        name: as it is written beside the mark.
        latency: relative to the reference's.
        typical: typical error.
        kind: "chosen", "best rule" or "other", or the precision of a uniform schedule.
    """

    name: str
    latency: float
    typical: IntervalRecord
    kind: str


def validated(found: Sensitivity) -> tuple[Mark, ...]:
    """The validation rows, in order, the best rule once; without any, uniform schedules on calibration samples."""
    if not found.validation:
        reference = found.latencies_ms[found.precisions[0]]
        return tuple(
            Mark(f"uniform {name}", found.latencies_ms[name] / reference, found.uniform[name], name)
            for name in found.precisions
            if name in found.uniform
        )
    best = found.best_rule.name.removeprefix(BEST_RULE) if found.best_rule else None
    marks = []
    for row in found.validation:
        kind = "other"
        if row is found.chosen:
            kind = "chosen"
        elif row.name.startswith(BEST_RULE):
            kind = "best rule"
        elif row.name == best:
            continue
        elif len(row.schedules) == len(row.counts) == 1 and row.name.startswith("uniform "):
            (kind,) = row.counts
        marks.append(Mark(shortened(row.name.removeprefix(BEST_RULE)), row.latency, row.typical, kind))
    return tuple(marks)


def tried(found: Sensitivity) -> tuple[Mark, ...]:
    """The candidates of the guard, in order; the winner first."""
    if found.guard is None:
        return ()
    marks = []
    for index, trial in enumerate(found.guard.candidates):
        kind = (
            "chosen" if index == 0 else "best rule" if trial.rule and trial.rule == found.guard.best_rule else "other"
        )
        marks.append(Mark(shortened(trial.names[0]), trial.latency, trial.typical, kind))
    return tuple(marks)


def shortened(name: str) -> str:
    """A name that leaves room for the figure: a rule that mixes precisions without its pool."""
    if len(name) <= LONGEST:
        return name
    rule, pool, _ = name.partition(" (")
    return f"{rule} (mixed)" if pool and len(rule) <= LONGEST - 8 else name[: LONGEST - 3] + "..."


def style(mark: Mark, place: dict[str, int]) -> dict[str, Any]:
    """What a mark looks like; `place` is of `svg.places`."""
    if mark.kind == "chosen":
        return {"marker": "*", "color": INK, "markersize": 15, "zorder": 6}
    if mark.kind == "best rule":
        return {"marker": "D", "color": INK, "markersize": 8, "zorder": 5}
    if mark.kind in place:
        index = place[mark.kind]
        return {"marker": MARKERS[index], "color": SHADES[index][0], "markersize": 9, "zorder": 4}
    return {"marker": "o", "color": INK, "markerfacecolor": PAPER, "markersize": 7, "zorder": 3}


def legend(marks: Sequence[Mark], chosen: str, place: dict[str, int]) -> list[Line2D]:
    """A line of the legend for each kind of mark that is there, uniform schedules excepted: those are named."""
    words = {"chosen": chosen, "best rule": "best rule", "other": "another schedule"}
    first = {mark.kind: mark for mark in reversed(marks) if mark.kind in words}
    return [
        Line2D([], [], linestyle="none", label=words[kind], **style(first[kind], place))
        for kind in words
        if kind in first
    ]


def whisker(axes: Axes, mark: Mark, at: float, floor: float, which: str) -> None:
    """The 95 % interval of a mark along an axis, at `at` on the other one."""
    value = max(mark.typical.value, floor)
    low, high = max(mark.typical.low, floor), max(mark.typical.high, floor)
    if low < high:
        size: Any = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
        place = (value, at) if which == "x" else (at, value)
        axes.errorbar(*place, **{f"{which}err": size}, color=INK, linewidth=1, capsize=3, zorder=2)


def error_rows(found: Sensitivity, marks: Sequence[Mark], name: str, chosen: str) -> str:
    """Typical error of every mark with its interval, smallest on top; one of 0 lies on the left edge.

    Args:
        found: the calibration.
        marks: at least one.
        name: of the figure, for its ids.
        chosen: what the legend calls the chosen one.
    """
    place = places(found.precisions)
    rows = sorted(marks, key=lambda mark: -mark.typical.value)
    floor = floor_of([error for mark in rows for error in (mark.typical.value, mark.typical.low)])
    with svg_figure(name, height=1.7 + 0.27 * len(rows)) as (figure, axes, svg):
        for index, mark in enumerate(rows):
            axes.plot(max(mark.typical.value, floor), index, linestyle="none", clip_on=False, **style(mark, place))
            whisker(axes, mark, index, floor, "x")
        for mark in rows:
            if mark.kind == "chosen":
                axes.axvline(max(mark.typical.value, floor), color=INK, linestyle=":", linewidth=1, zorder=1)
        axes.set_yticks(range(len(rows)), [mark.name for mark in rows])
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.grid(axis="x")
        axes.set_xlabel("typical error")
        if floor:
            log_axis(axes, floor, "x")
        if handles := legend(marks, chosen, place):
            figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return svg[0]
