"""Folders that appear whole are on the disk before they do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines.files import staged_folder


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
