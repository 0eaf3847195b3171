"""`tmpdiff-runtime run` and `verify`: pictures, refusals and faults."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import children
from helpers.paths import ROOT
from helpers.runtime_command import PROMPT, arguments, assert_one_error_line, entries_of, manifest_data
from PIL import Image

from engines.cli import INTERRUPTED, PROGRAM, main
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from engines.version import VERSION

NOT_IN_A_PRODUCT = (
    "torch diffusers transformers onnx modelopt rich skimage matplotlib scipy safetensors accelerate "
    "huggingface_hub calibration tmpdiff_export"
)
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_IN_A_PRODUCT.split()!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""

Json = dict[str, Any]


def test_run_writes_the_picture_the_runtime_makes(
    small_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(small_bundle), "--prompt", PROMPT, "--seed", "7", "--out", str(out), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    runtime = DenoiseRuntime.load(small_bundle)
    schedule = runtime.schedule()
    np.testing.assert_array_equal(np.asarray(Image.open(out)), runtime.generate([PROMPT], [7], schedule)[0])
    assert printed["pictures"] == [str(out)]
    assert printed["seeds"] == [7]
    assert printed["schedule_origin"] == schedule.origin
    used = set(schedule.precisions)
    assert printed["steps_per_precision"] == {name: schedule.precisions.count(name) for name in used}
    assert set(printed["mean_step_ms"]) == used
    seconds = printed["seconds"]
    assert set(seconds) == {"load", "text", "loop", "decode", "write"}
    steps_seconds = sum(printed["mean_step_ms"][name] * printed["steps_per_precision"][name] for name in used) / 1e3
    assert steps_seconds == pytest.approx(seconds["loop"], rel=0.2, abs=0.2)


def test_several_prompts_are_one_batch_with_a_seed_each(
    small_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "a small blue square"
    assert main(arguments(small_bundle, out, "--prompt", other, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    first, second = out.with_name("picture-0.png"), out.with_name("picture-1.png")
    assert printed["pictures"] == [str(first), str(second)]
    assert printed["seeds"] == [7, 8]
    assert sorted(out.parent.iterdir()) == [first, second]
    alone = out.with_name("alone.png")
    command = ["run", str(small_bundle), "--prompt", other, "--seed", "8", "--schedule", "uniform:int8"]
    assert main([*command, "--out", str(alone)]) == 0
    text = capsys.readouterr().out
    assert str(alone) in text
    assert f"{DenoiseRuntime.load(small_bundle).num_steps} int8 at " in text
    difference = np.abs(np.asarray(Image.open(second), np.int16) - np.asarray(Image.open(alone), np.int16))
    assert difference.mean() < 1.0
    assert first.read_bytes() != second.read_bytes()


def test_options_reach_the_picture(small_bundle: Path, out: Path, tmp_path: Path) -> None:
    runtime = DenoiseRuntime.load(small_bundle)
    manifest, reference = runtime.manifest, runtime.precisions[0]
    schedule = Schedule(
        bundle_id=manifest.bundle_id,
        precisions=(reference, *["int8"] * (runtime.num_steps - 1)),
        origin="by hand",
    )
    schedule.save(tmp_path / "mine.json")
    options = ["--guidance-scale", "4", "--negative-prompt", "a blue square"]
    assert main(arguments(small_bundle, out, *options, schedule=str(tmp_path / "mine.json"))) == 0
    expected = runtime.generate([PROMPT], [7], schedule, negative_prompts="a blue square", guidance_scale=4.0)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected[0])


def test_negative_prompts_are_one_for_all_or_one_each(small_bundle: Path, out: Path) -> None:
    runtime = DenoiseRuntime.load(small_bundle)
    schedule, prompts = runtime.schedule("uniform:int8"), [PROMPT, "a small blue square"]
    command = arguments(small_bundle, out, "--prompt", prompts[1])

    def drawn(*options: str) -> np.ndarray:
        assert main([*command, *options]) == 0
        return np.stack([np.asarray(Image.open(out.with_name(f"picture-{index}.png"))) for index in range(2)])

    def expected(negatives: list[str] | str | None) -> np.ndarray:
        return runtime.generate(prompts, [7, 8], schedule, negative_prompts=negatives)

    each = drawn("--negative-prompt", "blue", "--negative-prompt", "")
    np.testing.assert_array_equal(each, expected(["blue", ""]))
    for_all = drawn("--negative-prompt", "blue")
    np.testing.assert_array_equal(for_all, expected("blue"))
    np.testing.assert_array_equal(for_all[0], each[0])
    np.testing.assert_array_equal(drawn(), expected(None))
    assert (for_all[1] != each[1]).any()


def test_what_is_cut_of_a_prompt_is_one_line_of_warning(
    small_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, cut = "a red circle " * 3, "red " * 40 + "and a blue square"
    assert main(arguments(small_bundle, out, "--prompt", short, "--json")) == 0
    captured = capsys.readouterr()
    assert (json.loads(captured.out)["cut"], captured.err) == ([], "")
    for option in ("--prompt", "--negative-prompt"):
        assert main(arguments(small_bundle, out, option, cut, "--json")) == 0
        captured = capsys.readouterr()
        ((prompt, words),) = json.loads(captured.out)["cut"]
        assert prompt == cut
        assert cut.endswith(words)
        assert words.endswith("and a blue square")
        assert captured.err.startswith("warning: prompts are longer than the text encoder takes, it reads 'red red red")
        assert captured.err.count("\n") == 1
        if option == "--negative-prompt":
            whole = out.read_bytes()
            kept = cut.removesuffix(words).strip()
            assert main(arguments(small_bundle, out, option, kept)) == 0
            assert capsys.readouterr().err == ""
            assert out.read_bytes() == whole, "what is left draws the same"


def test_of_many_prompts_that_are_cut_the_first_are_named(
    small_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [word for index in range(6) for word in ("--prompt", f"{'red ' * (40 + index)}end")]
    assert main(arguments(small_bundle, out, *prompts)) == 0
    shown = capsys.readouterr().err
    assert shown.count(" without ") == 4
    assert shown.endswith("; and 2 more that are cut\n")


def on_a_terminal(words: list[str]) -> tuple[int, str]:
    """Runs `tmpdiff-runtime` with stderr on a terminal of its own; exit status and what was shown there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "engines", *words], stdout=subprocess.DEVNULL, stderr=theirs, cwd=ROOT
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says so where the other side has closed
        while found := os.read(ours, 4096):
            shown += found
    os.close(ours)
    return process.wait(), shown.decode()


