"""The fake CUDA driver does what its docstrings say; test_fake_tensorrt.py has the other half."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import fake_cuda
from fakes.fake_memory import FakeCudaError
from fakes.fake_streams import POLICIES
from fakes.install import Fakes, install

HOST_TO_DEVICE = "cudaMemcpyHostToDevice"
DEVICE_TO_HOST = "cudaMemcpyDeviceToHost"
DEVICE_TO_DEVICE = "cudaMemcpyDeviceToDevice"
PTX = b""".version 8.0
.target sm_75
.address_size 64
.visible .entry scale(
    .param .u64 scale_param_0,
    .param .f32 scale_param_1,
    .param .u32 scale_param_2
)
{ ret; }
"""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return install(monkeypatch)


@pytest.fixture
def runtime(fakes: Fakes) -> Any:
    return sys.modules["cuda.bindings.runtime"]


@pytest.fixture
def driver(fakes: Fakes) -> Any:
    return sys.modules["cuda.bindings.driver"]


def ok(result: tuple[Any, ...]) -> Any:
    assert int(result[0]) == 0, result
    return result[1] if len(result) > 1 else None


def new_stream(runtime: Any) -> Any:
    return ok(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))


def copy(runtime: Any, target: Any, source: Any, nbytes: int, kind: str, stream: Any) -> None:
    ok(runtime.cudaMemcpyAsync(target, source, nbytes, runtime.cudaMemcpyKind[kind], stream))


def upload(runtime: Any, values: np.ndarray, stream: Any) -> int:
    address = ok(runtime.cudaMalloc(values.nbytes))
    copy(runtime, address, values.ctypes.data, values.nbytes, HOST_TO_DEVICE, stream)
    return address


def download(runtime: Any, address: int, target: np.ndarray, stream: Any) -> None:
    copy(runtime, target.ctypes.data, address, target.nbytes, DEVICE_TO_HOST, stream)


def record(runtime: Any, stream: Any) -> Any:
    event = ok(runtime.cudaEventCreate())
    ok(runtime.cudaEventRecord(event, stream))
    return event


# --- order


def test_nothing_runs_before_a_synchronise(runtime: Any, fakes: Fakes) -> None:
    stream, source, target = new_stream(runtime), np.arange(4.0), np.zeros(4)
    address = upload(runtime, source, stream)
    download(runtime, address, target, stream)
    assert not target.any()
    assert fakes.cuda.scheduler.executed == []
    ok(runtime.cudaStreamSynchronize(stream))
    assert (target == source).all()


def test_a_host_buffer_reused_before_the_copy_ran_gives_wrong_data(runtime: Any) -> None:
    stream, source, target = new_stream(runtime), np.arange(4.0), np.zeros(4)
    address = upload(runtime, source, stream)
    source[:] = -1
    download(runtime, address, target, stream)
    ok(runtime.cudaStreamSynchronize(stream))
    assert (target == -1).all()


def two_streams(runtime: Any, *, ordered: bool, younger_writes: bool) -> float:
    """One stream writes a device buffer that the other one downloads; what the download gives."""
    older, younger = new_stream(runtime), new_stream(runtime)
    writer, reader = (younger, older) if younger_writes else (older, younger)
    address = upload(runtime, np.zeros(4), reader)
    ok(runtime.cudaStreamSynchronize(reader))
    new, seen = np.full(4, 7.0), np.zeros(4)
    copy(runtime, address, new.ctypes.data, new.nbytes, HOST_TO_DEVICE, writer)
    if ordered:
        ok(runtime.cudaStreamWaitEvent(reader, record(runtime, writer), 0))
    download(runtime, address, seen, reader)
    ok(runtime.cudaStreamSynchronize(reader))
    return float(seen[0])


@pytest.mark.parametrize(
    ("policy", "younger_writes", "seen"),
    [
        ("younger_first", True, 7.0),
        ("younger_first", False, 0.0),
        ("older_first", True, 0.0),
        ("older_first", False, 7.0),
        ("lazy", True, 0.0),
        ("lazy", False, 0.0),
    ],
)
def test_without_a_wait_the_policy_decides_the_order(
    runtime: Any, fakes: Fakes, policy: str, younger_writes: bool, seen: float
) -> None:
    fakes.cuda.scheduler.policy, fakes.cuda.scheduler.detect_races = policy, False
    assert two_streams(runtime, ordered=False, younger_writes=younger_writes) == seen
    assert two_streams(runtime, ordered=True, younger_writes=younger_writes) == 7.0


@pytest.mark.parametrize("policy", POLICIES)
def test_unordered_access_to_the_same_bytes_is_a_race(runtime: Any, fakes: Fakes, policy: str) -> None:
    fakes.cuda.scheduler.policy = policy
    with pytest.raises(FakeCudaError, match=r"race: memcpy .* no event or synchronisation orders them"):
        two_streams(runtime, ordered=False, younger_writes=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_host_synchronise_orders_streams(runtime: Any, fakes: Fakes, policy: str) -> None:
    fakes.cuda.scheduler.policy = policy
    first, second, seen = new_stream(runtime), new_stream(runtime), np.zeros(2)
    address = upload(runtime, np.ones(2), first)
    ok(runtime.cudaEventSynchronize(record(runtime, first)))
    download(runtime, address, seen, second)
    ok(runtime.cudaDeviceSynchronize())
    assert (seen == 1).all()


def test_two_readers_and_disjoint_writers_are_no_race(runtime: Any) -> None:
    first, second = new_stream(runtime), new_stream(runtime)
    address = upload(runtime, np.zeros(4), first)
    ok(runtime.cudaStreamSynchronize(first))
    halves = np.zeros((2, 2))
    for stream, half in ((first, 0), (second, 1)):
        download(runtime, address, halves[half], stream)
    for stream, offset in ((first, 32), (second, 48)):
        ok(runtime.cudaMemsetAsync(ok(runtime.cudaMalloc(64)) + offset, 0, 16, stream))
    ok(runtime.cudaDeviceSynchronize())


@pytest.mark.parametrize(("flags", "ordered"), [("cudaStreamDefault", True), ("cudaStreamNonBlocking", False)])
def test_the_default_stream_orders_blocking_streams_only(runtime: Any, flags: str, ordered: bool) -> None:
    stream, seen = ok(runtime.cudaStreamCreateWithFlags(getattr(runtime, flags))), np.zeros(2)
    address = upload(runtime, np.ones(2), 0)
    if not ordered:
        with pytest.raises(FakeCudaError, match="race"):
            download(runtime, address, seen, stream)
        return
    download(runtime, address, seen, stream)
    ok(runtime.cudaStreamSynchronize(stream))
    assert (seen == 1).all()


# --- memory


def test_memory_is_poisoned_aligned_counted_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = install(monkeypatch, memory=1 << 20).cuda
    runtime = sys.modules["cuda.bindings.runtime"]
    address = ok(runtime.cudaMalloc(1000))
    assert address % 256 == 0
    assert np.isnan(fake_cuda.device_array(address, np.float16, 500)).all()
    assert ok(runtime.cudaMemGetInfo()) == (1 << 20) - 1000
    assert runtime.cudaMalloc(1 << 20) == (runtime.cudaError_t.cudaErrorMemoryAllocation, None)
    ok(runtime.cudaFree(address))
    assert (cuda.bytes_in_use, cuda.peak_bytes, cuda.leaks()) == (0, 1000, [])


def test_use_after_free_is_found_when_the_queued_work_runs(runtime: Any) -> None:
    stream = new_stream(runtime)
    address = upload(runtime, np.zeros(4), stream)
    ok(runtime.cudaFree(address))
    with pytest.raises(FakeCudaError, match="is freed device memory"):
        ok(runtime.cudaStreamSynchronize(stream))


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda r, a: (r.cudaFree(a), r.cudaFree(a)), "freed before"),
        (lambda r, a: r.cudaFree(a + 8), "never allocated"),
        (lambda r, a: r.cudaMemsetAsync(a, 0, 65, 0), "pass the end of an allocation of 64 bytes"),
        (lambda r, a: copy(r, a, a, 8, HOST_TO_DEVICE, 0), "cudaMemcpyHostToDevice"),
        (lambda r, a: copy(r, 0, a, 8, DEVICE_TO_HOST, 0), "null pointer"),
        (lambda r, a: r.cudaStreamSynchronize(12345), "was never created"),
        (lambda r, a: r.cudaEventRecord(12345, 0), "not a live Event"),
    ],
)
def test_misuse_raises(runtime: Any, misuse: Callable[[Any, int], Any], words: str) -> None:
    with pytest.raises(FakeCudaError, match=words):
        misuse(runtime, ok(runtime.cudaMalloc(64)))


def test_a_write_past_the_end_and_a_write_after_free_are_found(runtime: Any, fakes: Fakes) -> None:
    address = ok(runtime.cudaMalloc(64))
    ctypes.memset(address + 60, 1, 8)
    with pytest.raises(FakeCudaError, match="out of bounds"):
        fakes.cuda.device.check_all()
    with pytest.raises(FakeCudaError, match="out of bounds"):
        runtime.cudaFree(address)
    other = ok(runtime.cudaMalloc(64))
    ok(runtime.cudaFree(other))
    ctypes.memset(other, 1, 4)
    with pytest.raises(FakeCudaError, match="written after it was freed"):
        fakes.cuda.device.check_all()


def test_a_planned_fault_hits_the_nth_call_from_now(runtime: Any, fakes: Fakes) -> None:
    ok(runtime.cudaMalloc(1))
    fakes.cuda.fail("cudaMalloc", runtime.cudaError_t.cudaErrorMemoryAllocation, nth=2)
    results = [runtime.cudaMalloc(1) for _ in range(3)]
    assert [int(result[0]) for result in results] == [0, 2, 0]
    assert results[1][1] is None


# --- capture


def begin(runtime: Any, stream: Any, mode: str = "cudaStreamCaptureModeThreadLocal") -> None:
    ok(runtime.cudaStreamBeginCapture(stream, runtime.cudaStreamCaptureMode[mode]))


def test_a_graph_replays_addresses_with_the_contents_of_now(runtime: Any, fakes: Fakes) -> None:
    stream, seen = new_stream(runtime), np.zeros(2)
    first = upload(runtime, np.ones(2), stream)
    second = ok(runtime.cudaMalloc(16))
    ok(runtime.cudaStreamSynchronize(stream))
    begin(runtime, stream)
    copy(runtime, second, first, 16, DEVICE_TO_DEVICE, stream)
    graph = ok(runtime.cudaStreamEndCapture(stream))
    ok(runtime.cudaStreamSynchronize(stream))
    assert np.isnan(fake_cuda.device_array(second, np.float64, 2)).all()  # recorded, not run
    launchable = ok(runtime.cudaGraphInstantiate(graph, 0))
    ok(runtime.cudaGraphDestroy(graph))
    for value in (3.0, 4.0):
        new = np.full(2, value)
        copy(runtime, first, new.ctypes.data, 16, HOST_TO_DEVICE, stream)
        ok(runtime.cudaGraphLaunch(launchable, stream))
        download(runtime, second, seen, stream)
        ok(runtime.cudaStreamSynchronize(stream))
        assert (seen == value).all()
    assert fakes.cuda.count("cudaGraphLaunch") == 2
    ok(runtime.cudaGraphLaunch(launchable, stream))
    ok(runtime.cudaGraphExecDestroy(launchable))
    with pytest.raises(FakeCudaError, match="not a live GraphExec"):
        runtime.cudaGraphLaunch(launchable, stream)
    ok(runtime.cudaStreamSynchronize(stream))
    assert fakes.cuda.scheduler.executed.count(("graph", int(stream))) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda r, s: r.cudaMalloc(1),
        lambda r, s: r.cudaFree(0),
        lambda r, s: r.cudaHostAlloc(1, 0),
        lambda r, s: r.cudaStreamSynchronize(s),
        lambda r, s: r.cudaDeviceSynchronize(),
    ],
)
def test_a_capture_forbids(runtime: Any, call: Callable[[Any, Any], Any]) -> None:
    stream = new_stream(runtime)
    begin(runtime, stream)
    with pytest.raises(FakeCudaError, match="captures"):
        call(runtime, stream)


@pytest.mark.parametrize(
    ("mode", "allowed"), [("cudaStreamCaptureModeGlobal", False), ("cudaStreamCaptureModeThreadLocal", True)]
)
def test_a_thread_local_capture_lets_other_threads_allocate(runtime: Any, mode: str, allowed: bool) -> None:
    begin(runtime, new_stream(runtime), mode)
    failures: list[BaseException] = []

    def allocate() -> None:
        try:
            ok(runtime.cudaMalloc(1))
        except FakeCudaError as error:
            failures.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    assert (not failures) == allowed


@pytest.mark.parametrize("joined", [True, False])
def test_streams_join_a_capture_by_events(runtime: Any, joined: bool) -> None:
    main, side, seen = new_stream(runtime), new_stream(runtime), np.zeros(1)
    first, second = upload(runtime, np.ones(1), main), ok(runtime.cudaMalloc(8))
    ok(runtime.cudaStreamSynchronize(main))
    begin(runtime, main)
    ok(runtime.cudaStreamWaitEvent(side, record(runtime, main), 0))
    copy(runtime, second, first, 8, DEVICE_TO_DEVICE, side)
    if joined:
        ok(runtime.cudaStreamWaitEvent(main, record(runtime, side), 0))
    status, graph = runtime.cudaStreamEndCapture(main)
    if not joined:
        assert (status, graph) == (runtime.cudaError_t.cudaErrorStreamCaptureUnjoined, None)
        return
    ok(runtime.cudaGraphLaunch(ok(runtime.cudaGraphInstantiate(graph, 0)), side))
    download(runtime, second, seen, side)
    ok(runtime.cudaStreamSynchronize(side))
    assert seen[0] == 1


# --- events


def test_elapsed_time_is_fake_device_time(runtime: Any) -> None:
    stream = new_stream(runtime)
    start = record(runtime, stream)
    address = upload(runtime, np.zeros(2), stream)
    ok(runtime.cudaMemsetAsync(address, 0, 8, stream))
    end = record(runtime, stream)
    assert runtime.cudaEventElapsedTime(start, end) == (runtime.cudaError_t.cudaErrorNotReady, None)
    ok(runtime.cudaEventSynchronize(end))
    assert ok(runtime.cudaEventElapsedTime(start, end)) == pytest.approx(0.002)
    untimed = ok(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming))
    ok(runtime.cudaEventRecord(untimed, stream))
    ok(runtime.cudaEventSynchronize(untimed))
    status, _ = runtime.cudaEventElapsedTime(start, untimed)
    assert status == runtime.cudaError_t.cudaErrorInvalidResourceHandle


# --- kernels


@pytest.fixture
def scale_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(grid: Any, block: Any, args: list[Any]) -> None:
        address, factor, count = args
        fake_cuda.device_array(address, np.float32, count)[:] *= np.float32(factor)

    monkeypatch.setitem(fake_cuda.kernels, "scale", scale)


TYPES = (ctypes.c_void_p, ctypes.c_float, ctypes.c_uint)


def launch(driver: Any, function: Any, stream: Any, values: tuple[Any, ...], types: tuple[Any, ...] = TYPES) -> Any:
    return driver.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, stream, (values, types), 0)


@pytest.mark.usefixtures("scale_kernel")
def test_a_kernel_runs_in_stream_order_on_checked_memory(runtime: Any, driver: Any) -> None:
    stream, seen = new_stream(runtime), np.zeros(4, np.float32)
    address = upload(runtime, np.ones(4, np.float32), stream)
    function = ok(driver.cuModuleGetFunction(ok(driver.cuModuleLoadData(PTX)), b"scale"))
    ok(launch(driver, function, stream, (address, 3.0, 4)))
    download(runtime, address, seen, stream)
    ok(runtime.cudaStreamSynchronize(stream))
    assert (seen == 3).all()
    ok(launch(driver, function, stream, (address, 3.0, 5)))
    with pytest.raises(FakeCudaError, match="pass the end"):
        runtime.cudaStreamSynchronize(stream)


@pytest.mark.usefixtures("scale_kernel")
@pytest.mark.parametrize("types", [TYPES[:2], (ctypes.c_void_p, ctypes.c_double, ctypes.c_uint)])
def test_a_launch_that_does_not_fit_the_ptx_raises(runtime: Any, driver: Any, types: tuple[Any, ...]) -> None:
    stream = new_stream(runtime)
    function = ok(driver.cuModuleGetFunction(ok(driver.cuModuleLoadData(PTX)), b"scale"))
    with pytest.raises(FakeCudaError, match=r"takes parameters of \(8, 4, 4\) bytes"):
        launch(driver, function, stream, (0, 1.0, 1)[: len(types)], types)


def test_modules_need_a_context_a_target_and_a_known_name(runtime: Any, driver: Any) -> None:
    assert driver.cuModuleLoadData(PTX) == (driver.CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
    ok(runtime.cudaFree(0))
    newer = PTX.replace(b"sm_75", b"sm_100")
    assert driver.cuModuleLoadData(newer) == (driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, None)
    assert driver.cuModuleLoadData(b"no ptx") == (driver.CUresult.CUDA_ERROR_INVALID_PTX, None)
    module = ok(driver.cuModuleLoadData(PTX))
    assert driver.cuModuleGetFunction(module, b"scales") == (driver.CUresult.CUDA_ERROR_NOT_FOUND, None)
    function = ok(driver.cuModuleGetFunction(module, b"scale"))
    ok(driver.cuModuleUnload(module))
    with pytest.raises(FakeCudaError, match="not a function of a loaded module"):
        launch(driver, function, 0, (0, 1.0, 1))


# --- hosts


def test_without_a_gpu_calls_return_what_the_real_package_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("this host has a GPU")
    kind, mode = real.cudaMemcpyKind.cudaMemcpyDefault, real.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
    calls = {
        "cudaGetDeviceCount": (),
        "cudaGetDevice": (),
        "cudaSetDevice": (0,),
        "cudaGetDeviceProperties": (0,),
        "cudaMemGetInfo": (),
        "cudaMalloc": (8,),
        "cudaFree": (0,),
        "cudaHostAlloc": (8, 0),
        "cudaFreeHost": (0,),
        "cudaMemcpyAsync": (0, 0, 8, kind, 0),
        "cudaMemsetAsync": (0, 0, 8, 0),
        "cudaStreamCreateWithFlags": (1,),
        "cudaStreamDestroy": (0,),
        "cudaStreamSynchronize": (0,),
        "cudaStreamWaitEvent": (0, 0, 0),
        "cudaStreamBeginCapture": (0, mode),
        "cudaStreamEndCapture": (0,),
        "cudaGraphInstantiate": (0, 0),
        "cudaGraphLaunch": (0, 0),
        "cudaEventCreate": (),
        "cudaEventCreateWithFlags": (0,),
        "cudaEventRecord": (0, 0),
        "cudaEventSynchronize": (0,),
        "cudaEventElapsedTime": (0, 0),
        "cudaDeviceSynchronize": (),
    }
    expected = {name: getattr(real, name)(*args)[1:] for name, args in calls.items()}
    install(monkeypatch, gpus=0)
    fake = sys.modules["cuda.bindings.runtime"]
    assert fake is not real
    results = {name: getattr(fake, name)(*args) for name, args in calls.items()}
    assert {name: result[1:] for name, result in results.items()} == expected
    assert all(result[0] == fake.cudaError_t.cudaErrorNoDevice for result in results.values())


def test_installing_replaces_the_modules_until_the_test_ends() -> None:
    import importlib.util

    from engines.backends.cuda import gpu

    before = {name: sys.modules.get(name) for name in ("tensorrt", "tensorrt_lean", "cuda")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch)
        bindings = importlib.import_module("engines.backends.tensorrt.bindings")
        assert not bindings.LEAN
        for name in ("tensorrt", "cuda.bindings", "cuda.bindings.runtime"):
            assert importlib.util.find_spec(name) is not None
        assert importlib.util.find_spec("tensorrt_lean") is None
        install(monkeypatch, lean=True, version="11.4.0.106")
        assert importlib.import_module("engines.backends.tensorrt.bindings") is not bindings
        assert importlib.import_module("engines.backends.tensorrt.bindings").LEAN
    assert {name: sys.modules.get(name) for name in before} == before
    assert sys.modules["engines.backends.cuda.gpu"] is gpu
    assert sys.modules["engines.backends.cuda"].gpu is gpu
    assert sys.modules.get("engines.backends.tensorrt.bindings") is not bindings
    with pytest.raises(FakeCudaError, match="no fake CUDA is installed"):
        fake_cuda.current()
