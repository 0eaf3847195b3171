"""What the command line shows while it works: lines for a log where there is no terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from calibration.records import DepartureRecord, IntervalRecord
from tmpdiff_export import display

SHOW = (
    "from tmpdiff_export.display import progress_bar\n"
    "with progress_bar() as report:\n"
    "    for done in range(4):\n"
    "        report('fp8: export', done, 3)\n"
)


def test_without_a_terminal_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with display.progress_bar() as report:
        for done, seconds in enumerate((0, 29, 31, 40, 60, 62, 95)):
            now[0] = 100.0 + seconds
            report("int8: export" if done < 4 else "packing", done, 7)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["31 s: int8: export, 2 of 7", "62 s: packing, 5 of 7", "95 s: packing, 6 of 7"]
    assert not printed.out


def test_a_short_command_leaves_a_log_clean() -> None:
    result = subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_terminal_gets_a_bar() -> None:
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    result = subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, stderr=terminal, env=environment)
    os.close(terminal)
    shown = os.read(controller, 65536).decode()
    os.close(controller)
    assert result.returncode == 0
    assert "fp8: export" in shown
    assert "3/3" in shown


def test_intervals_and_departures_in_one_line() -> None:
    found = IntervalRecord(value=1.24e-3, low=1e-3, high=2e-3)
    assert display.interval(found, ".1e") == "1.2e-03 [1.0e-03, 2.0e-03]"
    assert display.interval(IntervalRecord(value=0.5, low=0.5, high=0.5), ".2f") == "0.50"  # a single sample
    assert display.interval(IntervalRecord(value=0.0, low=0.0, high=0.0), ".2e") == "0"
    assert display.interval(None, ".2e") == display.departures(None) == "-"
    assert display.departures(DepartureRecord(count=2, samples=160, low=0.0015, high=0.0444)) == "2 of 160 [0.1, 4.4 %]"
