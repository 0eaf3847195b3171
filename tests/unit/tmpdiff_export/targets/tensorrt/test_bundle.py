"""A whole bundle built for TensorRT and run: on the FAKES of tensorrt and CUDA, whose engines run on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes.fake_kernels  # noqa: F401
import numpy as np
import pytest
from fakes.install import Fakes, install
from helpers.tiny_pipeline import PROMPTS, tiny_options

from engines.bundle import Bundle
from engines.errors import BackendError, BuildError
from engines.loop import Loop, host_loop
from engines.manifest import EngineEntry
from engines.precision import Precision
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule

NUM_STEPS = 4
PRECISIONS = (Precision.FP16, Precision.INT8, Precision.INT4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, cache: Path) -> Iterator[Path]:
    """Built once; do not write into it."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        out = tmp_path_factory.mktemp("bundle") / "bundle"
        build_bundle(tiny_pipeline, out, cache, version_compatible=True)
        yield out


def build_bundle(tiny_pipeline: Path, out: Path, cache: Path, **options: Any) -> Any:
    from engines.backends.tensorrt.options import PlanOptions
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.targets.tensorrt.settings import PlanSettings

    precisions = options.pop("precisions", PRECISIONS)
    settings = PlanSettings(options=PlanOptions(**options), cache=cache)
    return build(
        tiny_pipeline,
        out,
        BuildOptions(precisions=precisions, prompts=PROMPTS, steps=(NUM_STEPS,), backend="tensorrt", plans=settings),
    )


def mixed(bundle: Bundle) -> Schedule:
    names = ("fp16", "int8", "int4", "fp16")
    return Schedule(bundle_id=bundle.manifest.bundle_id, precisions=names, origin="test")


def inputs_of(runtime: DenoiseRuntime) -> tuple[Any, np.ndarray]:
    return runtime.encode(PROMPTS[:2]), runtime.noise([3, 4])


