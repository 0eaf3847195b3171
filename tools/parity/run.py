"""All families, by as many processes, and the result file."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from engines.files import atomic_write_text
from tools.gpu_bench.document import rounded
from tools.gpu_bench.machine import facts
from tools.parity.cells import cells
from tools.parity.compare import failures, measure
from tools.parity.families import FAMILIES
from tools.parity.table import TOOL, VERSION


def measure_families(out: Path, names: Sequence[str], combined: int, workers: int) -> int:
    """Writes the result file of some families; 1 where one is further from diffusers than rounding explains, else 0."""
    measured: dict[str, Any] = {}
    for name, found in _measured(names, combined, workers):
        measured[name] = found
        worst = max(row["latents"] for row in found["cells"])
        print(f"parity: {name}, {len(found['cells'])} cells, at most {worst:.1e}", file=sys.stderr, flush=True)
    result = {
        "tool": TOOL,
        "version": VERSION,
        "command": f"python -m tools.parity --families {','.join(names)} --combined {combined} --out {out.name}",
        "machine": facts(torch.device("cpu")),
        "families": {name: measured[name] for name in names},
    }
    atomic_write_text(out, json.dumps(rounded(result), indent=1) + "\n")
    lines = [line for name in names for line in failures(measured[name])]
    print("\n".join(lines), file=sys.stderr, end="\n" if lines else "")
    return 1 if lines else 0


def measure_family(name: str, combined: int) -> dict[str, Any]:
    """`compare.measure` of a family, in a folder that is removed."""
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        return measure(family, list(cells(family, combined=combined, seed=name)), Path(folder))


def _measured(names: Sequence[str], combined: int, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Families as they are finished."""
    if workers == 1:
        for name in names:
            yield name, measure_family(name, combined)
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of one process starve another's
    with ProcessPoolExecutor(min(workers, len(names)), multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(measure_family, name, combined): name for name in names}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # nothing is begun after an error
