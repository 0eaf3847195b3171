"""The TensorRT run side on a real GPU with a real TensorRT runtime, full or lean.

Loading and refusing plans, device memory, streams, events, CUDA graphs, the sampler kernels and the
device loop are real. Without a plan built for this GPU there is no TensorRT inference in it: where a
denoiser is needed, a stand-in enqueues one of our kernels.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.needs_gpu import needs_gpu
from helpers.paths import ROOT

from engines.documents import FileEntry
from engines.errors import BackendError
from engines.loop import Loop, host_loop
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP, EngineEntry, TensorSpec
from engines.plan_entry import PlanEntry
from engines.sampler import SamplerRow, SamplerTable

pytestmark = needs_gpu

TEXT = "encoder_hidden_states"
SHAPE = (4, 32, 32)

NO_PLANS = {
    "empty": b"",
    "text": b"this is no plan\n" * 64,
    "wrong magic": b"\x08\x0a\x12\x07pytorch" + bytes(4096),
    "truncated": b"ftrt" + bytes(28),
    "magic and noise": b"ftrt" + np.random.default_rng(0).bytes(65536),
    "zeros": bytes(65536),
    "noise": np.random.default_rng(1).bytes(65536),
}

LOAD = """
import sys
from pathlib import Path
from engines.backends.cuda.gpu import current_gpu
from engines.backends.tensorrt.plan import Plan
from engines.errors import BackendError
current_gpu()
try:
    Plan("fp16", Path(sys.argv[1]), version_compatible=sys.argv[2] == "host-code", weight_streaming=False)
except BackendError as error:
    print(error)
