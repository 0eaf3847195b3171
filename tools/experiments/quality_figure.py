"""The figure of `quality`: every metric against K, a column per precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.experiments.figures import INK, RANDOM, colour, headline, label, panels

OURS = "schedule"
RANDOM_NAME = "random"
RULE_STYLES = {"first K": ":>", "last K": ":<", "both ends": "--^", "evenly spread": "--v"}


def draw(content: dict[str, Any], findings: dict[str, Any]) -> Figure:
    """A column per precision; every metric against K, with the latency above where there is a speed-up."""
    setting, data = content["setting"], content["data"]
    shown = {"error": "E", "ssim": "1 - SSIM", "psnr_db": "PSNR, dB"}
    if all("lpips" in entry["means"][OURS] for found in findings.values() for entry in found["counts"].values()):
        shown["lpips"] = "LPIPS"
    figure, rows = panels(len(shown), len(findings), width=3.6, height=2.6)
    for column, (precision, found) in enumerate(findings.items()):
        for row, key in enumerate(shown):
            axes = rows[row][column]
            _lines(axes, found["counts"], key, colour(precision))
            if key != "psnr_db":
                axes.set_yscale("log")
            axes.set_xlabel(f"steps at {setting['reference']}, K")
        rows[0][column].set_title(label(precision, setting["backend"]))
        ratio = data["latencies_ms"][precision] / data["latencies_ms"][setting["reference"]]
        if found["faster"]:
            _latency_axis(rows[0][column], ratio, setting["num_steps"])
        else:
            rows[0][column].text(
                0.02, 0.03, "no speed-up on this machine", transform=rows[0][column].transAxes, fontsize=8
            )
    for row, words in enumerate(shown.values()):
        rows[row][0].set_ylabel(words)
    figure.legend(
        *rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=max(2, 3 * len(findings) - 1)
    )
    headline(
        figure,
        f"{setting['denoiser']}, T = {setting['num_steps']}, {len(setting['validation_prompts'])} unseen samples; band: "
        "95 % confidence of the schedule's E, bars: spread of random schedules",
    )
    return figure


def _lines(axes: Axes, counts: dict[str, Any], key: str, shade: str) -> None:
    steps = [int(count) for count in counts]
    entries = [entry["means"] for entry in counts.values()]
    uniform = {name for means in entries for name in means if name.startswith("uniform")}
    for name in [name for name in entries[0] if name not in uniform]:
        values = np.array([_plotted(means[name], key) for means in entries])
        if name == RANDOM_NAME:
            spread = [means[name]["error_spread"] or 0.0 for means in entries] if key == "error" else None
            axes.errorbar(steps, values, spread, fmt="-s", color=RANDOM, markersize=4, linewidth=1, label=name)
        elif name in RULE_STYLES:
            axes.plot(steps, values, RULE_STYLES[name], color=INK, markersize=4, linewidth=0.9, label=name)
        else:
            ours = name == OURS
            look, size = ("-*", 10) if ours else ("-.o", 5)
            axes.plot(
                steps, values, look, color=shade, markersize=size, linewidth=1.8, label=name, zorder=4 if ours else 3
            )
            if ours and key == "error":
                low, high = ([means[name]["error"][bound] for means in entries] for bound in ("low", "high"))
                axes.fill_between(steps, low, high, color=shade, alpha=0.15, linewidth=0)
    for name in sorted(uniform):
        level = next(_plotted(means[name], key) for means in entries if name in means)
        if level:  # the reference is exact, and has no PSNR
            axes.axhline(level, color=RANDOM, linewidth=0.8, linestyle=":")
            axes.text(steps[-1], level, name, fontsize=7, ha="right", va="bottom", color=RANDOM)


def _plotted(means: dict[str, Any], key: str) -> Any:
    if key == "error":
        return means["error"]["value"]
    return 1 - means["ssim"] if key == "ssim" else means[key]


def _latency_axis(axes: Axes, ratio: float, num_steps: int) -> None:
    """Latency relative to the reference, above the axes; `ratio` is the low precision's, below 1."""

    def latency(count: Any) -> Any:
        return ratio + (1 - ratio) * count / num_steps

    def count(relative: Any) -> Any:
        return (relative - ratio) / (1 - ratio) * num_steps

    above = axes.secondary_xaxis("top", functions=(latency, count))
    above.set_xlabel("relative latency", fontsize=8)
    above.tick_params(labelsize=7)
