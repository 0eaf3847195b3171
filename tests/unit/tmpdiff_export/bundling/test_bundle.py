"""The engines of the embedded pipeline: accuracy on real inputs, files, and builds that must fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.demo_build import GUIDANCE_SCALE, NUM_STEPS, DemoBuild
from helpers.whole_pipeline import setting_of, whole_pipeline
from onnx import TensorProto

from engines.backends.onnx_references import references
from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.bundle import Bundle
from engines.errors import BuildError
from engines.manifest import MODEL_OUTPUT
from engines.precision import DEFAULT_PRECISIONS, Precision
from engines.runtime import DenoiseRuntime
from tmpdiff_export.bundling import bundle as bundle_build
from tmpdiff_export.bundling import observed
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.pipelines.load import gather_batches
from tmpdiff_export.pipelines.settings import SettingRequest, resolve
from tmpdiff_export.quantization.recipes import RECIPES, Variant
from tmpdiff_export.targets.onnxruntime import cpu as cpu_target
from tmpdiff_export.targets.onnxruntime import lowering as cpu_lowering
from tools.acceptance.checks import check_of

# Measured on the embedded pipeline less a margin of 3 dB or more: a regression in scales, export or lowering shows.
FLOORS_DB = {Precision.FP16: 60.0, Precision.FP8: 30.0, Precision.INT8: 28.0, Precision.INT4: 25.0}


@pytest.fixture(scope="module")
def real_check(demo_pipeline: Path):
    """What the FP32 torch denoiser makes of inputs of a run that range calibration has not seen."""
    source = whole_pipeline(demo_pipeline)
    setting = resolve(source.facts, SettingRequest(NUM_STEPS))
    batches = gather_batches(source, setting, ["a large yellow triangle in the center"], seed=77, on_step=lambda: None)
    module = source.family.wrap(source.pipe).eval()
    return check_of(module, list(source.family.inputs), MODEL_OUTPUT, batches[::2])


@pytest.mark.parametrize("precision", DEFAULT_PRECISIONS)
def test_sqnr_against_fp32_torch_on_real_check(precision: Precision, demo_bundle: Path, real_check) -> None:
    measured = real_check.sqnr_db(DenoiseRuntime.load(demo_bundle).denoiser(precision.value))
    print(f"{precision.value}: SQNR {measured:.1f} dB, floor {FLOORS_DB[precision]:.1f} dB")
    assert measured >= FLOORS_DB[precision]


def test_the_manifest_says_how_each_engine_was_made(demo_bundle: Path) -> None:
    manifest = Bundle.open(demo_bundle).manifest
    assert manifest.precisions == tuple(precision.value for precision in DEFAULT_PRECISIONS)
    for name, (entry,) in manifest.denoisers.items():
        recipe = RECIPES[Precision(name)]
        assert entry.sqnr_db >= entry.sqnr_floor_db == recipe.sqnr_floor_db
        assert entry.recipe in ({variant.name for variant in recipe.variants} or {"none"})
    assert manifest.denoisers["int8"][0].lowering["MatMulIntegerToFloat"] == 40
    assert manifest.denoisers["int4"][0].lowering["MatMulNBits"] == 45
    assert manifest.denoisers["fp8"][0].lowering["fp8-emulated"] == 40


@pytest.mark.parametrize("precision", DEFAULT_PRECISIONS)
def test_onnx_files_are_valid_and_store_quantized_weights(precision: Precision, demo_build: DemoBuild) -> None:
    path = demo_build.onnx / f"{precision.value}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert {item.domain for item in model.opset_import} == {""}
    codes = {
        Precision.FP16: TensorProto.FLOAT16,
        Precision.FP8: TensorProto.FLOAT8E4M3FN,
        Precision.INT8: TensorProto.INT8,
        Precision.INT4: TensorProto.INT4,
    }
    values = sum(int(np.prod(item.dims)) for item in model.graph.initializer if item.data_type == codes[precision])
    assert values >= 15_000_000
    assert not any(item.data_type == TensorProto.FLOAT for item in model.graph.initializer)
    assert {item.type.tensor_type.elem_type for item in model.graph.output} == {TensorProto.FLOAT16}


def test_quantized_files_are_as_small_as_their_format(demo_build: DemoBuild) -> None:
    """What an engine reads: its graph, and all weight files that the graph refers to."""

    def size_of(precision: Precision) -> int:
        graph = demo_build.onnx / f"{precision.value}.onnx"
        files = {graph.name, *(item.location for item in references(graph))}
        return sum((demo_build.onnx / name).stat().st_size for name in files)

    size = {precision: size_of(precision) for precision in DEFAULT_PRECISIONS}
    ratios = {precision.value: size[precision] / size[Precision.FP16] for precision in DEFAULT_PRECISIONS}
    print(ratios)
    assert ratios["int8"] < 0.60
    assert ratios["fp8"] < 0.60
    assert ratios["int4"] < 0.30


def test_fp16_schedule_equals_a_plain_loop_bit_for_bit(demo_bundle: Path) -> None:
    runtime = DenoiseRuntime.load(demo_bundle)
    conditioning = runtime.encode(["a small red square on the left"])
    noise = runtime.noise([5])
    swapped = runtime.denoise(conditioning, runtime.schedule("uniform:fp16"), noise)

    entry = runtime.manifest.denoisers["fp16"][0]
    engine = OnnxRuntimeEngine(demo_bundle / entry.file.path)
    state = runtime.table.initial(noise)
    for timestep in runtime.table.timesteps:
        latents = np.concatenate([runtime.table.model_input(state)] * 2)
        inputs = {"latents": latents, "timestep": np.full(2, timestep, np.float32), **conditioning.guided}
        unconditional, conditional = engine.run(inputs)[MODEL_OUTPUT]
        output = unconditional + np.float32(GUIDANCE_SCALE) * (conditional - unconditional)
        state = runtime.table.advance(state, output[None])
    np.testing.assert_array_equal(swapped, state.latents)


def test_runtime_loop_equals_the_diffusers_pipeline(demo_bundle: Path, demo_pipeline: Path) -> None:
    runtime = DenoiseRuntime.load(demo_bundle)
    source = whole_pipeline(demo_pipeline)
    noise = runtime.noise([3])
    prompt = "a large blue circle in the bottom left"
    ours = runtime.denoise(runtime.encode([prompt]), runtime.schedule("uniform:fp16"), noise)
    with torch.inference_mode():
        theirs = source.pipe(
            prompt,
            num_inference_steps=NUM_STEPS,
            latents=torch.from_numpy(noise),
            output_type="latent",
            **source.call_options(setting_of(source, runtime.setting)),
        ).images.numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)


def test_seeds_reproduce_and_prompts_share_a_batch(demo_bundle: Path) -> None:
    runtime = DenoiseRuntime.load(demo_bundle)
    schedule = runtime.schedule()
    prompts = ["a large red ring on the right", "a small white square at the top"]
    both = runtime.generate(prompts, [1, 2], schedule)
    again = runtime.generate(prompts, [1, 2], schedule)
    np.testing.assert_array_equal(both, again)
    alone = runtime.generate(prompts[1:], [2], schedule)
    assert np.abs(both[1].astype(int) - alone[0]).mean() < 0.5
    other = runtime.generate(prompts[1:], [3], schedule)
    assert np.abs(other.astype(int) - alone).mean() > 0.5


def _options(**changes) -> BuildOptions:
    prompts = ("a large red circle in the center", "a small blue square on the left")
    return BuildOptions(**{"precisions": (Precision.FP16,), "prompts": prompts, "steps": (2,), **changes})


def left_by_a_failed_build(folder: Path) -> set[str]:
    """The stages beside a bundle that was not made, by name; nothing else may be there."""
    beside = sorted(path.name for path in folder.iterdir())
    assert beside in ([], [".bundle.stages"])
    found = [path for name in beside for path in (folder / name).iterdir() if path.name != "lock"]
    assert all((path / "stage.json").exists() for path in found), "nothing half-written"
    return {path.name.rpartition("-")[0] for path in found}


def test_a_build_that_misses_its_floor_fails_and_leaves_no_bundle(
    tmp_path: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong activation scale, as a buggy calibrator would give, planted in the INT8 recipe."""
    real = observed.calibrate_ranges

    def too_small(*args):
        found = real(*args)
        for ranges in (item for variants in found.values() for item in variants.values()):
            for name, item in ranges.items():
                ranges[name] = replace(item, input_amax=item.input_amax / 50)
        return found

    recipe = RECIPES[Precision.INT8]
    monkeypatch.setitem(RECIPES, Precision.INT8, type(recipe)(**{**vars(recipe), "variants": (Variant("max"),)}))
    monkeypatch.setattr(observed, "calibrate_ranges", too_small)
    out = tmp_path / "out"
    with pytest.raises(
        BuildError, match=r"int8: .* an SQNR of .* dB .* its floor is 22.0 dB; leave this precision out"
    ):
        build(
            tiny_pipeline,
            out / "bundle",
            _options(precisions=(Precision.FP16, Precision.INT8), onnx_dir=out / "onnx"),
        )
    assert "engine-int8-max" in left_by_a_failed_build(out)


