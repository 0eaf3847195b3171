"""The fake CUDA driver does what its docstrings say: memory, kernels, hosts; test_fake_streams.py has the order of work."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import fake_cuda
from fakes.fake_memory import FakeCudaError
from fakes.install import Fakes, install
from helpers.fake_driver_calls import DEVICE_TO_HOST, HOST_TO_DEVICE, copy, download, new_stream, ok, upload

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
