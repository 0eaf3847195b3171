"""A prompt file that `build` takes is one that `calibrate` takes: both read it by one function, and both cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny_pipeline import tiny_options

from calibration.measure.bundle_evaluator import BundleEvaluator
from engines import DenoiseRuntime
from engines.errors import PromptError
from engines.text import read_prompts
from tmpdiff_export.bundling.options import require_buildable

ODD = ("a red circle " * 100, "!", "\U0001f600 \u7ea2\u5706", "<pad></s> <|endoftext|>", "\u200b", "b\x00c")


def test_what_a_build_takes_is_encoded_for_calibration(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("[calibration]\n" + "\n".join(ODD) + "\n[validation]\n" + "\n".join(f"{odd} too" for odd in ODD))
    prompts = read_prompts(path)
    assert len(prompts.calibration) >= len(ODD)
    require_buildable(replace(tiny_options(), prompts=prompts.calibration), tmp_path / "bundle", "onnxruntime")
    runtime = DenoiseRuntime.load(tiny_bundle, threads=1)
    for section in (prompts.calibration, prompts.validation):
        assert BundleEvaluator(runtime, section, 0, 1.0).num_samples == len(section)


@pytest.mark.parametrize(
    "content",
    [
        "[calibration]\na\na\n[validation]\nb\n",
        "[calibration]\na\n[validation]\na\n",
        "[calibration]\n \t\n[validation]\na\n",
    ],
)
def test_what_calibration_cannot_use_is_refused_before_a_build(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(PromptError, match=r"repeats 'a'|no prompts under \[calibration\]"):
        read_prompts(path)
