"""`tmpdiff-export bench`: step latency per precision, the cost of swapping, and FP32 torch beside them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.measure.latency import ROUNDS, interleaved, machine, runs_on_gpu, step_latencies
from engines.arguments import add_setting_arguments, parse_resident_engines, parse_threads, setting_choice
from engines.conditioning import Conditioning
from engines.errors import TmpDiffError
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from engines.setting_choice import SettingChoice
from engines.terminal import print_json
from tmpdiff_export.commands.build import what_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    add_setting_arguments(parser)
    parser.add_argument("--pipeline", type=Path, metavar="DIR", help="also time this pipeline's denoiser in FP32 torch")
    parser.add_argument("--variant", metavar="NAME", help="with --pipeline: of its weight files, as for build")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"timed rounds (default {ROUNDS})")
    parser.add_argument("--threads", type=parse_threads, metavar="N", help="worker threads (default: one per core)")
    parser.add_argument(
        "--resident-engines",
        type=parse_resident_engines,
        metavar="N",
        help="on a GPU, also time mixed loops with at most N denoiser engines in device memory",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Times everything in turns and prints ratios."""
    from tmpdiff_export.display import print_table, progress_bar

    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}, expected 1 or more")
    with progress_bar() as report:
        asked = BenchOptions(
            setting_choice(args), args.pipeline, args.variant, args.rounds, args.threads, args.resident_engines
        )
        result = bench(args.bundle, asked, report)
    if args.json:
        print_json(result)
        return 0
    print_table(
        f"One denoiser step, setting {result['setting']}, batch {result['batch']}, {result['machine']}",
        ["what", "median ms", "min ms", "speed-up over FP16", ""],
        [
            [row["name"], f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f}", f"{row['speedup']:.2f}", row["remark"]]
            for row in result["rows"]
        ],
        [
            f"{loop['precisions']}, {loop['swaps']} swaps{_limit_words(loop)}: the loop takes {loop['over_sum_percent']:+.2f} % "
            "over the sum of its steps in uniform loops"
            for loop in result["loops"]
        ],
    )
    return 0


def _limit_words(loop: dict[str, Any]) -> str:
    limit = loop["resident_engines"]
    return "" if limit is None else f", at most {limit} engine{'s' * (limit > 1)} resident"


@dataclass(frozen=True)
class BenchOptions:
    """What is timed.

    Attributes:
        setting: of the bundle, None for the first.
        pipeline: the pipeline it was built from, to time its denoiser in FP32 torch in the same turns.
        variant: of its weight files, None for those without one, or the only one there.
        rounds: timed rounds.
        threads: worker threads, None for one per core; torch gets as many.
        resident_engines: on a GPU, a limit under which mixed loops are timed as well; every engine has to fit beside
            the limited ones.
    """

    setting: SettingChoice | None = None
    pipeline: Path | None = None
    variant: str | None = None
    rounds: int = ROUNDS
    threads: int | None = None
    resident_engines: int | None = None


