"""What the command line shows while it works: lines for a log where there is no terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from helpers.paths import ROOT

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
