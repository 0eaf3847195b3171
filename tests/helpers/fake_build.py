"""A small build of several stages that can kill itself: `python -m helpers.fake_build TARGET LOG [KILL_AT]`.

Every stage that is made writes a line to LOG. With KILL_AT the process ends by SIGKILL at that call to the file system,
counted from the start of the build; without, it prints how many there were.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from engines.files import staged_folder
from tmpdiff_export.bundling.stage_files import link
from tmpdiff_export.bundling.stages import Stages, open_stages

STAGES = {"batches": (), "ranges": ("batches",), "fp16": ("batches",), "fp8": ("ranges", "fp16"), "check": ("fp8",)}
"""By name, the stages that each is made from."""
CALLS = ("open", "os.", "shutil.", "tempfile.")


def build(target: Path, log: Path, note=print, **options: bool) -> None:
    with open_stages(target, note, **options) as stages, staged_folder(target, replace=True) as bundle:
        digests: dict[str, str] = {}
        for name in STAGES:
            kept = stages.keep(name, key_of(name, digests), lambda path, name=name: make(path, name, log))
            digests[name] = kept.digest
            for file in kept.files:
                if file.startswith("engines/"):
                    link(kept.folder / file, bundle / file)
        (bundle / "manifest.json").write_text(repr(digests))


def key_of(name: str, digests: dict[str, str]) -> dict[str, object]:
    return {"stage": name, "from": [digests[source] for source in STAGES[name]]}


def make(path: Path, name: str, log: Path) -> dict[str, object]:
    (path / "engines").mkdir()
    for part in range(3):
        (path / "engines" / f"{name}.{part}").write_bytes(f"{name} {part}\n".encode() * 5000)
    (path / "scratch").write_text(name)
    with open(log, "a") as lines:
        lines.write(f"{name}\n")
    return {"name": name, "scale": 0.1}


def stop_at(limit: int) -> list[int]:
    """Counts calls to the file system from now on, and ends at one of them; returns the count so far, in a list."""
    seen = [0]

    def hook(event: str, _: object) -> None:
        if event.startswith(CALLS):
            seen[0] += 1
            if seen[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def finished(stages: Stages) -> set[str]:
    return {path.name.rpartition("-")[0] for path in stages.folder.iterdir() if not path.name.startswith((".", "lock"))}


if __name__ == "__main__":
    seen = stop_at(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    build(Path(sys.argv[1]), Path(sys.argv[2]))
    print(seen[0])
