"""Times one calibration with one worker and with several, and says whether they agree.

    python -m tools.gpu_bench.calibration BUNDLE --workers 1,2 [--samples 8] [--method sweep] [--json OUT.json]

BUNDLE is calibrated in copies, from nothing but step latencies, which the first run measures and the others are given
so that all choose alike. The ratio is of wall seconds without the latencies, start of the workers included; a table has
the stages. The first run warms the host's file cache for the others, so give `--workers 1,2,1` where that may matter.
Each worker has a GPU of its own; a bundle that runs on the CPU shares out the cores instead, where several workers win
only what one process leaves idle.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from calibration import CalibrationOptions, Sensitivity
from engines.cli import guarded
from engines.errors import TmpDiffError
from engines.files import atomic_write_text
from engines.text import PromptFile, read_prompts
from tmpdiff_export.calibrate.bundle import JOURNAL_FOLDER, RunOptions, calibrate_bundle
from tmpdiff_export.display import print_table

PROMPTS = Path(__file__).resolve().parents[2] / "calibration" / "prompts" / "plain.txt"
LATENCIES = "step latencies"
START = "start workers"
LATENCY_LINES = 2
"""Lines at the beginning of a journal: what it belongs to, and the step latencies."""


class Stages:
    """Seconds per stage of a calibration, from its progress."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = "open the bundle"
        self._since = time.perf_counter()

    def report(self, stage: str, done: int, total: int) -> None:
        """Called by `calibrate_bundle`; the time since the last call counts to the stage under way."""
        now = time.perf_counter()
        # a stage's first report comes after its first unit of work, but for the stages that say when they begin
        self._add(self._stage if done == 0 else stage, now)
        self._stage = stage

    def end(self) -> None:
        """Counts what is left to the last stage."""
        self._add(self._stage, time.perf_counter())

    def _add(self, stage: str, now: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def main() -> int:
    """Returns 0 when all runs found the same, else 1."""
    parser = argparse.ArgumentParser(description="Times one calibration with one worker and with several.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--workers", default="1,2", metavar="N,N,...", help="numbers of workers (default 1,2)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration prompts (default 8)")
    parser.add_argument("--validation-samples", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--method", choices=("bisection", "sweep"), default="bisection")
    parser.add_argument("--threads", type=int, metavar="N", help="threads on a CPU, of all workers")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the figures there")
    args = parser.parse_args()
    prompts = read_prompts(args.prompts)
    chosen = PromptFile(prompts.calibration[: args.samples], prompts.validation[: args.validation_samples])
    counts = [int(text) for text in args.workers.split(",")]
    runs: list[dict[str, Any]] = []
    found: list[Sensitivity] = []
    with tempfile.TemporaryDirectory(prefix="bench-calibration-") as folder:
        for number, workers in enumerate(counts):
            copy = Path(folder) / str(number)
            shutil.copytree(args.bundle, copy, ignore=shutil.ignore_patterns(JOURNAL_FOLDER))
            if number:
                give_latencies(Path(folder) / "0", copy)
            stages = Stages()
            how = RunOptions(threads=args.threads, workers=workers)
            options = CalibrationOptions(method=args.method)
            found.append(calibrate_bundle(copy, chosen, options, how, progress=stages.report))
            stages.end()
            timed = sum(seconds for stage, seconds in stages.seconds.items() if stage != LATENCIES)
            runs.append({"workers": workers, "seconds": timed, "stages": stages.seconds})
            print(f"{workers} workers: {timed:.1f} s", file=sys.stderr, flush=True)
            if number:
                shutil.rmtree(copy)
    equal = all(other == found[0] for other in found)
    for run in runs:
        run["speedup"] = runs[0]["seconds"] / run["seconds"]
    result = {
        "machine": found[0].settings.machine if found[0].settings else None,
        "samples": found[0].num_samples,
        "validation_samples": len(chosen.validation),
        "num_steps": found[0].num_steps,
        "calls": {stage: sum(calls.values()) for stage, calls in found[0].calls.items()},
        "equal": equal,
        "runs": runs,
    }
    show(result)
    if args.json:
        atomic_write_text(args.json, json.dumps(result, indent=1) + "\n")
    return 0 if equal else 1


def give_latencies(measured: Path, copy: Path) -> None:
    """Begins the journal of a copy with the step latencies that another copy's has."""
    (journal,) = (measured / JOURNAL_FOLDER).iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)[:LATENCY_LINES]
    if not json.loads(lines[-1])["name"].startswith(LATENCIES):
        raise TmpDiffError(f"{journal} does not begin with step latencies; this tool no longer fits the calibration")
    (copy / JOURNAL_FOLDER).mkdir()
    (copy / JOURNAL_FOLDER / journal.name).write_bytes(b"".join(lines))


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    runs = result["runs"]
    stages = list(dict.fromkeys(stage for run in runs for stage in run["stages"] if stage != LATENCIES))
    rows = [[stage, *(f"{run['stages'].get(stage, 0.0):.2f}" for run in runs)] for stage in stages]
    rows.append(["all", *(f"{run['seconds']:.2f}" for run in runs)])
    rows.append(["speed-up", *(f"{run['speedup']:.2f}" for run in runs)])
    without = [run["seconds"] - run["stages"].get(START, 0.0) for run in runs]
    rows.append(["speed-up without start of workers", *(f"{without[0] / seconds:.2f}" for seconds in without)])
    print_table(
        f"Wall seconds of a calibration, {result['samples']} + {result['validation_samples']} samples, "
        f"T = {result['num_steps']}, {sum(result['calls'].values())} denoiser calls; {result['machine']}",
        ["stage", *(f"{run['workers']} worker{'s' * (run['workers'] > 1)}" for run in runs)],
        rows,
        [f"results {'equal bit for bit' if result['equal'] else 'DIFFER'}"],
    )


if __name__ == "__main__":
    sys.exit(guarded("gpu_bench.calibration", main))
