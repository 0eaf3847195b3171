"""`tmpdiff-runtime run` and `verify`: pictures, refusals, faults, and bundles made to do harm."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import engines
from engines.bundle import MANIFEST_NAME, SCHEDULE_NAME
from engines.cli import INTERRUPTED, PROGRAM, main
from engines.documents import write_document
from engines.manifest import MANIFEST_VERSION, manifest_identity
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from engines.version import VERSION

SOURCE = Path(engines.__file__).parent.parent
PROMPT = "a large red circle on the left"
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


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to damage. Its files are hard links: replace them, never write into them."""
    copy = tmp_path / "bundle"

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    shutil.copytree(demo_bundle, copy, copy_function=link)
    return copy


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A picture in an empty folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "picture.png"


def arguments(bundle: Path, out: Path, *more: str, schedule: str = "uniform:int8") -> list[str]:
    return ["run", str(bundle), "--prompt", PROMPT, "--seed", "7", "--out", str(out), "--schedule", schedule, *more]


def in_subprocess(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, "-m", "engines", *command], capture_output=True, text=True, env=environment, **options
    )


def assert_one_error_line(err: str, expected: str) -> None:
    assert err.startswith(f"{PROGRAM}: error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    assert err.rstrip("\n").isprintable(), err
    assert expected in err


def test_run_writes_the_picture_the_runtime_makes(
    demo_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(demo_bundle), "--prompt", PROMPT, "--seed", "7", "--out", str(out), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    runtime = DenoiseRuntime.load(demo_bundle)
    schedule = runtime.bundle.schedule()
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
    demo_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "a small blue square"
    assert main(arguments(demo_bundle, out, "--prompt", other, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    first, second = out.with_name("picture-0.png"), out.with_name("picture-1.png")
    assert printed["pictures"] == [str(first), str(second)]
    assert printed["seeds"] == [7, 8]
    assert sorted(out.parent.iterdir()) == [first, second]
    alone = out.with_name("alone.png")
    command = ["run", str(demo_bundle), "--prompt", other, "--seed", "8", "--schedule", "uniform:int8"]
    assert main([*command, "--out", str(alone)]) == 0
    text = capsys.readouterr().out
    assert str(alone) in text
    assert f"{DenoiseRuntime.load(demo_bundle).num_steps} int8 steps" in text
    difference = np.abs(np.asarray(Image.open(second), np.int16) - np.asarray(Image.open(alone), np.int16))
    assert difference.mean() < 1.0
    assert first.read_bytes() != second.read_bytes()


def test_options_reach_the_picture(demo_bundle: Path, out: Path, tmp_path: Path) -> None:
    runtime = DenoiseRuntime.load(demo_bundle)
    manifest, reference = runtime.manifest, runtime.precisions[0]
    schedule = Schedule(
        bundle_id=manifest.bundle_id,
        precisions=(reference, *["int8"] * (runtime.num_steps - 1)),
        origin="by hand",
    )
    schedule.save(tmp_path / "mine.json")
    options = ["--guidance-scale", "4", "--negative-prompt", "a blue square"]
    assert main(arguments(demo_bundle, out, *options, schedule=str(tmp_path / "mine.json"))) == 0
    expected = runtime.generate([PROMPT], [7], schedule, negative_prompt="a blue square", guidance_scale=4.0)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected[0])


def test_runs_without_the_export_world(demo_bundle: Path, out: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCKER)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(SOURCE)]), "TMPDIR": str(scratch)}
    blocked = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "torch is blocked" in blocked.stderr
    bare = out.with_name("bare.png")
    done = subprocess.run(
        [sys.executable, "-m", "engines", *arguments(demo_bundle, bare)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(scratch.iterdir()) == []  # ONNX Runtime's telemetry would leave a session file here
    assert main(arguments(demo_bundle, out)) == 0
    assert bare.read_bytes() == out.read_bytes()


def test_verify_counts_every_file(demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(demo_bundle), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    files = {entry["path"] for entry in entries_of(read(demo_bundle))}
    assert {f"engines/{name}.onnx" for name in ("fp16", "fp8", "int8", "int4")} < files
    assert printed["files"] == len([*files, SCHEDULE_NAME])
    assert main(["verify", str(demo_bundle)]) == 0
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
        (["--prompt", "word " * 5000], "tokens"),
        (["--negative-prompt", "blue", "--guidance-scale", "1"], "--negative-prompt has no effect"),
        (["--guidance-scale", "1e37"], "not finite"),
    ],
)
def test_what_cannot_work_is_one_line(
    options: list[str], expected: str, demo_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(demo_bundle, out, *options)) == 1
    captured = capsys.readouterr()
    assert_one_error_line(captured.err, expected)
    assert captured.out == ""
    assert list(out.parent.iterdir()) == []


def test_a_failing_disk_leaves_the_old_picture(demo_bundle: Path, out: Path) -> None:
    out.write_bytes(b"old")
    limited = in_subprocess(
        arguments(demo_bundle, out),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert limited.returncode == 1
    assert_one_error_line(limited.stderr, f"picture {out} cannot be written")
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line(demo_bundle: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "engines", "verify", str(demo_bundle)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )
    assert done.returncode == 1
    assert_one_error_line(done.stderr, "disk is full")


def test_interrupted_leaves_nothing(demo_bundle: Path, out: Path) -> None:
    prompts = ["--prompt", PROMPT] * 15  # long enough to be in the loop when the signal comes
    process = subprocess.Popen(
        [sys.executable, "-m", "engines", *arguments(demo_bundle, out, *prompts, schedule="uniform:fp16")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    time.sleep(4.0)
    assert process.poll() is None, "the run ended before it could be interrupted"
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert (printed, err) == ("", f"{PROGRAM}: interrupted; nothing half-written is left\n")
    assert list(out.parent.iterdir()) == []


# Bundles that are damaged or made to do harm. Each function changes a bundle; the text must be in the one line.


def read(bundle: Path) -> Json:
    data: Json = json.loads((bundle / MANIFEST_NAME).read_text())
    return data


def entries_of(data: Any) -> list[Json]:
    """Every file that a manifest vouches for, wherever in it."""
    if not isinstance(data, dict):
        return []
    found = [data] if {"path", "sha256", "bytes"} <= set(data) else []
    return found + [entry for value in data.values() for entry in entries_of(value)]


def replace(path: Path, content: bytes) -> None:
    """Puts a new file in place of one that may be a hard link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def edit(change: Callable[[Json], None], *, sign: bool = True) -> Callable[[Path], None]:
    """Changes the manifest; with `sign` its identity is made to fit, as a forger would."""

    def apply(bundle: Path) -> None:
        data = read(bundle)
        change(data)
        if sign:
            data["bundle_id"] = manifest_identity(data)
        replace(bundle / MANIFEST_NAME, json.dumps(data).encode())

    return apply


def engine_path(name: str) -> Callable[[Path], None]:
    return edit(lambda data: data["denoisers"]["int8"]["file"].update(path=name))


def manifest_text(content: bytes) -> Callable[[Path], None]:
    return lambda bundle: replace(bundle / MANIFEST_NAME, content)


def engine_file(bundle: Path) -> Path:
    return bundle / str(read(bundle)["denoisers"]["int8"]["file"]["path"])


def forged_file(section: str, content: bytes) -> Callable[[Path], None]:
    """Replaces a file and lets the manifest vouch for the new content."""

    def apply(bundle: Path) -> None:
        data = read(bundle)
        entry = {
            "sampler": data["sampler"],
            "tokenizer": data["text"]["tokenizer"],
            "engine": data["denoisers"]["int8"]["file"],
        }[section]
        replace(bundle / entry["path"], content)
        entry.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        data["bundle_id"] = manifest_identity(data)
        replace(bundle / MANIFEST_NAME, json.dumps(data).encode())

    return apply


def engine_outside(bundle: Path) -> None:
    engine = engine_file(bundle)
    outside = bundle.parent / "outside.onnx"
    engine.rename(outside)
    engine.symlink_to(outside)


def engines_folder_outside(bundle: Path) -> None:
    folder = engine_file(bundle).parent
    folder.rename(bundle.parent / "outside")
    folder.symlink_to(bundle.parent / "outside")


def engine_links_to_itself(bundle: Path) -> None:
    engine = engine_file(bundle)
    engine.unlink()
    engine.symlink_to(engine.name)


def engine_is_device(bundle: Path) -> None:
    engine = engine_file(bundle)
    engine.unlink()
    engine.symlink_to("/dev/zero")


def engine_is_folder(bundle: Path) -> None:
    engine = engine_file(bundle)
    engine.unlink()
    engine.mkdir()


def engine_is_fifo(bundle: Path) -> None:
    engine = engine_file(bundle)
    engine.unlink()
    os.mkfifo(engine)


def truncate_engine(bundle: Path) -> None:
    engine = engine_file(bundle)
    replace(engine, engine.read_bytes()[:-1])


def alter_engine(bundle: Path) -> None:
    engine = engine_file(bundle)
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    replace(engine, bytes(content))


def sparse(path: Path) -> None:
    """A document of 65 MiB that takes no room on the disk."""
    replace(path, b"{")
    os.truncate(path, 65 << 20)


def manifest_is(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        (bundle / MANIFEST_NAME).unlink()
        make(bundle / MANIFEST_NAME)

    return apply


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "path with ..": (engine_path("../outside.onnx"), "leaves the bundle folder"),
    "path with .. inside": (engine_path("engines/../../outside.onnx"), "leaves the bundle folder"),
    "absolute path": (engine_path("/etc/passwd"), "leaves the bundle folder"),
    "path with backslashes": (engine_path("..\\outside.onnx"), "leaves the bundle folder"),
    "empty path": (engine_path(""), "leaves the bundle folder"),
    "path with a NUL": (engine_path("engines/a\0b"), "leaves the bundle folder"),
    "path of the folder itself": (engine_path("."), "not a regular file"),
    "long path": (engine_path("a" * 5000), "cannot be read"),
    "path with a new line and a direction mark": (engine_path("engines/\u202e\nx\x1b[31m.onnx"), "\\u202e x\\x1b"),
    "path with a lone surrogate": (engine_path("engines/\ud800.onnx"), "use plain files"),
    "link that leads out": (engine_outside, "through a link"),
    "folder that leads out": (engines_folder_outside, "through a link"),
    "link to itself": (engine_links_to_itself, "use plain files"),
    "device": (engine_is_device, "through a link"),
    "folder for an engine": (engine_is_folder, "not a regular file"),
    "FIFO for an engine": (engine_is_fifo, "not a regular file"),
    "missing engine": (lambda bundle: engine_file(bundle).unlink(), "is missing"),
    "truncated engine": (truncate_engine, "truncated or altered"),
    "altered engine": (alter_engine, "was altered"),
    "newer format": (edit(lambda data: data.update(version=MANIFEST_VERSION + 1)), "upgrade tmpdiff-export"),
    "no version": (edit(lambda data: data.pop("version")), "format version None"),
    "version true": (edit(lambda data: data.update(version=True)), "format version True"),
    "manifest altered": (edit(lambda data: data["sampling"].update(height=8), sign=False), "the manifest was altered"),
    "manifest with an unknown field": (edit(lambda data: data.update(extra=1)), "extra"),
    "negative size": (edit(lambda data: data["sampling"].update(latents_shape=[4, -1, 8])), "latents_shape"),
    "endless size": (edit(lambda data: data["sampling"].update(latents_shape=[4, 1 << 20, 1 << 20])), "out of memory"),
    "more steps than the table": (edit(lambda data: data["sampling"].update(num_steps=10**12)), "sampler table has"),
    "pad token out of range": (edit(lambda data: data["text"].update(pad_token_id=10**30)), "pad_token_id"),
    "no reference": (edit(lambda data: data["denoisers"].pop("fp16")), "reference precision"),
    "unknown backend": (
        edit(lambda data: [entry.update(backend="tpu") for entry in data["denoisers"].values()]),
        "unknown backend 'tpu'",
    ),
    "two backends": (edit(lambda data: data["denoisers"]["int8"].update(backend="tpu")), "of several backends"),
    "sampler that is none": (forged_file("sampler", b"[]"), "sampler table is malformed"),
    "sampler nested deeply": (forged_file("sampler", b"[" * 100_000), "sampler table is malformed"),
    "tokenizer that is none": (forged_file("tokenizer", b"\xff\xfe"), "tokenizer file is not readable"),
    "decoder for a denoiser": (
        edit(lambda data: data["denoisers"]["int8"].update(file=data["vae_decoder"]["file"])),
        "takes inputs",
    ),
    "denoiser for a text encoder": (
        edit(lambda data: data["text_encoder"].update(file=data["denoisers"]["int8"]["file"])),
        "takes inputs",
    ),
    "unknown input": (
        edit(lambda data: data["text_encoder"]["inputs"][0].update(name="nonsense")),
        "the text encoder takes nonsense; the manifest has",
    ),
    "engine that is none": (forged_file("engine", b"not an ONNX file"), "cannot load"),
    "empty engine": (forged_file("engine", b""), "cannot load"),
    "empty manifest": (manifest_text(b""), "not valid JSON"),
    "manifest that is no JSON": (manifest_text(b"\x00\xff\xfe"), "not valid JSON"),
    "manifest that is a list": (manifest_text(b"[1]"), "expected an object"),
    "manifest with NaN": (manifest_text(b'{"version": NaN}'), "not valid JSON"),
    "manifest with a number of 5000 digits": (manifest_text(b'{"version": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "manifest nested deeply": (manifest_text(b"[" * 100_000), "not valid JSON"),
    "giant manifest": (lambda bundle: sparse(bundle / MANIFEST_NAME), "larger than"),
    "folder for a manifest": (manifest_is(Path.mkdir), "not a regular file"),
    "FIFO for a manifest": (manifest_is(os.mkfifo), "not a regular file"),
    "device for a manifest": (manifest_is(lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    "no manifest": (manifest_is(lambda path: None), "is not a bundle"),
    "no folder": (shutil.rmtree, "is not a folder"),
}
ONLY_A_RUN_NOTICES = {
    "endless size",
    "more steps than the table",
    "unknown backend",
    "sampler that is none",
    "sampler nested deeply",
    "tokenizer that is none",
    "decoder for a denoiser",
    "denoiser for a text encoder",
    "unknown input",
    "engine that is none",
    "empty engine",
}


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("name", HARM)
def test_a_harmful_bundle_is_refused_in_one_line(
    name: str, bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle.parent / "outside.onnx").write_bytes(engine_file(bundle).read_bytes())
    change, expected = HARM[name]
    change(bundle)
    commands = [arguments(bundle, out)]
    if name not in ONLY_A_RUN_NOTICES:
        commands.append(["verify", str(bundle)])
    for command in commands:
        assert main(command) == 1
        captured = capsys.readouterr()
        assert_one_error_line(captured.err, expected)
        assert captured.out == ""
        assert list(out.parent.iterdir()) == []


def signed(change: Callable[[Json], None]) -> Callable[[Path, Json], None]:
    def apply(path: Path, data: Json) -> None:
        change(data)
        write_document(path, data)

    return apply


def text(content: bytes) -> Callable[[Path, Json], object]:
    return lambda path, data: path.write_bytes(content)


WRONG_SCHEDULES: dict[str, tuple[Callable[[Path, Json], object], str]] = {
    "another T": (signed(lambda data: data["precisions"].append("int8")), "the bundle's loop has"),
    "another bundle": (signed(lambda data: data.update(bundle_id="f" * 64)), "was made for bundle ffffffffffff"),
    "a precision that is not there": (signed(lambda data: data["precisions"].__setitem__(0, "fp2")), "'fp2'"),
    "a precision with a new line": (signed(lambda data: data["precisions"].__setitem__(0, "fp\n16")), "malformed"),
    "newer format": (signed(lambda data: data.update(version=9)), "upgrade tmpdiff-export"),
    "altered": (lambda path, data: path.write_text(json.dumps({**data, "sha256": "0" * 64})), "was altered"),
    "infinity": (text(b'{"version": 1, "predicted_error": 1e999}'), "malformed"),
    "giant": (lambda path, data: sparse(path), "larger than"),
    "missing": (lambda path, data: None, "does not exist"),
    "folder": (lambda path, data: path.mkdir(), "not a regular file"),
    "FIFO": (lambda path, data: os.mkfifo(path), "not a regular file"),
    **{
        f"nested {depth} deep": (text(b'{"version": 1, "a": ' + b"[" * depth + b"]" * depth + b"}"), "schedule")
        for depth in (300, 900, 990, 1000, 5000)
    },
}


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("name", WRONG_SCHEDULES)
def test_a_wrong_schedule_is_refused_in_one_line(
    name: str, bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / SCHEDULE_NAME).unlink()
    manifest = read(bundle)
    data = {
        "version": 1,
        "bundle_id": manifest["bundle_id"],
        "precisions": ["int8"] * manifest["sampling"]["num_steps"],
        "origin": "by hand",
    }
    change, expected = WRONG_SCHEDULES[name]
    change(bundle.parent / "mine.json", data)
    assert main(arguments(bundle, out, schedule=str(bundle.parent / "mine.json"))) == 1
    assert_one_error_line(capsys.readouterr().err, expected)
    if (bundle.parent / "mine.json").exists():
        (bundle.parent / "mine.json").rename(bundle / SCHEDULE_NAME)
        assert main(["verify", str(bundle)]) == 1
        assert_one_error_line(capsys.readouterr().err, expected)


@pytest.mark.parametrize("choice", ["uniform:", "uniform:fp2", "uniform:FP16", "uniform:a b\n"])
def test_an_unknown_uniform_precision_lists_those_there_are(
    choice: str, demo_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(demo_bundle, out, schedule=choice)) == 1
    assert_one_error_line(capsys.readouterr().err, "the bundle holds fp16, fp8, int8, int4")


def test_an_uncalibrated_bundle_says_what_to_do(bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / SCHEDULE_NAME).unlink()
    assert main(["run", str(bundle), "--prompt", PROMPT, "--seed", "1", "--out", str(out)]) == 1
    assert_one_error_line(capsys.readouterr().err, "tmpdiff-export calibrate")
