"""`tmpdiff-export report`: the pictures in it, the same bytes every time, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import EXPORT, called, error_lines, started
from helpers.demo_build import linked_copy
from helpers.made_up import calibration
from helpers.report_page import HOSTILE, Parsed
from helpers.stored import schedule_path, sensitivity_path
from PIL import Image

from engines.bundle import Bundle
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule


def test_pictures_are_the_runtimes(bundle: Bundle, written: tuple[Path, dict[str, Any]]) -> None:
    parsed = Parsed(written[0].read_text())
    runtime = DenoiseRuntime(bundle, threads=2)
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(a["src"].partition(",")[2]))).convert("RGB"))
        for a in parsed.named("img")
    ]
    names = [*runtime.precisions, "schedule"]
    assert len(images) == 2 * len(names) == 2 * written[1]["pictures"]
    drawn = dict(zip(names, images[::2], strict=True))
    heat = dict(zip(names, images[1::2], strict=True))
    setting = bundle.setting()
    for name, schedule in (("fp16", bundle.schedule(setting, "uniform:fp16")), ("schedule", bundle.schedule(setting))):
        expected = runtime.generate([HOSTILE], [0], schedule)[0]
        assert np.abs(drawn[name].astype(int) - expected).max() <= 1  # another number of threads may round otherwise
    assert len(np.unique(heat["fp16"].reshape(-1, 3), axis=0)) == 1
    for name in names[1:]:
        difference = np.abs(drawn[name].astype(float) - drawn["fp16"]).mean(axis=-1)
        brightness = heat[name].astype(int).sum(axis=-1)
        assert brightness.flat[difference.argmax()] == brightness.max() > heat["fp16"].max()


def test_same_documents_give_same_bytes(demo_bundle: Path, tmp_path: Path) -> None:
    pages = []
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.html"
        assert started(EXPORT, "report", demo_bundle, "--out", out, PYTHONHASHSEED=seed).returncode == 0
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    assert len(list(tmp_path.iterdir())) == 2


def without(path_of: Callable[[Path], Path]) -> Callable[[Path], None]:
    return lambda bundle: path_of(bundle).unlink()


def other_schedule(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    Schedule.uniform(opened.manifest.bundle_id, opened.setting(), "fp16").save(schedule_path(bundle))


def other_calibration(bundle: Path) -> None:
    calibration(5, ("fp16", "fp8", "int8", "int4")).save(sensitivity_path(bundle))


def old_calibration(bundle: Path) -> None:
    path = sensitivity_path(bundle)
    data = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(data | {"version": 2}))


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (without(sensitivity_path), (), "not calibrated: there is no sensitivity.json; run `tmpdiff-export calibrate"),
        (without(schedule_path), (), "not calibrated: there is no schedule.json; run `tmpdiff-export calibrate"),
        (other_schedule, (), "is not the schedule that sensitivity.json beside it describes"),
        (other_calibration, (), "has 5 steps"),
        (
            old_calibration,
            (),
            "has format version 2, which holds no error vectors; calibrate the bundle anew: tmpdiff-export",
        ),
        (None, ("--pictures", "2"), "add --prompt TEXT"),
        (None, ("--pictures", "-1", "--prompt", "a"), "--pictures is -1"),
        (None, ("--steps", "5"), "the bundle has no setting for --steps 5; it has "),
    ],
    ids=[
        "no sensitivity",
        "no schedule",
        "other schedule",
        "other T",
        "version 2",
        "no prompt",
        "negative",
        "no setting",
    ],
)
def test_refusals(
    demo_bundle: Path, tmp_path: Path, damage: Callable[[Path], None] | None, arguments: tuple[str, ...], words: str
) -> None:
    bundle = linked_copy(demo_bundle, tmp_path / "bundle")
    if damage:
        damage(bundle)
    out = tmp_path / "out" / "report.html"
    out.parent.mkdir()
    out.write_text("the old one")
    result = called(EXPORT, "report", bundle, "--out", out, *arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert len(error_lines(result.stderr)) == 1
    assert result.stdout == ""
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert out.read_text() == "the old one"


@pytest.mark.parametrize(("out", "words"), [("missing/report.html", "does not exist"), (".", "is a folder")])
def test_refuses_where_it_cannot_write(demo_bundle: Path, tmp_path: Path, out: str, words: str) -> None:
    result = called(EXPORT, "report", demo_bundle, "--out", tmp_path / out)
    assert (result.returncode, words in result.stderr) == (1, True)
    assert not list(tmp_path.iterdir())
