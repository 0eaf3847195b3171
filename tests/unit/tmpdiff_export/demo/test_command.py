"""What `make demo` leaves behind, and what an installed wheel carries."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration import Sensitivity
from engines.bundle import Bundle
from engines.text import PromptFile
from tmpdiff_export.commands.demo import SHEET_NAME, draw, summarise

PROMPTS = ("a large cyan square in the top right",)


def test_pictures_side_by_side(demo_bundle: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    names = draw(tmp_path, demo_bundle, PROMPTS, 0, lambda *state: seen.append(state))
    assert names == [*(f"0-{name}.png" for name in ("fp16", "fp8", "int8", "int4", "schedule")), SHEET_NAME]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(names)
    assert seen[-1] == ("pictures", 5, 5)
    pictures = {name: np.asarray(Image.open(tmp_path / "pictures" / name)) for name in names}
    assert pictures["0-fp16.png"].shape == (256, 256, 3)
    reference = pictures["0-fp16.png"].astype(int)
    distance = {name: np.abs(pictures[f"0-{name}.png"] - reference).mean() for name in ("int8", "int4", "schedule")}
    assert all(0 < value < 20 for value in distance.values()), distance
    assert pictures[SHEET_NAME].shape[1] > 4 * pictures[SHEET_NAME].shape[0]  # one row, five columns


def test_summary_has_the_rows_of_the_table(demo_bundle: Path) -> None:
    found = Sensitivity.load(demo_bundle / "sensitivity.json")
    prompts = PromptFile(("a",), ("b",))
    summary = summarise("plain", prompts, Bundle.open(demo_bundle).manifest, found, ["0-fp16.png"], 1.0)
    rows = {row["name"]: row for row in summary["rows"]}
    high = found.schedule.count("fp16")
    assert {"schedule", "uniform fp16", "uniform int8", f"first {high}", f"last {high}", f"random {high}"} <= set(rows)
    for row in rows.values():
        assert sum(row["steps"].values()) == found.num_steps
        assert set(row) >= {"name", "steps", "latency", "error", "ssim", "psnr_db", "prompts"}
    assert rows["uniform fp16"]["latency"] == 1.0
    assert rows["uniform fp16"]["error"] == 0.0
    assert rows["uniform int8"]["latency"] < rows["schedule"]["latency"] < 1.0
    assert rows["uniform int8"]["error"] > 0
    assert 0 < summary["search_calls"] <= summary["sweep_calls"]
    assert summary["validation_prompts"] == ["b"]


def test_a_wheel_carries_weights_and_prompts(tmp_path: Path, demo_pipeline: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    result = subprocess.run([*command, str(tmp_path), "."], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in demo_pipeline.rglob("*"):
        if path.is_file():
            assert f"tmpdiff_export/demo/pipeline/{path.relative_to(demo_pipeline).as_posix()}" in names
    assert {f"calibration/prompts/{kind}.txt" for kind in ("plain", "composed", "unusual")} <= names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)


@pytest.mark.parametrize("kind", ["plain", "composed", "unusual"])
def test_prompt_sets_are_found_where_they_are_installed(kind: str) -> None:
    from importlib.resources import files

    assert files("calibration").joinpath(f"prompts/{kind}.txt").is_file()