def test_steps_are_shown_on_a_terminal_where_that_is_asked_for(small_bundle: Path, out: Path) -> None:
    words = arguments(small_bundle, out)
    status, shown = on_a_terminal([*words, "--steps-progress"])
    assert status == 0
    bars = shown.split("\r")
    assert bars[0] == ""
    assert bars[-1] == "\033[K", "the line is taken away"
    assert [bar.split("] ")[1].split() for bar in bars[1:-1]] == [[f"{step}/4", "int8"] for step in (1, 2, 3, 4)]
    assert bars[1] == f"[{'#' * 7}{'.' * 23}] 1/4 int8  "
    assert bars[4].startswith(f"[{'#' * 30}] ")
    assert on_a_terminal(words) == (0, "")
    piped = subprocess.run(
        [sys.executable, "-m", "engines", *words, "--steps-progress"], capture_output=True, text=True, cwd=ROOT
    )
    assert (piped.returncode, piped.stderr) == (0, "")


def test_runs_without_the_export_world(small_bundle: Path, out: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCKER)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "TMPDIR": str(scratch)}
    blocked = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "torch is blocked" in blocked.stderr
    bare = out.with_name("bare.png")
    done = subprocess.run(
        [sys.executable, "-m", "engines", *arguments(small_bundle, bare)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(scratch.iterdir()) == []  # ONNX Runtime's telemetry would leave a session file here
    assert main(arguments(small_bundle, out)) == 0
    assert bare.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("choices", [("fp16", "int8", "reuse1", "reuse0"), ("fp16", "reuse0", "int8", "reuse1")])
def test_a_product_runs_a_schedule_file_with_reused_steps(
    small_bundle: Path, out: Path, tmp_path: Path, choices: tuple[str, ...]
) -> None:
    with DenoiseRuntime.load(small_bundle) as runtime:
        bundle_id, setting = runtime.manifest.bundle_id, runtime.setting.name
        schedule = Schedule(bundle_id=bundle_id, setting=setting, precisions=choices, origin="by hand")
        reused = tuple(k for k, choice in enumerate(choices) if choice.startswith("reuse"))
        assert schedule.reused == reused
        schedule.save(tmp_path / "mine.json")
        expected = runtime.generate([PROMPT, PROMPT], [7, 8], schedule)
        computed = schedule.model_copy(
            update={"precisions": tuple("int8" if k in reused else choice for k, choice in enumerate(choices))}
        )
        assert not np.array_equal(runtime.generate([PROMPT, PROMPT], [7, 8], computed), expected)
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "engines",
            *arguments(small_bundle, out, "--prompt", PROMPT, "--json", schedule=str(tmp_path / "mine.json")),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert printed["steps_per_precision"] == {name: choices.count(name) for name in choices}
    assert printed["mean_step_ms"]["reuse1"] < printed["mean_step_ms"]["fp16"]
    for path, picture in zip(printed["pictures"], expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)


def test_verify_counts_every_file(small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(small_bundle), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    files = {entry["path"] for entry in entries_of(manifest_data(small_bundle))}
    assert {f"engines/{name}.onnx" for name in ("fp16", "fp8", "int8", "int4")} < files
    assert printed["files"] == len(files) + 1  # the schedule
    assert main(["verify", str(small_bundle)]) == 0
    assert "is whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("replaced", "value"),
    [
        ("--out", "picture.jpg"),
        ("--out", "picture"),
        ("--out", ".png"),
        ("--seed", "-1"),
        ("--seed", "1.5"),
        ("--seed", str(1 << 63)),
        ("--seed", "9" * 5000),
        ("--guidance-scale", "nan"),
        ("--guidance-scale", "inf"),
        ("--guidance-scale", "-1"),
        ("--guidance-scale", "much"),
        ("--guidance-rescale", "1.5"),
        ("--steps", "0"),
        ("--size", "64"),
        ("--size", "0x64"),
        ("--size", "64x99999999"),
        ("--threads", "0"),
        ("--threads", "99999999999"),
        ("--prompt", "\udcff"),
    ],
)
def test_a_wrong_argument_is_wrong_usage(
    replaced: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--prompt": PROMPT, "--seed": "1", "--out": str(tmp_path / "picture.png")} | {replaced: value}
    with pytest.raises(SystemExit) as left:
        main(["run", str(tmp_path), *(word for option, text in given.items() for word in (f"{option}={text}",))])
    assert left.value.code == 2
    assert f"argument {replaced}" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--prompt", "--seed", "--out"])
def test_a_missing_argument_is_wrong_usage(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--prompt": PROMPT, "--seed": "1", "--out": "picture.png"}
    del given[missing]
    with pytest.raises(SystemExit) as left:
        main(["run", "bundle", *(word for pair in given.items() for word in pair)])
    assert left.value.code == 2
    assert missing in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{PROGRAM} {VERSION}\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [("missing/picture.png", "does not exist"), ("folder.png", "is a folder"), ("file/picture.png", "does not exist")],
)
def test_an_output_that_cannot_be_written_is_refused_first(
    output: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    assert main(arguments(tmp_path / "no bundle", tmp_path / output)) == 1
    assert_one_error_line(capsys.readouterr().err, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--strict-prompts", "--prompt", "word " * 5000], "prompts are longer than the text encoder takes"),
        (["--strict-prompts", "--negative-prompt", "word " * 5000], "prompts are longer than the text encoder takes"),
        (["--negative-prompt", "blue", "--negative-prompt", "red"], "2 negative prompts for 1 prompts"),
        (["--guidance-rescale", "0.5"], "a PixArtSigmaPipeline does not rescale its guidance"),
        (["--steps", "5"], "the bundle has no setting for --steps 5; it has 4-64x64-g4.5-t40 (DPM"),
        (["--size", "64x96"], "no setting for --size 64x96"),
        (
            ["--scheduler-setting", "EulerDiscreteScheduler"],
            "no setting for --scheduler-setting EulerDiscreteScheduler",
        ),
        (["--negative-prompt", "blue", "--guidance-scale", "1"], "--negative-prompt has no effect"),
        (["--guidance-scale", "1e39"], "not finite"),
    ],
)
def test_what_cannot_work_is_one_line(
    options: list[str], expected: str, small_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(small_bundle, out, *options)) == 1
    captured = capsys.readouterr()
    assert_one_error_line(captured.err, expected)
    assert captured.out == ""
    assert list(out.parent.iterdir()) == []


def test_a_failing_disk_leaves_the_old_picture(small_bundle: Path, out: Path) -> None:
    out.write_bytes(b"old")
    limited = subprocess.run(  # no file may have more than a block or two
        ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", sys.executable, "-m", "engines", *arguments(small_bundle, out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert limited.returncode == 1
    assert_one_error_line(limited.stderr, f"picture {out} cannot be written")
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_the_shell_has_closed_are_done_without(small_bundle: Path, closed: str) -> None:
    words = ["sh", "-c", f'exec "$0" -m engines verify "$1" {closed}', sys.executable, small_bundle]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line(small_bundle: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "engines", "verify", str(small_bundle)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 1
    assert_one_error_line(done.stderr, "disk is full")


# The command, but that it stays in the loop after its first step, and says so by making the file it is given.
HELD_IN_THE_LOOP = """
import pathlib, sys, time
from engines.cli import main
from engines.runtime import DenoiseRuntime

marker = pathlib.Path(sys.argv.pop(1))
denoise = DenoiseRuntime.denoise

def held(self, *arguments, on_step, **options):
    def stay(*step):
        on_step(*step)
        marker.touch()
        time.sleep(600)

    return denoise(self, *arguments, on_step=stay, **options)

DenoiseRuntime.denoise = held
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("how", "ignored", "ends"),
    [
        ("", None, signal.SIGINT),
        ("", None, signal.SIGTERM),
        ("", None, signal.SIGHUP),
        ("nohup", signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_interrupted_leaves_nothing(
    how: str, ignored: signal.Signals | None, ends: signal.Signals, small_bundle: Path, out: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "in the loop"
    with children.start(
        [*how.split(), sys.executable, "-c", HELD_IN_THE_LOOP, marker, *arguments(small_bundle, out)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        children.wait_for(marker.exists, process)
        if ignored is not None:
            process.send_signal(ignored)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1.0)
        process.send_signal(ends)
        printed, err = process.communicate()
    assert process.returncode == INTERRUPTED
    assert (printed, err) == ("", f"{PROGRAM}: interrupted; nothing half-written is left\n")
    assert list(out.parent.iterdir()) == []
