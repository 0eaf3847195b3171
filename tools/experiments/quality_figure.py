"""The figure of `quality`: a column per precision, everything against K."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.experiments.figures import INK, RANDOM, colour, headline, label, panels
from tools.experiments.quality_analysis import PICTURES

RULE_STYLES = {"first K": ":>", "last K": ":<", "both ends": "--^", "evenly spread": "--v"}
OTHER_STYLES = {"random": "-s", "uniform, mixed": "-.D"}


def draw(content: dict[str, Any], findings: dict[str, Any]) -> Figure:
    """Typical error, its ratio to the best rule's, departures, and distances of pictures."""
    setting = content["setting"]
    found = {name: entry for name, entry in findings["precisions"].items() if entry["cells"]}
    first = next(iter(next(iter(found.values()))["cells"].values())) if found else {"pictures": {}}
    pictures = [key for key in PICTURES if key in first["pictures"]]
    figure, rows = panels(3 + len(pictures), max(1, len(found)), width=3.6, height=2.4)
    for column, (precision, entry) in enumerate(found.items()):
        shade, cells = colour(precision), entry["cells"]
        axes = [row[column] for row in rows]
        axes[0].set_title(label(precision, setting))
        _lines(axes[0], cells, [{n: t["value"] for n, t in cell["typical"].items()} for cell in cells.values()], shade)
        bounds = np.array([[cell["typical"]["schedule"][key] for key in ("low", "high")] for cell in cells.values()]).T
        axes[0].fill_between([int(count) for count in cells], *bounds, color=shade, alpha=0.15, linewidth=0)
        _ratios(axes[1], cells, shade)
        _departures(axes[2], cells, shade)
        for k, key in enumerate(pictures, start=3):
            _lines(axes[k], cells, [cell["pictures"][key] for cell in cells.values()], shade)
        for each in axes:
            each.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[-1].set_xlabel(f"steps at {setting['reference']}, K")
    names = ["typical error", "typical error\nover the best rule's", "departures", *(PICTURES[key] for key in pictures)]
    for row, words in zip(rows, names, strict=True):
        row[0].set_ylabel(words)
    if found:
        figure.legend(
            *rows[0][0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2 if len(found) == 1 else min(7, 3 * len(found)),
        )
    headline(
        figure,
        f"{setting['denoiser']}, T = {setting['num_steps']}, {len(setting['validation_prompts'])} unseen samples; 95 % "
        "confidence; the best rule is the one that was best on calibration prompts",
    )
    return figure


def _lines(axes: Axes, cells: dict[str, Any], values: list[dict[str, float]], shade: str) -> None:
    steps = [int(count) for count in cells]
    for name, style in (RULE_STYLES | OTHER_STYLES).items():
        shown = RANDOM if name in OTHER_STYLES else INK
        axes.plot(steps, [row[name] for row in values], style, color=shown, markersize=4, linewidth=0.9, label=name)
    axes.plot(
        steps,
        [row["schedule"] for row in values],
        "-*",
        color=shade,
        markersize=10,
        linewidth=1.8,
        label="schedule",
        zorder=4,
    )
    axes.set_yscale("log")


def _ratios(axes: Axes, cells: dict[str, Any], shade: str) -> None:
    shown = {int(count): cell["ratios"]["best rule"] for count, cell in cells.items() if cell["ratios"]["best rule"]}
    values = np.array([[found[key] for key in ("value", "low", "high")] for found in shown.values()]).reshape(-1, 3)
    spread = np.abs(values[:, 1:] - values[:, :1]).T
    axes.errorbar(list(shown), values[:, 0], spread, fmt="*", color=shade, markersize=10, capsize=3)
    axes.axhline(1, color=INK, linewidth=0.8, alpha=0.6)
    axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))


def _departures(axes: Axes, cells: dict[str, Any], shade: str) -> None:
    steps = [int(count) for count in cells]
    best = [cell["departures"]["best rule"] for cell in cells.values()]
    axes.plot(steps, best, "o", color=INK, markersize=8, fillstyle="none", label="best rule")
    axes.plot(steps, [cell["departures"]["schedule"] for cell in cells.values()], "*", color=shade, markersize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(-0.4, 1.5 * max(2, axes.get_ylim()[1]))  # room for the legend
    axes.legend(loc="upper right", fontsize=8)
