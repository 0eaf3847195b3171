"""Calibration by worker processes: the same result as in one, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
from helpers.children import start, wait_for
from helpers.commands import started
from helpers.demo_build import linked_copy
from helpers.paths import ROOT
from helpers.planted import measurements
from helpers.stored import schedule_path, sensitivity_path
from helpers.tiny_pipeline import PROMPTS, tiny_options
from helpers.worker_samples import SAMPLES, STEPS, broken_samples, calibrated, loop, not_finite_samples, open_planted

from calibration import open_journal
from calibration.measure.bundle_evaluator import BundleSamples
from calibration.measure.evaluator import SampleSet
from calibration.measure.journal import Journal
from calibration.measure.measurements import Measurements
from engines.backends.cuda import gpu
from engines.errors import BackendError, BundleError, TmpDiffError
from engines.runtime import DenoiseRuntime
from engines.text import PromptFile
from tmpdiff_export.calibrate import dask_pool
from tmpdiff_export.calibrate import workers as bundle_workers
from tmpdiff_export.calibrate.bundle import RunOptions, calibrate_bundle
from tmpdiff_export.calibrate.dask_pool import SampleWorkers
from tmpdiff_export.cli import main


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def spent(path: Path) -> Counter[str]:
    return sum((Counter(record["calls"]) for record in records(path)), Counter())


def steps_run(folder: Path) -> list[str]:
    return [line for path in folder.glob("steps-*") for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The calibration in this process: its result and its journal."""
    path = tmp_path_factory.mktemp("alone") / "journal"
    return calibrated(open_journal(path, loop(), loop(seed=1))), path


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("workers", "at_once"),
    [pytest.param(1, 1, marks=LONG), pytest.param(2, 1, marks=LONG), (2, 2), pytest.param(1, 8, marks=LONG)],
)
def test_equal_result_calls_and_progress_with_any_number_of_workers(tmp_path, alone, workers, at_once):
    expected, alone_path = alone
    environment = dict(os.environ)
    seen: list[tuple[str, int, int]] = []
    expected_seen: list[tuple[str, int, int]] = []
    calibrated(progress=lambda *step: expected_seen.append(step))
    path = tmp_path / "journal"
    with open_planted(tmp_path / "trace", workers, at_once=at_once) as pool:
        found = calibrated(open_journal(path, loop(), loop(seed=1)), pool, progress=lambda *step: seen.append(step))
    assert os.environ == environment
    assert found == expected
    assert seen == expected_seen
    in_order = sorted(records(alone_path), key=lambda record: record["name"])
    assert sorted(records(path), key=lambda record: record["name"]) == in_order, "bit for bit, calls and all"
    assert len(steps_run(tmp_path / "trace")) == spent(path).total(), "nothing is computed twice"
    environments = [file.read_text() for file in (tmp_path / "trace").glob("environment-*")]
    assert sorted(environments) == [str(index) for index in range(workers)], "each opens the samples once"
    together = [int(line) for path in (tmp_path / "trace").glob("together-*") for line in path.read_text().split()]
    assert max(together) == min(at_once, -(-SAMPLES // workers)), "samples of one run go into one call"


def test_measurements_nobody_announced_are_taken_as_well(tmp_path):
    def low_but(step):
        return tuple("fp16" if index == step else "int8" for index in range(STEPS))

    mixed = ("fp16",) * 3 + ("int4",) * (STEPS - 3)
    here = measurements(loop())
    with open_planted(tmp_path / "trace", 2) as pool:
        there = Measurements("calibration", SampleSet(loop()), Journal.in_memory(""), pool)
        for either in (here, there):
            either.schedule_error("some", low_but(2), 1, pictures=False)
            either.schedule_error("some", mixed, 0, pictures=False)
        for step in (0, 3):
            there.expect_downcasts(step, "int4")
        there.expect_nudged()
        for sample in range(SAMPLES):
            both = [
                [pool.downcast(step, "int4", sample) for step in (0, 3)] + [pool.nudged(sample)]
                for pool in (here, there)
            ]
            for one, other in zip(*both, strict=True):
                assert (one.error, one.direction.tobytes()) == (other.error, other.direction.tobytes())
        there.forget("int8")
        both = [pool.schedule_error("some", low_but(4), 1, pictures=False) for pool in (here, there)]
        assert both[0] == both[1]
    assert there.calls == here.calls
    assert there.recomputed == {"int8": STEPS}, "its states were forgotten"
    assert not here.recomputed


@pytest.mark.parametrize(
    ("workers", "fatal_call"), [pytest.param(1, 7, marks=LONG), (2, 7), pytest.param(2, 400, marks=LONG)]
)
def test_worker_killed_on_the_way_changes_nothing(tmp_path, alone, workers, fatal_call):
    expected, alone_path = alone
    trace, path = tmp_path / "trace", tmp_path / "journal"
    trace.mkdir()
    (trace / "fatal").touch()
    with open_planted(trace, workers, fatal_call=fatal_call) as pool:
        assert calibrated(open_journal(path, loop(), loop(seed=1)), pool) == expected
    assert not (trace / "fatal").exists(), "a worker died"
    names = [record["name"] for record in records(path)]
    assert len(names) == len(set(names))
    assert spent(path) == spent(alone_path), "the measurement cut off is counted once"
    repeated = len(steps_run(trace)) - spent(path).total()
    # states of the samples that changed hands, or came back, and what was cut off
    assert 0 < repeated <= 2 * 2 * 5 * 4 * STEPS + 2 * STEPS
    assert len(list(trace.glob("environment-*"))) in (2, workers + 1), "another one, or one started again, went on"


def test_resumed_calibration_repeats_no_finished_measurement(tmp_path, alone):
    expected, alone_path = alone
    path = tmp_path / "journal"
    lines = alone_path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:120]))
    with open_planted(tmp_path / "trace", 2) as pool:
        assert calibrated(open_journal(path, loop(), loop(seed=1)), pool) == expected
    assert path.read_bytes().startswith(b"".join(lines[:120]))
    assert spent(path) == spent(alone_path)


