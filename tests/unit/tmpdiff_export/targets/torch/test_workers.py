"""Builds whose packages worker processes make, without compiling any: who does what, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.build_tasks import compile_for_ever, die, die_compiling, fail, plant, seen, slow
from helpers.children import start, wait_for
from helpers.paths import ROOT
from helpers.tiny_pipeline import PROMPTS

from engines.bundle import Bundle
from engines.errors import BackendError, BuildError
from engines.manifest import Manifest
from engines.precision import Precision
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.cli import main
from tmpdiff_export.targets.choose import open_start
from tmpdiff_export.targets.target import at_once
from tmpdiff_export.targets.torch.target import TorchTarget
from tmpdiff_export.targets.torch.workers import COMPILE_THREADS, open_build_workers


def workers_left() -> list[psutil.Process]:
    """Worker processes of this one that live."""
    return [item for item in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(item.cmdline())]


def test_workers_see_gpus_in_turn_and_share_the_threads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv(COMPILE_THREADS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    with open_build_workers(3, ["GPU-a", "5"]) as pool:
        # As many as there are workers and one more, which comes to one that is free again.
        made = [pool.submit(str(index), partial(slow, 4.0)) for index in range(3)]
        deadline = time.monotonic() + 3.0  # the last one may not be known by its command line yet
        while len(workers_left()) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(workers_left()) == 3
        pool.submit("one more", partial(slow, 0.0))
        assert any(item.done() for item in made), "no more engines are in the making than there are workers"
        found: dict[int, dict[str, Any]] = {}
        while len(found) < 3:
            futures = [pool.submit("seen", seen) for _ in range(3)]
            found |= {said["process"]: said for said in (future.result() for future in futures)}  # type: ignore[index]
    assert sorted(said["gpu"] for said in found.values()) == ["5", "GPU-a", "GPU-a"]
    # Torch's own threads; those that packages are compiled for, as without workers; the compilers of GPU kernels.
    assert {tuple(said["threads"]) for said in found.values()} == {(2, 6, 4)}
    assert workers_left() == []


@pytest.mark.parametrize("then", [pytest.param("start", marks=pytest.mark.long), "wait"])
def test_a_failed_engine_ends_the_others(then: str) -> None:
    """Waiting for them would outlast the limit of a test."""

    def work() -> None:
        with open_build_workers(2, None) as pool:
            pool.submit("fp16", partial(slow, 3600.0))  # type: ignore[arg-type]
            failing = pool.submit("int8", fail)  # type: ignore[arg-type]
            if then == "start":
                pool.submit("vae_decoder", seen)  # type: ignore[arg-type]
            else:
                failing.result()

    with pytest.raises(BuildError, match="torch cannot compile int8: planted"):
        work()
    assert workers_left() == []


def test_what_cannot_travel_is_refused() -> None:
    words = r"int8: its module cannot be handed to a worker.*; leave --workers out"
    with open_build_workers(2, None) as pool, pytest.raises(BuildError, match=words):
        pool.submit("int8", lambda: None)  # type: ignore[arg-type,return-value]


def test_a_large_task_on_its_way_does_not_hold_up_the_end() -> None:
    def work() -> None:
        with open_build_workers(2, None) as pool:
            pool.submit("fp16", partial(len, bytes(1 << 24)))  # type: ignore[arg-type]
            raise KeyboardInterrupt  # no worker has begun to read

    with pytest.raises(KeyboardInterrupt):
        work()
    assert workers_left() == []


SCRIPT = """
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # worker processes import this file as well: what is below is not for them
    from helpers.build_tasks import compile_for_ever
    from engines.cli import guarded
    from tmpdiff_export.targets.torch.workers import open_build_workers

    def command():
        with open_build_workers(2, None) as pool:
            made = [pool.submit(str(index), partial(compile_for_ever, Path(sys.argv[1]))) for index in range(2)]
            made[0].result()
        return 0

    sys.exit(guarded("script", command))