def test_a_miscompiled_engine_is_caught(tmp_path: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowering that drops a cast or a bias, as an optimizer was seen to do, planted in the FP16 engine."""
    real = cpu_lowering.lower_for_cpu

    def broken(*arguments):
        lowered, counts = real(*arguments)
        for gelu in [node for node in lowered.graph.node if node.op_type == "Gelu"][:1]:  # the text encoder has none
            gelu.op_type = "Relu"
            del gelu.attribute[:]
        return lowered, counts

    monkeypatch.setattr(cpu_target, "lower_for_cpu", broken)
    with pytest.raises(
        BuildError, match=r"fp16: the built engine has an SQNR of .* floor is 50.0 dB; .* another --backend"
    ):
        build(tiny_pipeline, tmp_path / "bundle", _options())
    assert "engine-fp16-none" in left_by_a_failed_build(tmp_path)


def test_an_existing_bundle_survives_a_failed_rebuild(
    tiny_bundle: Path, copy_of, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_of(tiny_bundle)
    before = json.loads((bundle / "manifest.json").read_text())
    monkeypatch.setattr(
        bundle_build.Making, "run", lambda self, out: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        build(tiny_pipeline, bundle, _options(force=True))
    assert json.loads((bundle / "manifest.json").read_text()) == before
    assert Bundle.open(bundle).verify() > 0
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def _pixart(tmp_path: Path, tiny_pipeline: Path, **changes) -> Path:
    """The tiny pipeline around another denoiser."""
    from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline, local_files_only=True)
    pipe.transformer = PixArtTransformer2DModel.from_config({**pipe.transformer.config, "num_layers": 1, **changes})
    if "use_additional_conditions" in changes:  # only PixArt-Alpha hands over resolution and aspect ratio
        pipe = PixArtAlphaPipeline(**pipe.components)
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


LARGE = {"sample_size": 128, "num_attention_heads": 12, "cross_attention_dim": 384}  # as the 1024 px models


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({**LARGE, "use_additional_conditions": True}, {"sizes": ((64, 96),)}),
        ({**LARGE, "use_additional_conditions": None}, {"sizes": ((64, 64),)}),
        ({"out_channels": 4}, {"guidance_scale": 1.0}),  # no learned variance; traced without guidance, at batch 1
        ({"cross_attention_dim": 192, "num_attention_heads": 6}, {}),  # K = 192 stays out of INT4's blocks of 128
    ],
)
def test_other_pixart_denoisers_build_and_run(changes, options, tmp_path: Path, tiny_pipeline: Path) -> None:
    pipeline = _pixart(tmp_path, tiny_pipeline, **changes)
    precisions = (Precision.FP16, Precision.INT8, Precision.INT4)
    manifest = build(pipeline, tmp_path / "bundle", _options(precisions=precisions, **options))
    runtime = DenoiseRuntime.load(tmp_path / "bundle")
    pictures = runtime.generate(
        ["a red circle", "a blue ring", "a white square"],
        [0, 1, 2],
        runtime.schedule("uniform:int4"),
    )
    assert pictures.shape == (3, manifest.settings[0].height, manifest.settings[0].width, 3)


def test_failures_inside_the_model_are_one_clear_error(
    tmp_path: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_):
        raise RuntimeError("shape mismatch\nsecond line")

    monkeypatch.setattr(observed, "calibrate_ranges", fails)
    with pytest.raises(
        BuildError, match=r"PixArtTransformer2DModel: find ranges failed: RuntimeError: shape mismatch$"
    ):
        build(tiny_pipeline, tmp_path / "bundle", _options(precisions=(Precision.FP16, Precision.INT8)))
    assert "ranges" not in left_by_a_failed_build(tmp_path)
