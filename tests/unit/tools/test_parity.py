"""The comparison with diffusers: which cells it tries, that it sees a mistake, its table, and all families."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT

from engines import conditioning
from engines.errors import TmpDiffError
from tools.acceptance.odd_prompts import ODD_PROMPTS
from tools.acceptance.text_pipelines import TEXT_PIPELINES
from tools.parity import run
from tools.parity.__main__ import main
from tools.parity.cells import ATTACHED_PROMPTS, COMBINED, DEFAULT, Cell, cells
from tools.parity.families import FAMILIES, ParityFamily
from tools.parity.table import table

RESULT = ROOT / "docs" / "results" / "parity.json"
BEGIN, END = "<!-- python -m tools.parity --table docs/results/parity.json -->\n", "<!-- end -->\n"


def few(family: ParityFamily, *, combined: int, seed: str) -> Iterator[tuple[str, Cell]]:
    """One cell for every kind of comparison."""
    default = Cell.default(family)
    yield DEFAULT, default
    yield "size", replace(default, size=family.sizes[-1], scheduler=list(family.schedulers)[1])
    yield "text_length", replace(default, text_length=family.text_lengths[-1], batch=2)
    yield "prompt", replace(default, prompt="exclamation")
    yield "attached", replace(default, attached=True, prompt="long")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_axis_is_varied_alone_and_then_all_at_random(family: ParityFamily) -> None:
    found = list(cells(family, combined=10, seed="any"))
    default = Cell.default(family)
    assert found == list(cells(family, combined=10, seed="any"))
    assert [cell for axis, cell in found if axis == DEFAULT] == [default]
    assert [cell for axis, cell in found if axis == COMBINED] != [
        cell for axis, cell in cells(family, combined=10, seed="other") if axis == COMBINED
    ]
    assert {field.name for field in fields(Cell)} == set(family.axes)
    for axis, values in family.axes.items():
        tried = [cell for name, cell in found if name == axis]
        if axis == "attached":
            assert [cell.prompt for cell in tried] == list(ATTACHED_PROMPTS)
            continue
        assert tried == [replace(default, **{axis: value}) for value in values[1:]]
    assert set(family.axes["prompt"]) == set(ODD_PROMPTS)
    assert family.maker in TEXT_PIPELINES
    assert any(height != width for height, width in family.sizes)


def test_two_families_are_as_in_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "cells", few)
    out = tmp_path / "parity.json"
    assert main(["--out", str(out), "--families", "pixart,flux-schnell", "--workers", "1"]) == 0
    found = json.loads(out.read_text())["families"]
    for family in found.values():
        assert len(family["cells"]) == 5
        assert max(row["latents"] for row in family["cells"]) < 1e-4
        assert all(row["latents"] > 0 for row in family["cells"])
        assert sum("grey_levels" in row for row in family["cells"]) == 2
        assert family["another_prompt"] > 1e-2
    capsys.readouterr()
    assert main(["--table", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert "**" not in "".join(lines)
    assert lines[2].startswith("| PixArt-Sigma | ")
    assert "| PixArt-Sigma | 5 | 128x128; 112x80 | 120; 40 | DPM-Solver++ 2M Karras |" in lines


def test_a_prompt_that_is_read_otherwise_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_marks(tokenizer: Any, prompts: Sequence[str], *rest: Any) -> Any:
        return read(tokenizer, [prompt.replace("!", "") for prompt in prompts], *rest)

    read = conditioning.encode_texts
    monkeypatch.setattr(conditioning, "encode_texts", without_marks)
    monkeypatch.setattr(run, "cells", lambda *args, **kwargs: list(few(*args, **kwargs))[:4:3])
    out = tmp_path / "parity.json"
    assert main(["--out", str(out), "--families", "pixart", "--workers", "1"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "from diffusers at" in line]
    assert line.startswith("PixArt-Sigma: latents ")
    assert "'prompt': 'exclamation'" in line
    assert "**" in table(out)


def test_what_is_no_family_and_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TmpDiffError, match="family is 'pixar', expected some of sd, sdxl, "):
        main(["--out", str(tmp_path / "parity.json"), "--families", "pixar"])
    (tmp_path / "other.json").write_text('{"tool": "scale"}')
    with pytest.raises(TmpDiffError, match=r"no result of tools\.parity, version 1; measure again"):
        main(["--table", str(tmp_path / "other.json")])


def test_the_page_has_the_table_of_the_result_file() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == table(RESULT)
    assert set(json.loads(RESULT.read_text())["families"]) == set(FAMILIES)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_families_are_as_in_diffusers(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "parity.json"), "--workers", "1"]) == 0