"""


@pytest.mark.long
def test_a_worker_that_is_killed_leaves_no_compiler_of_any_worker(tmp_path: Path) -> None:
    def work() -> None:
        with open_build_workers(3, None) as pool:
            pool.submit("int8", partial(compile_for_ever, tmp_path))
            wait_for(lambda: len(list(tmp_path.glob("compiler-*"))) == 1)
            killed = pool.submit("fp8", partial(die_compiling, tmp_path))
            # The executor may learn of a process that it has just started at its next event only.
            pool.submit("int4", partial(slow, 1.0))
            killed.result()

    with pytest.raises(BuildError, match="a worker process died while"):
        work()
    compilers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("compiler-*")]
    assert len(compilers) == 2
    wait_for(
        lambda: not any(psutil.pid_exists(item) and psutil.Process(item).status() != "zombie" for item in compilers)
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_an_interrupted_build_leaves_no_process(tmp_path: Path, sent: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with start(
        [sys.executable, script, tmp_path], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        wait_for(lambda: len(list(tmp_path.glob("compiler-*"))) == 2, child)
        family = psutil.Process(child.pid).children(recursive=True)
        assert len(family) >= 4  # two workers with a compiler each
        if sent == signal.SIGINT:
            os.killpg(child.pid, sent)  # as a terminal does
        else:
            child.send_signal(sent)
        _, errors = child.communicate()
    _, alive = psutil.wait_procs(family, timeout=300)  # they would live for an hour
    for process in alive:
        process.kill()
    assert alive == []
    if sent == signal.SIGINT:
        assert child.returncode == 130
        assert errors == "script: interrupted; nothing half-written is left\n"


# builds of the tiny pipeline, with planted tasks


def planted_build(
    pipeline: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tasks: dict[str, dict[str, Any]], **options: Any
) -> list[tuple[str, int, int]]:
    """Builds FP16 and INT8 by two workers; what was reported."""
    monkeypatch.setattr(TorchTarget, "prepare", plant(tasks))
    reports: list[tuple[str, int, int]] = []
    asked = BuildOptions(
        (Precision.FP16, Precision.INT8), PROMPTS, steps=(2,), backend="torch", device="cpu", workers=2, **options
    )
    build(pipeline, out, asked, lambda *report: reports.append(report))
    return reports


@pytest.mark.parametrize(("best", "other"), [("max", "smoothquant-0.5"), ("smoothquant-0.5", "max")])
def test_the_best_variant_is_kept_whichever_is_made_first(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: str, other: str
) -> None:
    out = tmp_path / "bundle"
    tasks = {f"int8 {best}": {"sqnr_db": 41.0, "seconds": 1.0}, f"int8 {other}": {"sqnr_db": 40.0}}
    tasks["vae_decoder none"] = {"sqnr_db": 60.0, "seconds": 2.0}
    shared = Precision.INT8 if best == "max" else None
    if shared:
        # Packages are planted, weights are not: those of the kept variant are what the reference is made of.
        tasks["fp16 none"] = {"sqnr_db": 45.0}
    reports = planted_build(tiny_pipeline, out, monkeypatch, tasks, share_weights=shared)
    manifest = json.loads((out / "manifest.json").read_text())
    (int8,), (fp16,) = (manifest["denoisers"][name] for name in ("int8", "fp16"))
    assert list(manifest["denoisers"]) == ["fp16", "int8"]
    assert (int8["recipe"], int8["sqnr_db"]) == (best, 41.0)
    assert (out / "engines" / "int8.pt2").read_text() == best
    names = {"fp16", "int8", "text_encoder", "vae_decoder"}
    assert {path.stem for path in (out / "engines").glob("*.pt2")} == names
    Bundle.open(out).verify()
    listed = {file.path for file in Manifest.model_validate(manifest).files()}
    assert {path.relative_to(out).as_posix() for path in (out / "engines").iterdir()} <= listed
    if shared:
        assert fp16["sqnr_floor_db"] == int8["sqnr_floor_db"]
        assert fp16["weights"] == int8["weights"]
    said = {stage for stage, *_ in reports}
    assert {"build vae decoder", "make engine fp16", "make engine int8 (max)", "build engines: int8"} <= said
    assert all(0 <= done <= total for _, done, total in reports)
    finished = [done for stage, done, _ in reports if stage.startswith("build engines: ")]
    assert finished == sorted(finished)
    assert workers_left() == []


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (
            {"before": die},
            r"^a worker process died while .*int8.* was compiled \(out of memory\?\); use fewer --workers$",
        ),
        pytest.param({"before": fail}, "^torch cannot compile int8: planted$", marks=pytest.mark.long),
        ({"sqnr_db": 3.0}, r"^int8: the built engine has an SQNR of 3\.0 dB .*, its floor is 22\.0 dB"),
    ],
)
def test_a_build_that_fails_in_a_worker_leaves_nothing_but_finished_stages(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: dict[str, Any], says: str
) -> None:
    tasks = {f"int8 {name}": task for name in ("max", "smoothquant-0.5")}
    with pytest.raises(BuildError, match=says):
        planted_build(tiny_pipeline, tmp_path / "made" / "bundle", monkeypatch, tasks)
    kept = tmp_path / "made" / ".bundle.stages"
    assert list((tmp_path / "made").iterdir()) == [kept]
    assert not list(kept.glob("*.partial"))
    assert workers_left() == []


def test_one_worker_is_this_process() -> None:
    with open_start(None, 1) as begin:  # type: ignore[arg-type]
        assert begin is at_once
        made = begin("fp16", os.getpid)  # type: ignore[arg-type]
    assert made.done()
    assert made.result() == os.getpid()


@pytest.mark.parametrize(
    ("backend", "workers", "says"),
    [
        ("onnxruntime", 2, "--workers is for packages of the torch backend; engines of 'onnxruntime' are built in one"),
        ("torch", 0, "workers is 0, expected 1 to 256"),
        ("torch", 999_999, "workers is 999999, expected 1 to 256"),
        ("onnxruntime", -1, "workers is -1, expected 1 to 256"),
    ],
)
def test_workers_that_a_build_cannot_have_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, workers: int, says: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["[calibration]", *PROMPTS, "[validation]", "a yellow ring"]))
    out = tmp_path / "bundle"
    options = BuildOptions((Precision.FP16,), PROMPTS, backend=backend, workers=workers)
    with pytest.raises(BackendError, match=says):
        build(tmp_path / "no-pipeline", out, options)
    arguments: Sequence[str] = ["build", str(tmp_path / "no-pipeline"), "--out", str(out), "--prompts", str(prompts)]
    assert main([*arguments, "--backend", backend, "--device", "cpu", "--workers", str(workers)]) == 1
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1
    assert not out.exists()
