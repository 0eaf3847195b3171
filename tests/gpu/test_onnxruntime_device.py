"""ONNX Runtime's CUDA provider on a real GPU: a build's target, the device loop, the limit on residents, refusals."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_denoiser import REUSING, TEXT, denoiser, loop_inputs, make_loop, require_agreement

from engines.documents import FileEntry
from engines.errors import BackendError
from engines.files import sha256_bytes
from engines.loop import host_loop
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP, EngineEntry, TensorSpec
from engines.precision import Precision


def missing() -> str | None:
    """Why no such test can run here, or None."""
    for name in ("onnxruntime", "onnx", "torch", "ml_dtypes", "cuda"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    from engines.backends.onnxruntime.provider import require_provider

    try:
        require_provider()
    except BackendError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

PRECISIONS = ("fp16", "fp8", "int8", "int4")
FLOOR_DB = {"fp16": 50.0, "fp8": 24.0, "int8": 28.0, "int4": 18.0}
Engines = dict[str, tuple[EngineEntry, Path]]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """A small denoiser at every precision, as a build makes, loads and measures it."""
    from tmpdiff_export.targets.onnxruntime.cuda import OnnxCudaTarget

    target = OnnxCudaTarget(tuple(Precision(name) for name in PRECISIONS))  # tries the provider
    folder = tmp_path_factory.mktemp("engines")
    return {name: made(target, folder, name) for name in PRECISIONS}


@pytest.fixture
def host(engines: Engines) -> Iterator[Any]:
    with closing(host_of(engines)) as opened:
        yield opened


def host_of(engines: Engines, limit: int | None = None) -> Any:
    """A host of the denoisers."""
    from engines.backends.choose import HostOptions, open_host

    entry, _ = engines["fp16"]
    host: Any = open_host("onnxruntime", entry.device, HostOptions(resident_engines=limit))
    for name, (entry, path) in engines.items():
        host.add(name, entry, path)
    return host


def test_the_build_measures_every_precision_and_says_what_runs(engines: Engines) -> None:
    for name, (entry, path) in engines.items():
        print(f"{name}: {entry.sqnr_db} dB, {entry.bytes} bytes, {entry.lowering}, {entry.device}")
        assert entry.sqnr_db > FLOOR_DB[name]
        assert entry.file.sha256 == entry.onnx_sha256
        assert [item.name for item in path.parent.iterdir() if item.name.startswith(".")] == []
    assert engines["int4"][0].lowering["MatMulNBits"] == 5  # a kernel that reads 4-bit weights
    for name in ("fp8", "int8"):  # emulated: codes are dequantized at every call
        assert engines[name][0].lowering["DequantizeLinear"] >= 5 + 3
        assert engines[name][0].lowering["QuantizeLinear"] == 3


@pytest.mark.parametrize("name", PRECISIONS)
def test_engines_agree_with_fp32_torch_at_any_batch(host: Any, name: str) -> None:
    for rows in (1, 2, 3, 6, 2):
        require_agreement(host.engine(name), rows, FLOOR_DB[name])


@pytest.mark.parametrize("choices", [PRECISIONS, REUSING], ids=["computed", "reusing"])
@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_the_device_loop_is_bit_equal_to_the_host_loop(
    host: Any, guidance_scale: float, choices: tuple[str, ...]
) -> None:
    loop = make_loop(12, 3, guidance_scale, choices)
    first, again = host.denoise(loop), host.denoise(loop)
    expected = host_loop(loop, host.engine)
    assert np.isfinite(expected).all()
    assert np.array_equal(first, expected)
    assert np.array_equal(again, expected)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_on_resident_engines_changes_nothing_but_time(host: Any, engines: Engines, limit: int) -> None:
    loop = make_loop(12, 1, 4.5, PRECISIONS)
    with closing(host_of(engines, limit)) as limited:
        found = [limited.denoise(loop) for _ in range(2)]
        assert len(limited.resident) <= limit
    expected = host.denoise(loop)
    for latents in found:
        assert np.array_equal(latents, expected)


def test_a_call_returns_before_the_device_has_come_to_it(host: Any) -> None:
    """The stream is held up by work of another one; calls of a session that waited would outlast that."""
    from cuda.bindings import runtime

    from engines.backends.cuda.gpu import cuda
    from engines.backends.cuda.memory import DeviceBuffer, Event, Stream

    engine = host.engine("fp16")
    inputs = loop_inputs(2)
    expected = engine.run(inputs)[MODEL_OUTPUT]
    context, addresses = engine.upload(engine.plan, inputs)
    host.stream.synchronize()
    busy, behind = Stream(), Event()
    buffer = DeviceBuffer(1 << 30, "the test")
    try:
        for _ in range(400):
            cuda(runtime.cudaMemsetAsync(buffer.address, 0, buffer.size_bytes, busy.handle))
        behind.record(busy)
        cuda(runtime.cudaStreamWaitEvent(host.stream.handle, behind._handle, 0))
        for _ in range(3):
            context.enqueue(host.stream)
        (status,) = runtime.cudaEventQuery(behind._handle)
        assert status == runtime.cudaError_t.cudaErrorNotReady, status.name
        host.stream.synchronize()
        found = np.empty(expected.shape, np.float16)
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        cuda(runtime.cudaMemcpy(found.ctypes.data, addresses[MODEL_OUTPUT], found.nbytes, kind))
        assert np.array_equal(found.astype(np.float32), expected)
    finally:
        busy.rest()
        host.stream.rest()
        behind.close()
        buffer.close()
        busy.close()


def test_step_times_come_from_the_device(host: Any) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    loop = make_loop(40, 1, 4.5, PRECISIONS, seconds)
    for _ in range(3):
        host.denoise(loop)
    for values in seconds.values():
        values.clear()
    begin = time.perf_counter()
    host.denoise(loop)
    wall = time.perf_counter() - begin
    print({name: f"{statistics.median(values) * 1e6:.0f} us" for name, values in seconds.items()})
    assert 0.0 < sum(sum(values) for values in seconds.values()) <= wall


def test_memory_is_given_back(engines: Engines) -> None:
    from engines.backends.cuda.gpu import current_gpu

    def once() -> int:
        with closing(host_of(engines)) as opened:
            opened.denoise(make_loop(8, 2, 4.5, PRECISIONS))
            opened.denoise(make_loop(8, 1, 4.5, PRECISIONS))
        return current_gpu().free_bytes

    once()  # libraries load modules into the context, which keeps them
    before = once()
    for _ in range(3):
        after = once()
    assert abs(after - before) < 32 << 20


def test_a_text_encoder_takes_integers_and_stays(host: Any, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    table = np.random.default_rng(1).standard_normal((11, 6)).astype(np.float32)
    node = helper.make_node("Gather", ["table", "input_ids"], ["hidden_states"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("batch", 5))
    rows = helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, ("batch", 5, 6))
    graph = helper.make_graph([node], "text", [ids], [rows], [numpy_helper.from_array(table, "table")])
    host.add("text encoder", *saved(graph, tmp_path / "text.onnx"))
    data = np.arange(15, dtype=np.int64).reshape(3, 5) % 11
    assert np.array_equal(host.engine("text encoder").run({"input_ids": data})["hidden_states"], table[data])


def test_an_operator_without_a_kernel_is_named(host: Any, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Mul", ["latents", "latents"], ["square"]),
        helper.make_node("Det", ["square"], ["image"]),
    ]
    latents = helper.make_tensor_value_info("latents", TensorProto.FLOAT, ("batch", 4, 4))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ("batch",))
    host.add("other", *saved(helper.make_graph(nodes, "other", [latents], [image]), tmp_path / "other.onnx"))
    with pytest.raises(BackendError, match=r"engine other: CUDAExecutionProvider of .* has no kernel for 1 x Det, and"):
        host.engine("other").run({"latents": np.ones((2, 4, 4), np.float32)})


def test_another_gpu_and_files_that_are_no_graphs_are_refused(host: Any, engines: Engines, tmp_path: Path) -> None:
    entry, _ = engines["fp16"]
    with pytest.raises(BackendError, match="was built for sm75 Other GPU; this GPU is"):
        host.add("other", entry.model_copy(update={"device": "sm75 Other GPU"}), tmp_path / "other.onnx")
    path = tmp_path / "none.onnx"
    path.write_bytes(b"this is no graph\n" * 64)
    host.add("none", entry, path)
    with pytest.raises(BackendError, match=r"engine none: ONNX Runtime .* cannot load"):
        host.engine("none").run(loop_inputs(2))


def made(target: Any, folder: Path, name: str) -> tuple[EngineEntry, Path]:
    """The engine of a precision as `target` makes it."""
    import torch

    from tmpdiff_export.bundling.observed import with_larger_batch
    from tmpdiff_export.onnx_graphs.export import ExportInput
    from tmpdiff_export.quantization.codes import LayerRange
    from tmpdiff_export.quantization.recipes import RECIPES
    from tmpdiff_export.targets.target import EngineJob, SourceModel, file_entry
    from tmpdiff_export.weights.streamed import taken_weights
    from tools.acceptance.checks import check_of
    from tools.acceptance.export_families import store

    module, precision = denoiser(), Precision(name)
    names = (LATENTS, TIMESTEP, TEXT)
    batch = tuple(torch.from_numpy(loop_inputs(2)[key]) for key in names)
    inputs = [
        ExportInput(key, example, {0: "batch"}, keep_dtype=key == TIMESTEP)
        for key, example in zip(names, batch, strict=True)
    ]
    check = check_of(module, names, MODEL_OUTPUT, with_larger_batch([batch]))
    weights = {**taken_weights(module), **dict(module.named_buffers())}
    model = SourceModel(
        module, weights.__getitem__, inputs, {MODEL_OUTPUT: {0: "batch"}}, check, "", 2, torch.float32, half=True
    )
    quantized = () if precision is Precision.FP16 else ("q", "k", "v", "wide", "narrow")
    found = LayerRange(None if RECIPES[precision].weight_only else 6.0, None)
    job = EngineJob(name, model, "none", precision, dict.fromkeys(quantized, found), FLOOR_DB[name])
    prepared = target.prepare(job)
    path = folder / "engines" / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True)
    file = store(job, prepared.tensors, target.form, path.with_suffix(".safetensors"))
    return prepared.task(folder, [file_entry(folder, file)])(), path


def saved(graph: Any, path: Path) -> tuple[EngineEntry, Path]:
    """A graph as a file, and its manifest entry."""
    import onnx
    from onnx import helper

    from engines.backends.cuda.gpu import current_gpu
    from tmpdiff_export.targets.target import tensor_specs

    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    gpu = current_gpu()
    file = FileEntry(path=path.name, sha256=sha256_bytes(path.read_bytes()), bytes=path.stat().st_size)
    inputs: tuple[TensorSpec, ...] = tensor_specs(graph.input)
    entry = EngineEntry(
        file=file,
        backend="onnxruntime",
        backend_version="0",
        device=f"{gpu.architecture} {gpu.name}",
        lowering={},
        onnx_sha256=file.sha256,
        recipe="none",
        sqnr_db=0.0,
        sqnr_floor_db=0.0,
        inputs=inputs,
        outputs=tensor_specs(graph.output),
    )
    return entry, path
