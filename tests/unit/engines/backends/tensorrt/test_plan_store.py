"""Stored plans and the engine inspector's summary: what needs no TensorRT."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.linear_denoiser import save_model

from engines.backends.cuda.gpu import Gpu
from engines.backends.tensorrt.inspection import (
    layer_precision,
    read_inspector,
    require_quantized,
    speed_warning,
    summarize,
)
from engines.backends.tensorrt.options import PlanOptions
from engines.backends.tensorrt.plan_store import (
    PlanFacts,
    PlanKey,
    PlanRequest,
    PlanStore,
    inspector_file,
    plan_key,
)
from engines.errors import BackendError, BuildError
from engines.files import sha256_bytes
from engines.plan_entry import LayerShare

GPU = Gpu(0, "NVIDIA H200", (9, 0), 139 << 30, 130 << 30, "13.0")
INSPECTOR = '{"Layers": []}'
PROFILE = {"latents": ((2, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8))}
WIDE = {"latents": ((2, 4, 8, 12), (2, 4, 8, 12), (8, 4, 8, 12))}


# --- what the inspector says


def tensor(kind: str, *, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": "t", "Dimensions": [2, 4], key: kind}


def layer(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"Name": "n", "LayerType": "gemm", "Inputs": inputs, "Outputs": outputs, **more}


HALF, FP8, INT8 = tensor("Half"), tensor("FP8"), tensor("Int8")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (layer([HALF], [HALF]), "fp16"),
        (layer([tensor("Row major linear FP16 format")], [HALF]), "fp16"),
        (layer([tensor("Channel major FP16 format where channel % 8 == 0")], []), "fp16"),
        (layer([tensor("Row major linear FP32")], [HALF]), "fp32"),
        (layer([tensor("Float")], []), "fp32"),
        (layer([tensor("Row major linear BFloat16 format")], []), "bf16"),
        (layer([FP8, FP8, HALF], [HALF]), "fp8"),
        (layer([tensor("Row major linear FP8 format"), HALF], [HALF]), "fp8"),
        (layer([tensor("E4M3")], [HALF]), "fp8"),
        (layer([INT8, INT8], [HALF]), "int8"),
        (layer([tensor("Thirty-two wide channel vectorized row major Int8 format")], [INT8]), "int8"),
        (layer([HALF, tensor("Int4")], [HALF]), "int4"),
        (layer([tensor("FP4"), FP8], [HALF]), "nvfp4"),
        (layer([tensor("E2M1"), FP8], [HALF]), "nvfp4"),
        # TensorRT 11 splits the field; a format's words do not tell an Int64 from an Int8
        (layer([{"Name": "t", "Format": "Row major linear", "DataType": "FP8"}], [HALF]), "fp8"),
        (layer([{"Name": "t", "Format": "Row major linear INT8 format (kLINEAR)", "DataType": "Int64"}], []), "other"),
        # what a layer writes does not matter
        (layer([HALF], [FP8]), "fp16"),
        # weights and kernel names count as well as inputs
        (layer([HALF], [HALF], Weights={"Type": "Int8", "Count": 4096}), "int8"),
        (layer([HALF], [HALF], Bias={"Type": "Int8", "Count": 4096}), "fp16"),
        (layer([], [HALF], TacticName="sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn_n_tilesize64x64x64"), "fp8"),
        (layer([], [HALF], TacticName="sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize64x64x64"), "int8"),
        (layer([HALF], [FP8], TacticName="sm89_xmma_gemm_f16f16_e4m3f32_f32_tn_n"), "fp16"),
        (layer([HALF], [HALF], TacticName="ampere_h16816gemm_256x128_ldg8_nn_v1"), "fp16"),
        # nothing but outputs, or nothing at all
        (layer([], [HALF]), "fp16"),
        (layer([tensor("Int32")], [tensor("Bool")]), "other"),
        (layer([tensor("a new type")], [tensor("Unknown format")]), "other"),
        ({"Name": "n", "LayerType": "plugin", "Inputs": "none"}, "other"),
        # moving low-precision data is not computing with it
        (layer([INT8], [INT8], LayerType="Reformat"), "data movement"),
        (layer([FP8], [HALF], LayerType="kgen", Metadata="[ONNX Layer: blocks.0.to_q/weight_dq]"), "data movement"),
        (layer([HALF], [FP8], LayerType="kgen", Metadata="[ONNX Layer: to_q/QuantizeLinear]"), "data movement"),
        (layer([FP8], [HALF], Metadata="[ONNX Layer: to_q/DequantizeLinear_1]\x1e[ONNX Layer: to_q/MatMul]"), "fp8"),
    ],
)
def test_a_layer_has_the_narrowest_precision_it_reads(entry: dict[str, Any], expected: str) -> None:
    assert layer_precision(entry) == expected


def named(name: str, kind: dict[str, Any]) -> dict[str, Any]:
    return {**layer([kind], [kind]), "Name": name}


def test_layers_and_time_by_precision() -> None:
    layers = [named("a", FP8), named("b", FP8), named("c", HALF), named("d", tensor("Int32"))]
    assert summarize(layers) == {
        "fp8": LayerShare(layers=2),
        "fp16": LayerShare(layers=1),
        "other": LayerShare(layers=1),
    }
    shares = summarize(layers, {"a": 1.0, "b": 2.0, "c": 6.0, "inside the runtime": 1.0})
    assert shares == {
        "fp8": LayerShare(layers=2, time_share=0.3),
        "fp16": LayerShare(layers=1, time_share=0.6),
        "other": LayerShare(layers=1, time_share=0.1),
    }


def test_time_outside_the_listed_layers_is_shown() -> None:
    assert summarize([named("c", HALF)], {"c": 3.0, "x": 1.0})["other"] == LayerShare(layers=0, time_share=0.25)


def test_an_unmeasured_profile_gives_no_shares() -> None:
    assert summarize([named("c", HALF)], {"c": 0.0}) == {"fp16": LayerShare(layers=1)}


def test_inspector_json_of_both_majors_is_read() -> None:
    body = {"Layers": [named("a", FP8)]}
    assert read_inspector(json.dumps({**body, "Bindings": ["latents"]})) == body["Layers"]
    assert read_inspector(json.dumps({**body, "I/O Tensors": [{"Name": "latents"}]})) == body["Layers"]
    raw = '{"Layers": [{"Name": "a", "Metadata": "[ONNX Layer: x]\x1e[ONNX Layer: y]"}]}'
    assert read_inspector(raw)[0]["Name"] == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[]", "no layers"),
        ('{"Layers": []}', "no layers"),
        ('{"Layers": ["conv1", "conv2"]}', "names only; build the plan with detailed"),
    ],
)
def test_inspector_output_without_details_is_refused(text: str, words: str) -> None:
    with pytest.raises(BuildError, match=words):
        read_inspector(text)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4", "nvfp4"])
def test_a_quantized_plan_without_quantized_layers_is_refused(precision: str) -> None:
    shares = summarize([named("a", HALF), named("b", HALF), named("c", tensor("Float"))])
    with pytest.raises(BuildError, match=rf"{precision} plan has no {precision} layers .*fp16 2, fp32 1"):
        require_quantized(precision, shares)
    require_quantized("fp16", shares)


def test_a_quantized_plan_with_one_such_layer_passes() -> None:
    require_quantized("fp8", summarize([named("a", FP8), named("b", HALF)]))
    with pytest.raises(BuildError, match="no int8 layers"):
        require_quantized("int8", summarize([named("a", FP8), named("b", HALF)]))


def test_only_a_slow_quantized_engine_is_warned_of() -> None:
    assert speed_warning("fp8", 1.0, 2.0) is None
    assert speed_warning("fp16", 2.0, 2.0) is None
    assert "int4 is not faster than fp16 here (2.000 ms against 2.000 ms" in str(speed_warning("int4", 2.0, 2.0))


# --- the key of a plan


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return save_model(tmp_path / "fp8.onnx", "fp16")


def key_of(onnx: Path, **changes: Any) -> PlanKey:
    values: dict[str, Any] = {
        "precision": "fp8",
        "profiles": (PROFILE,),
        "options": PlanOptions(),
        "gpu": GPU,
        **changes,
    }
    version = values.pop("tensorrt_version", "11.4.0.106")
    return plan_key(PlanRequest(onnx, **values), version)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "int8"},
        {"profiles": ({"latents": ((2, 4, 8, 8), (4, 4, 8, 8), (8, 4, 8, 8))},)},
        {"profiles": ({"sample": PROFILE["latents"]},)},
        {"profiles": (PROFILE, WIDE)},
        {"profiles": (WIDE, PROFILE)},
        {"tensorrt_version": "11.4.1.2"},
        {"gpu": replace(GPU, name="NVIDIA H100")},
        {"gpu": replace(GPU, compute_capability=(10, 0))},
        {"options": PlanOptions(builder_optimization_level=4)},
        {"options": PlanOptions(workspace_bytes=1 << 30)},
        {"options": PlanOptions(weight_streaming=True)},
        {"options": PlanOptions(version_compatible=True)},
        {"options": PlanOptions(hardware_compatibility="ampere_plus")},
        {"options": PlanOptions(refittable=True)},
    ],
)
def test_everything_that_shapes_a_plan_changes_its_key(onnx: Path, changes: dict[str, Any]) -> None:
    assert key_of(onnx, **changes).digest != key_of(onnx).digest


def test_the_first_profile_is_not_any_other(onnx: Path) -> None:
    assert key_of(onnx, profiles=(PROFILE, WIDE)).digest != key_of(onnx, profiles=(WIDE, PROFILE)).digest


def test_a_change_of_the_stored_format_changes_the_key(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(onnx).digest
    monkeypatch.setitem(plan_key.__globals__, "PLAN_FORMAT", 3)
    assert key_of(onnx).digest != before


def test_the_content_of_the_model_changes_the_key_and_its_date_does_not(onnx: Path) -> None:
    before = key_of(onnx).digest
    os.utime(onnx, (1, 1))
    assert key_of(onnx).digest == before
    save_model(onnx, "fp16", external=True)
    with_data = key_of(onnx).digest
    assert with_data != before
    beside = onnx.with_name(f"{onnx.name}.data")
    data = bytearray(beside.read_bytes())
    data[0] ^= 1
    beside.write_bytes(data)
    assert key_of(onnx).digest not in (before, with_data)
    beside.unlink()
    with pytest.raises(FileNotFoundError):
        key_of(onnx)
    save_model(onnx, "fp16", operator="Tanh")
    assert key_of(onnx).digest != before


def test_what_is_free_on_the_gpu_does_not_change_the_key(onnx: Path) -> None:
    assert key_of(onnx, gpu=replace(GPU, free_bytes=1, index=3, driver="13.1")).digest == key_of(onnx).digest


# --- the store


def facts_of(plan: bytes) -> PlanFacts:
    return PlanFacts(
        sha256=sha256_bytes(plan),
        bytes=len(plan),
        inspector_sha256=sha256_bytes(INSPECTOR.encode()),
        weights_bytes=1,
        streamable_weights_bytes=0,
        scratch_bytes=2,
        inputs=(),
        outputs=(),
        layers={"fp8": LayerShare(layers=3)},
        build_s=0.5,
        warnings=(),
    )


class Builds:
    """A stand-in for `build_plan` that counts its calls."""

    def __init__(self, plan: bytes = b"plan", error: BaseException | None = None) -> None:
        self.plan, self.error, self.calls = plan, error, 0

    def __call__(self, target: Path) -> PlanFacts:
        self.calls += 1
        target.write_bytes(self.plan)
        if self.error is not None:
            raise self.error
        inspector_file(target).write_text(INSPECTOR)
        return facts_of(self.plan)


KEY = PlanKey({"precision": "fp8"})


def test_a_stored_plan_is_found_with_its_facts(tmp_path: Path) -> None:
    builds = Builds()
    stored = PlanStore(tmp_path / "plans").put(KEY, builds)
    assert (stored.path.read_bytes(), stored.inspector.read_text(), stored.reused) == (b"plan", INSPECTOR, False)
    again = PlanStore(tmp_path / "plans").put(KEY, builds)
    assert again == replace(stored, reused=True)
    assert PlanStore(tmp_path / "plans").find(KEY) == again
    assert builds.calls == 1
    assert PlanStore(tmp_path / "plans").find(PlanKey({"precision": "int8"})) is None


def test_an_entry_says_in_plain_words_what_it_is_for(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    store.put(KEY, Builds())
    data = json.loads((tmp_path / f"{KEY.digest}.json").read_text())
    assert data["key"] == {"precision": "fp8"}
    assert data["plan"]["layers"] == {"fp8": {"layers": 3, "time_share": None}}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BackendError("out of memory"), OSError("disk full")])
def test_an_interrupted_build_leaves_nothing_and_is_repeated(tmp_path: Path, error: BaseException) -> None:
    store = PlanStore(tmp_path)
    with pytest.raises(type(error)):
        store.put(KEY, Builds(error=error))
    assert store.find(KEY) is None
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY.digest}.plan.lock"]
    assert store.put(KEY, Builds()).reused is False


def test_a_precision_that_was_finished_survives_the_interruption_of_another(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    keys = {name: PlanKey({"precision": name}) for name in ("fp16", "fp8", "int8")}
    store.put(keys["fp16"], Builds(b"first fp16"))
    with pytest.raises(KeyboardInterrupt):
        store.put(keys["fp8"], Builds(error=KeyboardInterrupt()))
    second = {name: Builds(f"second {name}".encode()) for name in keys}
    plans = {name: store.put(key, second[name]).path.read_bytes() for name, key in keys.items()}
    assert plans == {"fp16": b"first fp16", "fp8": b"second fp8", "int8": b"second int8"}
    assert {name: builds.calls for name, builds in second.items()} == {"fp16": 0, "fp8": 1, "int8": 1}


@pytest.mark.parametrize("suffix", [".plan", ".plan.layers.json", ".json"])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_entry_is_not_found_and_is_built_again(tmp_path: Path, suffix: str, damage: str) -> None:
    store = PlanStore(tmp_path)
    store.put(KEY, Builds())
    path = tmp_path / f"{KEY.digest}{suffix}"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"pla", b"plo").replace(b"Lay", b"Loy"))
    assert store.find(KEY) is None
    assert store.put(KEY, Builds(b"new")).path.read_bytes() == b"new"
    assert store.find(KEY) is not None


def test_an_entry_under_the_wrong_name_is_not_found(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    store.put(KEY, Builds())
    other = PlanKey({"precision": "int8"})
    for path in list(tmp_path.glob(f"{KEY.digest}.*")):
        path.rename(tmp_path / path.name.replace(KEY.digest, other.digest))
    assert store.find(other) is None


def test_left_overs_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    left = tmp_path / f".{KEY.digest}.abc.partial"
    left.mkdir()
    (left / "half.plan").write_bytes(b"half")
    store.put(KEY, Builds())
    assert not left.exists()


def _put(folder: Path, plan: bytes, barrier: Any, results: Any) -> None:
    barrier.wait()
    stored = PlanStore(folder).put(KEY, Builds(plan))
    results.put((stored.reused, stored.path.read_bytes()))


def test_two_processes_build_one_plan_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_put, args=(tmp_path, plan, barrier, results)) for plan in (b"one" * 1000, b"two" * 1000)
    ]
    for worker in workers:
        worker.start()
    outcome = sorted(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    assert [reused for reused, _ in outcome] == [False, True]
    assert outcome[0][1] == outcome[1][1]
