"""Building plans against the fake TensorRT: what comes out, flags, refusals."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from fakes.install import install
from helpers.linear_denoiser import PROFILE, save_model
from helpers.plan_bench import Bench, MakeBench

from engines.errors import BackendError, BuildError

LARGER = {name: ((16, *axes), (16, *axes), (32, *axes)) for name, ((_, *axes), *_) in PROFILE.items()}
PRECISION_FLAGS = {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"}


# --- what a build gives


def test_a_plan_its_inspector_json_and_facts(bench: Bench) -> None:
    facts = bench.build("fp8")
    assert facts.bytes == bench.target.stat().st_size
    assert facts.sha256 == bench.code.plan_store.sha256_file(bench.target)
    inspector = bench.code.plan_store.inspector_file(bench.target)
    assert len(json.loads(inspector.read_text())["Layers"]) == sum(share.layers for share in facts.layers.values())
    assert facts.layers["fp8"].layers == 1
    assert facts.layers["fp16"].layers >= 1
    described = [(item.name, item.dtype, item.shape) for item in facts.inputs]
    assert described == [("latents", "float16", (-1, 16, 64)), ("timestep", "float32", (-1,))]
    assert [(item.name, item.dtype) for item in facts.outputs] == [("model_output", "float16")]
    assert facts.weights_bytes > 0
    assert facts.scratch_bytes > 0
    assert facts.streamable_weights_bytes == 0
    assert bench.left_behind() == {bench.target.name, inspector.name}


def test_profiles_share_the_weights_and_the_scratch_of_the_largest(bench: Bench) -> None:
    one, larger = bench.build(), bench.build(profiles=(LARGER,))
    both = bench.build(profiles=(PROFILE, LARGER))
    assert both.weights_bytes == one.weights_bytes
    assert both.scratch_bytes == larger.scratch_bytes > one.scratch_bytes
    engine = bench.code.builder._loaded(bench.target.read_bytes(), bench.code.options.PlanOptions())
    found = [engine.get_tensor_profile_shape("latents", index) for index in range(engine.num_optimization_profiles)]
    assert [tuple(map(tuple, shapes)) for shapes in found] == [PROFILE["latents"], LARGER["latents"]]
    stages = []
    bench.build(profiles=(PROFILE, LARGER), progress=lambda stage, done, total: stages.append(stage))
    assert {stage.rpartition(" ")[2] for stage in stages if "profile" in stage} == {"0", "1"}


@pytest.mark.parametrize("formats", ["long", "short"])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_quantized_layers_are_seen_however_types_are_spelled(bench: Bench, precision: str, formats: str) -> None:
    bench.fakes.settings.formats = formats
    assert bench.build(precision).layers[precision].layers == 1


def test_a_quantized_plan_without_quantized_layers_is_not_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, fp8 = {"Name": "a", "Format/Datatype": "Half"}, {"Name": "b", "Format/Datatype": "FP8"}
    unfused = [
        {
            "Name": "1",
            "LayerType": "kgen",
            "Inputs": [fp8],
            "Outputs": [half],
            "Metadata": "[ONNX Layer: lin/weight_dq]",
        },
        {"Name": "2", "LayerType": "gemm", "Inputs": [half, half], "Outputs": [half], "Metadata": "[ONNX Layer: lin]"},
    ]
    monkeypatch.setattr(
        bench.fakes.tensorrt.EngineInspector,
        "get_engine_information",
        lambda *_: json.dumps({"Layers": unfused, "I/O Tensors": []}),
    )
    with pytest.raises(
        BuildError, match=r"fp8 plan has no fp8 layers \(layers by precision: fp16 1, data movement 1\)"
    ):
        bench.build("fp8")
    assert bench.left_behind() == set()
    assert bench.build("fp16").layers["fp16"].layers == 1


def test_external_data_is_found_beside_the_file(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(bench.folder / "large.onnx", "fp16", external=True)
    data = path.with_name("large.onnx.data")
    assert data.stat().st_size > 64 * 64
    facts = bench.build("fp16", path)
    assert facts.weights_bytes >= 64 * 64 * 2
    data.unlink()
    with pytest.raises(BuildError, match=r"parser refuses large\.onnx"):
        bench.build("fp16", path)


def test_external_data_is_found_from_a_relative_path(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(bench.folder / "large.onnx", "fp16", external=True)
    monkeypatch.chdir(bench.folder)
    assert bench.build("fp16", Path(path.name)).weights_bytes >= 64 * 64 * 2


def test_a_library_that_does_not_tell_weight_sizes(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(version="10.13.0.35")
    monkeypatch.delattr(bench.fakes.tensorrt, "EngineStat")
    facts = bench.build("fp16")
    assert facts.weights_bytes == facts.bytes


def test_tensorrt_s_warnings_are_passed_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    trt: Any = bench.fakes.tensorrt
    build = trt.Builder.build_serialized_network

    def warn(builder: Any, *arguments: Any) -> Any:
        for words in ["the weights have subnormal values"] * 2:
            builder.logger.log(trt.ILogger.WARNING, words)
        return build(builder, *arguments)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", warn)
    assert bench.build().warnings == ("the weights have subnormal values",)


# --- flags


@pytest.mark.parametrize("version", ["10.13.0.35", "10.16.1.11", "11.0.0.114", "11.4.0.106"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_networks_are_strongly_typed_and_no_precision_flag_is_set(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, version: str, precision: str
) -> None:
    bench = make_bench(version=version)
    trt: Any = bench.fakes.tensorrt
    created: list[int] = []
    create = trt.Builder.create_network
    monkeypatch.setattr(
        trt.Builder, "create_network", lambda self, flags=0: created.append(flags) or create(self, flags)
    )
    bench.build(precision)
    assert created == [1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)]
    (build,) = bench.fakes.settings.builds
    assert not PRECISION_FLAGS & set(build.flags)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, set()),
        ({"weight_streaming": True}, {"WEIGHT_STREAMING"}),
        ({"version_compatible": True}, {"VERSION_COMPATIBLE"}),
        ({"refittable": True}, {"REFIT"}),
    ],
)
@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_options_become_flags(make_bench: MakeBench, version: str, options: dict[str, Any], flags: set[str]) -> None:
    bench = make_bench(version=version)
    bench.build(**options)
    names = bench.fakes.tensorrt.BuilderFlag.__members__  # type: ignore[attr-defined]
    assert {names[flag] for flag in bench.fakes.settings.builds[0].flags} == {names[flag] for flag in flags}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"optimization_level": 3, "hardware_compatibility": "NONE"}),
        ({"builder_optimization_level": 5}, {"optimization_level": 5}),
        ({"workspace_bytes": 1 << 29}, {"workspace_bytes": 1 << 29}),
        ({"hardware_compatibility": "ampere_plus"}, {"hardware_compatibility": "AMPERE_PLUS"}),
        (
            {"hardware_compatibility": "same_compute_capability"},
            {"hardware_compatibility": "SAME_COMPUTE_CAPABILITY"},
        ),
    ],
)
def test_options_become_settings(bench: Bench, options: dict[str, Any], expected: dict[str, Any]) -> None:
    bench.build(**options)
    assert expected.items() <= bench.fakes.settings.builds[0].options.items()


def test_what_options_do_to_the_facts(bench: Bench) -> None:
    assert bench.build(weight_streaming=True).streamable_weights_bytes > 0


# --- refusals


def test_a_gpu_that_lacks_the_precision_is_refused_before_the_parser_runs(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(compute_capability=(8, 6))

    def parse(*_: Any) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(bench.fakes.tensorrt.OnnxParser, "parse_from_file", parse)
    with pytest.raises(BackendError, match=r"fp8 needs compute capability 8\.9 or newer; .* choose fp16, int8, int4"):
        bench.build("fp8")


def test_the_parser_s_words_reach_the_error(bench: Bench) -> None:
    bench.fakes.settings.refused_ops = {"Softplus"}
    path = save_model(bench.folder / "odd.onnx", "fp16", operator="Softplus")
    with pytest.raises(BuildError) as caught:
        bench.build("fp16", path)
    assert str(caught.value).startswith(
        "TensorRT's parser refuses odd.onnx: node last (Softplus): No importer registered for op: Softplus; "
    )


def test_many_parser_errors_are_counted(bench: Bench) -> None:
    bench.fakes.settings.refused_ops = {"MatMul", "Cast", "Reshape", "Mul", "Relu"}
    with pytest.raises(BuildError, match=r"node linear \(MatMul\).* \| and 2 more;"):
        bench.build()


def test_a_file_that_is_no_model_is_refused(bench: Bench) -> None:
    path = bench.folder / "junk.onnx"
    path.write_bytes(b"junk")
    with pytest.raises(BuildError, match=r"parser refuses junk\.onnx: .*parse"):
        bench.build("fp16", path)


def test_the_builder_s_words_reach_the_error(bench: Bench) -> None:
    bench.timing_cache.write_bytes(b"rubbish")  # its complaints are not the build's
    bench.fakes.settings.build_error = "Error Code 10: no implementation for node linear"
    with pytest.raises(BackendError, match=r"could not build fp16\.onnx: Error Code 10: no implementation .*; allow"):
        bench.build()
    assert bench.left_behind() == set()


def test_an_exception_from_the_builder_leaves_nothing(bench: Bench) -> None:
    bench.fakes.settings.build_exception = MemoryError("out of host memory")
    with pytest.raises(MemoryError):
        bench.build()
    assert bench.left_behind() == set()


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"latents": PROFILE["latents"]}, "has inputs latents, timestep, the optimization profile is for latents"),
        ({**PROFILE, "extra": ((1,), (1,), (1,))}, "is for latents, timestep, extra"),
        (
            {**PROFILE, "latents": ((2, 64), (2, 64), (8, 64))},
            r"latents .* has shape \(-1, 16, 64\).*asks for \(2, 64\)",
        ),
        ({**PROFILE, "latents": ((2, 8, 64),) * 3}, r"asks for \(2, 8, 64\); give ranges that fit"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(bench: Bench, profile: Any, words: str) -> None:
    with pytest.raises(BuildError, match=words):
        bench.build(profiles=(PROFILE, profile))


def test_the_lean_runtime_cannot_build(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, lean=True)
    with pytest.raises(BackendError, match="runs plans but cannot build them"):
        importlib.import_module("engines.backends.tensorrt.builder").require_builder()


def test_polygraphy_is_asked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    for name in ("polygraphy.backend", "polygraphy.backend.trt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match="pip install polygraphy"):
        bench.build()


def test_nothing_is_printed(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.build("fp8", workspace_bytes=1 << 28)
    assert capfd.readouterr() == ("", "")


def test_the_oldest_supported_version_is_refused_below(make_bench: MakeBench) -> None:
    with pytest.raises(BackendError, match=r"needs 10\.13 or newer"):
        make_bench(version="10.12.0.36").build()


def test_a_missing_file_that_the_parser_only_logs_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT-RTX 1.7 does: the error says which initializer failed, the log which file."""
    trt: Any = bench.fakes.tensorrt
    take = trt.OnnxParser._take

    def fail_like_the_real_one(parser: Any, model: Any) -> bool:
        parser._logger.log(trt.ILogger.ERROR, "WeightsContext.cpp:203: Failed to open file: fp16.onnx.data")
        take(parser, onnx.ModelProto())
        return False

    monkeypatch.setattr(trt.OnnxParser, "_take", fail_like_the_real_one)
    with pytest.raises(BuildError, match=r"Failed to open file: fp16\.onnx\.data \| the model has no nodes"):
        bench.build()
