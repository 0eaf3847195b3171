"""The frozen `tmpdiff-runtime`: one executable that needs no Python, no PATH and no environment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.children import cpu_seconds, start, wait_for
from helpers.paths import ROOT

from engines.cli import INTERRUPTED, PROGRAM, main
from engines.version import VERSION
from tools.release.freeze_runtime import KEPT, LEFT_OUT, foreign_packages

PROMPT = "a large red circle on the left"


# What PyInstaller leaves out cannot be imported; of what is left, docstrings and assertions are gone.
WITHOUT = """
import sys
left_out = set(sys.argv.pop(1).split())

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in left_out:
            raise ModuleNotFoundError(f"{name} is left out", name=name)

sys.meta_path.insert(0, Blocker())
from engines.cli import main
sys.exit(main())
"""


def test_the_runtime_needs_nothing_that_is_left_out(tiny_bundle: Path, place: Path) -> None:
    left_out = {*LEFT_OUT.split(), *foreign_packages()}
    assert not left_out & KEPT
    done = subprocess.run(
        [sys.executable, "-OO", "-c", WITHOUT, " ".join(left_out), *arguments(tiny_bundle, "--out", "picture.png")],
        cwd=place, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (place / "picture.png").read_bytes().startswith(b"\x89PNG")


# The executable


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The executable and what the freezing printed."""
    out = tmp_path_factory.mktemp("frozen")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "release" / "freeze_runtime.py"), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert os.listdir(out) == [PROGRAM]
    return out / PROGRAM, done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def arguments(bundle: Path, *more: str, precision: str = "int8") -> list[str]:
    return ["run", str(bundle), "--prompt", PROMPT, "--seed", "7", "--schedule", f"uniform:{precision}", *more]


@pytest.mark.long
def test_size_and_start_up_are_stated(frozen: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    executable, printed = frozen
    assert f"size: {executable.stat().st_size / 1e6:.1f} MB (goal 90 MB: " in printed
    assert "start-up: " in printed
    assert "(goal 1 s: " in printed
    with capsys.disabled():
        print(f"\n{printed}", end="")


@pytest.mark.long
def test_version(frozen: tuple[Path, str], place: Path) -> None:
    done = subprocess.run([frozen[0], "--version"], env={}, cwd=place, capture_output=True, text=True, check=True)
    assert done.stdout == f"{PROGRAM} {VERSION}\n"


@pytest.mark.long
def test_makes_the_picture_that_python_makes(frozen: tuple[Path, str], demo_bundle: Path, place: Path) -> None:
    unpacked = place / "tmp"
    unpacked.mkdir()
    picture, expected = place / "frozen.png", place.parent / "python.png"
    done = subprocess.run(
        [frozen[0], *arguments(demo_bundle, "--out", "frozen.png")],
        env={"PATH": "", "TMPDIR": str(unpacked)},
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(unpacked.iterdir()) == [], "the executable left what it unpacked"
    assert sorted(place.iterdir()) == [picture, unpacked]
    assert main(arguments(demo_bundle, "--out", str(expected))) == 0
    assert picture.read_bytes() == expected.read_bytes()


@pytest.mark.long
def test_runs_with_no_environment_at_all(frozen: tuple[Path, str], demo_bundle: Path, place: Path) -> None:
    done = subprocess.run(
        [frozen[0], "verify", str(demo_bundle)], env={}, cwd=place, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "is whole" in done.stdout


@pytest.mark.long
def test_a_corrupted_engine_is_one_line(frozen: tuple[Path, str], demo_bundle: Path, place: Path) -> None:
    bundle = place.parent / "bundle"
    shutil.copytree(demo_bundle, bundle)
    engine = bundle / "engines" / "int8.onnx"
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    done = subprocess.run(
        [frozen[0], *arguments(bundle, "--out", "picture.png")],
        env={},
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"{PROGRAM}: error: bundle file engines/int8.onnx was altered")
    assert done.stderr.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.long
def test_ctrl_c_is_one_line(frozen: tuple[Path, str], demo_bundle: Path, place: Path) -> None:
    prompts = ["--prompt", PROMPT] * 15  # long enough to be in the loop when the signal comes
    with start(
        [frozen[0], *arguments(demo_bundle, "--out", "picture.png", *prompts, precision="fp16")],
        env={},
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for(lambda: cpu_seconds(process) > 3.0, process)  # starting takes half a second of it
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the boot loader and the program both get it
        printed, err = process.communicate()
    assert process.returncode == INTERRUPTED
    assert (printed, err) == ("", f"{PROGRAM}: interrupted; nothing half-written is left\n")
    assert list(place.iterdir()) == []
