"""The fake TensorRT builds as its docstrings say, also under the real polygraphy and with real ONNX Runtime."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.install import Fakes, install
from helpers.fake_engines import PROFILE, X, build, expected, fetch, load, new_log, ready, upload


@pytest.mark.parametrize("version", ["10.13.2.6", "10.16.1.11", "11.4.0.106"])
@pytest.mark.parametrize("kind", ["fp16", "fp8", "int8", "int4"])
def test_an_engine_computes_its_onnx_graph(
    monkeypatch: pytest.MonkeyPatch, onnx_file: Callable[[str], str], kind: str, version: str
) -> None:
    trt = install(monkeypatch, version=version).tensorrt
    log = new_log(trt)
    item = ready(trt, load(trt, log, build(trt, log, onnx_file(kind))))
    upload(item, X)
    assert item.context.execute_async_v3(int(item.stream)), log.errors
    np.testing.assert_allclose(fetch(item), expected(kind, X), atol=0.02)
    assert log.errors == []


def test_polygraphy_configures_and_builds(fakes: Fakes, onnx_file: Callable[[str], str], tmp_path: Path) -> None:
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path

    cache = tmp_path / "timing.cache"
    for _ in range(2):
        config = CreateConfig(
            profiles=[Profile().add("x", *PROFILE)],
            builder_optimization_level=1,
            version_compatible=True,
            memory_pool_limits={fakes.tensorrt.MemoryPoolType.WORKSPACE: 1 << 20},
            hardware_compatibility_level=fakes.tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS,
            load_timing_cache=str(cache),
        )
        network = network_from_onnx_path(onnx_file("fp16"), strongly_typed=True)
        plan = engine_bytes_from_network(network, config=config, save_timing_cache=str(cache))
    cold, warm = fakes.settings.builds
    assert (cold.timed, warm.timed) == (cold.layers, 0)
    assert "VERSION_COMPATIBLE" in warm.flags
    assert "TF32" not in warm.flags
    assert warm.options == {
        "optimization_level": 1,
        "workspace_bytes": 1 << 20,
        "max_aux_streams": -1,
        "hardware_compatibility": "AMPERE_PLUS",
    }
    assert load(fakes.tensorrt, new_log(fakes.tensorrt), plan).num_io_tensors == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": None}, "no optimization profile has been defined"),
        ({"shapes": ((1, 8), (1, 8), (1, 8))}, "static dimension mismatch"),
        ({"shapes": ((1,), (1,), (1,))}, "rank of input x"),
    ],
)
def test_a_profile_that_does_not_fit_fails_the_build(
    fakes: Fakes, onnx_file: Callable[[str], str], arguments: dict[str, Any], words: str
) -> None:
    log = new_log(fakes.tensorrt)
    assert build(fakes.tensorrt, log, onnx_file("fp16"), **arguments) is None
    assert words in log.errors[0]


@pytest.mark.parametrize("shapes", [((2, 8), (1, 8), (4, 8)), ((1, 8), (2, 8), (4,))])
def test_set_shape_refuses_inconsistent_shapes(fakes: Fakes, shapes: Any) -> None:
    profile = fakes.tensorrt.Builder(new_log(fakes.tensorrt)).create_optimization_profile()
    with pytest.raises(ValueError, match="inconsistent"):
        profile.set_shape("x", *shapes)


@pytest.mark.parametrize(
    ("kind", "capability", "built"),
    [("fp8", (8, 6), False), ("fp8", (8, 9), True), ("int4", (7, 5), False), ("fp16", (7, 5), True)],
)
def test_types_the_gpu_does_not_have_fail_the_build(
    monkeypatch: pytest.MonkeyPatch,
    onnx_file: Callable[[str], str],
    kind: str,
    capability: tuple[int, int],
    built: bool,
) -> None:
    trt = install(monkeypatch, compute_capability=capability).tensorrt
    log = new_log(trt)
    assert (build(trt, log, onnx_file(kind)) is not None) == built
    assert any("precision require hardware" in error for error in log.errors) == (not built)


def test_tensorrt_10_refuses_weak_typing_and_precision_flags(
    monkeypatch: pytest.MonkeyPatch, onnx_file: Callable[[str], str]
) -> None:
    trt = install(monkeypatch, version="10.16.1.11").tensorrt
    log = new_log(trt)
    assert build(trt, log, onnx_file("fp16"), flags=("FP16",)) is None
    assert "not allowed in a strongly typed network" in log.errors[0]
    builder = trt.Builder(log)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse_from_file(onnx_file("fp16"))
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None


def test_the_parser_reports_what_it_refuses(fakes: Fakes, onnx_file: Callable[[str], str], tmp_path: Path) -> None:
    trt = fakes.tensorrt
    fakes.settings.refused_ops.add("Relu")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(Path(onnx_file("fp16")).read_bytes()[:100])
    codes = []
    for path in (onnx_file("fp16"), str(broken), str(tmp_path / "missing.onnx")):
        parser = trt.OnnxParser(trt.Builder(new_log(trt)).create_network(0), new_log(trt))
        assert not parser.parse_from_file(path)
        assert parser.num_errors == 1
        codes.append(parser.get_error(0).code().name)
        if path.endswith("fp16.onnx"):
            assert (parser.get_error(0).node_operator(), parser.get_error(0).node_name()) == ("Relu", "relu")
    assert codes == ["UNSUPPORTED_NODE", "MODEL_DESERIALIZE_FAILED", "MODEL_DESERIALIZE_FAILED"]


@pytest.mark.parametrize("cancel_at", [None, 1])
def test_progress_is_nested_phases_and_can_cancel(
    fakes: Fakes, onnx_file: Callable[[str], str], cancel_at: int | None
) -> None:
    trt, log, seen = fakes.tensorrt, new_log(fakes.tensorrt), []

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            seen.append(("start", phase_name, parent_phase))

        def step_complete(self, phase_name: str, step: int) -> bool:
            seen.append(("step", phase_name, step))
            return step != cancel_at

        def phase_finish(self, phase_name: str) -> None:
            seen.append(("finish", phase_name, None))

    plan = build(trt, log, onnx_file("fp16"), configure=lambda config: setattr(config, "progress_monitor", Monitor()))
    assert (plan is None) == (cancel_at is not None)
    assert bool(log.errors) == (cancel_at is not None)
    starts = [item for item in seen if item[0] == "start"]
    assert [item[2] for item in starts] == [None, starts[0][1]]
    assert [item[1] for item in seen if item[0] == "finish"] == [starts[1][1], starts[0][1]]


def test_timings_of_another_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, onnx_file: Callable[[str], str]) -> None:
    trt = install(monkeypatch, name="Fake L40S", compute_capability=(8, 9)).tensorrt
    data = bytes(trt.Builder(new_log(trt)).create_builder_config().create_timing_cache(b"").serialize())
    trt = install(monkeypatch).tensorrt
    log = new_log(trt)
    config = trt.Builder(log).create_builder_config()
    cache = config.create_timing_cache(data)
    assert not config.set_timing_cache(cache, ignore_mismatch=False)
    assert config.set_timing_cache(cache, ignore_mismatch=True)
    assert config.create_timing_cache(b"rubbish") is None
    assert len(log.errors) == 2


def test_the_lean_module_has_no_builder_and_no_inspector(
    monkeypatch: pytest.MonkeyPatch, onnx_file: Callable[[str], str]
) -> None:
    trt = install(monkeypatch).tensorrt
    plan = bytes(build(trt, new_log(trt), onnx_file("fp16"), flags=("VERSION_COMPATIBLE",)))
    trt = install(monkeypatch, lean=True).tensorrt
    assert trt is sys.modules["tensorrt_lean"]
    assert not [name for name in ("Builder", "OnnxParser", "EngineInspector") if hasattr(trt, name)]
    engine = load(trt, new_log(trt), plan)
    with pytest.raises(TypeError, match="not registered"):
        engine.create_engine_inspector()


def test_further_profiles_copy_weights_unless_they_are_told_not_to(
    fakes: Fakes, onnx_file: Callable[[str], str]
) -> None:
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)

    def weights(target: float | None) -> int:
        def add(config: Any) -> None:
            profile = trt.Builder(log).create_optimization_profile()
            profile.set_shape("x", *PROFILE)
            if target is not None:
                profile.extra_memory_target = target
            assert config.add_optimization_profile(profile) == 1

        engine = load(trt, log, build(trt, log, onnx_file("fp16"), configure=add))
        assert engine.num_optimization_profiles == 2
        return int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))

    alone = load(trt, log, build(trt, log, onnx_file("fp16"))).get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)
    assert [weights(target) for target in (0.0, 0.5, None)] == [alone, 1.5 * alone, 2 * alone]


def test_a_dynamic_input_without_a_range_in_a_further_profile_fails_the_build(
    fakes: Fakes, onnx_file: Callable[[str], str]
) -> None:
    trt, log = fakes.tensorrt, new_log(fakes.tensorrt)
    empty = trt.Builder(log).create_optimization_profile()
    plan = build(trt, log, onnx_file("fp16"), configure=lambda config: config.add_optimization_profile(empty))
    assert plan is None
    assert "Dynamic input x is missing dimensions in profile 1" in log.errors[0]
