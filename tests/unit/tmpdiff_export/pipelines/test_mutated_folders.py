"""A hundred pipeline folders with one thing wrong each: `build` refuses in one line, or opens what is harmless."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import EXPORT, assert_refused, started
from helpers.mutations import KINDS, mutate
from helpers.small_pipelines import MAKERS, save_small_pipeline

from engines.errors import BuildError
from tmpdiff_export import cli
from tmpdiff_export.bundling import bundle
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.pipelines.load import open_pipeline

FOLDERS = 100
HARMLESS = "nothing is wrong with this folder"
MadeOnce = Callable[[str, Callable[[Path], object]], Path]


class ReadPrompts:
    """What a build does first with a pipeline that is open; then it stops."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def run(self, out: Path) -> None:
        for text in self.site.source.texts:
            text.require_same_reading(["a red circle", "!"])
        raise BuildError(HARMLESS)


def mutated(made_once: MadeOnce, seed: int, folder: Path) -> str:
    """Makes the folder of a seed; returns what is wrong with it."""
    name = list(MAKERS)[seed % len(MAKERS)]
    saved = made_once(f"small-{name}", lambda place: save_small_pipeline(name, place / "pipeline")) / "pipeline"
    shutil.copytree(saved, folder)
    return f"{name}: {mutate(folder, random.Random(seed))}"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("[calibration]\na\nb\n[validation]\nc\n")
    return path


@pytest.mark.parametrize("seed", range(FOLDERS))
def test_a_mutated_folder_is_refused_in_one_line(
    seed: int,
    made_once: MadeOnce,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    what = mutated(made_once, seed, tmp_path / "pipeline")
    monkeypatch.setattr(bundle, "Making", ReadPrompts)
    capfd.readouterr()  # diffusers saves with a progress bar
    arguments = ["--prompts", prompts, "--backend", "onnxruntime", "--precisions", "fp16"]
    status = cli.main(list(map(str, ["build", tmp_path / "pipeline", "--out", tmp_path / "bundle", *arguments])))
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("estimate: ")]
    assert (status, len(lines), shown.out) == (1, 1, ""), f"{what}: {shown.err}"
    assert lines[0].startswith("tmpdiff-export: error: "), what
    assert lines[0].isprintable(), what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline", "prompts.txt"], what


def test_the_seeds_mutate_in_every_way(made_once: MadeOnce, tmp_path: Path) -> None:
    kinds = {mutated(made_once, seed, tmp_path / str(seed)).split(": ")[1] for seed in range(FOLDERS)}
    assert kinds == {kind.__name__ for kind in KINDS}


@pytest.mark.parametrize(
    ("seed", "says"), [(10, "names no pipeline class"), (40, "from the module 'os', expected one of")]
)
def test_as_a_command_too(seed: int, says: str, made_once: MadeOnce, tmp_path: Path, prompts: Path) -> None:
    mutated(made_once, seed, tmp_path / "pipeline")
    done = started(EXPORT, "build", tmp_path / "pipeline", "--out", tmp_path / "bundle", "--prompts", prompts)
    assert_refused(done, says)


@pytest.mark.parametrize(
    ("name", "file", "changes", "says"),
    [
        (
            "sd",
            "text_encoder/config.json",
            {"max_position_embeddings": 10**9},
            "asks for 7 GiB of tables",
        ),
        ("sd", "text_encoder/config.json", {"vocab_size": 10**12}, "expected \\[1000000000000, 32\\]"),
        ("sd", "unet/config.json", {"block_out_channels": [16, 10**9]}, "of another shape|overflow"),
        (
            "sd",
            "unet/config.json",
            {"transformer_layers_per_block": [10**9, 1]},
            "has transformer_layers_per_block 10000",
        ),
        ("pixart", "transformer/config.json", {"sample_size": 10**6}, "asks for .* GiB of tables"),
        ("sd3", "transformer/config.json", {"pos_embed_max_size": 10**6}, "pos_embed.pos_embed .* expected"),
        ("sd", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "has num_train_timesteps 1000000000"),
        ("pixart", "scheduler/scheduler_config.json", {"solver_order": 10**9}, "has solver_order 1000000000"),
    ],
)
def test_sizes_that_would_fill_the_memory_are_refused_before_anything_is_made(
    name: str, file: str, changes: dict[str, object], says: str, made_once: MadeOnce, tmp_path: Path
) -> None:
    saved = made_once(f"small-{name}", lambda place: save_small_pipeline(name, place / "pipeline")) / "pipeline"
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BuildError, match=says):
        open_pipeline(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: a GiB


@pytest.mark.parametrize("action", ["unlink", "empty"])
def test_a_tokenizer_without_a_vocabulary_is_refused(action: str, made_once: MadeOnce, tmp_path: Path) -> None:
    saved = made_once("small-sd", lambda place: save_small_pipeline("sd", place / "pipeline")) / "pipeline"
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    path = folder / "tokenizer/tokenizer.json"
    path.unlink()
    if action == "empty":
        path.mkdir()
    with pytest.raises(BuildError, match="tokenizer holds no vocabulary"):
        open_pipeline(folder)
