"""Which plans are in device memory when: limits, loads beside the loop, and what gives way.

TensorRT and CUDA are fakes (see `fakes`): what a real GPU computes, needs and takes in time is not shown here.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fakes.install import Fakes, install
from helpers.small_loops import Opened, loop_of, same_bits, schedule
from helpers.small_plans import SEEDS, TOKENS, denoiser, embedder, entry, table

from engines.loop import host_loop


def live_engines(fakes: Fakes, start: int = 0) -> list[int]:
    """How many engines are in device memory after each load."""
    live, counts = 0, []
    for call in fakes.cuda.calls[start:]:
        live += (call.name == "deserialize_cuda_engine") - (call.name == "~ICudaEngine")
        if call.name == "deserialize_cuda_engine":
            counts.append(live)
    return counts


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_engines_are_resident_than_allowed(opened: Opened, fakes: Fakes, limit: int) -> None:
    host = opened(limit)
    for pattern in ("h8i4h8i4", "4444hhhh", "i8i8i8i8"):
        host.denoise(loop_of(table(8, 2), schedule(pattern)))
        assert len(host.resident) <= limit
    for name in SEEDS:
        host.engine(name)
    assert max(live_engines(fakes)) == limit


def test_engines_that_fit_are_loaded_once(opened: Opened, fakes: Fakes) -> None:
    host = opened(4)
    for pattern in ("h8i4h8i4", "4444hhhh"):
        host.denoise(loop_of(table(8, 2), schedule(pattern)))
    assert fakes.cuda.count("deserialize_cuda_engine") == 4


def test_the_next_engine_is_asked_for_as_soon_as_there_is_room(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.backends.cuda.device_loop import DeviceLoop
    from engines.backends.cuda.resident_plans import ResidentPlans

    happened: list[str] = []
    start, step = ResidentPlans.start, DeviceLoop.step
    monkeypatch.setattr(
        ResidentPlans,
        "start",
        lambda self, load, idle: (happened.append(f"load {load.engine}"), start(self, load, idle)),
    )
    monkeypatch.setattr(
        DeviceLoop, "step", lambda self, index, *rest: (happened.append(f"step {index}"), step(self, index, *rest))
    )
    opened(2).denoise(loop_of(table(6, 1), schedule("hh888i")))
    assert happened == [
        "load fp16", "load fp8", "step 0", "step 1", "load int8", "step 2", "step 3", "step 4", "step 5",
    ]  # fmt: skip


def test_an_engine_gives_way_only_when_its_work_is_done(opened: Opened, fakes: Fakes) -> None:
    host = opened(1)
    host.denoise(loop_of(table(4, 1), schedule("h8i4")))
    names = [call.name for call in fakes.cuda.calls]
    gone = [index for index, name in enumerate(names) if name == "~ICudaEngine"]
    waited = [index for index, name in enumerate(names) if name == "cudaEventSynchronize"]
    assert len(gone) == len(waited) == 3
    assert all(a < b for a, b in zip(waited, gone, strict=True))


def test_every_thread_works_on_the_device_that_was_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fakes = install(monkeypatch, gpus=2)
    from cuda.bindings import runtime

    from engines.backends.tensorrt.host import tensorrt_host

    runtime.cudaSetDevice(1)
    host = tensorrt_host(resident_engines=1)
    for name in ("fp16", "fp8"):
        host.add(name, *entry(fakes, denoiser(SEEDS[name]), tmp_path, name))
    with ThreadPoolExecutor(1) as new:  # in a new thread the current device is the first one
        new.submit(host.denoise, loop_of(table(4, 1), schedule("h8h8"))).result()
        assert fakes.cuda.device.in_use.get(0, 0) == 0
    with ThreadPoolExecutor(1) as new:
        new.submit(host.close).result()
        assert new.submit(lambda: runtime.cudaGetDevice()[1]).result() == 1  # where TensorRT frees
    assert fakes.cuda.leaks() == []


def test_other_engines_do_not_count_against_the_limit(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(1)
    host.add("text encoder", *entry(fakes, embedder(), tmp_path, "text"))
    loop = loop_of(table(4, 1), schedule("h8h8"))
    expected = host_loop(loop, host.engine)
    text = host.engine("text encoder")
    loads = fakes.cuda.count("deserialize_cuda_engine")
    ids = np.arange(2 * TOKENS, dtype=np.int64).reshape(2, TOKENS)
    before = text.run({"input_ids": ids})["hidden_states"]
    assert same_bits(host.denoise(loop), expected)
    assert same_bits(text.run({"input_ids": ids})["hidden_states"], before)
    assert fakes.cuda.count("deserialize_cuda_engine") == loads + 4
    assert host.resident == ("fp8",)
