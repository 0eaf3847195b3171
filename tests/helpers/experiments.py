"""How tests run the commands of `tools.experiments`."""

from __future__ import annotations

import subprocess

from helpers.commands import called


def command(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    return called(f"tools.experiments.{name}", *args)
