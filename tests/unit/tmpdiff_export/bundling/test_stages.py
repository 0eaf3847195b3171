"""Finished stages: found again, made anew when damaged, and a build that is killed at any point ends the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import fake_build
from helpers.children import start, wait_for
from helpers.paths import ROOT

from engines.documents import write_document
from engines.errors import TmpDiffError
from tmpdiff_export.bundling import stages as module
from tmpdiff_export.bundling.stage_files import link
from tmpdiff_export.bundling.stages import Stages, open_stages

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
KEY = {"steps": 20, "scale": 0.1}


def write(path: Path) -> dict[str, object]:
    (path / "engines").mkdir()
    (path / "engines/weights").write_bytes(b"w" * 3000)
    (path / "graph").write_bytes(b"g")
    return {"sqnr": 41.5, "shape": (1, 2)}


def fail(path: Path) -> None:
    pytest.fail("made though it is there")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


@pytest.fixture
def notes() -> list[str]:
    return []


def failing_build(target: Path, note: Callable[[str], None], *names: str) -> None:
    with open_stages(target, note) as stages:
        for name in names:
            stages.keep(name, KEY, write)
        (stages.begin("last", KEY) / "half").write_text("x")
        raise KeyError


def left_by_a_failed_build(target: Path, *names: str) -> Path:
    """Stages, as a build that fails after them leaves them."""
    with pytest.raises(KeyError):
        failing_build(target, lambda line: None, *names)
    return target.parent / f".{target.name}.stages"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stage_is_made_once(target: Path, notes: list[str]) -> None:
    folder = left_by_a_failed_build(target, "fp16", "fp8")
    with open_stages(target, notes.append) as stages:
        assert notes == [f"going on with 2 finished stages, 0.0 MB, in {folder}; --restart begins anew"]
        found = stages.keep("fp16", KEY, fail)
        assert found.reused
        assert found.result == {"sqnr": 41.5, "shape": [1, 2]}
        assert {name: item.bytes for name, item in found.files.items()} == {"engines/weights": 3000, "graph": 1}
        assert stages.find("fp16", {**KEY, "steps": 21}) is None
        assert stages.find("int8", KEY) is None
    assert not folder.exists(), "it goes when the build succeeds"
    with open_stages(target, notes.append) as stages:
        made = stages.keep("fp16", KEY, write)
    assert (made.reused, made.digest, made.result, made.files) == (False, found.digest, found.result, found.files)
    assert len(notes) == 1


def test_a_failed_build_says_what_stays(target: Path, notes: list[str]) -> None:
    with pytest.raises(KeyError):
        failing_build(target, notes.append, "fp16")
    folder = target.parent / ".bundle.stages"
    assert notes == [f"kept for the next run of the same command: 1 finished stage, 0.0 MB, in {folder}"]
    assert sorted(path.name.partition("-")[0] for path in folder.iterdir()) == ["fp16", "lock"]


def test_a_build_that_finishes_no_stage_leaves_nothing(tmp_path: Path, notes: list[str]) -> None:
    with pytest.raises(KeyError):
        failing_build(tmp_path / "deep/er/bundle", notes.append)
    assert list(tmp_path.iterdir()) == []
    assert notes == []


def test_restart_and_keep(target: Path, notes: list[str]) -> None:
    folder = left_by_a_failed_build(target, "fp16", "fp8")
    with open_stages(target, notes.append, keep=True) as stages:
        stages.keep("fp16", KEY, fail)
        assert stages.used_bytes > 6000
    assert notes[1].startswith("kept: 1 finished stage, ")
    assert [path.name[:5] for path in sorted(folder.iterdir())] == ["fp16-", "lock"], "what was not used has gone"
    with open_stages(target, notes.append, restart=True) as stages:
        assert stages.used_bytes == 0
        assert stages.find("fp16", KEY) is None
    assert len(notes) == 2


def test_one_stage_of_a_name(target: Path) -> None:
    with open_stages(target, print) as stages:
        stages.keep("fp8", KEY, write)
        other = stages.keep("fp8", {"steps": 4}, write)
        similar = stages.keep("fp8-attention", KEY, write)
        folders = {path for path in stages.folder.iterdir() if path.name != "lock"}
        assert folders == {other.folder, similar.folder}
        with pytest.raises(ZeroDivisionError):
            stages.keep("fp8", KEY, lambda path: 1 / 0)
        assert {path for path in stages.folder.iterdir() if path.name != "lock"} == folders
        assert stages.find("fp8", {"steps": 4}) is not None


@pytest.mark.parametrize("name", ["", ".x", "a/b", "../a", "A", "a b"])
def test_names_are_those_of_files(target: Path, name: str) -> None:
    with open_stages(target, print) as stages, pytest.raises(ValueError, match="lower case letters"):
        stages.find(name, KEY)


def test_results_and_files_that_cannot_be_kept(target: Path) -> None:
    with open_stages(target, print) as stages:
        with pytest.raises(ValueError, match="JSON compliant"):
            stages.keep("fp16", KEY, lambda path: float("nan"))
        with pytest.raises(ValueError, match="name of its own record"):
            stages.keep("fp16", KEY, lambda path: (path / "stage.json").write_text("x"))
        with pytest.raises(TmpDiffError, match="no plain file"):
            stages.keep("fp16", KEY, lambda path: (path / "link").symlink_to("/dev/zero"))
        assert [path.name for path in stages.folder.iterdir()] == ["lock"]


def truncated(stage: Path) -> None:
    os.truncate(stage / "engines/weights", 2999)


def altered(stage: Path) -> None:
    (stage / "engines/weights").write_bytes(b"w" * 2999 + b"v")


def missing(stage: Path) -> None:
    (stage / "graph").unlink()


def added(stage: Path) -> None:
    (stage / "engines/more").write_text("x")


def linked(stage: Path) -> None:
    (stage / "graph").rename(stage.parent / "graph")
    (stage / "graph").symlink_to(stage.parent / "graph")


def linked_device(stage: Path) -> None:
    (stage / "graph").unlink()
    (stage / "graph").symlink_to("/dev/zero")


def pipe(stage: Path) -> None:
    (stage / "graph").unlink()
    os.mkfifo(stage / "graph")


def linked_folder(stage: Path) -> None:
    (stage / "engines").rename(stage.parent / "engines")
    (stage / "engines").symlink_to(stage.parent / "engines")


def record_pipe(stage: Path) -> None:
    (stage / "stage.json").unlink()
    os.mkfifo(stage / "stage.json")


def record_missing(stage: Path) -> None:
    (stage / "stage.json").unlink()


def record_no_json(stage: Path) -> None:
    (stage / "stage.json").write_text("{")


def record_deep(stage: Path) -> None:
    (stage / "stage.json").write_text('{"key": ' + "[" * 100_000 + "]" * 100_000 + "}")


def record_list(stage: Path) -> None:
    (stage / "stage.json").write_text("[]")


def record_result(stage: Path) -> None:
    path = stage / "stage.json"
    path.write_text(path.read_text().replace("41.5", "99.5"))


def resigned(change):
    """A record whose own digest is right."""

    def apply(stage: Path) -> None:
        path = stage / "stage.json"
        data = json.loads(path.read_text())
        del data["sha256"]
        change(data)
        write_document(path, data)

    return apply


def whole_link(stage: Path) -> None:
    stage.rename(stage.parent / "elsewhere")
    stage.symlink_to(stage.parent / "elsewhere")


def a_file(stage: Path) -> None:
    stage.rename(stage.parent / "elsewhere")
    stage.write_text("x")


DAMAGE = {
    "truncated": (truncated, "has 2999 bytes, expected 3000"),
    "altered": (altered, "weights was altered"),
    "missing": (missing, "graph is missing"),
    "added": (added, "more is not listed"),
    "linked": (linked, "graph is no plain file"),
    "linked device": (linked_device, "graph is no plain file"),
    "pipe": (pipe, "graph is no plain file"),
    "linked folder": (linked_folder, "engines is no plain file"),
    "record: pipe": (record_pipe, "stage.json is no plain file"),
    "record: missing": (record_missing, "does not exist"),
    "record: no JSON": (record_no_json, "is not valid JSON"),
    "record: deep": (record_deep, "is not valid JSON"),
    "record: a list": (record_list, "holds a JSON list"),
    "record: result": (record_result, "was altered after it was written"),
    "record: version": (resigned(lambda data: data.update(version=2)), "has format version 2"),
    "record: fields": (resigned(lambda data: data.pop("result")), "is malformed"),
    "record: types": (resigned(lambda data: data.update(files={"a": 1})), "is malformed"),
    "record: other key": (resigned(lambda data: data.update(key=1)), "is of another stage"),
    "record: files": (resigned(lambda data: data["files"].pop()), "graph is not listed"),
    "record: outside": (resigned(lambda data: data["files"][1].update(path="../lock")), "lock is missing"),
    "a link": (whole_link, "is no folder"),
    "a file": (a_file, "is no folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_stage_is_noticed_and_made_anew(target: Path, notes: list[str], kind: str) -> None:
    folder = left_by_a_failed_build(target, "fp16", "fp8")
    (stage,) = folder.glob("fp16-*")
    change, says = DAMAGE[kind]
    change(stage)
    with open_stages(target, notes.append) as stages:
        del notes[:]
        assert stages.find("fp16", KEY) is None
        (line,) = notes
        assert line.startswith("stage fp16 is damaged, and made anew: ")
        assert says in line
        assert not stage.is_symlink()
        assert not stage.exists()
        assert not stages.keep("fp16", KEY, write).reused
        assert stages.keep("fp8", KEY, fail).reused
        assert stages.keep("fp16", KEY, fail).reused


def test_finished_files_are_linked_into_a_bundle(target: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open_stages(target, print) as stages:
        kept = stages.keep("fp16", KEY, write)
        link(kept.folder / "engines/weights", out / "engines/weights")
        assert os.path.samefile(kept.folder / "engines/weights", out / "engines/weights")
        with pytest.raises(FileExistsError):
            link(kept.folder / "engines/weights", out / "engines/weights")
    assert contents(out) == {"engines/weights": b"w" * 3000}


def test_files_are_copied_where_links_are_refused(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(module.os, "link", refuse)
    with open_stages(target, print) as stages:
        kept = stages.keep("fp16", KEY, write)
        link(kept.folder / "engines/weights", tmp_path / "out" / "engines/weights")
    assert contents(tmp_path / "out") == {"engines/weights": b"w" * 3000}


def test_what_dead_builds_left_beside_the_target_goes(target: Path, notes: list[str]) -> None:
    beside = target.parent
    mine = [beside / f".bundle.ab_{digit}xy.partial" for digit in range(100, 102)]
    others = [".bundle2.abcd1234.partial", ".bundle.abcd1234.keep", ".bundle.ABCD1234.partial", ".other.abcd1234.old"]
    for path in [*mine, *(beside / name for name in others), target, beside / ".bundle.abcd1234.old"]:
        (path / "engines").mkdir(parents=True)
    (beside / ".bundle.abcd5678.partial").write_text("a file of somebody else")
    with open_stages(target, notes.append):
        pass
    assert sorted(path.name for path in beside.iterdir()) == sorted([*others, ".bundle.abcd5678.partial", "bundle"])
    assert len(notes) == 3
    assert all(note.endswith("left by a build that was killed") for note in notes)


def test_a_bundle_that_was_moved_aside_is_put_back(target: Path, notes: list[str]) -> None:
    (target.parent / ".bundle.abcd1234.old").mkdir()
    (target.parent / ".bundle.abcd1234.old" / "manifest.json").write_text("{}")
    (target.parent / ".bundle.abcd1234.partial").mkdir()
    with open_stages(target, notes.append):
        assert contents(target) == {"manifest.json": b"{}"}
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]
    assert "was put back" in notes[0]


@pytest.mark.parametrize("what", ["file", "link"])
def test_something_else_in_the_place_of_the_folder(target: Path, what: str) -> None:
    folder = target.parent / ".bundle.stages"
    if what == "file":
        folder.write_text("x")
    else:
        (target.parent / "other").mkdir()
        folder.symlink_to(target.parent / "other")
    with pytest.raises(TmpDiffError, match="is no folder"), open_stages(target, print):
        pass
    assert os.path.lexists(folder)


WAITING = """
import sys, time
from pathlib import Path
from tmpdiff_export.bundling.stages import open_stages

