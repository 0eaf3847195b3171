"""Bundles for ONNX Runtime's CUDA provider: built, run, timed, refused.

There is no GPU here. CUDA is a fake, and so is the provider (`fakes.fake_ort_cuda`): real sessions, optimizers and I/O
binding, on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.fake_ort_cuda import FakeOrtCuda
from fakes.install import Fakes, install
from helpers.demo_build import linked_copy
from helpers.provider_graphs import DEVICE
from helpers.runtime_command import rewrite_manifest
from helpers.small_loops import same_bits
from helpers.tiny_pipeline import PROMPTS

from engines.bundle import Bundle
from engines.errors import BackendError, TmpDiffError
from engines.files import sha256_file
from engines.loop import Loop, host_loop
from engines.precision import DEFAULT_PRECISIONS, Precision
from engines.runtime import DenoiseRuntime


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """The tiny pipeline, built for (what is told to be) the GPU, at all precisions; do not write into it."""
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    folder = tmp_path_factory.mktemp("cuda")
    options = BuildOptions(
        DEFAULT_PRECISIONS, PROMPTS, steps=(4,), backend="onnxruntime", device="cuda", onnx_dir=folder / "onnx"
    )
    with pytest.MonkeyPatch.context() as patch:
        cuda = install(patch).cuda
        ort = FakeOrtCuda.install(patch, cuda)
        build(tiny_pipeline, folder / "bundle", options)
        assert cuda.leaks() == []
        assert ort.alive() == []
    return folder / "bundle"


def test_a_bundle_holds_the_exported_graphs_as_they_are(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    Bundle.open(bundle).verify()
    assert list(manifest.denoisers) == ["fp16", "fp8", "int8", "int4"]
    for name, entry in manifest.engines().items():
        assert (entry.backend, entry.device) == ("onnxruntime", DEVICE), name
        assert entry.file.sha256 == entry.onnx_sha256
        assert entry.sqnr_db > entry.sqnr_floor_db
    for name, (entry,) in manifest.denoisers.items():
        assert sha256_file(bundle.parent / "onnx" / f"{name}.onnx") == entry.file.sha256
    listed = {file.path for entry in manifest.engines().values() for file in entry.files()}
    assert {path.relative_to(bundle).as_posix() for path in (bundle / "engines").iterdir()} == listed
    assert {Path(file).suffix for file in listed} == {".onnx", ".safetensors"}


def test_the_manifest_counts_what_was_fused_and_what_was_not(bundle: Path) -> None:
    denoisers = Bundle.open(bundle).manifest.denoisers
    assert denoisers["int4"][0].lowering["MatMulNBits"] == 25
    assert "DequantizeLinear" not in denoisers["int4"][0].lowering
    for name in ("fp8", "int8"):
        assert denoisers[name][0].lowering["DequantizeLinear"] >= 33, name
        assert denoisers[name][0].lowering["QuantizeLinear"] == 13, name
    assert "QuantizeLinear" not in denoisers["fp16"][0].lowering


@pytest.mark.parametrize(
    "choices",
    [("fp16", "int4", "int8", "fp8"), ("fp16", "int4", "reuse1", "int8"), ("int4", "reuse0", "fp16", "reuse1")],
)
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_a_bundle_runs_in_the_device_loop(
    bundle: Path, limit: int | None, choices: tuple[str, ...], fakes: Fakes, ort: FakeOrtCuda
) -> None:
    with DenoiseRuntime.load(bundle, resident_engines=limit) as runtime:
        conditioning, noise = runtime.encode(PROMPTS[:2]), runtime.noise([3, 4])
        plan = runtime.schedule("uniform:fp16").model_copy(update={"precisions": choices})
        runtime.preload(plan)
        seen: list[str] = []
        found = runtime.denoise(conditioning, plan, noise, on_step=lambda _k, name, _seconds: seen.append(name))
        assert tuple(seen) == choices
        scale = runtime.setting.guidance_scale
        loop = Loop(runtime.table, plan.precisions, conditioning.batch(scale), noise, scale)
        assert np.isfinite(found).all()
        assert same_bits(found, host_loop(loop, runtime.denoiser))
        assert runtime.decode(found).shape[0] == 2
    assert fakes.cuda.leaks() == []
    assert ort.alive() == []


def test_engines_agree_with_the_bundle_for_the_cpu(
    bundle: Path, small_bundle: Path, fakes: Fakes, ort: FakeOrtCuda
) -> None:
    with DenoiseRuntime.load(small_bundle) as cpu, DenoiseRuntime.load(bundle) as gpu:
        assert cpu.manifest.denoisers["fp16"][0].device == "cpu"
        conditioning, noise = cpu.encode(PROMPTS[:1]), cpu.noise([1])
        plan = cpu.schedule("uniform:fp16")
        expected = cpu.denoise(conditioning, plan, noise)
        found = gpu.denoise(conditioning, gpu.schedule("uniform:fp16"), noise)
    assert -10 * np.log10(np.square(found - expected).sum() / np.square(expected).sum()) > 40


def test_bench_times_the_steps_on_the_device(
    bundle: Path, tmp_path: Path, fakes: Fakes, ort: FakeOrtCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    from tmpdiff_export.cli import main

    assert main(["bench", str(bundle), "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["fp16", "fp8", "int8", "int4"]
    assert result["machine"].startswith(f"{DEVICE}, onnxruntime ")
    assert result["batch"] == 2  # guidance
    assert all(row["median_ms"] > 0 for row in result["rows"])
    assert "25 x MatMulNBits" in result["rows"][3]["runs"]
    steps = result["loops"][0]["swaps"] + 1
    assert [(loop["precisions"], loop["resident_engines"]) for loop in result["loops"]] == [
        (f"fp16/{name}", None) for name in ("fp8", "int8", "int4")
    ]
    opened = len(ort.opened)
    pair = linked_copy(bundle, tmp_path / "pair")
    rewrite_manifest(pair, lambda data: [data["denoisers"].pop(name) for name in ("fp8", "int8")])
    assert main(["bench", str(pair), "--rounds", "1", "--resident-engines", "1", "--json"]) == 0
    loops = json.loads(capsys.readouterr().out)["loops"]
    assert [(loop["swaps"], loop["resident_engines"]) for loop in loops] == [
        (swaps, limit) for limit in (None, 1) for swaps in (steps - 1, 1)
    ]
    # With room for one engine every swap of a mixed loop loads one; there are 3 timed rounds at least.
    assert len(ort.opened) - opened > 3 * (steps - 1)


def test_the_command_lines_run_and_inspect_it(
    bundle: Path, tmp_path: Path, ort: FakeOrtCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines.cli import main as runtime_main
    from tmpdiff_export.cli import main

    arguments = ["run", str(bundle), "--prompt", PROMPTS[0], "--seed", "1", "--schedule", "uniform:int4"]
    arguments += ["--resident-engines", "1"]
    assert runtime_main([*arguments, "--out", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").stat().st_size > 0
    assert {Path(item.path).stem for item in ort.opened} == {"int4", "text_encoder", "vae_decoder"}
    assert main(["inspect", str(bundle)]) == 0
    assert "25 x MatMulNBits" in capsys.readouterr().out
    ort.refused = {"LayerNormalization"}
    assert runtime_main([*arguments, "--out", str(tmp_path / "other.png")]) == 1
    said = capsys.readouterr().err
    assert "has no kernel for" in said
    assert "x LayerNormalization" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "other.png").exists()


def test_a_miscomputed_engine_fails_the_build(
    tiny_pipeline: Path, tmp_path: Path, fakes: Fakes, ort: FakeOrtCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the arithmetic is right: the check of the build has to see it."""
    from fakes import fake_ort_cuda

    from engines.errors import BuildError
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    bind = fake_ort_cuda.Binding.bind_input

    def swapped(self: Any, name: str, *where: Any) -> None:
        bind(self, name, *where)
        if name == "encoder_attention_mask":  # reads the latents in its place
            *rest, _ = where
            self.real.bind_input(name, "cpu", 0, *rest[2:], self.spans["latents"][0])

    monkeypatch.setattr(fake_ort_cuda.Binding, "bind_input", swapped)
    options = BuildOptions((Precision.FP16,), PROMPTS, steps=(4,), backend="onnxruntime", device="cuda")
    with pytest.raises(BuildError, match="fp16: the built engine has an SQNR of"):
        build(tiny_pipeline, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_builds_that_cannot_be_are_refused_before_any_work(tmp_path: Path, fakes: Fakes) -> None:
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    for precisions, says in (
        ((Precision.FP16, Precision.NVFP4), "'onnxruntime' on a GPU has no nvfp4; choose from fp16, fp8, int8, int4"),
        ((Precision.FP16,), "needs CUDAExecutionProvider.*; --device cpu builds for this machine's CPU"),
    ):
        options = BuildOptions(precisions, PROMPTS, backend="onnxruntime", device="cuda")
        with pytest.raises(TmpDiffError, match=says):
            build(tmp_path / "no pipeline", tmp_path / "bundle", options)
    with pytest.raises(BackendError, match="--device is for the backends torch and onnxruntime; 'tensorrt'"):
        build(tmp_path, tmp_path / "bundle", BuildOptions((Precision.FP16,), PROMPTS, backend="tensorrt", device="cpu"))


def test_a_provider_that_cannot_start_is_refused_before_any_work(tmp_path: Path, ort: FakeOrtCuda) -> None:
    from tmpdiff_export.targets.onnxruntime.cuda import OnnxCudaTarget

    ort.starts = False
    with pytest.raises(
        BackendError,
        match=r"CUDAExecutionProvider cannot start \(ONNX Runtime's log line above says why\); it needs.*--device cpu builds for",
    ):
        OnnxCudaTarget((Precision.FP16,))
    ort.starts = True
    target = OnnxCudaTarget((Precision.FP16,))
    with pytest.raises(TmpDiffError, match=r"parameters take .* bytes in 16 bit, the GPU has"):
        target.require_memory(1 << 40)
