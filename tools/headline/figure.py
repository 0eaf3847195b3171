"""The figure: quality over speed, a panel for every number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tools.experiments.figures import INK, RANDOM, headline, panels
from tools.headline.goals import CACHE_DIT, GOAL_SPEEDUP, GOAL_SSIM, SCHEDULE, curves, frontier

OWN, CACHED = "#0072b2", ("#d55e00", "#e69f00", "#cc79a7", "#8c510a", "#a6761d")
TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5)


def draw(contents: Sequence[dict[str, Any]]) -> Figure:
    """Mean SSIM and, where it was measured, LPIPS against the speed-up of a whole loop over compiled 16 bit."""
    keys = [key for key in ("ssim", "lpips") if all(key in content["rows"][0] for content in contents)]
    figure, axes = panels(len(keys), len(contents), width=5.2, height=3.8)
    for column, content in enumerate(contents):
        for row, key in zip(axes, keys, strict=True):
            _panel(row[column], content, key)
        axes[0][column].set_title(f"T = {content['setting']['num_steps']}")
        axes[-1][column].set_xlabel("speed-up of the whole loop over compiled 16 bit")
    for row, key in zip(axes, keys, strict=True):
        row[0].set_ylabel({"ssim": "SSIM to the 16-bit run", "lpips": "LPIPS to the 16-bit run"}[key])
    legends = [each.get_legend_handles_labels() for row in axes for each in row]
    handles = {name: line for lines, names in legends for line, name in zip(lines, names, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    setting = contents[0]["setting"]
    headline(
        figure,
        f"{setting['denoiser']}, {setting['parameters_m']:.0f} M parameters, {setting['picture']}, "
        f"{setting['prompts']} unseen prompts, {setting['batch']} pictures at once, {setting['machine']}",
    )
    return figure


def _panel(axes: Axes, content: dict[str, Any], key: str) -> None:
    shades = iter(CACHED * 3)
    for name, rows in curves(content["rows"]).items():
        points = sorted((row["speedup"], row[key]["mean"]) for row in rows)
        if name == SCHEDULE:
            axes.plot(*zip(*points, strict=True), "-*", color=OWN, markersize=11, label="calibrated schedule", zorder=5)
        elif name.startswith(CACHE_DIT):
            style = "--s" if "FP8" in name else "-o"
            axes.plot(*zip(*points, strict=True), style, color=next(shades), markersize=4, linewidth=1, label=name)
        else:
            style = {"uniform": "D", "16-bit": "P"}.get(name, ":^" if name.startswith("fewer") else ":x")
            shade = INK if name == "uniform" else RANDOM
            axes.plot(*zip(*points, strict=True), style, color=shade, markersize=5, linewidth=0.9, label=name)
    if key == "ssim":
        axes.plot(GOAL_SPEEDUP, GOAL_SSIM, "x", color=INK, markersize=9, label="goal")
        best = [point for point in frontier(content["rows"]) if point[0] > 0]
        axes.set_ylim(max(0.0, min(point[1] for point in best) - 0.05), 1.005)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(0.9, 1.1 * max(row["speedup"] for row in content["rows"]))
