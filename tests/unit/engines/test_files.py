"""Folders that appear whole are on the disk before they do; files that are gone through side by side."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from engines.files import sha256_bytes, sha256_file, side_by_side, staged_folder


def test_all_that_a_folder_holds_is_on_the_disk_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, synced = tmp_path / "bundle", set()
    fsync, rename = os.fsync, os.rename

    def watched(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(source: Path, goal: Path) -> None:
        inside = [source, *Path(source).rglob("*")]
        assert [path for path in inside if not path.is_symlink() and path.stat().st_ino not in synced] == []
        rename(source, goal)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "rename", renamed)
    with staged_folder(target) as folder:
        (folder / "engines").mkdir()
        (folder / "engines" / "fp16.onnx").write_bytes(b"x")
        (folder / "manifest.json").write_text("{}")
        (folder / "elsewhere").symlink_to(tmp_path / "nothing")
    assert (target / "engines" / "fp16.onnx").read_bytes() == b"x"


def test_files_are_hashed_side_by_side_in_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "cab"]
    for path in paths:
        path.write_text(path.name)
    assert side_by_side(paths, sha256_file) == [sha256_bytes(path.name.encode()) for path in paths]


@pytest.mark.parametrize("error", [OSError("damaged"), KeyboardInterrupt()])
def test_after_a_failure_the_other_files_are_not_read_to_their_ends(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    ended = []

    def work(item: int, stop: threading.Event) -> None:
        if item == 0:
            raise error
        assert stop.wait(60.0), "nobody told it"
        ended.append(item)

    with pytest.raises(type(error)):
        side_by_side(range(100), work)
    assert len(ended) < 99


def test_a_link_to_a_bundle_is_replaced_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "manifest.json").write_text("old")
    target = tmp_path / "bundle"
    target.symlink_to(tmp_path / "elsewhere")
    with staged_folder(target, replace=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "elsewhere"]
    assert (target / "manifest.json").read_text() == "new"
    assert not target.is_symlink()
    assert (tmp_path / "elsewhere" / "manifest.json").read_text() == "old"
