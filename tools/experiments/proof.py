"""Whole studies at once: `prediction` and `quality` of several bundles and precisions, in a process each.

    python -m tools.experiments.proof --bundle build/pixart 240 160 --bundle build/pixart-50 96 64 \\
        --prompts FILE --precisions fp8,int8,int4 --out FOLDER

A process measures one precision of one bundle, with a journal of its own; as many run at once as the machine has cores,
on one GPU. Prints a line for every piece that is done, and writes FOLDER/prediction-<bundle>.json and
FOLDER/quality-<bundle>.json with their figures. After `--seconds-limit` nothing new is begun; what was measured is
written and stays in the journals, so that the same command goes on from there. `tools.experiments.summary` puts the
results beside each other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from engines.cli import guarded
from engines.documents import read_json
from engines.errors import TmpDiffError
from engines.runtime import DenoiseRuntime
from tools.experiments import prediction, quality
from tools.experiments.command import Experiment, beside, write_content
from tools.experiments.study import open_study

PROGRAM = "proof"
EXPERIMENTS = (prediction.EXPERIMENT, quality.EXPERIMENT)
PARTS = "parts"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Of libraries that take all cores by default."""


@dataclass(frozen=True)
class Piece:
    """What one process measures.

    Attributes:
        bundle: its folder.
        precision: the low precision.
        words: arguments that all pieces of the bundle share.
        folder: where results go.
        until: when to begin nothing new, in seconds since the epoch; None for never.
    """

    bundle: Path
    precision: str
    words: tuple[str, ...]
    folder: Path
    until: float | None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.bundle.name} {self.precision}"

    def part(self, experiment: Experiment) -> Path:
        """Prefix of what is measured, before it is put together."""
        return self.folder / PARTS / f"{experiment.name}-{self.bundle.name}-{self.precision}"

    def arguments(self, experiment: Experiment) -> argparse.Namespace:
        """As if its command had been given."""
        left = () if self.until is None else ("--seconds-limit", f"{max(self.until - time.time(), 0.0):.0f}")
        words = (str(self.bundle), "--precisions", self.precision, *self.words, *left)
        return experiment.parser().parse_args([*words, "--out", str(self.part(experiment))])


def measure(piece: Piece) -> None:
    """Measures a piece and writes its parts; what the processes run."""
    begun = time.monotonic()
    last = ""

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        if done >= total and stage != last:
            last = stage
            print(f"{time.monotonic() - begun:5.0f} s  {piece.name}: {stage}", flush=True)

    def run() -> int:
        with open_study(piece.arguments(EXPERIMENTS[0]), report) as study:
            for experiment in EXPERIMENTS:
                write_content(experiment.content(study, piece.arguments(experiment)), piece.part(experiment))
        return 0

    sys.exit(guarded(piece.name, run))


def run(args: argparse.Namespace) -> int:
    """Measures all pieces, then puts together and draws what each bundle gave."""
    until = None if args.seconds_limit is None else time.time() + args.seconds_limit
    (args.out / PARTS).mkdir(parents=True, exist_ok=True)
    bundles = [(Path(folder), int(samples), int(unseen)) for folder, samples, unseen in args.bundle]
    if len({folder.name for folder, *_ in bundles}) < len(bundles):
        raise TmpDiffError("two bundles have the same folder name, which results are named by; rename one")
    pieces = []
    for folder, samples, unseen in bundles:
        words = ["--prompts", str(args.prompts), "--samples", str(samples), "--validation-samples", str(unseen)]
        words += ["--threads", "1", *(("--lpips", str(args.lpips)) if args.lpips else ())]
        for precision in _precisions(folder, args.precisions):
            pieces.append(Piece(folder, precision, tuple(words), args.out, until))
    for piece in pieces:
        for experiment in EXPERIMENTS:
            beside(piece.part(experiment), ".json").unlink(missing_ok=True)
    failed = _in_parallel(pieces, args.processes)
    for folder, *_ in bundles:
        for experiment in EXPERIMENTS:
            _put_together(experiment, [piece for piece in pieces if piece.bundle == folder])
    if failed:
        raise TmpDiffError(f"not measured to the end: {', '.join(failed)}; run the command again to go on from there")
    return 0


def _precisions(bundle: Path, asked: str | None) -> list[str]:
    with DenoiseRuntime.load(bundle, threads=1) as runtime:
        low = runtime.precisions[1:]
    chosen = [name for name in low if asked is None or name in asked.split(",")]
    if not chosen:
        raise TmpDiffError(f"bundle {bundle} has none of {asked}; choose from {', '.join(low)}")
    return chosen


def _in_parallel(pieces: Sequence[Piece], at_once: int) -> list[str]:
    """Measures each in a process of its own; names of those that failed."""
    for name in THREADS:
        os.environ.setdefault(name, "1")
    context = multiprocessing.get_context("spawn")
    waiting, running, failed = list(pieces), dict[Any, tuple[Piece, SpawnProcess]](), list[str]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                process = context.Process(target=measure, args=(waiting[0],))
                process.start()
                running[process.sentinel] = (waiting.pop(0), process)
            for sentinel in wait(list(running)):
                piece, process = running.pop(sentinel)
                process.join()
                print(f"{piece.name}: {'done' if process.exitcode == 0 else 'FAILED'}", flush=True)
                if process.exitcode != 0:
                    failed.append(piece.name)
    finally:
        for _, process in running.values():
            process.terminate()
    return failed


def _put_together(experiment: Experiment, pieces: Sequence[Piece]) -> None:
    """Writes, draws and prints one result file of the parts of a bundle."""
    paths = [beside(piece.part(experiment), ".json") for piece in pieces]
    contents = [read_json(path, "result file", TmpDiffError) for path in paths if path.exists()]
    data: dict[str, Any] = {}
    for content in contents:
        data |= content["data"]
    if not data:
        print(f"{experiment.name}, {pieces[0].bundle.name}: nothing was measured")
        return
    names = [piece.precision for piece in pieces]
    whole = contents[0] | {"setting": contents[0]["setting"] | {"precisions": names}, "data": data}
    prefix = pieces[0].folder / f"{experiment.name}-{pieces[0].bundle.name}"
    args = vars(pieces[0].arguments(experiment)) | {"precisions": ",".join(names), "out": prefix, "seconds_limit": None}
    whole["command"] = experiment.wording(argparse.Namespace(**args))
    write_content(whole, prefix)
    experiment.finish(whole, prefix)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.experiments.{PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bundle", nargs=3, action="append", required=True, metavar=("BUNDLE", "N", "M"),
        help="bundle folder, calibration samples, validation samples; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="calibration and validation prompts"
    )
    parser.add_argument("--precisions", metavar="LIST", help="low precisions, comma-separated (default: all built)")
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="weights from tools.experiments.fetch_lpips")
    parser.add_argument("--seconds-limit", type=float, metavar="S", help="begins nothing new after S seconds")
    parser.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="at once (default: one per core)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results go")
    args = parser.parse_args(arguments)
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}, expected 1 or more")
    return guarded(PROGRAM, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
