"""Builds that are killed and repeated, in forks of one process: of a build of its own, most time goes into imports.

`python -m helpers.build_trials FOLDER SEED TRIALS WORD...` calls `tmpdiff-export build WORD... --out FOLDER/N/bundle`:
once undisturbed for N = whole, and for every trial N once killed, at a random one of its calls to the file system, and
once more to its end. It prints a JSON document per trial: where it was killed, the stages that were finished then, and
those that the second call made.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.fake_build import finished, stop_at

from tmpdiff_export.bundling.stage_record import Kept
from tmpdiff_export.bundling.stages import Stages


def build(words: Sequence[str], folder: Path, *, kill_at: int = 0) -> int:
    """One build in a fork; its exit status, negative for a signal. `FOLDER.log` names the stages that it made."""
    if not (pid := os.fork()):
        status = 1
        try:
            status = _build(words, folder, kill_at)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _build(words: Sequence[str], folder: Path, kill_at: int) -> int:
    from tmpdiff_export.cli import main

    folder.mkdir(exist_ok=True)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    log, real = Path(f"{folder}.log"), Stages.finish
    log.write_text("")

    def finish(self: Stages, path: Path, name: str, *more: Any) -> Kept:
        kept = real(self, path, name, *more)
        with open(log, "a") as made:
            made.write(f"{name}\n")
        return kept

    Stages.finish = finish  # type: ignore[method-assign]
    seen = stop_at(kill_at)
    status = main(["build", *words, "--out", str(folder / "bundle")])
    Path(f"{folder}.calls").write_text(str(seen[0]))
    return status


def stages_of(folder: Path) -> list[str]:
    """The finished stages beside a bundle in the making."""
    stages = folder / ".bundle.stages"
    return sorted(finished(Stages(stages, print))) if stages.exists() else []


def main() -> None:
    """All trials."""
    from tmpdiff_export.bundling import bundle  # noqa: F401
    from tmpdiff_export.bundling.preflight import Needs, require_modules

    require_modules(Needs("onnxruntime", "cpu"))
    root, seed, trials, words = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    if status := build(words, root / "whole"):
        sys.exit(f"the undisturbed build ended with {status}: {(root / 'whole.err').read_text()}")
    calls = int((root / "whole.calls").read_text()) * 95 // 100  # their number differs a little from run to run
    chance = random.Random(seed)
    for trial in range(trials):
        folder = root / str(trial)
        at = chance.randint(calls * trial // trials + 1, calls * (trial + 1) // trials)
        killed = build(words, folder, kill_at=at)
        left = stages_of(folder)
        again = build(words, folder)
        found = {
            "at": f"call {at} of {calls}",
            "killed": killed == -signal.SIGKILL,
            "finished": left,
            "status": again,
            "made": Path(f"{folder}.log").read_text().split(),
            "errors": Path(f"{folder}.err").read_text(),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
