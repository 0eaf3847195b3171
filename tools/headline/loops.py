"""Times of whole loops with given choices, on a bundle whose pictures mean nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from engines.errors import TmpDiffError
from engines.reuse import order_of
from engines.runtime import DenoiseRuntime
from tools.gpu_bench.timing import summary
from tools.headline.goals import SCHEDULE
from tools.headline.methods import Batch, chosen


def time_choices(
    runtime: DenoiseRuntime, rows: Sequence[Mapping[str, Any]], batch: Batch, repeats: int
) -> dict[str, Any]:
    """Times uniform precisions and the schedules of a study, in turns.

    Args:
        runtime: another bundle's, for as many steps.
        rows: of the study. Low precisions that the bundle lacks become its fastest.
        batch: what is drawn.
        repeats: of each.

    Returns:
        JSON data: `rows` with name, choices, times and speed-up over the bundle's own 16 bit.

    Raises:
        TmpDiffError: no schedule of as many steps.
    """
    reference, *low = runtime.precisions
    schedules = {f"uniform {name}": runtime.schedule(f"uniform:{name}") for name in runtime.precisions}
    for row in rows:
        if row["group"] == SCHEDULE and len(row["choices"]) == runtime.num_steps:
            known = [c if c in runtime.precisions or order_of(c) is not None else low[0] for c in row["choices"]]
            schedules[row["name"]] = chosen(runtime, known, row["name"])
    if len(schedules) == len(runtime.precisions):
        raise TmpDiffError(
            f"no schedule of {runtime.num_steps} steps in the result file; pass --steps as it was made with"
        )
    times: dict[str, list[float]] = {name: [] for name in schedules}
    for repeat in range(1 + repeats):
        for name, schedule in schedules.items():
            begin = time.perf_counter()
            runtime.denoise(batch.conditioning, schedule, batch.noise)
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - begin))
    found = {name: summary(each) for name, each in times.items()}
    base = found[f"uniform {reference}"]["median_ms"]
    rows_found = [
        {"name": name, "loop": each, "speedup": base / each["median_ms"], "choices": list(schedules[name].precisions)}
        for name, each in found.items()
    ]
    for row in rows_found:
        print(f"{row['name']}: {row['loop']['median_ms']:.1f} ms, {row['speedup']:.2f} times as fast", flush=True)
    return {
        "format": "tmpdiff loops",
        "denoiser": runtime.manifest.model.denoiser_class,
        "parameters_m": runtime.manifest.model.parameters / 1e6,
        "num_steps": runtime.num_steps,
        "pictures": batch.conditioning.size,
        "rows": rows_found,
    }