def test_the_manifest_says_what_the_plans_are(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert Bundle.open(bundle).verify() == 2 + 2 * 5
    names = [name for entry in manifest.engines().values() for name in (entry.file.path, plan_of(entry).inspector.path)]
    assert sorted(path.relative_to(bundle).as_posix() for path in (bundle / "engines").iterdir()) == sorted(names)
    for name, entry in manifest.engines().items():
        assert entry.weights == ()  # a plan has its weights itself
        assert (entry.backend, entry.backend_version) == ("tensorrt", "11.4.0.106"), name
        assert entry.device == "sm90 Fake H200"
        assert entry.file.path.endswith(".plan")
        assert entry.sqnr_db >= entry.sqnr_floor_db
        assert entry.plan is not None
        assert entry.plan.version_compatible
        json.loads((bundle / entry.plan.inspector.path).read_text())
        assert entry.plan.weights_bytes > 0
        assert entry.plan.scratch_bytes > 0
    denoisers = manifest.denoisers
    assert plan_of(denoisers["int8"][0]).layers["int8"].layers > 0
    assert "int8" not in plan_of(denoisers["fp16"][0]).layers
    assert sum(share.time_share or 0.0 for share in plan_of(denoisers["int8"][0]).layers.values()) == pytest.approx(1.0)
    (profile,) = plan_of(denoisers["fp16"][0]).profiles
    assert profile["latents"] == ((1, 4, 16, 16), (2, 4, 16, 16), (8, 4, 16, 16))  # 1 to 4 pictures, guided or not
    assert profile["encoder_hidden_states"] == (
        (1, 40, 128),
        (2, 40, 128),
        (8, 40, 128),
    )  # as long as prompts are padded


def plan_of(entry: EngineEntry) -> Any:
    assert entry.plan is not None
    return entry.plan


def test_the_device_loop_equals_the_host_loop_over_the_same_engines(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    with DenoiseRuntime.load(bundle) as runtime:
        conditioning, noise = inputs_of(runtime)
        schedule = mixed(runtime.bundle)
        found = runtime.denoise(conditioning, schedule, noise)
        scale = runtime.setting.guidance_scale
        loop = Loop(runtime.table, schedule.precisions, conditioning.batch(scale), noise, scale)
        expected = host_loop(loop, runtime.denoiser)
    assert np.isfinite(found).all()
    assert np.array_equal(found, expected)


def test_it_is_near_the_same_bundle_on_the_cpu(bundle: Path, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = DenoiseRuntime.load(built(tiny_options(num_steps=NUM_STEPS)))
    conditioning, noise = inputs_of(cpu)
    expected = cpu.denoise(conditioning, cpu.schedule("uniform:fp16"), noise)
    install(monkeypatch)
    with DenoiseRuntime.load(bundle) as runtime:
        conditioning, noise = inputs_of(runtime)
        found = runtime.denoise(conditioning, runtime.schedule("uniform:fp16"), noise)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.02


def test_prompt_to_picture_and_calibration_work(bundle: Path, copy_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from calibration import CalibrationOptions, HighSteps
    from engines.text import PromptFile
    from tmpdiff_export.calibrate.bundle import calibrate_bundle

    fakes = install(monkeypatch)
    fakes.settings.layer_ms["FP16"] = 1.0
    mine = copy_of(bundle)
    found = calibrate_bundle(mine, PromptFile(PROMPTS[:1], PROMPTS[1:2]), CalibrationOptions(HighSteps(1)))
    assert len(found.schedule) == NUM_STEPS
    assert found.settings is not None
    assert found.settings.machine == "sm90 Fake H200, tensorrt 11.4.0.106"
    assert fakes.cuda.leaks() == []
    with DenoiseRuntime.load(mine) as runtime:
        seconds: list[float] = []
        pictures = runtime.generate(
            PROMPTS[:1],
            [0],
            runtime.schedule(),
            on_step=lambda _index, _name, time: seconds.append(time),
        )
    assert pictures.shape == (1, 64, 64, 3)
    assert len(seconds) == NUM_STEPS
    assert min(seconds) > 0


def test_a_limit_on_resident_engines_changes_nothing_but_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, weights = [], []
    for limit in (None, 2, 1):
        fakes = install(monkeypatch)
        with DenoiseRuntime.load(bundle, resident_engines=limit) as runtime:
            conditioning, noise = inputs_of(runtime)
            results.append(runtime.denoise(conditioning, mixed(runtime.bundle), noise))
        weights.append(fakes.cuda.peak_bytes)
        assert fakes.cuda.leaks() == []
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert weights[2] < weights[1] < weights[0]


def test_nothing_waits_for_the_device_inside_the_loop(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = install(monkeypatch)
    with DenoiseRuntime.load(bundle) as runtime:
        conditioning, noise = inputs_of(runtime)
        schedule = mixed(runtime.bundle)
        for _ in range(2):  # the second run captures, later ones launch
            runtime.denoise(conditioning, schedule, noise)
        start = len(fakes.cuda.calls)
        runtime.denoise(conditioning, schedule, noise)
        names = fakes.cuda.names(start)
    assert names.count("cudaGraphLaunch") == NUM_STEPS
    assert sum("Synchronize" in name for name in names) == 1
    assert names.index("cudaStreamSynchronize") > max(
        index for index, name in enumerate(names) if name == "cuLaunchKernel"
    )
    assert not {"cudaMalloc", "cudaFree", "cudaHostAlloc"} & set(names)


def test_the_lean_runtime_runs_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lean=True)
    with DenoiseRuntime.load(bundle) as runtime:
        conditioning, noise = inputs_of(runtime)
        assert np.isfinite(runtime.denoise(conditioning, mixed(runtime.bundle), noise)).all()


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ({"gpus": 0}, "found no NVIDIA GPU"),
        ({"compute_capability": (8, 9)}, r"was built for sm90 Fake H200 .* this GPU is sm89"),
        ({"version": "10.16.1.11"}, r"cannot load engine text encoder|cannot load engine fp16"),
    ],
)
def test_a_host_that_cannot_run_it_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, host: dict[str, Any], says: str
) -> None:
    install(monkeypatch, **host)
    with pytest.raises(BackendError, match=says), DenoiseRuntime.load(bundle) as runtime:
        runtime.generate(PROMPTS[:1], [0], runtime.schedule("uniform:fp16"))


def test_a_batch_outside_the_profile_names_the_profile(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with (
        DenoiseRuntime.load(bundle) as runtime,
        pytest.raises(BackendError, match=r"has shape \(10, 40\), optimization profile 0 takes \(1, 40\) to \(8, 40\)"),
    ):
        runtime.generate(list(PROMPTS) * 3, list(range(9)), runtime.schedule("uniform:fp16"))


def test_an_interrupted_build_goes_on_with_the_plans_it_has(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = install(monkeypatch)
    cache = tmp_path / "plans"

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("int8: "):
            raise KeyboardInterrupt

    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.targets.tensorrt.settings import PlanSettings

    options = BuildOptions(PRECISIONS[:2], PROMPTS, NUM_STEPS, backend="tensorrt", plans=PlanSettings(cache=cache))
    with pytest.raises(KeyboardInterrupt):
        build(tiny_pipeline, tmp_path / "bundle", options, progress)
    assert not (tmp_path / "bundle").exists()
    finished = {path.name: path.read_bytes() for path in cache.glob("*.plan")}
    assert len(finished) == 3  # text encoder, VAE decoder and FP16
    before = len(fakes.settings.builds)
    build(tiny_pipeline, tmp_path / "bundle", options)
    built = len(fakes.settings.builds) - before
    assert built == 2  # both INT8 variants; the others were there
    assert all((cache / name).read_bytes() == content for name, content in finished.items())
    build(tiny_pipeline, tmp_path / "again", options)
    assert len(fakes.settings.builds) - before == built
    first, again = (Bundle.open(tmp_path / name).manifest for name in ("bundle", "again"))
    assert [entry.file for (entry,) in first.denoisers.values()] == [
        entry.file for (entry,) in again.denoisers.values()
    ]


def test_what_cannot_be_built_is_refused_before_the_pipeline_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "nowhere"
    install(monkeypatch, compute_capability=(8, 6))
    with pytest.raises(BackendError, match=r"fp8 needs compute capability 8\.9 .* choose fp16, int8, int4"):
        build_bundle(nowhere, tmp_path / "b", tmp_path / "c", precisions=(Precision.FP16, Precision.FP8))
    install(monkeypatch, lean=True)
    with pytest.raises(BackendError, match="needs the full tensorrt package"):
        build_bundle(nowhere, tmp_path / "b", tmp_path / "c")
    install(monkeypatch, gpus=0)
    with pytest.raises(BackendError, match="found no NVIDIA GPU"):
        build_bundle(nowhere, tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "b").exists()


def test_a_gpu_that_is_too_small_is_refused_before_the_export(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, memory=64 << 20)
    with pytest.raises(BuildError, match=r"building fp16 needs about .* of device memory"):
        build_bundle(tiny_pipeline, tmp_path / "b", tmp_path / "c")


def test_a_quantized_plan_without_quantized_layers_fails_the_build(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = install(monkeypatch)
    fakes.settings.unquantized = True
    with pytest.raises(BuildError, match="int8 plan has no int8 layers"):
        build_bundle(tiny_pipeline, tmp_path / "b", tmp_path / "c", precisions=PRECISIONS[:2])
    assert not (tmp_path / "b").exists()


def test_a_quantized_plan_that_is_not_faster_is_built_with_a_warning(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch).settings.layer_ms["INT8"] = 5.0
    manifest = build_bundle(tiny_pipeline, tmp_path / "b", tmp_path / "c", precisions=PRECISIONS[:2])
    assert plan_of(manifest.denoisers["fp16"][0]).warnings == ()
    assert plan_of(manifest.denoisers["int8"][0]).warnings[0].startswith("int8 is not faster than fp16 here (")


def test_settings_of_plans_are_refused_by_other_backends(tiny_pipeline: Path, tmp_path: Path) -> None:
    from engines.backends.tensorrt.options import PlanOptions
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tmpdiff_export.targets.tensorrt.settings import PlanSettings

    plans = PlanSettings(options=PlanOptions(version_compatible=True))
    options = BuildOptions(PRECISIONS, PROMPTS, backend="onnxruntime", plans=plans)
    with pytest.raises(BackendError, match="--version-compatible are settings of TensorRT plans"):
        build(tiny_pipeline, tmp_path / "b", options)


def test_the_command_line_builds_inspects_and_runs(
    tiny_pipeline: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tmpdiff_export.cli import main

    fakes: Fakes = install(monkeypatch)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["[calibration]", *PROMPTS, "[validation]", "a yellow ring"]))
    out = tmp_path / "bundle"
    arguments = ["--precisions", "fp16,int8", "--steps", "4", "--backend", "auto", "--plan-cache", str(cache)]
    arguments += ["--batch", "1:1:2", "--workspace-mib", "256", "--builder-optimization-level", "2"]
    assert main(["build", str(tiny_pipeline), "--out", str(out), "--prompts", str(prompts), *arguments]) == 0
    text = capsys.readouterr().out
    assert "tensorrt" in text
    assert "int8 layers" in text
    assert fakes.settings.builds
    manifest = Bundle.open(out).manifest
    assert plan_of(manifest.denoisers["int8"][0]).profiles[0]["latents"][2] == (4, 4, 16, 16)
    assert main(["inspect", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    picture = tmp_path / "picture.png"
    run = ["run", str(out), "--prompt", PROMPTS[0], "--seed", "1", "--out", str(picture), "--schedule", "uniform:int8"]
    assert main([*run, "--resident-engines", "1"]) == 0
    assert picture.stat().st_size > 100
