"""What the command line shows: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from engines.terminal import printable
from tmpdiff_export.memory import PeakMemory

if TYPE_CHECKING:
    from calibration.records import DepartureRecord, IntervalRecord

PIPED_WIDTH = 140
LINE_SECONDS = 30.0
"""Without a terminal: time between lines of progress, so that short commands print none."""
Report = Callable[[str, int, int], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[Report]:
    """A progress display on stderr that takes (stage, done, total), and shows the peak memory.

    A bar per stage on a terminal; elsewhere a plain line every `LINE_SECONDS`, as for the log of a build host. Both go
    on inside long calls.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        with _heartbeat() as report:
            yield report
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _MemoryColumn(),
    )
    with Progress(*columns, console=console) as progress:
        current: tuple[str, Any] | None = None

        def report(stage: str, done: int, total: int) -> None:
            nonlocal current
            if current is None or current[0] != stage:
                if current is not None:
                    progress.stop_task(current[1])
                current = (stage, progress.add_task(stage, total=total))
            progress.update(current[1], completed=done, total=total)

        yield report


class _MemoryColumn(ProgressColumn):
    """The peak memory, beside the stage that runs."""

    max_refresh = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._memory = PeakMemory()

    def render(self, task: Task) -> Text:
        """Empty for a stage that has ended."""
        return Text("" if task.stop_time is not None else _peak(self._memory))


@contextlib.contextmanager
def _heartbeat() -> Iterator[Report]:
    """Lines from a thread of its own for the length of a block; without a stderr, none."""
    now = time.monotonic()
    begun, current = now, ("", 0, 0, now)  # stage, done, total, since when it runs
    memory, ended = PeakMemory(), threading.Event()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal current
        current = (stage, done, total, current[3] if current[0] == stage else time.monotonic())

    def beat() -> None:
        while sys.stderr is not None and not ended.wait(LINE_SECONDS):  # `print` would take stdout in its place
            stage, done, total, since = current
            if not stage:
                continue
            now = time.monotonic()
            peak = _peak(memory)
            line = f"{now - begun:.0f} s: {stage}, {done} of {total}, {now - since:.0f} s in it" + (
                peak and f", {peak}"
            )
            try:
                print(line, file=sys.stderr, flush=True)
            except (OSError, ValueError):  # nobody reads any more, or it was closed
                return

    thread = threading.Thread(target=beat, name="progress", daemon=True)
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()


def _peak(memory: PeakMemory) -> str:
    count = memory.bytes()
    return "" if count is None else f"peak memory {count / 1e9:.1f} GB"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """A table on stdout, its first column left-aligned and the others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def print_note(text: str) -> None:
    """One line on stderr, escaped: what a reader of stdout should not find there."""
    if sys.stderr is not None:
        print(printable(text), file=sys.stderr, flush=True)


def schedule_strip(precisions: Sequence[str]) -> str:
    """A schedule in one line: runs of equal precision with their step indices, "fp16 0-2 | int8 3-17"."""
    parts: list[str] = []
    begin = 0
    for index in range(1, len(precisions) + 1):
        if index == len(precisions) or precisions[index] != precisions[begin]:
            span = str(begin) if index - begin == 1 else f"{begin}-{index - 1}"
            parts.append(f"{precisions[begin]} {span}")
            begin = index
    return " | ".join(parts) if len(set(precisions)) > 1 else f"{precisions[0]} at every step"


def number(value: float | None, form: str) -> str:
    """A figure for a table cell, "-" where there is none."""
    return "-" if value is None else format(value, form)


def interval(found: IntervalRecord | None, form: str) -> str:
    """A figure with its 95 % interval, "1.2e-03 [1.0e-03, 1.5e-03]"; without one where there is a single sample."""
    if found is None:
        return "-"
    if found.low == found.value == found.high:
        return format(found.value, form) if found.value else "0"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def departures(found: DepartureRecord | None) -> str:
    """A count of departures with the 95 % interval of their share, "2 of 160 [0.2, 4.4 %]"."""
    if found is None:
        return "-"
    return f"{found.count} of {found.samples} [{100 * found.low:.1f}, {100 * found.high:.1f} %]"
