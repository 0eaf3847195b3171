"""Figure 4 over the speed-up, from stored result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.experiments import command

from engines.errors import TmpDiffError
from tools.experiments.figures import label
from tools.experiments.speed_quality import read_ratios, speed_up

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "experiments"
RATIOS = RESULTS / "step-ratios.json"


def test_nvfp4_is_named_after_what_its_engine_is() -> None:
    setting = {"backend": "torch", "recipes": {"fp8": "max", "nvfp4": "rank32"}}
    assert label("nvfp4", setting) == "nvfp4 (W4A4R32, simulated)"
    assert label("nvfp4", setting | {"backend": "tensorrt"}) == "nvfp4 (W4A4R32)"
    assert label("nvfp4", setting | {"recipes": {"nvfp4": "max"}}) == "nvfp4 (W4A4, simulated)"
    assert label("nvfp4", {"backend": "torch"}) == "nvfp4 (W4A4, simulated)"
    assert label("fp8", setting) == "fp8"


def test_speed_ups_of_loops() -> None:
    assert speed_up(3.0, 20, 0) == pytest.approx(3)
    assert speed_up(3.0, 20, 20) == 1
    assert speed_up(3.0, 20, 8) == pytest.approx(20 / 12)


def test_every_ratio_has_a_source_and_one_of_a_form_is_drawn() -> None:
    rows = json.loads(RATIOS.read_text())["ratios"]
    assert all(row["source"] and row["hardware"] and row["model"] for row in rows)
    drawn = [row["form"] for row in rows if row["drawn"]]
    assert len(set(drawn)) == len(drawn)
    assert set(read_ratios(RATIOS)) == {"fp8", "nvfp4 (W4A4)", "nvfp4 (W4A4R32)"}


def test_files_of_one_denoiser_are_drawn_together(tmp_path: Path) -> None:
    plain = RESULTS / "quality-pixart.json"
    content = json.loads(plain.read_text())
    content["setting"]["recipes"] = {"nvfp4": "rank32"}
    content["data"] = {"nvfp4": content["data"]["nvfp4"]}
    (tmp_path / "branched.json").write_text(json.dumps(content))
    words = ("--ratios", RATIOS, "--out", tmp_path / "figure")
    done = command("speed_quality", plain, tmp_path / "branched.json", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "figure.json").read_text())["precisions"]
    assert list(found) == ["fp8", "nvfp4 (W4A4, simulated)", "nvfp4 (W4A4R32, simulated)"]
    branched = found["nvfp4 (W4A4R32, simulated)"]
    assert (branched["file"], branched["ratio"]["ratio"]) == ("branched.json", 3.0)
    assert [round(row[0], 2) for row in branched["series"]["schedule"]] == [1.15, 1.36, 1.67, 2.14, 3.0]
    assert branched["series"]["schedule"][-1] == branched["series"]["uniform, mixed"][-1]

    content["setting"]["validation_prompts"] = content["setting"]["validation_prompts"][:-1]
    (tmp_path / "other.json").write_text(json.dumps(content))
    done = command("speed_quality", plain, tmp_path / "other.json", *words)
    assert done.returncode == 1
    assert "other.json is of another denoiser, number of steps or other prompts than " in done.stderr


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps({"ratios": [{"form": "fp8", "drawn": True}]}))
    with pytest.raises(TmpDiffError, match=r"table\.json is no table of ratios: 'ratio' is missing"):
        read_ratios(tmp_path / "table.json")
