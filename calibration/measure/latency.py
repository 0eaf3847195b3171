"""Step latencies, measured in turns so that drift of the machine cancels in their ratios."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from engines.backends.choose import backend_version
from engines.bundle import UNIFORM_PREFIX
from engines.conditioning import Conditioning
from engines.manifest import EngineEntry
from engines.reuse import REUSES
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule

Key = TypeVar("Key", bound=Hashable)

LEAST_MS = 1e-3
"""A device's clock may tell no time between two events."""

WARM_UP_ROUNDS = 2
ROUNDS = 15


@dataclass(frozen=True)
class Timing:
    """Times of one thing over all rounds, in ms."""

    median_ms: float
    min_ms: float


def interleaved(
    work: Mapping[Key, Callable[[], object]],
    rounds: int = ROUNDS,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[Key, Timing]:
    """Times several things in turns, after `WARM_UP_ROUNDS` rounds that are not counted.

    Args:
        work: what to time, by anything that tells it apart.
        rounds: counted rounds.
        on_round: called after every round with (done, total).
    """
    times: dict[Key, list[float]] = {name: [] for name in work}
    for number in range(WARM_UP_ROUNDS + rounds):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            if number >= WARM_UP_ROUNDS:
                times[name].append((time.perf_counter() - begin) * 1e3)
        if on_round:
            on_round(number + 1, WARM_UP_ROUNDS + rounds)
    return {name: Timing(statistics.median(values), min(values)) for name, values in times.items()}


def step_latencies(
    runtime: DenoiseRuntime,
    conditioning: Conditioning,
    guidance_scale: float,
    rounds: int = ROUNDS,
    on_round: Callable[[int, int], None] | None = None,
    also: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Latency of one loop iteration (denoiser call and sampler update) per precision.

    On the CPU single steps are timed in turns. On a GPU whole uniform loops run in turns, because a
    step alone would be charged for transfers that a loop does not make; their steps are timed on the device.

    Args:
        runtime: the loaded bundle.
        conditioning: for N prompts; the batch size that is timed.
        guidance_scale: above 1, a call is one batch of 2 N.
        rounds: counted rounds; on a GPU each gives T samples.
        on_round: called after every round with (done, total).
        also: other work on the CPU to time in the same turns, by name.
    """
    if runs_on_gpu(runtime):
        return _device_step_latencies(runtime, conditioning, guidance_scale, max(2, rounds // 5), on_round)
    batch = conditioning.batch(guidance_scale)
    state = runtime.table.initial(runtime.noise(range(conditioning.size)))

    def one_step(precision: str) -> Callable[[], object]:
        return lambda: runtime.step(state, precision, batch, guidance_scale)

    return interleaved({name: one_step(name) for name in runtime.precisions} | dict(also or {}), rounds, on_round)


def reuse_latency(
    runtime: DenoiseRuntime, conditioning: Conditioning, guidance_scale: float, rounds: int = ROUNDS
) -> Timing:
    """Latency of one loop iteration that reuses the last model output: what the sampler takes without a denoiser.

    Args:
        runtime: the loaded bundle, of two steps at least.
        conditioning: for N prompts; the batch size that is timed.
        guidance_scale: as for `step_latencies`.
        rounds: counted rounds; on a GPU whole loops.
    """
    reference, reused = runtime.precisions[0], REUSES[0]
    if not runs_on_gpu(runtime):
        batch = conditioning.batch(guidance_scale)
        start = runtime.table.initial(runtime.noise(range(conditioning.size)))
        state = runtime.step(start, reference, batch, guidance_scale, 1)
        return interleaved({reused: lambda: runtime.step(state, reused, batch, guidance_scale, 1)}, rounds)[reused]
    schedule = Schedule(
        bundle_id=runtime.manifest.bundle_id,
        setting=runtime.setting.name,
        precisions=(reference, *(reused,) * (runtime.num_steps - 1)),
        origin="latency of reuse",
    )
    times: list[float] = []
    for number in range(WARM_UP_ROUNDS + max(2, rounds // 5)):
        steps = _loop_ms(runtime, conditioning, schedule, guidance_scale)
        if number >= WARM_UP_ROUNDS:
            times += steps[1:]
    return Timing(max(statistics.median(times), LEAST_MS), min(times))


def _device_step_latencies(
    runtime: DenoiseRuntime,
    conditioning: Conditioning,
    guidance_scale: float,
    rounds: int,
    on_round: Callable[[int, int], None] | None,
) -> dict[str, Timing]:
    times: dict[str, list[float]] = {name: [] for name in runtime.precisions}
    for number in range(WARM_UP_ROUNDS + rounds):
        for name, kept in times.items():
            schedule = runtime.bundle.schedule(runtime.setting, f"{UNIFORM_PREFIX}{name}")
            steps = _loop_ms(runtime, conditioning, schedule, guidance_scale)
            if number >= WARM_UP_ROUNDS:
                kept += steps
        if on_round:
            on_round(number + 1, WARM_UP_ROUNDS + rounds)
    return {name: Timing(statistics.median(values), min(values)) for name, values in times.items()}


def _loop_ms(
    runtime: DenoiseRuntime, conditioning: Conditioning, schedule: Schedule, guidance_scale: float
) -> list[float]:
    """Milliseconds of every step of a run."""
    steps: list[float] = []
    runtime.denoise(
        conditioning,
        schedule,
        runtime.noise(range(conditioning.size)),
        guidance_scale=guidance_scale,
        on_step=lambda _index, _choice, seconds: steps.append(seconds * 1e3),
    )
    return steps


def runs_on_gpu(runtime: DenoiseRuntime) -> bool:
    """Whether the bundle's denoisers run on a GPU and their loop on the device."""
    return _reference(runtime).device != "cpu"


def machine(runtime: DenoiseRuntime, threads: int | None) -> str:
    """What latencies were measured on: GPU, or threads and processor; backend and its version."""
    entry = _reference(runtime)
    library = f"{entry.backend} {backend_version(entry.backend)}"
    if runs_on_gpu(runtime):
        return f"{entry.device}, {library}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0))
    return f"{threads or cores} threads on {cores} cores of {model}, {library}"


def _reference(runtime: DenoiseRuntime) -> EngineEntry:
    return runtime.manifest.reference
