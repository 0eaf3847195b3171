"""The figure: SSIM, LPIPS and typical error over speed, a row for every number of steps, a line for every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tools.experiments.figures import INK, RANDOM, headline, panels
from tools.headline.goals import CACHE_DIT, GOAL_SPEEDUP, GOAL_SSIM, SCHEDULE, best_points, curves, value

TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6)
KEYS: Final = {
    "ssim": "SSIM (more is better)",
    "lpips": "LPIPS (less is better)",
    "typical_error": "typical error (less is better)",
}
STYLES: Final[Mapping[str, tuple[str, str]]] = {
    "calibrated schedule": ("-*", "#0072b2"),
    "cache-dit": ("-o", "#e69f00"),
    "cache-dit and torchao FP8": ("-s", "#d55e00"),
    "reuse at fixed steps": ("-x", "#009e73"),
    "fewer steps": ("-^", "#cc79a7"),
    "uniform precision": ("D", INK),
    "torchao FP8": ("P", RANDOM),
}
"""Line and colour of every family, those in front last drawn first named."""


def family(group: str) -> str:
    """The family of a group of rows."""
    if group == SCHEDULE:
        return "calibrated schedule"
    if group.startswith(CACHE_DIT):
        return "cache-dit and torchao FP8" if "FP8" in group else "cache-dit"
    named = {"reuse": "reuse at fixed steps", "fewer": "fewer steps", "uniform": "uniform precision"}
    return named.get(group.partition(" ")[0], group)


def families(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of every family, in the order of `STYLES`; the baseline is in none."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STYLES}
    for group, members in curves(rows).items():
        found[family(group)] += members
    return {name: members for name, members in found.items() if members}


def draw(contents: Sequence[dict[str, Any]]) -> Figure:
    """SSIM, typical error and, where it was measured, LPIPS over the speed-up of a whole loop over compiled 16 bit.

    A line joins the best points of a family; its other points are pale.
    """
    keys = [key for key in KEYS if all(key in row for content in contents for row in content["rows"])]
    figure, axes = panels(len(contents), len(keys), width=3.4, height=2.9)
    for row, content in zip(axes, contents, strict=True):
        for panel, key in zip(row, keys, strict=True):
            _panel(panel, content["rows"], key)
        row[0].set_ylabel(f"{content['setting']['num_steps']} steps", fontsize=11, fontweight="bold")
    for panel, key in zip(axes[0], keys, strict=True):
        panel.set_title(KEYS[key], fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel("times as fast as compiled 16 bit")
    legends = [panel.get_legend_handles_labels() for row in axes for panel in row]
    handles = {name: line for lines, names in legends for line, name in zip(lines, names, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    setting = contents[0]["setting"]
    headline(
        figure,
        f"{setting['denoiser']}, {setting['parameters_m']:.0f} M parameters, {setting['picture']}, "
        f"{setting['prompts']} unseen prompts, {setting['batch']} pictures at once, {setting['machine']}",
    )
    return figure


def _panel(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    found = families(rows)
    for depth, (name, members) in enumerate(found.items()):
        style, colour = STYLES[name]
        order = len(found) - depth + 2
        if key == "typical_error":  # a log axis has no place for the reference, which is exact
            members = [row for row in members if value(row, key) > 0]
        if not members:
            continue
        points = [(row["speedup"], value(row, key)) for row in members]
        size = 10 if style.endswith("*") else 5
        axes.plot(*zip(*points, strict=True), style[-1], color=colour, markersize=0.6 * size, alpha=0.3, zorder=order)
        best = points if style[0] != "-" else best_points(members, key)
        axes.plot(
            *zip(*best, strict=True), style, color=colour, markersize=size, linewidth=1.3, label=name, zorder=order
        )
    if key == "ssim":
        axes.plot(GOAL_SPEEDUP, GOAL_SSIM, "+", color=INK, markersize=11, label="goal", zorder=20)
        low = [point[1] for members in found.values() for point in best_points(members)]
        axes.set_ylim(max(0.0, min([GOAL_SSIM, *low]) - 0.02), 1.003)
    elif key == "lpips":  # pale points may lie outside, as those of SSIM
        high = [point[1] for members in found.values() for point in best_points(members, key)]
        axes.set_ylim(-0.02 * max(high), 1.08 * max(high))
    else:
        axes.set_yscale("log")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.set_xlim(0.9, 1.08 * max(row["speedup"] for row in rows))
