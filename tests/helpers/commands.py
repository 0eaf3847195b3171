"""How tests run commands: in this process, or as users start them, and what they expect of errors."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers.paths import ROOT

EXPORT = "tmpdiff_export.cli"
PROMPTS = """[calibration]
a large red circle in the center
a small blue ring on the left
[validation]
a white square at the top
"""
PROGRESS = re.compile(
    r"\d+ s: .+, \d+ of \d+, \d+ s in it(, peak memory .+ GB)?"
)  # a line now and then from a command that takes longer, as on a busy machine


def called(module: str, *args: object) -> subprocess.CompletedProcess[str]:
    """`python -m module` in this process: of a process of its own, most time goes into imports."""
    words = [module, *map(str, args)]
    out, err = io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    status: object = 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", words)
        warnings.simplefilter("ignore", RuntimeWarning)  # a package may have imported the module already
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as left:
            status = left.code or 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    assert isinstance(status, int), status
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def started(module: str, *args: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m module` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        capture_output=True, text=True, cwd=cwd, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment},
    )  # fmt: skip


def error_lines(stderr: str) -> list[str]:
    """Lines of stderr that are no progress."""
    return [line for line in stderr.splitlines() if not PROGRESS.fullmatch(line)]


def assert_refused(result: subprocess.CompletedProcess[str], says: str) -> None:
    """`tmpdiff-export` failed with one clear line on stderr, no traceback, nothing on stdout."""
    lines = error_lines(result.stderr)
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tmpdiff-export: error: ")
    assert says in lines[0]
    assert result.stdout == ""


def save_prompts(folder: Path) -> Path:
    """Writes a prompt file."""
    path = folder / "prompts.txt"
    path.write_text(PROMPTS)
    return path
