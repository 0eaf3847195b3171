"""`tmpdiff-export build`: what it refuses before the work, and what it leaves behind when it is cut short."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.children import start, wait_for
from helpers.commands import EXPORT, assert_refused, called, save_prompts, started
from helpers.paths import ROOT

from tmpdiff_export.bundling import estimates

CPU = ("--backend", "onnxruntime")


def refused(*args: object, says: str) -> None:
    assert_refused(called(EXPORT, *args), says)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return save_prompts(tmp_path)


def test_build_refuses_bad_input_and_leaves_nothing(tmp_path: Path, prompts: Path, demo_pipeline: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    bundle = out / "bundle"
    build = ("--out", bundle, "--prompts", prompts)
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline", "_diffusers_version": "0.42.1"}')
    blank = tmp_path / "blank.txt"
    blank.write_text("# nothing\n\n")
    absent = tmp_path / "absent"
    assert_refused(started(EXPORT, "build", absent, *build), "does not exist; pass a folder written by save_pretrained")
    refused("build", empty, *build, says="it holds no model_index.json")
    refused("build", broken, *build, says="a pipeline without a transformer or unet is not supported")
    refused(
        "build",
        demo_pipeline,
        *build,
        "--precisions",
        "fp16,fp7",
        says="unknown precision 'fp7'; choose from fp16, fp8, int8, int4",
    )
    refused("build", demo_pipeline, *build, "--precisions", "int8", says="lacks fp16")
    refused("build", demo_pipeline, *build, "--precisions", "fp16,fp16", says="repeats a name")
    refused(
        "build",
        demo_pipeline,
        *build,
        "--backend",
        "cuda",
        says="backend is 'cuda', expected one of auto, onnxruntime, ",
    )
    refused("build", demo_pipeline, *build, "--backend", "tensorrt", says="needs the module tensorrt or tensorrt_lean")
    refused("build", demo_pipeline, *build, "--backend", "torch", says="--device cpu compiles torch packages for this")
    refused(
        "build",
        demo_pipeline,
        *build,
        "--backend",
        "onnxruntime",
        "--device",
        "cuda",
        says="needs CUDAExecutionProvider",
    )
    refused("build", demo_pipeline, *build, "--version-compatible", says="are settings of TensorRT plans")
    refused("build", demo_pipeline, *build, "--steps", "4,5,4", says="--steps names the same twice")
    refused(
        "build",
        demo_pipeline,
        *build,
        "--size",
        "256x256,256x250",
        says="height 250 does not fit this pipeline; give a positive multiple of 16",
    )
    refused("build", demo_pipeline, *build, "--size", "8x16", says="width 8 does not fit this pipeline")
    refused("build", demo_pipeline, *build, "--text-length", "999", says="text length 999 does not fit this pipeline")
    refused("build", demo_pipeline, *build, "--clip-skip", "1", says="clip")
    for option, value in (("--steps", "0"), ("--steps", "4,"), ("--size", "256"), ("--text-length", "0")):
        wrong = called(EXPORT, "build", demo_pipeline, *build, option, value)
        assert (wrong.returncode, f"argument {option}: " in wrong.stderr) == (2, True), wrong.stderr
    refused("build", demo_pipeline, *build, "--onnx-dir", blank, says="blank.txt is a file; name a folder")
    refused("build", demo_pipeline, *build, "--batch", 10**9, says="expected 1024 pictures at most")
    refused("build", demo_pipeline, *build, "--workers", 999_999, says="workers is 999999, expected 1 to 256")
    refused("build", demo_pipeline, *build, "--onnx-dir", bundle / "onnx", says="is inside the bundle")
    refused("build", demo_pipeline, "--out", tmp_path, "--prompts", prompts, "--force", says="is no bundle")
    refused("build", demo_pipeline, "--out", bundle, "--prompts", blank, says="holds no prompts")
    refused("build", demo_pipeline, "--out", bundle, "--prompts", tmp_path / "no.txt", says="no.txt does not exist")
    refused("build", empty, "--out", out / "deep" / "er" / "bundle", "--prompts", prompts, says="model_index.json")
    assert list(out.iterdir()) == []


def test_build_refuses_an_unsupported_denoiser(tmp_path: Path, prompts: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    refused(
        "build", tmp_path / "pipe", "--out", tmp_path / "bundle", "--prompts", prompts,
        says="denoiser class UNet2DModel is not supported; this release exports PixArtTransformer2DModel",
    )  # fmt: skip
    assert not (tmp_path / "bundle").exists()


def test_build_refuses_a_scheduler_that_draws_noise(tmp_path: Path, prompts: Path, demo_pipeline: Path) -> None:
    pipeline = tmp_path / "pipe"
    shutil.copytree(demo_pipeline, pipeline)
    config = pipeline / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "algorithm_type": "sde-dpmsolver++"}))
    refused("build", pipeline, "--out", tmp_path / "bundle", "--prompts", prompts, says="DPMSolverMultistepScheduler")
    assert not (tmp_path / "bundle").exists()


def test_build_refuses_to_overwrite(tiny_bundle: Path, copy_of, prompts: Path, tiny_pipeline: Path) -> None:
    bundle = copy_of(tiny_bundle)
    refused("build", tiny_pipeline, "--out", bundle, "--prompts", prompts, says="already exists")
    assert called(EXPORT, "verify", bundle).returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "already exists"),
        (("--backend", "torch", "--refittable", "--out", "absent"), "--refittable are settings of TensorRT plans"),
        (("--backend", "onnxruntime", "--workers", 2, "--out", "absent"), "--workers is for packages of the torch"),
        (("--backend", "onnxruntime", "--steps", "4,4", "--out", "absent"), "--steps names the same twice"),
        (
            ("--backend", "onnxruntime", "--steps", ",".join(map(str, range(1, 66))), "--out", "absent"),
            "65 settings are asked for, expected 64 at most",
        ),
        (("--backend", "onnxruntime", "--out", "/proc/bundle"), "output folder /proc/bundle cannot be written"),
    ],
)
def test_build_refuses_before_its_slow_imports(
    words: tuple[object, ...], says: str, tmp_path: Path, prompts: Path, demo_pipeline: Path
) -> None:
    script = (
        "import sys; from tmpdiff_export.cli import main; "
        "assert main(sys.argv[1:]) == 1; assert 'torch' not in sys.modules"
    )
    asked = ["build", demo_pipeline, "--out", tmp_path, "--prompts", prompts, *words]
    result = subprocess.run([sys.executable, "-c", script, *map(str, asked)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("build", signal.SIGINT, "nothing half-written is left"),
        ("build", signal.SIGTERM, "nothing half-written is left"),
        ("build", signal.SIGHUP, "nothing half-written is left"),
        ("demo", signal.SIGINT, "the demo starts over when it is run again"),
    ],
)
def test_an_interrupted_build_leaves_finished_stages_and_says_so(
    name: str, how: signal.Signals, says: str, tmp_path: Path, prompts: Path, tiny_pipeline: Path
) -> None:
    out = tmp_path / "out"
    words, middle = {  # the embedded pipeline runs for a while before its first ranges
        "build": (
            (tiny_pipeline, "--out", out / "bundle", "--prompts", prompts, "--onnx-dir", out / "onnx"),
            "check-denoiser-*",
        ),
        "demo": (("--out", out), "weights-text_encoder-*"),
    }[name]
    stages = out / ".bundle.stages"
    with start(
        [sys.executable, "-m", EXPORT, name, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        wait_for(lambda: list(stages.glob(middle)), process)
        process.send_signal(how)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert f"tmpdiff-export: interrupted; {says}" in errors
    assert "Traceback" not in errors
    assert list(out.iterdir()) == [stages]
    kept = [path for path in stages.iterdir() if path.name != "lock"]
    assert kept
    assert all((path / "stage.json").exists() for path in kept), "nothing half-written"
    size = f"{len(kept)} finished stages, "
    assert [line for line in errors.splitlines() if f"kept for the next run of the same command: {size}" in line]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_during_a_build_leaves_finished_stages(
    tmp_path: Path, prompts: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else fills it, so that what was free before the work is not there any more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        words = ("build", tiny_pipeline, "--out", disk / "bundle", "--prompts", prompts, "--steps", "2", *CPU)
        refused(*words, says="of disk (text encoders and VAE decoder 0.3 MB, fp16 1.4 MB, ")
        assert list(disk.iterdir()) == []
        monkeypatch.setattr(estimates.shutil, "disk_usage", lambda path: _Usage(10**12))
        result = called(EXPORT, *words)
        assert result.returncode == 1
        assert "disk is full" in result.stderr
        assert "Traceback" not in result.stderr
        (stages,) = disk.iterdir()
        assert stages.name == ".bundle.stages"
        kept = [path for path in stages.iterdir() if path.name != "lock"]
        assert kept
        assert all((path / "stage.json").exists() for path in kept), "nothing half-written"
        assert f"kept for the next run of the same command: {len(kept)} finished stages, " in result.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


@dataclass(frozen=True)
class _Usage:
    free: int


@pytest.mark.parametrize(
    ("disk", "memory", "says"),
    [
        (5_000_000, 10**12, r"needs about 6\.[01] MB of disk \(text encoders and VAE decoder 0\.3 MB, fp16 1\.4 MB, .*\) and "
         r"5\.0 MB is free; a build without --onnx-dir would fit \(3\.5 MB\)$"),
        (100_000, 10**12, r" of disk \(.*\) and 0\.1 MB is free; it needs \d\.\d MB more$"),
        (10**12, 10**9, r"needs about 2\.2 GB of host memory \(libraries 2\.1 GB, .*\) and 1\.0 GB is free; it needs 1\.2 GB more$"),
    ],
)  # fmt: skip
def test_a_build_that_does_not_fit_is_refused_before_work(
    disk: int,
    memory: int,
    says: str,
    tmp_path: Path,
    prompts: Path,
    tiny_pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda path: _Usage(disk))
    monkeypatch.setattr(estimates, "host_available_bytes", lambda: memory)
    monkeypatch.setattr("tmpdiff_export.bundling.making.gather", lambda *arguments: pytest.fail("it works"))
    words = ("build", tiny_pipeline, "--out", tmp_path / "deep/bundle", "--onnx-dir", tmp_path / "onnx", *CPU)
    result = called(EXPORT, *words, "--prompts", prompts, "--precisions", "fp16,int8,int4")
    assert_refused(result, "this build needs about ")
    assert re.search(says, result.stderr.rstrip()), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [prompts.name], "nothing is left"
