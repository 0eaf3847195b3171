"""Times and quality of methods on the same prompts and noise."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from calibration.measure.metrics import departed, relative_error, typical_error
from engines.errors import TmpDiffError
from engines.runtime import DenoiseRuntime
from tools.gpu_bench.timing import summary
from tools.headline.methods import OURS, Batch, Denoise, Method
from tools.headline.order import Part
from tools.headline.quality import Comparison

BESIDE_EVERY = 4
"""Batches of a method between two loops of the baseline, so that both see the same clocks."""


@dataclass
class Run:
    """What a method has done; pictures may still be compared.

    Attributes:
        method: which.
        latents: final ones of every prompt.
        times: JSON data on the times of a loop.
        distances: of pictures, on their way.
    """

    method: Method
    latents: np.ndarray
    times: dict[str, Any]
    distances: list[Future[dict[str, float]]] = field(default_factory=list)


def time_loops(denoise: Denoise, baseline: Denoise, batches: Sequence[Batch]) -> tuple[np.ndarray, dict[str, Any]]:
    """Runs a method on all batches, and the baseline on some of them, in turns.

    Returns:
        Latents of all prompts; JSON data with times of a loop, `speedup` over the baseline's.
    """
    denoise(batches[0])
    baseline(batches[0])
    own, other, found = list[float](), list[float](), list[np.ndarray]()

    def timed(run: Denoise, batch: Batch, times: list[float]) -> np.ndarray:
        begin = time.perf_counter()
        latents = run(batch)
        times.append(1e3 * (time.perf_counter() - begin))
        return latents

    for index, batch in enumerate(batches):
        if index % BESIDE_EVERY == 0:
            timed(baseline, batch, other)
        found.append(timed(denoise, batch, own))
    loop, beside = summary(own), summary(other)
    return np.concatenate(found), {"loop": loop, "beside": beside, "speedup": beside["median_ms"] / loop["median_ms"]}


class Study:
    """Runs methods and gathers what they gave."""

    def __init__(self, runtime: DenoiseRuntime, batches: Sequence[Batch], comparison: Comparison) -> None:
        self.runtime, self.batches, self.comparison = runtime, batches, comparison
        self.runs: list[Run] = []
        self._baseline: Denoise | None = None
        self._references: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def run(self, method: Method) -> None:
        """Runs a method; the first of all is the baseline.

        Raises:
            TmpDiffError: what it is compared with was not measured.
        """
        if not method.is_reference and method.reference not in self._references:
            whose = "the bundle" if method.reference == OURS else "the peers"
            raise TmpDiffError(f"not compared, as the 16-bit run of all steps of {whose} was not measured")
        with method.open() as denoise:
            self._baseline = self._baseline or denoise
            latents, times = time_loops(denoise, self._baseline, self.batches)
            computed = method.computed()
        run = Run(method, latents, times | {"computed": computed})
        pictures = self._decoded(latents)
        if method.is_reference:
            self._references[method.reference] = (latents, pictures)
        run.distances = self.comparison.begin(pictures, self._references[method.reference][1])
        self.runs.append(run)
        print(
            f"{method.name}: {times['loop']['median_ms']:.1f} ms, {times['speedup']:.2f} times as fast, "
            f"{computed:.4g} steps computed, typical error {typical_error(self._errors(run)):.2e}",
            flush=True,
        )

    def run_all(
        self,
        parts: Sequence[Part],
        late: Callable[[], bool],
        write: Callable[[Sequence[str], Sequence[str]], None],
    ) -> tuple[list[str], list[str]]:
        """Runs the methods of all parts; what fails leaves the rest, as their machine may be gone soon.

        Args:
            parts: the first one holds the baseline, without which there is nothing to tell.
            late: whether no method is to be begun any more.
            write: called after every method with what is left out so far, and what failed.

        Returns:
            Methods, or whole parts, that were left out as it was late; what failed, a line each.
        """
        left_out, failed = list[str](), list[str]()

        def tried(name: str, act: Callable[[], Any]) -> Any:
            try:
                return act()
            except Exception as error:
                if not self.runs:
                    raise
                traceback.print_exc()
                failed.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
                return None

        for index, part in enumerate(parts):
            if self.runs and late():
                left_out.append(part.name)
                continue
            for method in tried(part.name, partial(_listed, part)) or ():
                if self.runs and late():
                    left_out.append(method.name)
                    continue
                tried(method.name, partial(self.run, method))
                write([*left_out, *(later.name for later in parts[index + 1 :])], failed)
        return left_out, failed

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        size = self.batches[0].conditioning.size
        return np.concatenate(
            [self.runtime.decode(latents[start : start + size]) for start in range(0, len(latents), size)]
        )

    def _errors(self, run: Run) -> list[float]:
        reference = self._references[run.method.reference][0]
        return [relative_error(one, other) for one, other in zip(run.latents, reference, strict=True)]

    def rows(self, *, wait: bool) -> list[dict[str, Any]]:
        """JSON data of every method, once its pictures are compared, or of those only whose pictures are by now."""
        return [self._row(run) for run in self.runs if wait or all(found.done() for found in run.distances)]

    def _row(self, run: Run) -> dict[str, Any]:
        errors = self._errors(run)
        distances = [found.result() for found in run.distances]
        measured = {key: [found[key] for found in distances] for key in distances[0]}
        return {
            "name": run.method.name,
            "group": run.method.group,
            "reference": run.method.reference,
            **run.times,
            **{key: _described(values) for key, values in measured.items()},
            "typical_error": typical_error(errors),
            "departures": int(departed(np.array(errors)).sum()),
            "choices": list(run.method.choices),
        }


def _listed(part: Part) -> list[Method]:
    return list(part.methods())


def _described(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error of it, and the worst decile's bound (low for SSIM, so both ends are given)."""
    array = np.array(values)
    low, high = np.percentile(array, (10, 90))
    error = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else 0.0
    return {"mean": float(array.mean()), "standard_error": error, "p10": float(low), "p90": float(high)}


def make_batches(
    runtime: DenoiseRuntime, prompts: Sequence[str], size: int, seed: int, report: Callable[[str], None]
) -> list[Batch]:
    """Conditioning and noise of the prompts, `size` at once; those that fill no batch are left out, which is said."""
    whole = len(prompts) // size * size
    if whole < len(prompts):
        report(f"{len(prompts) - whole} prompts fill no batch of {size} and are left out")
    return [
        Batch(runtime.encode(prompts[start : start + size]), runtime.noise(range(seed + start, seed + start + size)))
        for start in range(0, whole, size)
    ]
