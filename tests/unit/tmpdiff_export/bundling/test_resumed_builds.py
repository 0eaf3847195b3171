"""Builds that are cut short and go on: the same bundle in the end, and no finished stage is made twice."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.build_trials import stages_of
from helpers.children import Child, cpu_seconds, start
from helpers.commands import EXPORT, save_prompts
from helpers.paths import ROOT
from helpers.tiny_pipeline import tiny_options

from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.bundling import bundle as bundle_build
from tmpdiff_export.bundling import onnx_files
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.stage_record import Kept
from tmpdiff_export.bundling.stages import Note, Stages
from tmpdiff_export.pipelines.load import open_pipeline

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
WORDS = ("--backend", "onnxruntime", "--precisions", "fp16,int8", "--steps", "2")
OPTIONS = tiny_options(num_steps=2)


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


@pytest.fixture
def expected(built) -> dict[str, bytes]:
    """Of an undisturbed build."""
    return contents(built(OPTIONS))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that builds in this process make, as they are made."""
    names: list[str] = []
    real = Stages.finish

    def finish(self: Stages, path: Path, name: str, *more) -> Kept:
        names.append(name)
        return real(self, path, name, *more)

    monkeypatch.setattr(Stages, "finish", finish)
    return names


def test_killed_at_random_calls_to_the_file_system_a_build_ends_the_same(tmp_path: Path, tiny_pipeline: Path) -> None:
    words = [sys.executable, "-m", "helpers.build_trials", tmp_path, 19, trials := 6, tiny_pipeline, *WORDS]
    prompts = save_prompts(tmp_path)
    result = subprocess.run(
        [*map(str, words), "--prompts", str(prompts)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [item["killed"] for item in found] == [True] * trials
    whole = contents(tmp_path / "whole/bundle")
    stages = set((tmp_path / "whole.log").read_text().split())
    for trial, item in enumerate(found):
        assert item["status"] == 0, item
        assert contents(tmp_path / str(trial) / "bundle") == whole, item["at"]
        assert [path.name for path in (tmp_path / str(trial)).iterdir()] == ["bundle"], item["at"]
        assert sorted([*item["made"], *item["finished"]]) == sorted(stages), item["at"]
        count = len(item["finished"])
        says = "going on with 1 finished stage, " if count == 1 else f"going on with {count} finished stages, "
        assert (says in item["errors"]) == bool(count), item["errors"]


@pytest.mark.long
@pytest.mark.timeout(3600)  # 41 builds, imports and all
def test_killed_at_20_random_moments_a_build_ends_the_same(tmp_path: Path, tiny_pipeline: Path) -> None:
    """Moments of its computing time, so that a busy machine does not move them."""
    prompts = save_prompts(tmp_path)

    def begin(folder: Path) -> Child:
        folder.mkdir(exist_ok=True)
        build = [sys.executable, "-m", EXPORT, "build", tiny_pipeline, "--out", folder / "bundle", "--prompts", prompts]
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return start([*build, *WORDS, "--force"], text=True, cwd=ROOT, env=ENVIRONMENT, **output)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with begin(tmp_path / "whole") as child:
        _, errors = child.communicate()
    assert child.returncode == 0, errors
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    whole, chance, cut = contents(tmp_path / "whole/bundle"), random.Random(19), 0
    for trial in range(20):
        folder, moment = tmp_path / str(trial), taken * (trial + chance.random()) / 20
        with begin(folder) as child:
            while child.poll() is None and cpu_seconds(child) < moment:
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
            child.communicate()
        cut += child.returncode == -signal.SIGKILL
        finished = stages_of(folder)
        with begin(folder) as child:
            _, errors = child.communicate()
        print(f"killed after {moment:.1f} of {taken:.1f} s: {len(finished)} finished stages")
        assert child.returncode == 0, errors
        assert (f"going on with {len(finished)} finished stage" in errors) == bool(finished), errors
        assert contents(folder / "bundle") == whole, moment
        assert [path.name for path in folder.iterdir()] == ["bundle"], moment
    assert cut >= 18, "the last moments may be past the end"


STEPS = (
    "start_text_encoder",
    "gather",
    "start_vae_decoder",
    "denoiser_model",
    "find_all_ranges",
    "DenoiserEngines",
    "_Build._wait_for",
    "keep_graphs",
    "write_tokenizers",
    "write_manifest",
)
"""Of a build, in the order of their first calls."""


def interrupted(step: str, pipeline: Path, out: Path, options: BuildOptions = OPTIONS, notes: Note = print) -> None:
    """A build that Ctrl-C ends at the beginning of a step."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{bundle_build.__name__}.{step}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(pipeline, out, options, say=notes)


def test_interrupted_at_every_step_in_turn_a_build_makes_each_stage_once(
    tmp_path: Path, tiny_pipeline: Path, expected: dict[str, bytes], made: list[str]
) -> None:
    out, options = tmp_path / "bundle", replace(OPTIONS, onnx_dir=tmp_path / "onnx")
    for step in STEPS:
        interrupted(step, tiny_pipeline, out, options)
        assert sorted(made) == stages_of(tmp_path), step
        # the graphs of --onnx-dir are there just before the bundle is; nothing half-written lies among them
        assert {path.name for path in tmp_path.iterdir()} <= {".bundle.stages", "onnx"}, step
        onnx = {path.name for path in (tmp_path / "onnx").iterdir()} if (tmp_path / "onnx").exists() else set()
        complete = {f"{name}.onnx" for name in ("fp16", "int8", "text_encoder", "vae_decoder")}
        assert {name for name in onnx if not name.endswith(".safetensors")} in (set(), complete), step
    build(tiny_pipeline, out, options)
    assert sorted(made) == sorted(set(made)), "none was made again"
    assert contents(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "onnx"]


def test_restart_makes_every_stage_again(
    tmp_path: Path, tiny_pipeline: Path, expected: dict[str, bytes], made: list[str]
) -> None:
    interrupted("write_manifest", tiny_pipeline, tmp_path / "bundle")
    first = sorted(made)
    made.clear()
    notes: list[str] = []
    build(tiny_pipeline, tmp_path / "bundle", replace(OPTIONS, restart=True), say=notes.append)
    assert sorted(made) == first
    assert not [line for line in notes if "going on" in line]
    assert contents(tmp_path / "bundle") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_kept_stages_serve_a_build_of_one_more_precision(
    tmp_path: Path, tiny_pipeline: Path, expected: dict[str, bytes], made: list[str], built
) -> None:
    out, notes = tmp_path / "bundle", []
    build(tiny_pipeline, out, replace(OPTIONS, keep_stages=True), say=notes.append)
    assert contents(out) == expected
    first = set(made)
    assert stages_of(tmp_path) == sorted(first)
    assert f"kept: {len(first)} finished stages, " in notes[-1]
    assert str(tmp_path / ".bundle.stages") in notes[-1]
    made.clear()
    more = tiny_options("fp16", "fp8", "int8", num_steps=2)
    build(tiny_pipeline, out, replace(more, force=True))
    # Engines that read a file whose name has one reader more are made again; what else there is new is FP8's.
    assert set(made) == {
        "ranges",
        "codes-fp8-max-onnxruntime-cpu",
        "weights-fp16+fp8+int8-onnxruntime-cpu",
        "engine-fp16-none",
        "engine-fp8-max",
        "engine-int8-max",
        "engine-int8-smoothquant-0.5",
    }
    assert contents(out) == contents(built(more))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_altered_stage_is_noticed_by_its_hash_and_made_anew(
    tmp_path: Path, tiny_pipeline: Path, expected: dict[str, bytes], made: list[str]
) -> None:
    out = tmp_path / "bundle"
    interrupted("write_manifest", tiny_pipeline, out)
    for stage in ("runs", "ranges", "weights-fp16-", "codes-int8-max-", "engine-int8-max"):
        (folder,) = (tmp_path / ".bundle.stages").glob(f"{stage}*")
        file = max((path for path in folder.rglob("*") if path.is_file() and path.name != "stage.json"), key=_size)
        alter_last_byte(file)
        made.clear()
        notes: list[str] = []
        interrupted("write_manifest", tiny_pipeline, out, notes=notes.append)
        (line,) = (line for line in notes if "damaged" in line)
        assert line.startswith(f"stage {stage}")
        assert line.endswith(f"{file.name} was altered (its sha256 does not match)")
        (again,) = made  # and nothing that was made from it: it came out the same
        assert again.startswith(stage)
    build(tiny_pipeline, out, OPTIONS)
    assert contents(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def alter_last_byte(path: Path) -> None:
    """Of a weight, a scale, or the end of a graph."""
    with open(path, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))


def _size(path: Path) -> int:
    return path.stat().st_size


def test_settings_in_a_linked_folder_count_and_a_bundle_inside_the_pipeline_does_not(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))
    elsewhere = Path(shutil.move(folder / "scheduler", tmp_path / "elsewhere"))
    (folder / "scheduler").symlink_to(elsewhere)

    def settings() -> str:
        return Site(open_pipeline(folder), *[None] * 7).settings_sha256

    before = settings()
    (folder / ".bundle.stages").mkdir()
    (folder / ".bundle.stages" / "stage.json").write_text("{}")
    assert settings() == before
    config = elsewhere / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_train_timesteps": 900}))
    assert settings() != before


def test_what_a_killed_build_left_among_the_onnx_files_goes_and_a_folder_in_their_place_leaves_them_alone(
    tmp_path: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx, out, scratches = tmp_path / "onnx", tmp_path / "bundle", []
    options = replace(OPTIONS, precisions=(Precision.FP16,), onnx_dir=onnx)
    (onnx / "vae_decoder.onnx").mkdir(parents=True)
    real = onnx_files._write

    def write(site: Site, folder: Path, kept: onnx_files.KeptJobs) -> None:
        scratches.append(folder)
        real(site, folder, kept)

    monkeypatch.setattr(onnx_files, "_write", write)
    with pytest.raises(
        BuildError, match=r"vae_decoder\.onnx is a folder, where --onnx-dir is to have a file; remove it"
    ):
        build(tiny_pipeline, out, options)
    assert [path.name for path in onnx.iterdir()] == ["vae_decoder.onnx"]
    (onnx / "vae_decoder.onnx").rmdir()
    scratches[0].mkdir()
    (scratches[0] / "fp16.onnx").write_text("left")
    build(tiny_pipeline, out, options)
    assert {path.suffix for path in onnx.iterdir()} == {".onnx", ".safetensors"}
    assert (onnx / "vae_decoder.onnx").is_file()
