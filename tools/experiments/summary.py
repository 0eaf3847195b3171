"""The goals of the calibrator over result files of `prediction` and `quality`, by family.

    python -m tools.experiments.summary docs/results/experiments/*.json --out summary.json

Files of one denoiser and number of steps are one family. Prints a table, goal by family, and writes the same as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from engines.files import atomic_write_text
from tmpdiff_export.display import number, print_table
from tools.experiments import goals
from tools.experiments.command import compact_json, round_numbers
from tools.experiments.quality_analysis import over_all

PROGRAM = "summary"
ALL = "all"
VERSIONS = {"prediction": 1, "quality": 4}


def summarize(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By family and over all, what `quality_analysis.over_all` says of the cells, and R^2 by precision."""
    cells: dict[str, list[dict[str, Any]]] = {}
    r2: dict[str, dict[str, float]] = {}
    for content in contents:
        setting, findings = content["setting"], content["findings"]
        family = f"{setting['denoiser']}, T = {setting['num_steps']}"
        if content["experiment"] == "prediction":
            r2.setdefault(family, {}).update({name: fits["gram"]["r2"]["value"] for name, fits in findings.items()})
        else:
            found = [cell for entry in findings["precisions"].values() for cell in entry["cells"].values()]
            cells.setdefault(family, []).extend(found)
    families = {name: {**over_all(cells.get(name, [])), "r2": r2.get(name, {})} for name in sorted({*cells, *r2})}
    everything = over_all([cell for found in cells.values() for cell in found])
    return {"families": families, ALL: everything}


def table(summary: dict[str, Any]) -> list[list[str]]:
    """A row per goal: what is asked for, every family, and all."""
    columns = [*summary["families"].values(), summary[ALL]]
    departures = [found["departures"] for found in columns]
    words = {
        "cells": [str(found["cells"]) for found in columns],
        f"over the best rule, geometric mean <= {goals.OVER_RULE_MEAN}": [
            number(found["over_best_rule"], ".3f") for found in columns
        ],
        f"over the best rule, worst cell <= {goals.OVER_RULE}": [
            number(found["over_best_rule_worst"], ".3f") for found in columns
        ],
        "  cells above it, and not distinguishable from it": [
            f"{found['not_met']['missed']}, {found['not_met']['not distinguishable']}" for found in columns
        ],
        "over uniform, mixed, geometric mean": [number(found["over_mixed"], ".3f") for found in columns],
        f"over uniform, mixed, worst cell <= {goals.OVER_MIXED}": [
            number(found["over_mixed_worst"], ".3f") for found in columns
        ],
        f"departures, and the best rules'; in sum <= {goals.MORE_DEPARTURES}": [
            f"{found['schedule']}, {found['best rule']}" for found in departures
        ],
        "  cells with significantly more": [str(found["significantly_more_departures"]) for found in columns],
        f"R^2 of the Gram, least >= {goals.R2}": [
            number(min(found.get("r2", {}).values(), default=None), ".3f") for found in columns[:-1]
        ]
        + [
            number(
                min((value for found in columns[:-1] for value in found["r2"].values()), default=None),
                ".3f",
            )
        ],
        f"denoiser calls of before, worst cell <= {goals.CALLS:.0%}": [
            "-" if found["calls_share_worst"] is None
            else f"{found['calls'] / found['earlier_calls']:.0%}, {found['calls_share_worst']:.0%}"
            for found in columns
        ],
    }  # fmt: skip
    return [[name, *values] for name, values in words.items()]


def run(args: argparse.Namespace) -> int:
    """Reads, prints, and writes."""
    contents = []
    for path in args.files:
        content = read_json(path, "result file", TmpDiffError)
        name = content.get("experiment")
        if name not in VERSIONS or content.get("version") != VERSIONS[name] or "findings" not in content:
            raise TmpDiffError(
                f"{path} holds {name!r} version {content.get('version')!r}, expected a result file of prediction or quality "
                "as they are now"
            )
        contents.append(content)
    found = round_numbers(summarize(contents))
    print_table("Goals of the calibrator", ["", *found["families"], ALL], table(found))
    if args.out:
        atomic_write_text(args.out, compact_json(found) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.experiments.{PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON", help="result files of prediction and quality")
    parser.add_argument("--out", type=Path, metavar="FILE", help="writes the summary as JSON")
    args = parser.parse_args(arguments)
    return guarded(PROGRAM, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
