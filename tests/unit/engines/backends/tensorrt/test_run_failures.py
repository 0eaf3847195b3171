"""What a failing call of CUDA or TensorRT ends in: its words, no leak, and a host that goes on.

TensorRT and CUDA are fakes (see `fakes`): what a real GPU computes, needs and takes in time is not shown here.
"""

from __future__ import annotations

from typing import Any

import pytest
from fakes.cuda_enums import CUresult, cudaError_t
from fakes.install import Fakes
from helpers.small_loops import Opened, loop_of, same_bits, schedule
from helpers.small_plans import table

from engines.errors import BackendError
from engines.loop import host_loop

MEMORY_ERROR = cudaError_t.cudaErrorMemoryAllocation
LAUNCH_ERROR = cudaError_t.cudaErrorLaunchFailure


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("cudaStreamCreateWithFlags", MEMORY_ERROR, "out of memory"),
        ("cudaFree", MEMORY_ERROR, "out of memory"),
        ("cuModuleLoadData", CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "refuses the sampler kernels.*PTX_VERSION"),
        ("cuModuleGetFunction", CUresult.CUDA_ERROR_NOT_FOUND, "NOT_FOUND"),
    ],
)
def test_a_host_that_cannot_open_leaves_nothing(fakes: Fakes, call: str, error: Any, words: str) -> None:
    from engines.backends.tensorrt.host import tensorrt_host

    fakes.cuda.fail(call, error)
    with pytest.raises(BackendError, match=words):
        tensorrt_host()
    assert fakes.cuda.leaks() == []


FAILURES = {
    "cudaSetDevice": ((1, 2), cudaError_t.cudaErrorDevicesUnavailable, "cudaErrorDevicesUnavailable"),
    "cudaMalloc": ((1, 3), MEMORY_ERROR, "cannot allocate .* out of memory; use a smaller batch"),
    "cudaHostAlloc": ((1,), MEMORY_ERROR, "out of memory"),
    "cudaMemcpyAsync": ((1, 2, 4), cudaError_t.cudaErrorInvalidValue, "invalid argument"),
    "cudaEventCreateWithFlags": ((1, 3), MEMORY_ERROR, "out of memory"),
    "cudaEventRecord": ((1, 5), LAUNCH_ERROR, "unspecified launch failure"),
    "cudaStreamSynchronize": ((1,), LAUNCH_ERROR, "unspecified launch failure"),
    "cudaGraphLaunch": ((1, 3), LAUNCH_ERROR, "unspecified launch failure"),
    "cuLaunchKernel": ((1, 2, 24), CUresult.CUDA_ERROR_LAUNCH_FAILED, "LAUNCH_FAILED"),
    "execute_async_v3": ((1, 3), "the enqueue broke", "engine fp.* failed to run: .*the enqueue broke"),
    "deserialize_cuda_engine": ((1, 3), "the plan is no good", "cannot load engine .*the plan is no good"),
}


@pytest.mark.parametrize("limit", [None, 1, 2])
@pytest.mark.parametrize(("call", "nth"), [(call, nth) for call, (when, *_) in FAILURES.items() for nth in when])
def test_a_failure_in_the_loop_has_its_words_and_the_next_loop_is_right(
    opened: Opened, fakes: Fakes, call: str, nth: int, limit: int | None
) -> None:
    _, error, words = FAILURES[call]
    loop = loop_of(table(8, 2), schedule("hh88iihh"))
    expected = host_loop(loop, opened().engine)
    host = opened(limit)
    fakes.cuda.fail(call, error, nth=nth)
    with pytest.raises(BackendError, match=words) as failure:
        host.denoise(loop)
    assert "\n" not in str(failure.value)
    assert same_bits(host.denoise(loop), expected)


def test_an_engine_that_was_being_loaded_when_a_loop_failed_is_kept(opened: Opened, fakes: Fakes) -> None:
    host = opened()
    fakes.cuda.fail("cudaHostAlloc", MEMORY_ERROR)  # while the worker loads
    loop = loop_of(table(4, 1), schedule("h8i4"))
    with pytest.raises(BackendError, match="out of memory"):
        host.denoise(loop)
    host.denoise(loop)
    assert fakes.cuda.count("deserialize_cuda_engine") == 4


def test_a_wait_that_fails_in_the_worker_reaches_the_user(opened: Opened, fakes: Fakes) -> None:
    host = opened(1)
    fakes.cuda.fail("cudaEventSynchronize", LAUNCH_ERROR)
    loop = loop_of(table(4, 1), schedule("hh88"))
    with pytest.raises(BackendError, match="unspecified launch failure"):
        host.denoise(loop)
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


def test_memory_that_runs_out_is_named_and_the_host_stays_usable(opened: Opened, fakes: Fakes) -> None:
    host = opened()
    host.engine("fp16")
    fakes.cuda.total_bytes = fakes.cuda.bytes_in_use
    with pytest.raises(BackendError, match=r"cannot load engine fp8 .*OutOfMemory.*limit the resident engines"):
        host.engine("fp8")
    with pytest.raises(BackendError, match=r"cannot allocate \d+ bytes of GPU memory for \w+"):
        host.denoise(loop_of(table(4, 1), schedule("hhhh")))
    fakes.cuda.total_bytes = 1 << 20
    loop = loop_of(table(4, 1), schedule("h8i4"))
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))
