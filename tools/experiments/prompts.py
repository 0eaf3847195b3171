"""Draws a prompt file for the embedded pipeline, and those trained as it is, from scenes that training never sees.

    python -m tools.experiments.prompts --kinds plain,composed,unusual --calibration 128 --validation 128 --out FILE

Kinds take turns, so that the first N prompts of either section, which are what `--samples N` uses, hold equally many of
each. No scene occurs twice. There are 91 held-out scenes of kind plain, and many of the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.cli import guarded
from engines.errors import PromptError
from engines.files import atomic_write_text
from tmpdiff_export.demo.scenes import held_out_captions


def draw(kinds: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` captions of different held-out scenes, the kinds in turns.

    Raises:
        PromptError: an unknown or repeated kind, or fewer such scenes than are asked for.
    """
    if len(set(kinds)) < len(kinds):
        raise PromptError(f"kinds are {', '.join(kinds)}, expected different ones")
    try:
        drawn = [held_out_captions(kind, -(-count // len(kinds)), seed) for kind in kinds]
    except ValueError as error:
        raise PromptError(str(error)) from error
    return [caption for turn in zip(*drawn, strict=True) for caption in turn][:count]


def write(kinds: Sequence[str], calibration: int, validation: int, seed: int, path: Path) -> None:
    """Writes the file, with a comment that says how it was drawn.

    Raises:
        PromptError: a section without prompts, or as `draw`.
    """
    if min(calibration, validation) < 1:
        raise PromptError(f"{calibration} calibration and {validation} validation prompts, expected 1 or more of each")
    captions = draw(kinds, calibration + validation, seed)
    lines = [
        f"# Held-out captions for the embedded pipeline; kinds {', '.join(kinds)} in turns, seed {seed}.",
        *("[calibration]", *captions[:calibration]),
        *("[validation]", *captions[calibration:]),
    ]
    atomic_write_text(path, "\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.experiments.prompts", description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="composed", metavar="LIST", help="of plain, composed, unusual")
    parser.add_argument("--calibration", type=int, default=128, metavar="N", help="calibration prompts (default 128)")
    parser.add_argument("--validation", type=int, default=128, metavar="N", help="validation prompts (default 128)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the draw (default 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="prompt file to write")
    args = parser.parse_args(arguments)

    def run() -> int:
        write(args.kinds.split(","), args.calibration, args.validation, args.seed, args.out)
        return 0

    return guarded("prompts", run)


if __name__ == "__main__":
    sys.exit(main())
