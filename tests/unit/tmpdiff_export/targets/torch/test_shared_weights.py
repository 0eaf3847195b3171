"""Packages that share weights, are emulated, or are made by several processes, without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.needs_compiler import needs_compiler
from helpers.runtime_command import rewrite_manifest
from helpers.tiny_pipeline import denoiser_inputs

from engines import DenoiseRuntime
from engines.errors import BackendError
from engines.manifest import MODEL_OUTPUT, EngineEntry, Manifest
from engines.precision import Precision
from tmpdiff_export.weights.files import places


@needs_compiler
def test_the_reference_may_be_made_of_the_weights_of_another_engine(torch_variants: Path, torch_bundle: Path) -> None:
    assert {path.name for path in (torch_variants / "engines").glob("fp*")} == {
        "fp16.pt2",
        "fp8.pt2",
        "fp8.codes.safetensors",
        "fp16+fp8+nvfp4.safetensors",
    }
    with DenoiseRuntime.load(torch_variants) as loaded, DenoiseRuntime.load(torch_bundle) as separate:
        fp16, fp8 = (loaded.manifest.denoisers[name][0] for name in ("fp16", "fp8"))
        assert list(loaded.manifest.denoisers) == ["fp16", "fp8", "nvfp4"]
        assert fp16.weights == fp8.weights
        assert fp16.lowering == {"fp8 linear in a 16-bit product": fp8.lowering["fp8 linear"]}
        assert fp16.sqnr_floor_db == fp8.sqnr_floor_db
        assert fp8.sqnr_db < fp16.sqnr_db < separate.manifest.denoisers["fp16"][0].sqnr_db - 10
        inputs = denoiser_inputs(loaded, 2)
        found, exact = (item.denoiser("fp16").run(inputs)[MODEL_OUTPUT] for item in (loaded, separate))
        error = np.square(found - exact).sum() / np.square(exact).sum()
        assert 20.0 < -10 * np.log10(error) < 50.0  # that of FP8 weights, and not none
        picture = loaded.generate(["a red circle"], [3], loaded.schedule("uniform:fp16"))
        assert picture.shape == (1, 64, 64, 3)


@needs_compiler
def test_nvfp4_is_emulated_with_its_own_error_and_says_so(torch_variants: Path) -> None:
    with DenoiseRuntime.load(torch_variants) as loaded:
        entry = loaded.manifest.denoisers["nvfp4"][0]
        layers = loaded.manifest.denoisers["fp8"][0].lowering["fp8 linear"]
        assert entry.lowering == {"nvfp4 linear emulated in a 16-bit product": layers, "fp8 attention": 2}
        inputs = denoiser_inputs(loaded, 2)
        found, fp8 = (loaded.denoiser(name).run(inputs)[MODEL_OUTPUT] for name in ("nvfp4", "fp8"))
    error = np.square(found - fp8).sum() / np.square(fp8).sum()
    assert entry.sqnr_floor_db < -10 * np.log10(error) < 26.0  # that of 4-bit codes, and not none


@needs_compiler
def test_two_workers_make_what_one_process_makes(torch_variants: Path, torch_bundle: Path) -> None:
    alone, spread = (
        Manifest.model_validate_json((folder / "manifest.json").read_text())
        for folder in (torch_variants, torch_bundle)
    )
    assert spread.range_calibration == alone.range_calibration
    for (one,), (two,) in ((alone.text_encoder, spread.text_encoder), (alone.vae_decoder, spread.vae_decoder)):
        # The hash of the weights among it; a package holds paths, and has another one each time.
        assert one.model_dump(exclude={"file"}) == two.model_dump(exclude={"file"})
    one, two = (item.denoisers["fp8"][0] for item in (alone, spread))
    # Which files its tensors lie in depends on what else is in the bundle; so do their sizes.
    differs = {"file": True, "weights": True, "package": {"weights_bytes"}}
    assert one.model_dump(exclude=differs) == two.model_dump(exclude=differs)
    assert bytes_of(torch_variants, one) == bytes_of(torch_bundle, two)


def bytes_of(bundle: Path, engine: EngineEntry) -> dict[str, tuple[object, bytes]]:
    """Every tensor that an engine reads: type and content."""
    return {
        name: ((place.dtype, place.shape), place.read().view(-1).view(torch.uint8).numpy().tobytes())
        for file in engine.weights
        for name, place in places(bundle / file.path).items()
    }


@needs_compiler
def test_weights_in_another_folder_than_their_package_are_refused(torch_variants: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(torch_variants, copy)
    (copy / "elsewhere").mkdir()

    def change(data: dict[str, Any]) -> None:
        first = data["denoisers"]["fp16"][0]["weights"][0]
        elsewhere = f"elsewhere/{Path(first['path']).name}"
        shutil.copyfile(copy / first["path"], copy / elsewhere)
        first["path"] = elsewhere

    rewrite_manifest(copy, change)
    with (
        DenoiseRuntime.load(copy) as loaded,
        pytest.raises(BackendError, match=r"lies in another folder than engines/fp16\.pt2, expected the same"),
    ):
        loaded.denoiser("fp16")


def test_what_cannot_share_weights_is_refused() -> None:
    from tmpdiff_export.targets.torch.settings import PackageSettings

    built = (Precision.FP16, Precision.FP8)
    PackageSettings().require_unset("onnxruntime")
    settings = PackageSettings(share_weights=Precision.FP8)
    settings.require_built(built)
    with pytest.raises(
        BackendError, match="is for packages of the torch backend; engines of 'tensorrt' hold their own"
    ):
        settings.require_unset("tensorrt")
    for wrong in (Precision.INT8, Precision.FP16):
        with pytest.raises(
            BackendError, match=f"names {wrong.value}, expected a quantized precision that is built: fp8"
        ):
            PackageSettings(share_weights=wrong).require_built(built)
