"""What `make` would run to set up the environment, and when; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.paths import ROOT

NOW = 1_700_000_000.0
PINNED = ("pyproject.toml", "constraints.txt")
STAMPS = (".venv/.installed", ".venv/.installed-dev")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose environment is up to date, with all that is for development."""
    for name in ("Makefile", *PINNED):
        shutil.copyfile(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (NOW, NOW))
    (tmp_path / ".venv").mkdir()
    for age, name in enumerate(STAMPS, start=1):
        touch(tmp_path / name, NOW + age)
    return tmp_path


def touch(path: Path, when: float) -> None:
    path.touch()
    os.utime(path, (when, when))


def installs(project: Path, target: str) -> list[str]:
    """What `make target` would have pip install, in order."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    result = subprocess.run(["make", "-n", target], cwd=project, env=outer, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    commands = [line for line in result.stdout.splitlines() if " -m pip " in line]
    for command in commands:
        assert "--quiet" in command
        assert "--constraint constraints.txt" in command
    return [command.split()[-1].strip("'") for command in commands]


def test_an_environment_that_is_up_to_date_is_left_alone(project: Path) -> None:
    assert installs(project, "demo") == []
    assert installs(project, "lint") == []


def test_the_demo_takes_no_tools_for_development(project: Path) -> None:
    shutil.rmtree(project / ".venv")
    assert installs(project, "demo") == [".[export]"]
    assert installs(project, "setup") == [".[export]", ".[dev]"]


def test_tools_for_development_come_on_top_of_the_demo(project: Path) -> None:
    (project / STAMPS[1]).unlink()
    assert installs(project, "demo") == []
    assert installs(project, "lint") == [".[dev]"]


@pytest.mark.parametrize("changed", PINNED)
def test_a_changed_pin_updates_the_environment(project: Path, changed: str) -> None:
    touch(project / changed, NOW + 60)
    assert installs(project, "demo") == [".[export]"]
    assert installs(project, "setup") == [".[export]", ".[dev]"]
    touch(project / STAMPS[0], NOW + 120)  # `make demo` was run
    assert installs(project, "demo") == []
    assert installs(project, "setup") == [".[dev]"]
