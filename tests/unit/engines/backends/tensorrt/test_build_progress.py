"""Progress of builds against the fake TensorRT; builds that are stopped, and go on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.linear_denoiser import PROFILE, save_model
from helpers.plan_bench import Bench


def test_progress_is_reported_in_nested_stages(bench: Bench) -> None:
    seen: list[tuple[str, int, int]] = []
    bench.build(progress=lambda *step: seen.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages[1].startswith(f"{stages[0]} > ")
    for stage in stages:
        steps = [(done, total) for name, done, total in seen if name == stage]
        total = steps[0][1]
        assert steps == [(done, total) for done in range(total + 1)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the display broke")])
def test_what_the_progress_callback_raises_ends_the_build(bench: Bench, error: BaseException) -> None:
    calls = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append(done)
        if done == 1:
            raise error

    with pytest.raises(type(error)) as caught:
        bench.build(progress=progress)
    assert caught.value is error
    assert calls.count(1) == 1
    assert bench.fakes.settings.builds == []  # the fake notes only builds that were not cancelled
    assert bench.left_behind() == set()


def test_ctrl_c_ends_the_build_at_the_next_step(bench: Bench) -> None:
    before = signal.getsignal(signal.SIGINT)
    survived = []

    def progress(stage: str, done: int, total: int) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)
            survived.append(done)  # it does not raise here, inside TensorRT's call

    with pytest.raises(KeyboardInterrupt):
        bench.build(progress=progress)
    assert survived == [1]
    assert signal.getsignal(signal.SIGINT) is before
    assert bench.left_behind() == set()


def test_an_interrupted_build_of_several_precisions_goes_on_where_it_was(bench: Bench) -> None:
    store_code: ModuleType = bench.code.plan_store
    options = bench.code.options.PlanOptions()
    models = {name: save_model(bench.folder / f"{name}.onnx", name) for name in ("fp16", "fp8", "int8")}

    def run(interrupt_at: str | None) -> dict[str, Any]:
        store, stored = store_code.PlanStore(bench.folder / "plans"), {}
        for precision, path in models.items():

            def progress(stage: str, done: int, total: int, stop: bool = precision == interrupt_at) -> None:
                if stop and done == 1:
                    raise KeyboardInterrupt

            def build(target: Path, path: Path = path, precision: str = precision, progress: Any = progress) -> Any:
                return bench.build(precision, path, target, progress=progress)

            asked = store_code.PlanRequest(path, precision, (PROFILE,), options, bench.gpu)
            stored[precision] = store.put(store_code.plan_key(asked, bench.fakes.settings.version), build)
        return stored

    with pytest.raises(KeyboardInterrupt):
        run("fp8")
    (finished,) = (bench.folder / "plans").glob("*.plan")
    before = finished.stat().st_ino, finished.read_bytes()
    assert not list((bench.folder / "plans").glob(".*.partial"))
    stored = run(None)
    assert {name: plan.reused for name, plan in stored.items()} == {"fp16": True, "fp8": False, "int8": False}
    assert (stored["fp16"].path.stat().st_ino, stored["fp16"].path.read_bytes()) == before
    assert all(plan.reused for plan in run(None).values())
    assert len(bench.fakes.settings.builds) == 3
    assert stored["fp8"].facts.layers["fp8"].layers == 1
    assert json.loads(stored["fp8"].inspector.read_text())["Layers"]


def test_no_step_is_reported_after_the_build_was_stopped(bench: Bench) -> None:
    """TensorRT's threads may complete steps that were under way."""
    calls = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append(done)
        raise KeyboardInterrupt

    monitor = bench.code.build_progress.BuildProgress(progress)
    monitor.phase_start("Building engine", None, 3)
    assert monitor.step_complete("Building engine", 0) is False
    assert monitor.step_complete("Building engine", 1) is False
    monitor.phase_finish("Building engine")
    assert calls == [0]
    with pytest.raises(KeyboardInterrupt):
        monitor.raise_stopped()
