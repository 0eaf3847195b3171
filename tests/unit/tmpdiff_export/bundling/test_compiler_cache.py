"""Where torch's compiler keeps what it made: among the stages, for as long as they are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tmpdiff_export.bundling.bundle import compiler_cache
from tmpdiff_export.bundling.stages import open_stages

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def _fail_after_compiling(out: Path, content: str, *, restart: bool = False) -> str | None:
    """What an earlier build has left in the cache; then something is compiled, and the build fails."""
    found = None
    try:
        with open_stages(out, lambda line: None, restart=restart) as stages:
            with compiler_cache(stages, "torch"):
                kept = Path(os.environ[NAMES[0]]) / "kernel"
                found = kept.read_text() if kept.exists() else None
                kept.write_text(content)
                os.environ[NAMES[1]] = str(kept.parent / "triton")  # as torch does
            assert not any(name in os.environ for name in NAMES)
            stages.keep("codes", {"of": "something"}, lambda folder: None)
            raise RuntimeError
    except RuntimeError:
        return found


def test_it_is_there_again_after_a_failure_and_gone_after_success(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert _fail_after_compiling(out, "one") is None
    assert _fail_after_compiling(out, "two") == "one"
    assert _fail_after_compiling(out, "three", restart=True) is None
    with open_stages(out, lambda line: None) as stages, compiler_cache(stages, "torch"):
        assert (stages.cache / "kernel").read_text() == "three"
    assert list(tmp_path.iterdir()) == []


def test_other_backends_and_a_place_that_the_user_named_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_stages(tmp_path / "bundle", lambda line: None) as stages:
        with compiler_cache(stages, "onnxruntime"):
            assert NAMES[0] not in os.environ
        monkeypatch.setenv(NAMES[0], "elsewhere")
        with compiler_cache(stages, "torch"):
            assert os.environ[NAMES[0]] == "elsewhere"
        assert not any("cache" in path.name for path in stages.folder.iterdir())