def bench(bundle: Path, options: BenchOptions, report: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Step latencies and loop overhead of a bundle.

    Args:
        bundle: bundle folder.
        options: what is timed.
        report: called with (stage, done, total).

    Returns:
        JSON data: "machine", "setting", "batch" (rows of a denoiser call: 2 with guidance), "rows" (per precision and for
        torch: median and least ms, speed-up over the FP16 engine, and what the engine runs, in words) and "loops" (whole
        loops that swap at every step, with a limit also once, against uniform ones).

    Raises:
        TmpDiffError: the bundle is damaged or has no such setting, its engines cannot run here, or `options.pipeline` is
            not the one it was built from, or given for engines on a GPU.
    """
    setting, pipeline, threads, rounds = options.setting, options.pipeline, options.threads, options.rounds
    resident_engines = options.resident_engines
    with ExitStack() as opened:
        runtime = opened.enter_context(DenoiseRuntime.load(bundle, setting=setting, threads=threads))
        runtimes: dict[int | None, DenoiseRuntime] = {None: runtime}
        if resident_engines is not None:
            limited = DenoiseRuntime.load(bundle, setting=setting, threads=threads, resident_engines=resident_engines)
            runtimes[resident_engines] = opened.enter_context(limited)
        scale = runtime.setting.guidance_scale
        conditioning = runtime.encode(["a bench mark"])
        also: dict[str, Callable[[], object]] = {}
        if pipeline is not None:
            if runs_on_gpu(runtime):
                raise TmpDiffError(
                    "--pipeline times FP32 torch on the CPU; this bundle's engines run on a GPU: leave it out"
                )
            also["torch fp32"] = _torch_step(options, pipeline, runtime, conditioning)
        timings = step_latencies(
            runtime, conditioning, scale, rounds, lambda done, total: report("steps", done, total), also
        )
        reference = timings[runtime.precisions[0]].median_ms
        rows = []
        for name, timing in timings.items():
            speedup = reference / timing.median_ms
            no_gain = name in runtime.precisions[1:] and speedup <= 1.0
            rows.append(
                {
                    "name": name,
                    "median_ms": timing.median_ms,
                    "min_ms": timing.min_ms,
                    "speedup": speedup,
                    "runs": what_runs(runtime.manifest.denoisers[name][0]) if name in runtime.precisions else "",
                    "remark": f"no gain over {runtime.precisions[0]} on this backend" if no_gain else "",
                }
            )
        return {
            "machine": machine(runtime, threads),
            "setting": runtime.setting.name,
            "batch": len(next(iter(conditioning.batch(scale).values()))),
            "rows": rows,
            "loops": _loops(runtimes, conditioning, rounds, report),
        }


def _loops(
    runtimes: Mapping[int | None, DenoiseRuntime],
    conditioning: Conditioning,
    rounds: int,
    report: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Loops that swap engines at every step, with a limit also once, against what their steps take in uniform loops.

    Args:
        runtimes: of one bundle, by their limit on resident engines; uniform loops run where there is none.
        conditioning: of all loops.
        rounds: as of `bench`.
        report: as of `bench`.
    """
    free = runtimes[None]
    reference, *others = free.precisions
    noise = free.noise(range(conditioning.size))
    steps = free.num_steps
    results = []

    def loop(runtime: DenoiseRuntime, precisions: tuple[str, ...]) -> Callable[[], object]:
        schedule = Schedule(
            bundle_id=runtime.manifest.bundle_id, setting=runtime.setting.name, precisions=precisions, origin="bench"
        )
        return lambda: runtime.denoise(conditioning, schedule, noise)

    for other in others:
        alternating = tuple((reference, other)[index % 2] for index in range(steps))
        mixed = {steps - 1: alternating}
        if len(runtimes) > 1 and steps > 1:  # what a limit costs depends on how long a precision stays
            mixed[1] = tuple(sorted(alternating, key=(reference, other).index))
        work: dict[Any, Callable[[], object]] = {name: loop(free, (name,) * steps) for name in (reference, other)}
        for limit, runtime in runtimes.items():
            work |= {(swaps, limit): loop(runtime, precisions) for swaps, precisions in mixed.items()}
        times = interleaved(work, max(3, rounds // 3), lambda done, total: report("loops", done, total))
        expected = sum(times[name].median_ms / steps for name in alternating)
        for swaps, limit in [key for key in work if isinstance(key, tuple)]:
            taken = times[swaps, limit].median_ms
            results.append(
                {
                    "precisions": f"{reference}/{other}",
                    "resident_engines": limit,
                    "swaps": swaps,
                    "loop_ms": taken,
                    "sum_of_steps_ms": expected,
                    "swap_ms": (taken - expected) / max(swaps, 1),
                    "over_sum_percent": (taken / expected - 1.0) * 100.0,
                }
            )
    return results


def _torch_step(
    options: BenchOptions, pipeline: Path, runtime: DenoiseRuntime, conditioning: Conditioning
) -> Callable[[], object]:
    """One call of the pipeline's own denoiser in FP32 torch on the inputs the engines get."""
    import numpy as np
    import torch

    from tmpdiff_export.pipelines.load import open_pipeline

    source = open_pipeline(pipeline, options.variant)
    if source.weights.sha256() != runtime.manifest.model.denoiser_sha256:
        raise TmpDiffError(
            f"the bundle was not built from the weights in {source.weights.folder}; pass the --pipeline, and --variant, of its build"
        )
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    component = source.family.component
    setattr(source.pipe, component, source.load(component, torch.float32))
    module = source.family.wrap(source.pipe).eval()
    batch = conditioning.batch(runtime.setting.guidance_scale)
    latents = runtime.table.model_input(runtime.table.initial(runtime.noise(range(conditioning.size))))
    size = len(next(iter(batch.values())))
    arrays = {
        "latents": np.concatenate([latents] * (size // len(latents))),
        "timestep": np.full(size, runtime.table.timesteps[0], np.float32),
        **batch,
    }
    inputs = [torch.from_numpy(np.array(arrays[name])) for name in source.family.inputs]

    def step() -> object:
        with torch.inference_mode():
            return module(*inputs)

    return step