"""


def test_the_runtime_and_the_gpu_are_real(record_property: Any) -> None:
    from engines.backends.cuda.gpu import current_gpu
    from engines.backends.tensorrt.bindings import LEAN, VERSION, require_supported, trt
    from engines.backends.tensorrt.messages import MessageLog

    require_supported()
    gpu = current_gpu()
    assert gpu.compute_capability >= (7, 5)
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    log = MessageLog()
    runtime = trt.Runtime(log)
    assert log.errors == []
    assert runtime.logger is not None
    print(f"TensorRT {VERSION}{' (lean)' if LEAN else ''}, {gpu}")


@pytest.mark.parametrize("host_code", ["host-code", "no-host-code"])
@pytest.mark.parametrize("name", NO_PLANS)  # not their content: pytest puts a test's name into the environment
def test_a_plan_that_is_none_ends_in_our_error_with_the_loggers_words(
    tmp_path: Path, name: str, host_code: str
) -> None:
    content = NO_PLANS[name]
    path = tmp_path / "fp16.plan"
    path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), host_code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)  # a crash would show here
    message = done.stdout.strip()
    print(f"{name}, {host_code}: {message}")
    assert "\n" not in message
    if content:
        assert "cannot load engine fp16 (fp16.plan): " in message
        assert "TensorRT gave no reason" not in message
    else:
        assert "cannot be read" in message


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_device_loop_is_bit_equal_to_the_host_loop(dtype: type[Any], guidance_scale: float) -> None:
    loop = make_loop(steps=12, samples=3, guidance_scale=guidance_scale, precisions=("fp16", "int8"))
    with StandInHost(dtype) as host:
        found = host.denoise(loop)
        again = host.denoise(loop)  # now every engine has its CUDA graph
    expected = host_loop(loop, lambda name: HostStandIn(name, dtype))
    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)
    assert np.array_equal(again, expected)


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
@pytest.mark.parametrize("limit", [None, 1])
def test_reused_steps_are_bit_equal_to_those_of_the_host_loop(limit: int | None, guidance_scale: float) -> None:
    loop = make_loop(steps=12, samples=3, guidance_scale=guidance_scale, precisions=("fp16", "int8"))
    reused = {2: "reuse0", 3: "reuse1", 5: "reuse1", 7: "reuse2", 8: "reuse2", 11: "reuse0"}
    loop = replace(loop, precisions=tuple(reused.get(k, name) for k, name in enumerate(loop.precisions)))
    with StandInHost(np.float16, limit) as host:
        found = host.denoise(loop)
        again = host.denoise(loop)
    expected = host_loop(loop, lambda name: HostStandIn(name, np.float16))
    assert np.isfinite(expected).all()
    assert np.array_equal(found, expected)
    assert np.array_equal(again, expected)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_device_loop_is_the_same_under_a_limit_on_resident_engines(limit: int) -> None:
    loop = make_loop(steps=12, samples=1, guidance_scale=4.5, precisions=("fp16", "int8", "fp8"))
    with StandInHost(np.float16, limit) as host:
        found = host.denoise(loop)
        assert len(host.resident) <= limit
    assert np.array_equal(found, host_loop(loop, lambda name: HostStandIn(name, np.float16)))


def test_step_times_come_from_the_device_and_sum_to_the_loop() -> None:
    seconds: list[float] = []
    loop = make_loop(steps=20, samples=4, guidance_scale=4.5, precisions=("fp16", "int8"), seconds=seconds)
    with StandInHost(np.float16) as host:
        for _ in range(3):
            host.denoise(loop)
        seconds.clear()
        begin = time.perf_counter()
        host.denoise(loop)
        wall = time.perf_counter() - begin
    assert len(seconds) == 20
    assert 0.0 < sum(seconds) <= wall
    print(f"step of the sampler alone: median {statistics.median(seconds) * 1e6:.1f} us; loop {wall * 1e3:.2f} ms")


def test_memory_is_given_back() -> None:
    from engines.backends.cuda.gpu import current_gpu

    loop = make_loop(steps=6, samples=2, guidance_scale=4.5, precisions=("fp16", "int8"))
    with StandInHost(np.float16) as host:  # the context and the kernels' module stay
        host.denoise(loop)
    before = current_gpu().free_bytes
    for _ in range(5):
        with StandInHost(np.float16) as host:
            host.denoise(loop)
    assert abs(current_gpu().free_bytes - before) < 16 << 20


def test_an_allocation_that_cannot_be_made_is_our_error() -> None:
    from engines.backends.cuda.gpu import current_gpu
    from engines.backends.cuda.memory import DeviceBuffer

    with pytest.raises(
        BackendError, match=r"cannot allocate .* bytes of GPU memory for scratch: .*cudaErrorMemoryAllocation"
    ):
        DeviceBuffer(2 * current_gpu().total_bytes, "scratch")
    DeviceBuffer(1 << 20, "scratch").close()  # the failed call left nothing behind


def make_loop(
    *, steps: int, samples: int, guidance_scale: float, precisions: tuple[str, ...], seconds: list[float] | None = None
) -> Loop:
    """A loop with a two-step sampler, as DPM-Solver++ makes it."""
    rng = np.random.default_rng(7)
    rows = [SamplerRow(((k, 0.9),), ((k - 1, -0.03), (k, -0.11)) if k else ((k, -0.1),)) for k in range(steps)]
    table = SamplerTable(
        "stand-in", steps, np.linspace(999.0, 1.0, steps), None, 1.25, np.linspace(1.0, 0.7, steps), tuple(rows)
    )
    batch = (2 if guidance_scale > 1.0 else 1) * samples
    return Loop(
        table,
        tuple(precisions[k % len(precisions)] for k in range(steps)),
        {TEXT: rng.standard_normal((batch, 16, 8), dtype=np.float32)},
        rng.standard_normal((samples, *SHAPE), dtype=np.float32),
        guidance_scale,
        None if seconds is None else lambda _index, _name, elapsed: seconds.append(elapsed),
    )


FACTORS = {"fp16": 0.5, "int8": 0.625, "fp8": 0.75}


class HostStandIn:
    """On the host: model output = latents * factor, in the engine's dtype."""

    def __init__(self, name: str, dtype: type[Any]) -> None:
        self._factor, self._dtype = FACTORS[name], dtype

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        latents = inputs[LATENTS].astype(self._dtype).astype(np.float64)
        return {MODEL_OUTPUT: (latents * self._factor).astype(np.float32).astype(self._dtype).astype(np.float32)}


def StandInHost(dtype: type[Any], limit: int | None = None) -> Any:
    """The host of TensorRT engines, whose plans are stand-ins; everything else is real."""
    from contextlib import closing

    from engines.backends.cuda.host import CudaHost
    from engines.backends.tensorrt.plan import require_runnable

    def load(name: str, _entry: EngineEntry, _path: Path) -> Any:
        return StandInPlan(name, dtype, host._kernels)

    host = CudaHost(require_runnable, load, resident_engines=limit)
    for name in FACTORS:
        host.add(name, entry_of(dtype), Path(name))
    return closing(host)


