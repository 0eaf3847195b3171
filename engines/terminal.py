"""What a terminal is shown: JSON, one line of any text, the bar of a loop."""

from __future__ import annotations

import json
import sys
from typing import Any

BAR = 30


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(data, indent=1, allow_nan=False))


def printable(text: str) -> str:
    """`text` with white space runs as one blank and every other unprintable character escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in " ".join(text.split())
    )


class StepBar:
    """A line on a terminal that shows how far the loop is; taken away at its end."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        self._steps, self._shown = steps, shown

    def show(self, done: int, precision: str) -> None:
        """Draws it after `done` steps, the last one at `precision`."""
        if self._shown:
            filled = BAR * done // self._steps
            bar = "#" * filled + "." * (BAR - filled)
            print(f"\r[{bar}] {done}/{self._steps} {precision:<6}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