@LONG
def test_measurement_that_kills_every_worker_is_given_up_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "journal"
    with (
        pytest.raises(TmpDiffError, match=r"4 worker processes died .*use fewer --workers\. What was measured is kept"),
        open_planted(tmp_path / "deadly", 2) as pool,
    ):
        calibrated(open_journal(path, loop(), loop(seed=1)), pool)
    open_journal(path, loop(), loop(seed=1))


@LONG
def test_a_port_that_somebody_else_took_meanwhile_is_replaced(tmp_path, monkeypatch):
    free_ports, asked = dask_pool._free_ports, []
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def ports(count):
            asked.append(count)
            found = free_ports(count)
            return [taken.getsockname()[1], *found[1:]] if len(asked) == 1 else found

        monkeypatch.setattr(dask_pool, "_free_ports", ports)
        with open_planted(tmp_path / "opened", 2) as pool:
            result = calibrated(pool=pool)
    assert asked == [2, 2]
    assert result == calibrated()


def test_errors_of_workers_are_those_of_one_process(tmp_path):
    with pytest.raises(BundleError, match="bundle x is damaged"):
        SampleWorkers(broken_samples, [{}, {}])
    words = r"the uniform fp16 run of calibration sample \d gave latents that are not finite"
    with pytest.raises(TmpDiffError, match=words), SampleWorkers(not_finite_samples, [{}, {}]) as pool:
        calibrated(pool=pool)