def make(path):
    (path / "half").write_bytes(b"x" * 1000)
    print("in the middle", flush=True)
    time.sleep(600)

with open_stages(Path(sys.argv[1]), lambda line: None) as stages:
    stages.keep("first", 1, lambda path: (path / "whole").write_bytes(b"x"))
    stages.keep("second", 2, make)
"""


def test_a_second_build_is_refused_and_a_killed_one_gives_way(target: Path, notes: list[str]) -> None:
    with start([sys.executable, "-c", WAITING, target], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        assert child.stdout.readline() == "in the middle\n"
        says = rf"another build to the same place is running: process {child.pid} holds .*/\.bundle\.stages/lock;"
        with pytest.raises(TmpDiffError, match=says), open_stages(target, notes.append):
            pass
        assert notes == []
        child.send_signal(signal.SIGKILL)
        child.wait()
    folder = target.parent / ".bundle.stages"
    assert [path.name for path in folder.glob(".second-*.partial/*")] == ["half"]
    with open_stages(target, notes.append) as stages:
        assert list(folder.glob(".*")) == []
        assert stages.keep("first", 1, fail).reused
        assert stages.find("second", 2) is None


def test_builds_that_come_and_go_never_share_the_folder(target: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom engines.errors import TmpDiffError\n"
        "from tmpdiff_export.bundling.stages import open_stages\n"
        "target, busy, done = Path(sys.argv[1]), Path(sys.argv[1] + '.busy'), 0\n"
        "while done < 30:\n"
        "    try:\n"
        "        with open_stages(target, lambda line: None) as stages:\n"
        "            busy.touch(exist_ok=False)\n"
        "            stages.keep('a', 1, lambda path: None)\n"
        "            busy.unlink()\n"
        "            done += 1\n"
        "    except TmpDiffError as error:\n"
        "        assert 'another build' in str(error), error\n"
    )
    children = [start([sys.executable, "-c", program, target], env=ENVIRONMENT) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert list(target.parent.iterdir()) == []


def fake(target: Path, log: Path, *kill_at: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "helpers.fake_build", target, log, *kill_at]
    return subprocess.run([*map(str, words)], capture_output=True, text=True, env=ENVIRONMENT)


def test_killed_at_20_random_points_a_build_ends_the_same(tmp_path: Path) -> None:
    whole = fake(tmp_path / "whole/bundle", tmp_path / "whole.log")
    assert whole.returncode == 0, whole.stderr
    expected = contents(tmp_path / "whole/bundle")
    assert len(expected) == 3 * len(fake_build.STAGES) + 1
    calls, chance = int(whole.stdout.split()[-1]), random.Random()
    for point in range(20):
        folder, log = tmp_path / str(point), tmp_path / f"{point}.log"
        at = chance.randint(calls * point // 20 + 1, calls * (point + 1) // 20)
        assert fake(folder / "bundle", log, at).returncode == -signal.SIGKILL, at
        kept = folder / ".bundle.stages"
        finished = fake_build.finished(Stages(kept, print)) if kept.exists() else set()
        before = log.read_text().split() if log.exists() else []
        again = fake(folder / "bundle", log)
        assert again.returncode == 0, (at, again.stderr)
        assert contents(folder / "bundle") == expected, at
        assert [path.name for path in folder.iterdir()] == ["bundle"], at
        made_again = log.read_text().split()[len(before) :]
        assert not finished & set(made_again), f"killed at call {at}: finished stages are not made again"


def test_killed_again_and_again_from_outside_gets_done(tmp_path: Path) -> None:
    target, log = tmp_path / "bundle", tmp_path / "log"
    words = [sys.executable, "-m", "helpers.fake_build", target, log]
    for count in range(1, len(fake_build.STAGES)):
        with start(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as child:
            wait_for(lambda count=count: log.exists() and len(log.read_text().split()) >= count, child)
            child.send_signal(signal.SIGKILL)
    assert fake(target, log).returncode == 0
    whole = fake(tmp_path / "whole/bundle", tmp_path / "whole.log")
    assert whole.returncode == 0
    assert contents(target) == contents(tmp_path / "whole/bundle")
