"""Packages that are compiled for the CPU, and a bundle of them: what they compute, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cpp_program import compile_program
from helpers.needs_compiler import needs_compiler
from helpers.runtime_command import rewrite_manifest
from helpers.tiny_pipeline import PROMPTS, denoiser_inputs, tiny_options

from calibration import CalibrationOptions, HighSteps
from engines import DenoiseRuntime
from engines.errors import BackendError, BundleError
from engines.manifest import LATENTS, MANIFEST_VERSION, MODEL_OUTPUT, TIMESTEP, Manifest
from engines.setting_choice import SettingChoice
from engines.text import PromptFile

pytestmark = needs_compiler
TEXT = "encoder_hidden_states"


@pytest.fixture(scope="module")
def bundles(torch_bundle: Path, built: Any) -> dict[str, Path]:
    """The tiny pipeline as torch packages, and for ONNX Runtime."""
    return {"torch": torch_bundle, "onnxruntime": built(tiny_options("fp16", "fp8", "int8"))}


@pytest.fixture(scope="module")
def runtime(bundles: dict[str, Path]) -> Iterator[DenoiseRuntime]:
    """The torch bundle, loaded."""
    with DenoiseRuntime.load(bundles["torch"]) as loaded:
        yield loaded


def test_a_bundle_says_what_its_packages_are(bundles: dict[str, Path]) -> None:
    import torch

    manifest = Manifest.model_validate_json((bundles["torch"] / "manifest.json").read_text())
    assert manifest.version == MANIFEST_VERSION
    assert list(manifest.denoisers) == ["fp16", "fp8", "int8"]
    for name, entry in manifest.engines().items():
        assert (entry.backend, entry.device, entry.backend_version) == ("torch", "cpu", torch.__version__), name
        assert entry.file.path.endswith(".pt2")
        assert {Path(file.path).suffix for file in entry.weights} == {".safetensors"}
        assert entry.onnx_sha256 is None
        assert entry.package is not None
        assert entry.package.batch == (1 if name == "VAE decoder" else 2)
        assert entry.sqnr_db > entry.sqnr_floor_db
    assert manifest.denoisers["int8"][0].lowering == {
        "int8 linear": manifest.denoisers["fp8"][0].lowering["fp8 linear"]
    }
    stored = {name: entry.bytes for name, (entry,) in manifest.denoisers.items()}
    fp8, fp16 = (sum(file.bytes for file in manifest.denoisers[name][0].weights) for name in ("fp8", "fp16"))
    assert fp8 < 0.7 * fp16, stored
    shared = {entry.weights[0].path for (entry,) in manifest.denoisers.values()}
    assert shared == {"engines/fp16+fp8+int8.safetensors"}  # what no precision quantizes is there once


@pytest.mark.parametrize(("name", "floor"), [("fp16", 55.0), ("fp8", 28.0), ("int8", 30.0)])
def test_engines_agree_with_the_onnx_file_of_their_precision(
    runtime: DenoiseRuntime, bundles: dict[str, Path], name: str, floor: float
) -> None:
    with DenoiseRuntime.load(bundles["onnxruntime"]) as other:
        inputs = denoiser_inputs(runtime, 2)
        expected = other.denoiser(name).run(inputs)[MODEL_OUTPUT]
    found = runtime.denoiser(name).run(inputs)[MODEL_OUTPUT]
    assert -10 * np.log10(np.square(found - expected).sum() / np.square(expected).sum()) > floor


def test_any_batch_is_made_of_the_compiled_one(runtime: DenoiseRuntime) -> None:
    engine = runtime.denoiser("int8")
    whole = denoiser_inputs(runtime, 5)
    expected = engine.run(whole)[MODEL_OUTPUT]
    for rows in (1, 2, 3, 4):
        found = engine.run({name: values[:rows] for name, values in whole.items()})[MODEL_OUTPUT]
        assert found.shape == expected[:rows].shape
        assert np.array_equal(found, expected[:rows])


def test_the_runtime_command_runs_a_torch_bundle_and_imports_no_compiler(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "picture.png"
    script = (
        "import sys; from engines.cli import main; assert main() == 0\n"
        "print([name for name in ('torch._inductor.codecache', 'torch._dynamo', 'triton') if name in sys.modules])"
    )
    words = ["run", bundles["torch"], "--prompt", "a red circle", "--seed", "1", "--schedule", "uniform:int8"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words), "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.endswith("\n[]\n")
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long  # the program's own compilation
def test_a_package_runs_without_python(runtime: DenoiseRuntime, bundles: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    program = tmp_path / "run_package"
    compile_program(program)
    entry = runtime.manifest.denoisers["int8"][0]
    inputs = denoiser_inputs(runtime, entry.package.batch)  # type: ignore[union-attr]
    save_file(
        {str(position): np.ascontiguousarray(inputs[spec.name]) for position, spec in enumerate(entry.inputs)},
        tmp_path / "inputs.safetensors",
    )
    files = [bundles["torch"] / file.path for file in entry.files()]
    words = [program, *files, tmp_path / "inputs.safetensors", tmp_path / "outputs.bin"]
    subprocess.run(list(map(str, words)), check=True)
    found = np.fromfile(tmp_path / "outputs.bin", np.float32)
    expected = runtime.denoiser("int8").run(inputs)[MODEL_OUTPUT]
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    missing = subprocess.run(
        [str(program), *map(str, files), str(tmp_path / "none"), "x"], capture_output=True, text=True
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("run_package: ")
    assert "none cannot be read" in missing.stderr
    save_file({"0": inputs[LATENTS]}, tmp_path / "few.safetensors")
    part = tmp_path / "int8.pt2"
    shutil.copy(files[0], part)
    for beside, said in (
        (None, r"takes \d+ tensors, received \d+; name all"),
        ("int8.1.pt2", "is one of several packages"),
    ):
        if beside is not None:
            (tmp_path / beside).touch()
        refused = subprocess.run(
            [str(program), str(part), *map(str, files[1:]), str(tmp_path / "few.safetensors"), str(tmp_path / "x")],
            capture_output=True,
            text=True,
        )
        assert refused.returncode == 1
        assert re.search(said, refused.stderr), refused.stderr


def test_wrong_inputs_are_refused(runtime: DenoiseRuntime) -> None:
    engine, inputs = runtime.denoiser("fp16"), denoiser_inputs(runtime, 2)
    with pytest.raises(BackendError, match=f"needs input {TEXT}; received latents, timestep"):
        engine.run({name: inputs[name] for name in (LATENTS, TIMESTEP)})
    with pytest.raises(BackendError, match=r"latents has shape \(2, 4, 8, 8\), expected"):
        engine.run({**inputs, LATENTS: inputs[LATENTS][:, :, :8, :8]})


def test_a_mixed_schedule_draws_the_picture_that_onnx_runtime_draws(bundles: dict[str, Path]) -> None:
    pictures = {}
    for backend, folder in bundles.items():
        with DenoiseRuntime.load(folder) as loaded:
            pictures[backend] = loaded.generate(["a red circle"], [3], loaded.schedule("uniform:fp16"))
    difference = np.abs(pictures["torch"].astype(int) - pictures["onnxruntime"].astype(int))
    assert difference.max() <= 2


@pytest.mark.usefixtures("all_cores")
def test_calibration_takes_as_many_samples_in_a_call_as_it_is_compiled_for(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tmpdiff_export.calibrate import bundle as calibration_run
    from tmpdiff_export.calibrate.settings import Wanted, open_setting

    found, rows = [], []
    options = CalibrationOptions(HighSteps(2))
    run = DenoiseRuntime.step

    def counted(self: DenoiseRuntime, state: Any, *others: Any) -> Any:
        rows[-1].append(len(state.latents))
        return run(self, state, *others)

    monkeypatch.setattr(DenoiseRuntime, "step", counted)
    for at_once in (2, 1):
        folder = tmp_path / str(at_once)
        shutil.copytree(bundles["torch"], folder)
        rows.append([])
        if at_once == 1:
            monkeypatch.setattr(calibration_run, "samples_per_call", lambda *_: 1)
        prompts = PromptFile(PROMPTS[:2], PROMPTS[2:])
        monkeypatch.setattr(calibration_run, "_latencies", lambda *_: {"fp16": 3.0, "fp8": 2.0, "int8": 1.0})
        setting, _ = open_setting(folder, Wanted(guidance_scale=1.0))
        how = calibration_run.RunOptions(setting=SettingChoice(named=setting.name))
        result = calibration_run.calibrate_bundle(folder, prompts, options, how)
        found.append(result.model_dump(exclude={"settings", "latencies_ms"}))
    assert set(rows[0]) == {2, 1}  # two samples of calibration, one of validation
    assert set(rows[1]) == {1}
    assert sum(rows[0]) == sum(rows[1])
    assert found[0] == found[1]
    folder = tmp_path / "workers"
    shutil.copytree(bundles["torch"], folder)
    open_setting(folder, Wanted(guidance_scale=1.0))
    monkeypatch.undo()
    monkeypatch.setattr(calibration_run, "_latencies", lambda *_: {"fp16": 3.0, "fp8": 2.0, "int8": 1.0})
    result = calibration_run.calibrate_bundle(folder, prompts, options, replace(how, workers=2))
    assert result.model_dump(exclude={"settings", "latencies_ms"}) == found[0]


def test_a_limit_on_resident_engines_needs_a_gpu(bundles: dict[str, Path]) -> None:
    with pytest.raises(BackendError, match=r"on a GPU; this one's engines run on torch \(cpu\)"):
        DenoiseRuntime.load(bundles["torch"], resident_engines=1)


def test_damage_is_found_before_anything_is_loaded(bundles: dict[str, Path], tmp_path: Path) -> None:
    for name in ("int8.pt2", "int8.codes.safetensors", "fp16+fp8+int8.safetensors"):
        copy = tmp_path / name
        shutil.copytree(bundles["torch"], copy)
        path = copy / "engines" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with DenoiseRuntime.load(copy) as loaded, pytest.raises(BundleError, match=re.escape(name)):
            loaded.denoiser("int8")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend_version": "2.0.1"}, "was compiled by torch 2.0.1, installed is .*; install torch 2.0, or build"),
        ({"package": None}, "the manifest does not describe its torch package"),
        ({"device": "sm90 NVIDIA H100"}, "found no NVIDIA GPU|cuda.bindings"),
    ],
)
def test_a_package_that_cannot_run_here_is_refused(
    bundles: dict[str, Path], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundles["torch"], copy)
    rewrite_manifest(copy, lambda data: [entry.update(change) for (entry,) in data["denoisers"].values()])
    with DenoiseRuntime.load(copy) as loaded, pytest.raises(BackendError, match=says):
        loaded.denoiser("fp16")
