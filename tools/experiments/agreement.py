"""Whether two runs of `single_steps` order the steps alike: another machine or backend, or more prompts.

    python -m tools.experiments.agreement docs/results/experiments/single_steps.json OTHER.json

Per precision and direction: Spearman's correlation of the two curves; by how many steps the first one's order is off in
the second; and how much more error the first one's choice of K steps leaves, from K = T/5 to 4T/5, judged by the
second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from tmpdiff_export.display import print_table
from tools.experiments.curves import curve
from tools.experiments.rank_deviation import regret_in_range
from tools.experiments.single_steps import directions_of
from tools.experiments.statistics import rank_deviation, spearman


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[list[str]]:
    """A row of words per precision and direction that both have.

    Raises:
        TmpDiffError: nothing to compare.
    """
    if first["setting"]["num_steps"] != second["setting"]["num_steps"]:
        raise TmpDiffError(
            f"the first file has T = {first['setting']['num_steps']}, the second T = {second['setting']['num_steps']}; "
            "name two of one T"
        )
    shared = [name for name in first["data"] if name in second["data"]]
    if not shared:
        raise TmpDiffError(f"the first file has {', '.join(first['data'])}, the second {', '.join(second['data'])}")
    rows = []
    for precision in shared:
        found, truth = first["data"][precision], second["data"][precision]
        for direction in directions_of(found):
            if direction in truth:
                pair = curve(truth, direction), curve(found, direction)
                positive = [np.maximum(scores, 0.0) for scores in pair]
                rows.append(
                    [
                        f"{precision}, {direction}",
                        f"{spearman(*pair):.2f}",
                        f"{rank_deviation(*pair):.1f}",
                        f"{regret_in_range(*positive):.0%}",
                    ]
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.experiments.agreement", description=__doc__.splitlines()[0])
    for name in ("first", "second"):
        parser.add_argument(name, type=Path, metavar=f"{name.upper()}.json", help="a result file of single_steps")
    args = parser.parse_args(arguments)

    def run() -> int:
        contents = [read_json(path, "result file", TmpDiffError) for path in (args.first, args.second)]
        for path, content in zip((args.first, args.second), contents, strict=True):
            if content.get("experiment") != "single_steps":
                raise TmpDiffError(f"{path} holds {content.get('experiment')!r}, expected a file of 'single_steps'")
        settings = [content["setting"] for content in contents]
        sizes = " against ".join(
            f"{len(item['calibration_prompts'])} prompts on {item['machine']}" for item in settings
        )
        print_table(sizes, ["", "Spearman", "rank deviation", "regret"], compare(*contents))
        return 0

    return guarded("agreement", run)


if __name__ == "__main__":
    sys.exit(main())
