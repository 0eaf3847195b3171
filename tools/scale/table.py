"""Results as Markdown: `python -m tools.scale.table result.json ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from tools.scale.__main__ import TOOL, VERSION

BYTES_16_BIT = 2


def table(result: dict[str, Any]) -> str:
    """A heading and a table of one result."""
    phases, setting = result["phases"], result["setting"]
    done = {name: phase for name, phase in phases.items() if phase.get("status") == "done"}
    rows: list[tuple[str, str]] = [*_make_rows(done), *_build_rows(done), *_bench_rows(done)]
    for name, phase in done.items():
        if name in ("calibrate", "run", "run-limited", "bench"):
            rows.append((f"{name}: seconds; host peak; device peak", _taken(phase)))
    rows += [
        (name, f"{phase['status']}: {phase.get('why', 'see the file')}")
        for name, phase in phases.items()
        if name not in done
    ]
    machine = result["machine"]
    where = machine.get("gpu") or "CPU"
    title = f"{setting['title']}, {setting['precisions']}, {setting['backend']}, text encoders {setting['text']}"
    libraries = machine["libraries"]
    lines = [f"{title}; {where}, torch {libraries['torch']}, diffusers {libraries['diffusers']}, {machine['date']}", ""]
    lines += ["| what | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    return "\n".join(lines)


def _make_rows(done: dict[str, Any]) -> list[tuple[str, str]]:
    if "make" not in done:
        return []
    sizes = done["make"]["weights_bytes"]
    return [("weights of the pipeline, GB", ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items()))]


def _build_rows(done: dict[str, Any]) -> list[tuple[str, str]]:
    if "build" not in done:
        return []
    build = done["build"]
    peaks = [attempt["peak_bytes"] for attempt in build["attempts"]]
    total, anonymous = (max(peak[kind] for peak in peaks) for kind in ("total", "anonymous"))
    weights = BYTES_16_BIT * build["parameters"]
    stored = sum(build["files"].values())
    stages: dict[str, float] = {}
    for attempt in build["attempts"]:
        for stage, seconds in attempt["stages_s"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    longest = sorted(stages.items(), key=lambda item: -item[1])[:8]
    engines = build["engines"].items()
    return [
        ("parameters of the denoiser", f"{build['parameters'] / 1e9:.3f} B"),
        ("build", f"{_taken(build)}, {len(peaks)} command(s)"),
        ("host peak over the 16-bit weights", f"{total / weights:.2f} (anonymous {anonymous / weights:.2f})"),
        ("host peak less 2 GiB, over the 16-bit weights", f"{(total - (2 << 30)) / weights:.2f}"),
        ("longest stages, s", ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in longest)),
        ("bundle, GB; engines apart would be", f"{stored / 1e9:.2f}; {build['separate_bytes'] / 1e9:.2f}"),
        ("SQNR, dB (floor)", ", ".join(f"{n} {e['sqnr_db']:.1f} ({e['sqnr_floor_db']:.0f})" for n, e in engines)),
    ]


def _bench_rows(done: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    steps = {}
    if "bench" in done:
        result = done["bench"]["result"]
        steps = {row["name"]: row["median_ms"] for row in result["rows"]}
        rows.append(("step, ms", ", ".join(f"{name} {value:.1f}" for name, value in steps.items())))
        for loop in result["loops"]:
            limit = "" if loop["resident_engines"] is None else f", {loop['resident_engines']} resident"
            what = f"loop over the sum of its steps, {loop['precisions']}, {loop['swaps']} swaps{limit}"
            rows.append((what, f"{1 + loop['over_sum_percent'] / 100:.4f} ({loop['swap_ms']:.2f} ms a swap)"))
    if "peer" in done:
        peer = done["peer"]["result"]["median_ms"]
        over = ", ".join(f"{name} {peer / value:.2f}" for name, value in steps.items())
        rows.append(("compiled 16-bit diffusers module, ms; times as fast are", f"{peer:.1f}; {over or '-'}"))
    return rows


def _taken(phase: dict[str, Any]) -> str:
    peaks = [attempt["peak_bytes"] for attempt in phase["attempts"]]
    device = [peak["device"] for peak in peaks if peak["device"] is not None]
    on_device = f"{max(device) / 1e9:.1f} GB" if device else "-"
    return f"{phase['seconds']:.0f} s; {max(peak['total'] for peak in peaks) / 1e9:.2f} GB; {on_device}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.scale.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    for path in parser.parse_args(arguments).files:
        result = read_json(path, "result file", TmpDiffError)
        if (result.get("tool"), result.get("version")) != (TOOL, VERSION):
            raise TmpDiffError(f"{path} is no result of tools.scale, version {VERSION}; measure again")
        print(f"{table(result)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("scale.table", main))
