"""Builds of several settings: each draws what diffusers draws at that size, number of steps and seed."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import EXPORT, called, save_prompts
from helpers.tiny_pipeline import PROMPTS, tiny_options
from helpers.whole_pipeline import setting_of, whole_pipeline

from engines.bundle import Bundle
from engines.runtime import DenoiseRuntime
from engines.setting_choice import SettingChoice
from tmpdiff_export.pipelines.load import SourcePipeline

STEPS = (4, 6)
SIZES = ((64, 64), (64, 96))  # height, width


@pytest.fixture(scope="module")
def several(built: Any) -> Path:
    """FP16 and INT8 of the tiny pipeline for ONNX Runtime in four settings; do not write into it."""
    folder: Path = built(tiny_options(steps=STEPS, sizes=SIZES))
    return folder


@pytest.fixture(scope="module")
def source(tiny_pipeline: Path) -> SourcePipeline:
    return whole_pipeline(tiny_pipeline)


def test_there_is_a_setting_for_every_size_and_number_of_steps(several: Path) -> None:
    manifest = Bundle.open(several).manifest
    found = [((entry.height, entry.width), entry.num_inference_steps) for entry in manifest.settings]
    assert found == list(product(SIZES, STEPS))
    assert [entry.name for entry in manifest.settings] == [
        "4-64x64-g4.5-t40", "6-64x64-g4.5-t40", "4-96x64-g4.5-t40", "6-96x64-g4.5-t40",
    ]  # fmt: skip
    assert [entry.latents_shape for entry in manifest.settings[1:3]] == [(4, 16, 16), (4, 16, 24)]
    assert all(len(entries) == 1 for entries in manifest.denoisers.values()), "one graph runs them all"
    assert {path.relative_to(several).as_posix() for path in several.glob("settings/*/*")} == {
        entry.sampler.path for entry in manifest.settings
    }
    assert Bundle.open(several).verify() == len(manifest.files())


@pytest.mark.parametrize(("size", "steps"), product(SIZES, STEPS))
def test_each_draws_what_the_pipeline_draws_for_the_same_seed(
    size: tuple[int, int], steps: int, several: Path, source: SourcePipeline
) -> None:
    with DenoiseRuntime.load(several, setting=SettingChoice(steps, size), threads=1) as runtime:
        schedule = runtime.schedule("uniform:fp16")
        ours = runtime.denoise(runtime.encode(PROMPTS[:2]), schedule, runtime.noise([7, 8]))
        pictures = runtime.decode(ours)
    height, width = size
    options = source.call_options(setting_of(source, runtime.setting))
    assert (options["height"], options["width"]) == size
    with torch.inference_mode():
        theirs = source.pipe(
            list(PROMPTS[:2]),
            generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
            num_inference_steps=steps,
            output_type="latent",
            **options,
        ).images.numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)
    assert pictures.shape == (2, height, width, 3)


def test_the_command_line_asks_for_them(several: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    words = ("--precisions", "fp16", "--backend", "onnxruntime", "--steps", "4,6", "--size", "64x64,96x64")
    done = called(EXPORT, "build", tiny_pipeline, "--out", out, "--prompts", save_prompts(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    assert Bundle.open(out).manifest.settings == Bundle.open(several).manifest.settings
    for entry in Bundle.open(out).manifest.settings:
        assert f"setting {entry.name}: {entry.described}" in done.stdout
    shown = called(EXPORT, "inspect", out).stdout
    assert "setting 4-64x64-g4.5-t40: not calibrated yet: tmpdiff-export calibrate " in shown
    assert "--prompts FILE --scheduler-setting 6-96x64-g4.5-t40" in shown
