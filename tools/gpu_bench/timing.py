"""Times, memory and errors of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tools.gpu_bench.step import Step

WARM_UPS = 10
REPEATS = 30
BESIDE_EVERY = 3  # one baseline step between so many of the row's


class Stopwatch:
    """Device time of pieces of work: CUDA events on a GPU, wall time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[Any, Any]] = []
        self._seconds: list[float] = []

    def time(self, work: Callable[[], object]) -> None:
        """Runs `work` once and times it; does not wait for a GPU."""
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            work()
            self._seconds.append(time.perf_counter() - start)

    def times_ms(self) -> list[float]:
        """What was timed so far."""
        if self._cuda:
            torch.cuda.synchronize()
            return [float(begin.elapsed_time(end)) for begin, end in self._events]
        return [1e3 * seconds for seconds in self._seconds]


def summary(times_ms: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = np.percentile(times_ms, (25, 50, 75))
    return {"median_ms": float(middle), "quartiles_ms": [float(low), float(high)], "repeats": len(times_ms)}


def time_step(step: Step, beside: Step | None, repeats: int, warm_ups: int) -> dict[str, Any]:
    """Times a step over rotating inputs, and the baseline between its repeats, so that both see the same clocks.

    Returns:
        `step` as of `summary`; with `beside` also `beside`, the baseline's, and `speedup`, the ratio of the medians.
    """
    for index in range(warm_ups):
        step.load(index)
        step.launch()
    if beside is not None:
        beside.launch()
    own, other = Stopwatch(step.device), Stopwatch(step.device)
    for index in range(repeats):
        step.load(index)
        own.time(step.launch)
        if beside is not None and index % BESIDE_EVERY == 0:
            beside.load(index)
            other.time(beside.launch)
    result: dict[str, Any] = {"step": summary(own.times_ms())}
    if beside is not None:
        result["beside"] = summary(other.times_ms())
        result["speedup"] = result["beside"]["median_ms"] / result["step"]["median_ms"]
    return result


def best_seconds(work: Callable[[], object], device: torch.device, *, calls: int = 8, rounds: int = 4) -> float:
    """Seconds of one call, the best of some rounds of back-to-back calls: a ceiling, not an average."""
    work()
    watch = Stopwatch(device)

    def many() -> None:
        for _ in range(calls):
            work()

    for _ in range(rounds):
        watch.time(many)
    return min(watch.times_ms()) / 1e3 / calls


def scratch_bytes(step: Step) -> int | None:
    """Most memory that a compiled step allocates beyond what is there before it; None on a CPU."""
    if step.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def output_error(outputs: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> dict[str, float | None]:
    """Relative L2 error over all input sets, and the same in decibels (None where there is no error)."""
    noise = sum(
        float((output.float() - reference.float()).square().sum())
        for output, reference in zip(outputs, references, strict=True)
    )
    signal = sum(float(reference.float().square().sum()) for reference in references)
    ratio = noise / signal
    finite = np.isfinite(ratio)
    return {
        "relative_l2": float(ratio**0.5) if finite else None,
        "sqnr_db": float(-10 * np.log10(ratio)) if finite and ratio > 0 else None,
    }
