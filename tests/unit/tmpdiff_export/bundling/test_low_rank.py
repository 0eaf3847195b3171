"""Builds whose NVFP4 engines have branches of low rank, and which of them is kept."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny_pipeline import denoiser_inputs, tiny_options

from engines.manifest import MODEL_OUTPUT
from engines.precision import Precision
from engines.runtime import DenoiseRuntime
from tmpdiff_export.bundling import denoiser
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.bundling.engine import StartedEngine, Trial
from tmpdiff_export.quantization.low_rank import price_db
from tmpdiff_export.quantization.recipes import RECIPES, SmoothQuant, Variant
from tmpdiff_export.targets.accuracy import sqnr_db

RANK = 4


def use_variants(monkeypatch: pytest.MonkeyPatch, *variants: Variant) -> None:
    monkeypatch.setitem(RECIPES, Precision.NVFP4, replace(RECIPES[Precision.NVFP4], variants=variants))


@pytest.fixture
def branched(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variant, whose branches are said to take no room: layers of this size would rather be FP8."""
    use_variants(monkeypatch, Variant("rank4", SmoothQuant(0.5), RANK))
    monkeypatch.setattr(denoiser, "share_of_fp8", lambda shapes, rank: 0.0)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_an_engine_with_branches_is_built_and_runs(
    backend: str, branched: None, tiny_pipeline: Path, tmp_path: Path
) -> None:
    more = {"device": "cpu"} if backend == "torch" else {}
    build(tiny_pipeline, tmp_path / "bundle", tiny_options("fp16", "nvfp4", backend=backend, **more))
    with DenoiseRuntime.load(tmp_path / "bundle") as runtime:
        (entry,) = runtime.manifest.denoisers["nvfp4"]
        assert entry.recipe == "rank4"
        assert entry.sqnr_db > entry.sqnr_floor_db
        codes = sum(file.bytes for file in entry.weights if "codes" in file.path)
        if backend == "torch":
            assert set(entry.lowering) == {"nvfp4 linear beside rank 4 emulated in a 16-bit product"}
            assert entry.package is not None
            assert entry.package.weights_bytes == sum(file.bytes for file in entry.weights)
        else:
            assert entry.lowering["low-rank-branches"] == entry.lowering["nvfp4-emulated"]
        assert codes > 0
        inputs = denoiser_inputs(runtime, 2)
        found, reference = (runtime.denoiser(name).run(inputs)[MODEL_OUTPUT] for name in ("nvfp4", "fp16"))
        assert sqnr_db(reference, found) > 12


def test_branches_that_take_more_than_fp8_are_not_tried(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_variants(monkeypatch, Variant("max"), Variant("rank4", None, RANK), Variant("rank32", None, 32))
    said: list[str] = []
    options = tiny_options("fp16", "nvfp4", keep_stages=True)
    manifest = build(tiny_pipeline, tmp_path / "bundle", options, lambda stage, *_: said.append(stage))
    assert manifest.denoisers["nvfp4"][0].recipe == "max"
    made = {stage for stage in said if stage.startswith("make engine nvfp4")}
    assert "make engine nvfp4 (max)" in made
    assert "make engine nvfp4 (rank32)" not in made


def trial(name: str, sqnr: float, share: float) -> Trial:
    entry = SimpleNamespace(recipe=name, sqnr_db=sqnr, sqnr_floor_db=12.0)
    made: Future = Future()
    made.set_result(entry)
    return Trial(made, lambda: SimpleNamespace(entry=entry), price_db(share))


@pytest.mark.parametrize(
    ("trials", "kept"),
    [
        ([("max", 20.0, 0.0), ("rank16", 22.0, 0.2), ("rank32", 23.0, 0.4)], "rank16"),  # .97 and 2.2 dB
        ([("max", 20.0, 0.0), ("rank16", 20.9, 0.2), ("rank32", 22.1, 0.4)], "max"),
        ([("max", 20.0, 0.0), ("rank16", 22.0, 0.05), ("rank32", 23.0, 0.1)], "rank32"),
        ([("max", 20.0, 0.0), ("rank64", 90.0, 1.2)], "max"),
        ([("max", 20.0, 0.0), ("smoothed", 20.0, 0.0)], "max"),
    ],
)
def test_a_branch_has_to_be_worth_its_bytes(trials: list[tuple[str, float, float]], kept: str) -> None:
    assert StartedEngine("nvfp4", [trial(*item) for item in trials]).finish().entry.recipe == kept
    assert price_db(1.2) == math.inf
