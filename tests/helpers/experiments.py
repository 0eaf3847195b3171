"""How tests run the commands of `tools.experiments`."""

from __future__ import annotations

import subprocess
import sys

from helpers.paths import ROOT


def command(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", f"tools.experiments.{name}", *map(str, args)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