CHILD = """
import sys
from pathlib import Path

if __name__ == "__main__":  # worker processes import this file as well: what is below is not for them
    from helpers.worker_samples import calibrated, loop, open_planted
    from calibration import open_journal
    from engines.cli import guarded

    def command():
        journal = open_journal(Path(sys.argv[1]), loop(), loop(seed=1))
        with open_planted(Path(sys.argv[2]), 2, seconds=0.02) as pool:
            calibrated(journal, pool)
        return 0

    sys.exit(guarded("child", command))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=LONG)])
def test_interrupted_calibration_leaves_no_process_and_a_sound_journal(tmp_path, alone, sent):
    path, trace, script = tmp_path / "journal", tmp_path / "trace", tmp_path / "child.py"
    script.write_text(CHILD)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    with start(
        [sys.executable, script, path, trace],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 30, child)
        family = psutil.Process(child.pid).children(recursive=True)
        assert len(family) >= 2
        if sent == signal.SIGINT:
            os.killpg(child.pid, sent)  # as a terminal does
        else:
            child.send_signal(sent)
        _, errors = child.communicate()
    _, alive = psutil.wait_procs(family, timeout=300)
    for process in alive:
        process.kill()
    assert alive == []
    if sent == signal.SIGKILL:
        assert child.returncode == -sent
    else:
        assert child.returncode == 130
        assert errors == "child: interrupted; nothing half-written is left\n"
        assert not list(tmp_path.glob("tmpdiff-workers-*"))
    measured = len(records(path))
    assert calibrated(open_journal(path, loop(), loop(seed=1))) == alone[0]
    assert len(records(path)) > measured


# bundles


@pytest.fixture(scope="module")
def bundle(built):
    return built(tiny_options())


@pytest.mark.usefixtures("planted_latencies", "all_cores")
def test_bundle_calibrated_by_two_workers_is_the_same(tmp_path, bundle, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[calibration]\n" + "\n".join(PROMPTS) + "\n[validation]\na yellow ring\na white square\n")
    found = []
    for workers in (1, 2):
        copy = tmp_path / str(workers)
        linked_copy(bundle, copy)
        arguments = ["calibrate", str(copy), "--prompts", str(prompts), "--high-steps", "2", "--json"]
        assert main([*arguments, "--workers", str(workers)]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed.pop("workers") == workers
        assert printed.pop("seconds") > 0
        assert printed.pop("bundle") == str(copy)
        found.append((printed, sensitivity_path(copy).read_bytes(), schedule_path(copy).read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("on_gpu", "expected"),
    [(True, [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "7"}]), (False, [{"OMP_NUM_THREADS": "3"}] * 2)],
)
def test_each_worker_sees_one_gpu_or_its_share_of_the_threads(bundle, monkeypatch, on_gpu, expected):
    monkeypatch.setattr(bundle_workers, "runs_on_gpu", lambda runtime: on_gpu)
    monkeypatch.setattr("engines.backends.cuda.gpu.gpu_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7,1")
    monkeypatch.setattr("tmpdiff_export.calibrate.dask_pool.SampleWorkers", lambda *arguments: arguments)
    with DenoiseRuntime.load(bundle) as runtime:
        samples = BundleSamples(PromptFile(PROMPTS, ("a yellow ring",)), 0, 4.5)
        open_samples, environments, at_once = bundle_workers.open_workers(runtime, samples, 2, 7, 4)
    assert environments == expected
    assert at_once == 4
    name = runtime.setting.name

    def load(path, setting, threads):
        pytest.fail(f"{threads} threads in setting {setting.named}")

    monkeypatch.setattr(bundle_workers.DenoiseRuntime, "load", load)
    with pytest.raises(pytest.fail.Exception, match=f"{None if on_gpu else 3} threads in setting {name}"):
        open_samples()


def test_workers_that_cannot_be_had_are_refused_before_any_work(tmp_path, bundle, monkeypatch, capsys):
    prompts = PromptFile(PROMPTS, ("a yellow ring",))
    with pytest.raises(
        TmpDiffError, match="3 workers need a thread each, and --threads is 2; pass --workers 2 at most"
    ):
        calibrate_bundle(bundle, prompts, how=RunOptions(workers=3, threads=2))
    with pytest.raises(TmpDiffError, match="workers is 0, expected 1 or more"):
        calibrate_bundle(bundle, prompts, how=RunOptions(workers=0))
    monkeypatch.setattr(bundle_workers, "runs_on_gpu", lambda runtime: True)
    with pytest.raises(BackendError, match=r"no NVIDIA GPU was found|counting GPUs needs the module cuda\.bindings"):
        calibrate_bundle(bundle, prompts, how=RunOptions(workers=2))
    monkeypatch.setattr("engines.backends.cuda.gpu.gpu_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        TmpDiffError, match="3 workers need a GPU each, and 2 can be seen here; pass --workers 2 at most"
    ):
        calibrate_bundle(bundle, prompts, how=RunOptions(workers=3))
    assert gpu.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 5")
    assert gpu.visible_gpus() == ["GPU-a", "5"]
    with pytest.raises(TmpDiffError, match=r"can be seen here \(CUDA_VISIBLE_DEVICES is 'GPU-a, 5'\)"):
        calibrate_bundle(bundle, prompts, how=RunOptions(workers=3))
    monkeypatch.setattr(bundle_workers, "MODULES", ("no_such_engine",))
    with pytest.raises(BackendError, match=r"needs the module no_such_engine, .*pip install '\.\[distributed\]'"):
        calibrate_bundle(bundle, prompts, how=RunOptions(workers=2))
    file = tmp_path / "prompts.txt"
    file.write_text("[calibration]\na\nb\n[validation]\nc\n")
    assert main(["calibrate", str(bundle), "--prompts", str(file), "--workers", "2"]) == 1
    assert "no_such_engine" in capsys.readouterr().err
    assert not (bundle / "calibration").exists(), "nothing was measured"


@pytest.mark.usefixtures("all_cores")
def test_bench_times_the_same_calibration_with_one_and_two_workers(tmp_path, bundle):
    out = tmp_path / "out.json"
    done = started("tools.gpu_bench.calibration", bundle, "--samples", 2, "--validation-samples", 2, "--json", out)
    assert done.returncode == 0, done.stderr
    assert "results equal bit for bit" in done.stdout
    result = json.loads(out.read_text())
    assert result["equal"] is True
    one, two = result["runs"]
    assert (one["workers"], two["workers"], one["speedup"]) == (1, 2, 1.0)
    assert two["speedup"] == one["seconds"] / two["seconds"]
    assert "start workers" in two["stages"]
    assert "start workers" not in one["stages"]
    assert "step latencies" not in two["stages"], "those of the first run"
    assert not (bundle / "calibration").exists()
