"""Fake streams, captures and events run work in the order that their docstrings say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import fake_cuda
from fakes.fake_memory import FakeCudaError
from fakes.fake_streams import POLICIES
from fakes.install import Fakes
from helpers.fake_driver_calls import (
    DEVICE_TO_DEVICE,
    HOST_TO_DEVICE,
    begin,
    copy,
    download,
    new_stream,
    ok,
    record,
    upload,
)


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
