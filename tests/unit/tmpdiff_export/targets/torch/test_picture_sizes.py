"""Torch packages have fixed shapes: a bundle for two picture sizes has packages for each, over one set of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.demo_build import linked_copy
from helpers.needs_compiler import needs_compiler
from helpers.tiny_pipeline import PROMPTS, tiny_options
from helpers.whole_pipeline import setting_of, whole_pipeline

from engines.bundle import Bundle
from engines.errors import BundleError
from engines.runtime import DenoiseRuntime
from engines.setting_choice import SettingChoice
from tmpdiff_export.calibrate.settings import Wanted, open_setting

SIZES = ((64, 64), (64, 96))  # height, width

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def bundle(built: Callable[[Any], Path]) -> Path:
    """FP16 and INT8 of the tiny pipeline for the CPU at two sizes; do not write into it."""
    return built(tiny_options("fp16", "int8", backend="torch", device="cpu", workers=2, sizes=SIZES))


def test_packages_of_all_sizes_share_their_weights(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    for entries in (manifest.denoisers["fp16"], manifest.denoisers["int8"], manifest.vae_decoder):
        square, wide = entries
        assert (square.for_size, wide.for_size) == ((16, 16), (16, 24))
        assert square.file.path != wide.file.path
        assert square.weights == wide.weights
        assert square.recipe == wide.recipe
        assert min(square.sqnr_db, wide.sqnr_db) > square.sqnr_floor_db
    assert [entry.for_size for entry in manifest.text_encoder] == [None]
    listed = {file.path for entry in manifest.engines().values() for file in entry.files()}
    assert {path.relative_to(bundle).as_posix() for path in (bundle / "engines").iterdir()} == listed
    contents = [file.sha256 for file in manifest.files() if file.path.endswith(".safetensors")]
    assert len(set(contents)) == len(contents), "no weight file is stored twice"


def test_each_size_is_drawn_by_its_own_package(bundle: Path, tiny_pipeline: Path) -> None:
    source = whole_pipeline(tiny_pipeline)
    with DenoiseRuntime.load(bundle, threads=1) as first:
        for size in SIZES:
            runtime = first.at(SettingChoice(size=size))
            ours = runtime.denoise(runtime.encode(PROMPTS[:1]), runtime.schedule("uniform:fp16"), runtime.noise([7]))
            with torch.inference_mode():
                theirs = source.pipe(
                    PROMPTS[0],
                    generator=torch.Generator().manual_seed(7),
                    num_inference_steps=4,
                    output_type="latent",
                    **source.call_options(setting_of(source, runtime.setting)),
                ).images.numpy()
            assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)  # BF16 where the CPU has it
            assert runtime.decode(ours).shape == (1, *size, 3)


def test_a_setting_more_has_one_of_these_sizes(bundle: Path, tmp_path: Path) -> None:
    copy = linked_copy(bundle, tmp_path / "bundle")
    assert open_setting(copy, Wanted(SettingChoice(steps=6, size=(64, 96))))[1]
    with pytest.raises(BundleError, match="the bundle has engines for 64x64; 96x64: pick one of these"):
        open_setting(copy, Wanted(SettingChoice(size=(96, 96))))
