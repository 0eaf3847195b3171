"""Running plans: the device loop against the host loop, memory, graphs, residency, and every way to fail.

TensorRT and CUDA are fakes (see `fakes`): what a real GPU computes, needs and takes in time is not shown here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fake_kernels  # noqa: F401  (registers the kernels)
from fakes.cuda_enums import CUresult, cudaError_t
from fakes.install import Fakes, install
from helpers.paths import ROOT
from helpers.small_loops import loop_of, same_bits, schedule
from helpers.small_plans import CHANNELS, SIDE, TOKENS, WIDTH, denoiser, embedder, entry, table

from engines.errors import BackendError
from engines.files import sha256_file
from engines.loop import Loop, host_loop

BACKEND = ROOT / "engines" / "backends" / "cuda"
SEEDS = {"fp16": 0, "fp8": 1, "int8": 2, "int4": 3}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
MEMORY = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return install(monkeypatch)


Opened = Callable[..., Any]


@pytest.fixture
def opened(fakes: Fakes, tmp_path: Path) -> Iterator[Opened]:
    """Opens a host with the small denoisers in it; after the test it is closed and nothing may be left."""
    from engines.backends.tensorrt.host import tensorrt_host

    hosts = []

    def open_host(resident_engines: int | None = None, names: tuple[str, ...] = tuple(SEEDS), **options: Any) -> Any:
        host = tensorrt_host(resident_engines=resident_engines)
        hosts.append(host)
        for name in names:
            host.add(name, *entry(fakes, denoiser(SEEDS[name], weights=64 << SEEDS[name]), tmp_path, name, **options))
        return host

    yield open_host
    for host in hosts:
        host.close()
        host.close()
    assert fakes.cuda.leaks() == []


# The loop


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("pattern", ["hhhhhhhh", "hh8888hh", "h8i4h8i4", "444i88hh"])
def test_the_device_loop_equals_the_host_loop_bit_for_bit(opened: Opened, pattern: str, limit: int | None) -> None:
    host = opened(limit)
    for sampler in (table(8, 1), table(8, 2), table(8, 3, past_samples=True), table(8, 8, past_samples=True)):
        for guidance_scale in (4.5, 1.0):
            loop = loop_of(sampler, schedule(pattern), guidance_scale=guidance_scale)
            assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


@pytest.mark.parametrize("policy", ["younger_first", "older_first", "lazy"])
def test_the_order_in_which_streams_run_does_not_matter(opened: Opened, fakes: Fakes, policy: str) -> None:
    host = opened(2)
    fakes.cuda.scheduler.policy = policy
    loop = loop_of(table(8, 3), schedule("h8i4h8i4"))
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


# Residency


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


# One inference


def inputs(batch: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {
        "latents": random.standard_normal((batch, CHANNELS, SIDE, SIDE)).astype(np.float32),
        "timestep": np.full(batch, 500, np.float32),
        "hidden_states": random.standard_normal((batch, TOKENS, WIDTH)).astype(np.float32),
    }


def test_an_engine_takes_either_floating_type_and_returns_float32(opened: Opened) -> None:
    engine = opened().engine("fp16")
    given = inputs()
    half = {name: values.astype(np.float16) for name, values in given.items()}
    result = engine.run(given)["model_output"]
    assert result.dtype == np.float32
    assert result.shape == given["latents"].shape
    assert same_bits(engine.run(half)["model_output"], result)
    reference = np.tanh(
        given["latents"] * denoiser_weight() + given["hidden_states"].mean((1, 2)).reshape(-1, 1, 1, 1) + 0.5
    )
    np.testing.assert_allclose(result, reference, atol=5e-3)


def denoiser_weight() -> np.ndarray:
    return np.random.default_rng(SEEDS["fp16"]).standard_normal((1, CHANNELS, 1, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given.pop("timestep"), r"takes inputs \['hidden_states', 'latents', 'timestep'\], received"),
        (lambda given: given.update(other=np.zeros(2, np.float32)), "received .*'other'"),
        (lambda given: given.update(timestep=np.zeros(2, np.int64)), "input timestep must be float32, received int64"),
        (lambda given: given.update(inputs(5)), r"\(5, 3, 4, 4\), optimization profile 0 takes \(1, 3, 4, 4\) to \(4, 3, 4, 4\)"),
        (lambda given: given.update(hidden_states=np.zeros((1, TOKENS, WIDTH), np.float16)), "dimension batch"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(opened: Opened, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    engine = opened().engine("fp16")
    given = inputs()
    change(given)
    with pytest.raises(BackendError, match=words):
        engine.run(given)
    assert engine.run(inputs())["model_output"].shape == (2, CHANNELS, SIDE, SIDE)


def test_a_failed_inference_is_over_before_its_engine_gives_way(opened: Opened, fakes: Fakes) -> None:
    host = opened(1)
    expected = opened().engine("fp8").run(inputs())["model_output"]
    engine = host.engine("fp16")
    fakes.cuda.fail("cudaMemcpyAsync", cudaError_t.cudaErrorInvalidValue, nth=4)  # the download
    with pytest.raises(BackendError, match="invalid argument"):
        engine.run(inputs())
    assert same_bits(host.engine("fp8").run(inputs())["model_output"], expected)


def test_a_plan_file_can_be_opened_and_timed_by_itself(fakes: Fakes, tmp_path: Path) -> None:
    from engines.backends.cuda.timing import latency_ms
    from engines.backends.tensorrt.host import open_engine
    from engines.backends.tensorrt.profiling import layer_times

    _, path = entry(fakes, denoiser(0), tmp_path, "alone")
    with open_engine(path, version_compatible=False) as (engine, plan):
        shapes = {name: values.shape for name, values in inputs().items()}
        before = engine.run(inputs())["model_output"]
        times = layer_times(engine, plan, shapes)
        layer_ms = fakes.settings.layer_ms["FP16"]
        assert len(times) >= 4
        assert max(times.values()) == pytest.approx(max(fakes.settings.layer_ms["FP32"], layer_ms))
        assert latency_ms(engine, shapes) > 0
        assert same_bits(engine.run(inputs())["model_output"], before)
        with pytest.raises(BackendError, match="takes inputs"):
            latency_ms(engine, {"latents": (1, 2)})
    assert fakes.cuda.leaks() == []


# Refusals


def test_without_a_gpu_no_runtime_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, gpus=0)
    from engines.backends.tensorrt.host import open_engine, tensorrt_host

    with pytest.raises(BackendError, match="found no NVIDIA GPU"):
        tensorrt_host()
    with pytest.raises(BackendError, match="found no NVIDIA GPU"), open_engine(tmp_path, version_compatible=True):
        pass


def test_host_code_runs_only_for_plans_that_say_they_have_it(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(names=())
    small = denoiser(0)
    host.add("fp16", *entry(fakes, small, tmp_path, "said", flags=("VERSION_COMPATIBLE",)))
    host.add("fp8", *entry(fakes, small, tmp_path, "unsaid", flags=("VERSION_COMPATIBLE",), version_compatible=False))
    host.engine("fp16")
    with pytest.raises(BackendError, match="host code"):
        host.engine("fp8")


def test_the_lean_runtime_runs_version_compatible_plans_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fakes = install(monkeypatch)
    entries = [
        entry(fakes, denoiser(0), tmp_path, "portable", flags=("VERSION_COMPATIBLE",)),
        entry(fakes, denoiser(0), tmp_path, "bound"),
    ]
    fakes = install(monkeypatch, lean=True)
    from engines.backends.tensorrt.host import tensorrt_host

    host = tensorrt_host()
    host.add("fp16", *entries[0])
    assert host.engine("fp16").run(inputs())["model_output"].shape == (2, CHANNELS, SIDE, SIDE)
    with pytest.raises(BackendError, match="only the lean runtime is installed"):
        host.add("fp8", *entries[1])
    host.close()
    assert fakes.cuda.leaks() == []


@pytest.mark.parametrize(
    ("capability", "compatibility", "runs"),
    [((8, 9), "none", False), ((8, 9), "ampere_plus", True), ((8, 9), "same_compute_capability", False), ((7, 5), "ampere_plus", False)],
)  # fmt: skip
def test_a_plan_for_other_gpus_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], compatibility: str, runs: bool
) -> None:
    built, path = entry(install(monkeypatch), denoiser(0), tmp_path, "x", hardware_compatibility=compatibility)
    install(monkeypatch, compute_capability=capability, name="Fake L4")
    from engines.backends.tensorrt.host import tensorrt_host

    host = tensorrt_host()
    if runs:
        host.add("fp16", built, path)
    else:
        with pytest.raises(BackendError, match=r"sm90 Fake H200 .* this GPU is sm\d\d Fake L4"):
            host.add("fp16", built, path)
    host.close()


def test_a_stripped_plan_is_refused(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(names=())
    host.add("fp16", *entry(fakes, denoiser(0, weights=128), tmp_path, "x", flags=("STRIP_PLAN",)))
    with pytest.raises(BackendError, match="stripped plan"):
        host.engine("fp16")


def test_an_altered_plan_ends_in_tensorrts_words(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(names=())
    built, path = entry(fakes, denoiser(0), tmp_path, "x")
    path.write_bytes(path.read_bytes()[:-1])
    host.add("fp16", built, path)
    with pytest.raises(BackendError, match=r"cannot load engine fp16 .*truncated or corrupt"):
        host.engine("fp16")
    path.write_bytes(b"")
    with pytest.raises(BackendError, match="cannot be read"):
        host.engine("fp16")


def test_a_manifest_without_the_plans_description_is_refused(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    built, path = entry(fakes, denoiser(0), tmp_path, "x")
    with pytest.raises(BackendError, match="does not describe its TensorRT plan"):
        opened(names=()).add("fp16", built.model_copy(update={"plan": None}), path)


def test_a_plan_that_takes_another_type_than_the_manifest_says_is_refused(
    fakes: Fakes, opened: Opened, tmp_path: Path
) -> None:
    built, path = entry(fakes, denoiser(0), tmp_path, "x")
    single = tuple(spec.model_copy(update={"dtype": "float32"}) for spec in built.inputs)
    host = opened(names=())
    host.add("fp16", built.model_copy(update={"inputs": single}), path)
    with pytest.raises(BackendError, match="hidden_states as float16, which its manifest entry does not say"):
        host.denoise(loop_of(table(2, 1), schedule("hh")))


def test_weights_are_streamed_where_the_plan_says_so(
    fakes: Fakes, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 1000
    monkeypatch.setattr(fakes.tensorrt.ICudaEngine, "get_weight_streaming_automatic_budget", lambda self: budget)
    host = opened(names=())
    small = denoiser(0, weights=1 << 16)
    host.add("fp16", *entry(fakes, small, tmp_path, "streamed", flags=("WEIGHT_STREAMING",)))
    host.add("fp8", *entry(fakes, small, tmp_path, "kept", flags=("WEIGHT_STREAMING",), weight_streaming=False))
    assert host.engine("fp16").plan.engine.weight_streaming_budget_v2 == budget
    assert host.engine("fp8").plan.engine.weight_streaming_budget_v2 > 1 << 17
    loop = loop_of(table(3, 1), schedule("h8h"))
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


def test_an_error_that_is_kept_does_not_keep_device_memory(
    opened: Opened, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes.tensorrt.IExecutionContext, "set_input_shape", lambda *_: False)
    host = opened(names=("fp16",))
    with pytest.raises(BackendError, match="engine fp16: TensorRT refuses the shapes") as failure:
        host.engine("fp16").run(inputs())
    host.close()
    assert fakes.cuda.leaks() == []
    assert failure.value.__traceback__ is not None


@pytest.mark.parametrize(
    ("loop", "error", "words"),
    [
        (loop_of(table(2, 1), ("fp16", "fp4")), BackendError, "no engine 'fp4' was added; there are fp16"),
        (loop_of(table(2, 1), schedule("hhh")), ValueError, "3 precisions for a table of 2 steps"),
        (loop_of(table(2, 1), schedule("hh"), samples=3), BackendError, "optimization profile 0 takes"),
    ],
)
def test_loops_that_cannot_run_are_refused(opened: Opened, loop: Loop, error: type[Exception], words: str) -> None:
    host = opened(names=("fp16",))
    with pytest.raises(error, match=words):
        host.denoise(loop)
    good = loop_of(table(2, 1), schedule("hh"))
    assert same_bits(host.denoise(good), host_loop(good, host.engine))


def test_other_conditioning_than_the_engine_takes_is_named(opened: Opened) -> None:
    loop = loop_of(table(2, 1), schedule("hh"))
    with pytest.raises(BackendError, match=r"takes inputs .*'hidden_states'.* received .*'pooled'"):
        opened().denoise(
            Loop(loop.table, loop.precisions, {"pooled": loop.conditioning["hidden_states"]}, loop.noise, 4.5)
        )


def test_a_closed_host_says_so(opened: Opened) -> None:
    host = opened()
    engine = host.engine("fp16")
    host.close()
    for call in (
        lambda: host.engine("fp16"),
        lambda: engine.run(inputs()),
        lambda: host.denoise(loop_of(table(1, 1), ("fp16",))),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_a_limit_below_one_is_refused(fakes: Fakes) -> None:
    from engines.backends.tensorrt.host import tensorrt_host

    with pytest.raises(ValueError, match="resident_engines is 0"):
        tensorrt_host(resident_engines=0)


# Failures of CUDA and TensorRT

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


# The kernels


def test_the_ptx_belongs_to_the_source() -> None:
    first = (BACKEND / "kernels.ptx").read_text().splitlines()[0]
    assert f"sha256 {sha256_file(BACKEND / 'kernels.cu')}," in first, "run tools/release/compile_kernels.py"


def test_the_ptx_rounds_every_operation_by_itself() -> None:
    text = (BACKEND / "kernels.ptx").read_text()
    assert set(re.findall(r"\.entry\s+(\w+)", text)) == {"tmpdiff_model_input", "tmpdiff_guide", "tmpdiff_combine"}
    arithmetic = set(re.findall(r"\b((?:fma|mad|mul|add|sub|neg|div)(?:\.\w+)*\.f(?:16|32|64))\b", text))
    assert arithmetic == {"mul.rn.f64", "add.rn.f64", "sub.rn.f32", "mul.rn.f32", "add.rn.f32"}
    assert ".ftz" not in text
    assert ".sat" not in text


# History


@pytest.mark.parametrize("past_samples", [False, True])
@pytest.mark.parametrize("reach", [1, 2, 3, 8])
def test_nothing_that_is_still_needed_is_overwritten(fakes: Fakes, reach: int, past_samples: bool) -> None:
    from engines.backends.cuda.history import HistoryLayout

    sampler = table(8, reach, past_samples=past_samples)
    layout = HistoryLayout.of(sampler)
    holds: dict[int, tuple[str, int]] = {layout.samples[0]: ("x", 0)}
    for k, row in enumerate(sampler.rows):
        assert holds[layout.samples[k]] == ("x", k)
        holds[layout.outputs[k]] = ("m", k)
        operands = {layout.samples[j]: ("x", j) for j, _ in row.samples} | {
            layout.outputs[j]: ("m", j) for j, _ in row.outputs
        }
        assert all(holds[slot] == value for slot, value in operands.items())
        assert layout.samples[k + 1] not in operands
        holds[layout.samples[k + 1]] = ("x", k + 1)
    assert holds[layout.samples[-1]] == ("x", 8)
    assert max(holds) + 1 == layout.num_slots


def test_the_history_is_as_small_as_the_table_allows(fakes: Fakes) -> None:
    from engines.backends.cuda.history import HistoryLayout

    assert HistoryLayout.of(table(50, 1)).num_slots == 2 + 1
    assert HistoryLayout.of(table(50, 3)).num_slots == 2 + 3
    assert HistoryLayout.of(table(50, 4, past_samples=True)).num_slots == 5 + 4
