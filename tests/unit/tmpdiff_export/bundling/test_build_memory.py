"""What a build takes of the host's memory beside what any build takes, as a multiple of the 16-bit weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import save_prompts
from helpers.paths import ROOT

from tmpdiff_export.memory import size_text

PROGRAM = """
import sys
from tmpdiff_export.cli import main

assert main(sys.argv[1:]) == 0
with open("/proc/self/status") as lines:
    print("peak", next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")))
"""
# ONNX Runtime widens 16-bit weights when it loads an engine for a CPU: they are twice as large then, and its packed
# copies of one layer after the other come on top: 2.2 to 2.4 times in a process that does nothing else, 2.3 measured of a build; 3.2 where freed memory stayed.
RATIO = 2.5


def peak_bytes(pipeline: Path, folder: Path) -> int:
    """Of a build of all four precisions in a process of its own."""
    folder.mkdir()
    words = ["build", pipeline, "--out", folder / "bundle", "--prompts", save_prompts(folder)]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words), "--backend", "onnxruntime", "--steps", "2"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return int(result.stdout.rpartition("peak ")[2])


@pytest.mark.long
def test_the_peak_of_a_build_is_bounded_by_its_weights(
    tmp_path: Path, tiny_pipeline: Path, demo_pipeline: Path
) -> None:
    from tools.acceptance.random_pipeline import save_random_pipeline

    pipeline = tmp_path / "pipeline"
    save_random_pipeline(pipeline, demo_pipeline / "tokenizer", heads=16, head_size=64, layers=6, latent_side=16)
    stored = sum(path.stat().st_size for path in (pipeline / "transformer").glob("*.safetensors"))
    weights = stored // 2  # they are stored in float32
    assert weights > 200_000_000
    base, peak = peak_bytes(tiny_pipeline, tmp_path / "tiny"), peak_bytes(pipeline, tmp_path / "large")
    ratio = (peak - base) / weights
    print(f"base {size_text(base)}, peak {size_text(peak)}, 16-bit weights {size_text(weights)}: {ratio:.2f} times")
    assert ratio <= RATIO
