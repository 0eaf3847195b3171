"""What the command line shows while it works: lines for a log where there is no terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import time

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


LINE = re.compile(r"\d+ s: (.+), (\d+) of (\d+), (\d+) s in it, peak memory \d+\.\d GB")
BEATS = "from tmpdiff_export import display\ndisplay.LINE_SECONDS = 0.05\n"
NATIVE = BEATS + (
    "import ctypes\n"
    "with display.progress_bar() as report:\n"
    "    report('int8: export', 2, 7)\n"
    "    ctypes.CDLL(None).usleep(900_000)\n"
    "    report('packing', 0, 1)\n"
    "    ctypes.CDLL(None).usleep(500_000)\n"
    "print('done')\n"
)


def test_without_a_terminal_lines_also_inside_native_calls() -> None:
    result = subprocess.run([sys.executable, "-c", NATIVE], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "done\n")
    lines = [LINE.fullmatch(line) for line in result.stderr.splitlines()]
    assert None not in lines, result.stderr
    found = [line.groups() for line in lines if line]
    assert {line[:3] for line in found} == {("int8: export", "2", "7"), ("packing", "0", "1")}
    assert found[-1][3] == "0", "since the stage began"


def test_nothing_is_left_of_the_heartbeat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", 0.001)

    def work() -> None:
        with display.progress_bar() as report:
            report("export", 1, 0)
            for _ in range(1000):
                if capsys.readouterr().err:
                    raise KeyboardInterrupt
                time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert "progress" not in [thread.name for thread in threading.enumerate()]
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_a_closed_stderr_ends_nothing() -> None:
    words = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, NATIVE]
    closed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (closed.returncode, closed.stdout) == (0, "done\n")
    reader, writer = os.pipe()
    os.close(reader)
    unread = subprocess.run([sys.executable, "-c", NATIVE], cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert (unread.returncode, unread.stdout) == (0, "done\n")


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
    assert "peak memory" in shown


def test_intervals_and_departures_in_one_line() -> None:
    found = IntervalRecord(value=1.24e-3, low=1e-3, high=2e-3)
    assert display.interval(found, ".1e") == "1.2e-03 [1.0e-03, 2.0e-03]"
    assert display.interval(IntervalRecord(value=0.5, low=0.5, high=0.5), ".2f") == "0.50"  # a single sample
    assert display.interval(IntervalRecord(value=0.0, low=0.0, high=0.0), ".2e") == "0"
    assert display.interval(None, ".2e") == display.departures(None) == "-"
    assert display.departures(DepartureRecord(count=2, samples=160, low=0.0015, high=0.0444)) == "2 of 160 [0.1, 4.4 %]"


def test_a_note_is_one_escaped_line_beside_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    display.print_note("stage a\x1b[2J is\ndamaged")
    assert capsys.readouterr() == ("", "stage a\\x1b[2J is damaged\n")
    monkeypatch.setattr(sys, "stderr", None)
    display.print_note("nobody reads")
    assert capsys.readouterr().out == ""