def entry_of(dtype: type[Any]) -> EngineEntry:
    """A manifest entry of a denoiser of this GPU."""
    from engines.backends.cuda.gpu import current_gpu
    from engines.backends.tensorrt.bindings import VERSION

    kind: Any = np.dtype(dtype).name
    file = FileEntry(path="engines/x.plan", sha256="0" * 64, bytes=0)
    gpu = current_gpu()
    return EngineEntry(
        file=file,
        backend="tensorrt",
        backend_version=VERSION,
        device=f"{gpu.architecture} {gpu.name}",
        lowering={},
        onnx_sha256="0" * 64,
        recipe="none",
        sqnr_db=0.0,
        sqnr_floor_db=0.0,
        inputs=(
            TensorSpec(name=LATENTS, dtype=kind, shape=("batch", *SHAPE)),
            TensorSpec(name=TIMESTEP, dtype="float32", shape=("batch",)),
            TensorSpec(name=TEXT, dtype=kind, shape=("batch", 16, 8)),
        ),
        outputs=(TensorSpec(name=MODEL_OUTPUT, dtype=kind, shape=("batch", *SHAPE)),),
        plan=PlanEntry(
            version_compatible=True,
            hardware_compatibility="none",
            profiles=({},),
            weight_streaming=False,
            weights_bytes=0,
            scratch_bytes=0,
            layers={},
            inspector=file,
        ),
    )


class StandInPlan:
    """Stands for `plan.Plan`: its inference is our kernels, its CUDA graphs are real."""

    note = None

    def __init__(self, name: str, dtype: type[Any], kernels: Any) -> None:
        from engines.backends.cuda.plan import Tensor

        kind = np.dtype(dtype)
        self.name, self.kernels = name, kernels
        self.inputs = {
            LATENTS: Tensor(LATENTS, kind, (-1, *SHAPE)),
            TIMESTEP: Tensor(TIMESTEP, np.dtype(np.float32), (-1,)),
            TEXT: Tensor(TEXT, kind, (-1, 16, 8)),
        }
        self.outputs = {MODEL_OUTPUT: Tensor(MODEL_OUTPUT, kind, (-1, *SHAPE))}
        self._contexts: dict[Any, Any] = {}

    def context(self, shapes: Mapping[str, tuple[int, ...]], stream: Any) -> Any:
        """One per set of shapes."""
        key = tuple(sorted(shapes.items()))
        if key not in self._contexts:
            self._contexts[key] = stand_in_context(self, shapes)
        return self._contexts[key]

    def close(self) -> None:
        """Frees the contexts."""
        for context in self._contexts.values():
            context.close()


def stand_in_context(plan: StandInPlan, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A real `plan.Context`, with TensorRT's execution context replaced by two kernel launches."""
    from engines.backends.tensorrt.context import Context

    size = int(np.prod(shapes[LATENTS]))
    half = plan.inputs[LATENTS].dtype == np.float16

    class Execution:
        """float32 scratch = latents; model output = its product with the factor, in the engine's dtype."""

        def __init__(self) -> None:
            self.addresses: dict[str, int] = {}

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def set_device_memory(self, address: int, size_bytes: int) -> None:
            assert size_bytes >= 4 * size + 256
            self.scratch, self.spare = address, address + 4 * size

        def execute_async_v3(self, number: int) -> bool:
            stream: Any = type("AsStream", (), {"handle": number})
            plan.kernels.guide(
                stream,
                model_output=self.addresses[LATENTS],
                half=half,
                size=size,
                guidance_scale=None,
                output=self.scratch,
            )
            plan.kernels.model_input(
                stream,
                latents=self.scratch,
                scale=FACTORS[plan.name],
                size=size,
                copies=1,
                model_latents=self.addresses[MODEL_OUTPUT],
                latents_half=half,
                timestep=0.0,
                samples=1,
                model_timestep=self.spare,
                timestep_half=False,
            )
            return True

    context = Context.__new__(Context)
    context._name = plan.name
    context._tensors = (*plan.inputs.values(), *plan.outputs.values())
    context._bound, context._ready, context._graph, context.note = None, False, None, None
    context._context = Execution()
    context.scratch_bytes = 4 * size + 256
    context.output_shapes = {MODEL_OUTPUT: shapes[LATENTS]}
    context._shapes = {**shapes, **context.output_shapes}
    return context
