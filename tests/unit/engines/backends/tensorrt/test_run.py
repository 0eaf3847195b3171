"""Running plans: the device loop against the host loop, memory and graphs.

TensorRT and CUDA are fakes (see `fakes`): what a real GPU computes, needs and takes in time is not shown here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.cuda_enums import cudaError_t
from fakes.install import Fakes, install
from helpers.small_loops import Opened, loop_of, same_bits, schedule
from helpers.small_plans import SEEDS, denoiser, entry, table

from engines.errors import ScheduleError
from engines.loop import host_loop

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
MEMORY = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost")


# The loop


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("pattern", ["hhhhhhhh", "hh8888hh", "h8i4h8i4", "444i88hh"])
def test_the_device_loop_equals_the_host_loop_bit_for_bit(opened: Opened, pattern: str, limit: int | None) -> None:
    host = opened(limit)
    for sampler in (table(8, 1), table(8, 2), table(8, 3, past_samples=True), table(8, 8, past_samples=True)):
        for guidance_scale in (4.5, 1.0):
            loop = loop_of(sampler, schedule(pattern), guidance_scale=guidance_scale)
            assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


@pytest.mark.parametrize("limit", [None, 1, 2])
@pytest.mark.parametrize("pattern", ["haaaaaaa", "hhbhabac", "h8ibac4b", "iiibbbcc"])
def test_reused_steps_equal_those_of_the_host_loop_bit_for_bit(
    opened: Opened, fakes: Fakes, pattern: str, limit: int | None
) -> None:
    host = opened(limit)
    for sampler in (table(8, 1), table(8, 2), table(8, 3, past_samples=True), table(8, 8, past_samples=True)):
        for guidance_scale, samples in ((4.5, 2), (1.0, 1)):
            loop = loop_of(sampler, schedule(pattern), guidance_scale=guidance_scale, samples=samples)
            start = len(fakes.cuda.calls)
            latents = host.denoise(loop)
            names = [call.name for call in fakes.cuda.calls[start:]]
            computed = sum(letter not in "abc" for letter in pattern)
            sums = sum(letter in "bc" for letter in pattern)
            assert names.count("cuLaunchKernel") == 3 * computed + (8 - computed) + sums
            assert same_bits(latents, host_loop(loop, host.engine))


def test_a_reused_step_is_timed_by_its_own_name_and_loads_nothing(opened: Opened) -> None:
    seen: list[tuple[int, str]] = []
    host = opened(1)
    loop = loop_of(table(6, 2), schedule("hhabia"), on_step=lambda k, name, seconds: seen.append((k, name)))
    host.denoise(loop)
    assert seen == list(enumerate(loop.precisions))
    assert host.resident == ("int8",)
    with pytest.raises(ScheduleError, match="step index 1 is reuse1"):
        host.denoise(loop_of(table(4, 1), schedule("hbhh")))
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


def test_a_loop_with_rescaled_guidance_reuses_as_the_host_loop_does(opened: Opened) -> None:
    host = opened()
    loop = loop_of(table(6, 2), schedule("hhab8c"), guidance_rescale=0.7)
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


@pytest.mark.parametrize("policy", ["younger_first", "older_first", "lazy"])
def test_the_order_in_which_streams_run_does_not_matter(opened: Opened, fakes: Fakes, policy: str) -> None:
    host = opened(2)
    fakes.cuda.scheduler.policy = policy
    for pattern in ("h8i4h8i4", "h8bi4cba"):
        loop = loop_of(table(8, 3), schedule(pattern))
        assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


@pytest.mark.parametrize("version", ["10.13.2.6", "10.16.1.11"])
def test_older_tensorrt_runs_the_same_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    fakes = install(monkeypatch, version=version)
    from engines.backends.tensorrt.host import tensorrt_host

    host = tensorrt_host(resident_engines=1)
    for name in ("fp16", "fp8"):
        host.add(name, *entry(fakes, denoiser(SEEDS[name]), tmp_path, name))
    loop = loop_of(table(6, 2), schedule("hh88hh"))
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))
    host.close()
    assert fakes.cuda.leaks() == []


def test_engines_of_different_types_share_a_loop(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(names=("fp16",))
    host.add("int8", *entry(fakes, denoiser(9, "float32"), tmp_path, "single"))
    loop = loop_of(table(6, 2), schedule("hihiih"))
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


def test_the_result_belongs_to_the_caller(opened: Opened) -> None:
    host = opened()
    loop = loop_of(table(4, 2), schedule("h88h"))
    first = host.denoise(loop)
    kept = first.copy()
    host.denoise(loop_of(table(4, 2), schedule("hhhh"), guidance_scale=2.0))
    assert same_bits(first, kept)
    assert first.flags.owndata
    assert first.flags.writeable


def test_batches_of_other_sizes_follow_each_other(opened: Opened) -> None:
    host = opened()
    for samples in (1, 2, 1, 2):
        loop = loop_of(table(4, 2), schedule("h88h"), samples=samples)
        assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


def test_nothing_waits_and_nothing_is_allocated_between_the_steps(opened: Opened, fakes: Fakes) -> None:
    host = opened()
    for _ in range(2):
        start = len(fakes.cuda.calls)
        host.denoise(loop_of(table(8, 3), schedule("h8i4h8i4")))
        names = [call.name for call in fakes.cuda.calls[start:]]
        steps = [index for index, name in enumerate(names) if name == "cuLaunchKernel"]
        assert len(steps) == 3 * 8
        between = names[steps[0] : steps[-1]]
        assert not set(between) & {*WAITS, *MEMORY, "cudaMemcpyAsync", "create_execution_context"}
        assert names[steps[-1] :].count("cudaStreamSynchronize") == 1
        assert sum(name in WAITS for name in names) == 1


def test_a_second_loop_allocates_nothing_whatever_the_limit(opened: Opened, fakes: Fakes) -> None:
    for limit in (None, 1, 2):
        host = opened(limit)
        loop = loop_of(table(8, 3), schedule("h8i4h8i4"))
        host.denoise(loop)
        start = len(fakes.cuda.calls)
        host.denoise(loop)
        assert not {call.name for call in fakes.cuda.calls[start:]} & set(MEMORY)


def test_seconds_of_each_step_come_after_the_loop(opened: Opened, fakes: Fakes) -> None:
    seen: list[tuple[int, str, float]] = []
    waits: list[int] = []

    def on_step(step_index: int, precision: str, seconds: float) -> None:
        seen.append((step_index, precision, seconds))
        waits.append(fakes.cuda.count("cudaStreamSynchronize"))

    host = opened()
    before = fakes.cuda.count("cudaStreamSynchronize")
    host.denoise(loop_of(table(4, 1), schedule("h8ih"), on_step=on_step))
    assert [item[:2] for item in seen] == list(enumerate(schedule("h8ih")))
    assert all(seconds > 0 for *_, seconds in seen)
    assert waits == [before + 1] * 4


# Memory and graphs


def test_all_engines_run_in_one_scratch(opened: Opened, fakes: Fakes) -> None:
    host = opened()
    host.denoise(loop_of(table(4, 1), schedule("h8i4")))
    used = [call.args for call in fakes.cuda.calls if call.name == "set_device_memory"]
    assert len({address for address, _ in used}) == 1
    bound = [call.args for call in fakes.cuda.calls if call.name == "set_tensor_address"]
    assert len({address for _, address in bound}) == len({name for name, _ in bound}) == 4


def test_a_graph_is_captured_once_per_engine_and_shape(opened: Opened, fakes: Fakes) -> None:
    host = opened()
    pattern = schedule("h8h8h8")
    for rounds in range(3):
        host.denoise(loop_of(table(6, 2), pattern))
        assert fakes.cuda.count("cudaGraphInstantiate") == 2
        # One plain enqueue and one captured one per engine; the rest are launches.
        assert fakes.cuda.count("execute_async_v3") == 4
        assert fakes.cuda.count("cudaGraphLaunch") == 6 * (rounds + 1) - 2
    host.denoise(loop_of(table(6, 2), pattern, samples=1))
    host.denoise(loop_of(table(6, 2), pattern))
    assert fakes.cuda.count("cudaGraphInstantiate") == 4
    assert host.notes == {}


def test_a_capture_does_not_hinder_the_worker_that_loads(opened: Opened, fakes: Fakes) -> None:
    opened(2).denoise(loop_of(table(8, 2), schedule("hh88iihh")))
    modes = [call.args[1].name for call in fakes.cuda.calls if call.name == "cudaStreamBeginCapture"]
    assert modes
    assert set(modes) == {"cudaStreamCaptureModeThreadLocal"}


def test_only_so_many_contexts_are_kept_per_engine(opened: Opened, fakes: Fakes) -> None:
    host = opened(names=("fp16",), batch=(1, 2, 6))
    loops = [loop_of(table(3, 2), schedule("hhh"), samples=size, guidance_scale=1.0) for size in range(1, 7)]
    expected = [host.denoise(loop) for loop in loops]
    assert all(same_bits(host.denoise(loop), latents) for loop, latents in zip(loops, expected, strict=True))
    names = fakes.cuda.names()
    assert names.count("create_execution_context") == 12
    assert names.count("~IExecutionContext") == 12 - 4


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("cudaStreamBeginCapture", cudaError_t.cudaErrorStreamCaptureUnsupported),
        ("cudaGraphInstantiate", cudaError_t.cudaErrorMemoryAllocation),
    ],
)
def test_an_engine_that_cannot_be_captured_says_so_and_runs(
    opened: Opened, fakes: Fakes, call: str, error: cudaError_t
) -> None:
    host = opened(names=("fp16",))
    fakes.cuda.fail(call, error)
    loop = loop_of(table(6, 2), schedule("hhhhhh"))
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))
    assert "without a CUDA graph" in host.notes["fp16"]
    assert error.name in host.notes["fp16"]
    assert fakes.cuda.count("cudaGraphLaunch") == 0


def test_what_tensorrt_says_against_a_capture_is_in_the_note(opened: Opened, fakes: Fakes) -> None:
    host = opened(names=("fp16",))
    fakes.cuda.fail("execute_async_v3", "this layer synchronises", nth=2)
    loop = loop_of(table(6, 2), schedule("hhhhhh"))
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))
    assert "this layer synchronises" in host.notes["fp16"]


def test_a_larger_batch_moves_the_buffers_and_old_graphs_are_not_used(opened: Opened, fakes: Fakes) -> None:
    host = opened(names=("fp16", "fp8"))
    small, large = (loop_of(table(6, 2), schedule("h8h8h8"), samples=samples) for samples in (1, 2))
    expected = host.denoise(small)
    host.denoise(large)
    assert same_bits(host.denoise(small), expected)
    assert same_bits(host.denoise(large), host_loop(large, host.engine))


def test_scratch_that_has_to_grow_in_a_loop_waits_for_the_work_in_the_old_one(
    fakes: Fakes, opened: Opened, tmp_path: Path
) -> None:
    host = opened(2, names=("fp16", "fp8"))
    host.add("int8", *entry(fakes, denoiser(9, "float32"), tmp_path, "larger"))
    loop = loop_of(table(6, 2), schedule("h8hhih"))
    expected = host_loop(loop, host.engine)
    host.close()
    again = opened(2, names=("fp16", "fp8"))
    again.add("int8", *entry(fakes, denoiser(9, "float32"), tmp_path, "larger"))
    assert same_bits(again.denoise(loop), expected)


def test_memory_of_no_bytes_has_an_address(fakes: Fakes) -> None:
    from engines.backends.cuda.memory import DeviceBuffer

    buffer = DeviceBuffer(0, "nothing")
    assert buffer.address  # TensorRT refuses the null address
    buffer.close()
    buffer.close()
    assert fakes.cuda.leaks() == []
