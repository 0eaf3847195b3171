"""The sampler kernels as they were compiled."""

from __future__ import annotations

import re

from helpers.paths import ROOT

from engines.files import sha256_file

BACKEND = ROOT / "engines" / "backends" / "cuda"


def test_the_ptx_belongs_to_the_source() -> None:
    first = (BACKEND / "kernels.ptx").read_text().splitlines()[0]
    assert f"sha256 {sha256_file(BACKEND / 'kernels.cu')}," in first, "run tools/release/compile_kernels.py"


def test_the_ptx_rounds_every_operation_by_itself() -> None:
    text = (BACKEND / "kernels.ptx").read_text()
    assert set(re.findall(r"\.entry\s+(\w+)", text)) == {"tmpdiff_model_input", "tmpdiff_guide", "tmpdiff_combine"}
    arithmetic = set(re.findall(r"\b((?:fma|mad|mul|add|sub|neg|div)(?:\.\w+)*\.f(?:16|32|64))\b", text))
    assert arithmetic == {"mul.rn.f64", "add.rn.f64", "sub.rn.f32", "mul.rn.f32", "add.rn.f32"}
    assert ".ftz" not in text
    assert ".sat" not in text
