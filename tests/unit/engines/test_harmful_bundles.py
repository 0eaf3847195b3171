"""`tmpdiff-runtime` given bundles and schedules that are damaged, or made to do harm: each is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.demo_build import linked_copy
from helpers.runtime_command import PROMPT, arguments, assert_one_error_line, manifest_data, replace, rewrite_manifest
from helpers.stored import schedule_path

from engines.bundle import MANIFEST_NAME, Bundle
from engines.cli import main
from engines.documents import write_document
from engines.manifest import MANIFEST_VERSION
from engines.schedule import Schedule

Json = dict[str, Any]


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to damage. Its files are hard links: replace them, never write into them."""
    return linked_copy(small_bundle, tmp_path / "bundle")


# Each function changes a bundle; the text must be in the one line.


def edit(change: Callable[[Json], object], *, sign: bool = True) -> Callable[[Path], None]:
    return lambda bundle: rewrite_manifest(bundle, change, sign=sign)


def engine_path(name: str) -> Callable[[Path], None]:
    return edit(lambda data: data["denoisers"]["int8"][0]["file"].update(path=name))


def manifest_text(content: bytes) -> Callable[[Path], None]:
    return lambda bundle: replace(bundle / MANIFEST_NAME, content)


def engine_file(bundle: Path) -> Path:
    return bundle / str(manifest_data(bundle)["denoisers"]["int8"][0]["file"]["path"])


def forged_file(section: str, content: bytes) -> Callable[[Path], None]:
    """Replaces a file and lets the manifest vouch for the new content."""

    def apply(bundle: Path) -> None:
        def change(data: Json) -> None:
            entry = {
                "sampler": data["settings"][0]["sampler"],
                "tokenizer": data["texts"][0]["tokenizer"],
                "engine": data["denoisers"]["int8"][0]["file"],
            }[section]
            replace(bundle / entry["path"], content)
            entry.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))

        rewrite_manifest(bundle, change)

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


def files_of(engine: Json) -> Json:
    return {kind: engine[kind] for kind in ("file", "weights")}


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "path with ..": (engine_path("../outside.onnx"), "leaves the bundle folder"),
    "path with .. inside": (engine_path("engines/../../outside.onnx"), "leaves the bundle folder"),
    "one weight file by two names": (
        edit(
            lambda data: data["denoisers"]["int8"][0]["weights"].append(
                {**data["denoisers"]["int8"][0]["weights"][0], "path": "engines/./int8.safetensors"}
            )
        ),
        "is not in normal form",
    ),
    "size of 400 digits": (edit(lambda data: data["denoisers"]["int8"][0]["file"].update(bytes=10**400)), "bytes: "),
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
    "manifest altered": (
        edit(lambda data: data["model"].update(parameters=8), sign=False),
        "bundle_id does not match the manifest's content; the manifest was altered",
    ),
    "setting altered": (
        edit(lambda data: data["settings"][0].update(height=8), sign=False),
        "settings_sha256 does not match the manifest's settings; the manifest was altered",
    ),
    "no settings": (edit(lambda data: data.update(settings=[])), "settings: Tuple should have at least 1 item"),
    "settings that are none": (edit(lambda data: data.update(settings=7)), "settings: "),
    "setting with a path for a name": (edit(lambda data: data["settings"][0].update(name="../x")), "settings.0.name"),
    "setting outside": (
        edit(lambda data: data["settings"][0]["sampler"].update(path="../settings/sampler.json")),
        "leaves the bundle folder",
    ),
    "one setting twice": (
        edit(lambda data: data["settings"].append(data["settings"][0])),
        "two settings have the same name, expected different ones",
    ),
    "two settings in one folder": (
        edit(lambda data: data["settings"].append({**data["settings"][0], "name": "other"})),
        "two settings have the same folder, expected different ones",
    ),
    "no engines of a kind": (edit(lambda data: data.update(vae_decoder=[])), "vae_decoder: "),
    "manifest with an unknown field": (edit(lambda data: data.update(extra=1)), "extra"),
    "negative size": (edit(lambda data: data["settings"][0].update(latents_shape=[4, -1, 8])), "latents_shape"),
    "endless size": (
        edit(lambda data: data["settings"][0].update(latents_shape=[4, 1 << 20, 1 << 20])),
        "has latents 1048576x1048576 for pictures of ",
    ),
    "endless channels": (
        edit(lambda data: data["settings"][0]["latents_shape"].__setitem__(0, 1 << 40)),
        "out of memory",
    ),
    "latents of another size than the picture": (
        edit(lambda data: data["settings"][0].update(latents_shape=[4, 5, 7])),
        "has latents 7x5 for pictures of ",
    ),
    "endless height": (edit(lambda data: data["settings"][0].update(height=10**9)), "settings.0.height"),
    "endless text": (edit(lambda data: data["settings"][0].update(text_length=10**9)), "settings.0.text_length"),
    "more steps than the table": (
        edit(lambda data: data["settings"][0].update(num_steps=10**12)),
        "has 4 steps, the manifest says 1000",
    ),
    "pad token out of range": (edit(lambda data: data["texts"][0].update(pad_token_id=10**30)), "pad_token_id"),
    "no reference": (edit(lambda data: data["denoisers"].pop("fp16")), "reference precision"),
    "unknown backend": (
        edit(lambda data: [entry.update(backend="tpu") for (entry,) in data["denoisers"].values()]),
        "unknown backend 'tpu'",
    ),
    "two backends": (edit(lambda data: data["denoisers"]["int8"][0].update(backend="tpu")), "of several backends"),
    "sampler that is none": (forged_file("sampler", b"[]"), "sampler table is malformed"),
    "sampler nested deeply": (forged_file("sampler", b"[" * 100_000), "sampler table is malformed"),
    "tokenizer that is none": (forged_file("tokenizer", b"\xff\xfe"), "tokenizer file is not readable"),
    "decoder for a denoiser": (
        edit(lambda data: data["denoisers"]["int8"][0].update(files_of(data["vae_decoder"][0]))),
        "takes inputs",
    ),
    "denoiser for a text encoder": (
        edit(lambda data: data["text_encoder"][0].update(files_of(data["denoisers"]["int8"][0]))),
        "takes inputs",
    ),
    "graph of another engine with weights of its own": (
        edit(lambda data: data["text_encoder"][0].update(file=data["denoisers"]["int8"][0]["file"])),
        "expected a weight file that the manifest lists for it",
    ),
    "unknown input": (
        edit(lambda data: data["text_encoder"][0]["inputs"][0].update(name="nonsense")),
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
    "endless channels",
    "more steps than the table",
    "unknown backend",
    "sampler that is none",
    "sampler nested deeply",
    "tokenizer that is none",
    "decoder for a denoiser",
    "denoiser for a text encoder",
    "graph of another engine with weights of its own",
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
    "a reuse that is not there": (
        signed(lambda data: data["precisions"].__setitem__(3, "reuse3")),
        "asks for precision 'reuse3'; the bundle holds fp16, fp8, int8, int4, and a step that computes nothing is reuse0, "
        "reuse1 or reuse2",
    ),
    "too little to reuse": (
        signed(lambda data: data["precisions"].__setitem__(1, "reuse1")),
        "step index 1 is reuse1, which needs 2 model outputs computed before it at distinct timesteps, and there is 1",
    ),
    "a first step that is reused": (
        signed(lambda data: data["precisions"].__setitem__(0, "reuse0")),
        "step index 0 is reuse0, which needs 1 model output computed before it at distinct timesteps, and there are 0",
    ),
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
    stored = schedule_path(bundle)
    stored.unlink()
    manifest = manifest_data(bundle)
    data = {
        "version": 1,
        "bundle_id": manifest["bundle_id"],
        "precisions": ["int8"] * manifest["settings"][0]["num_steps"],
        "origin": "by hand",
    }
    change, expected = WRONG_SCHEDULES[name]
    change(bundle.parent / "mine.json", data)
    assert main(arguments(bundle, out, schedule=str(bundle.parent / "mine.json"))) == 1
    assert_one_error_line(capsys.readouterr().err, expected)
    if (bundle.parent / "mine.json").exists():
        (bundle.parent / "mine.json").rename(stored)
        assert main(["verify", str(bundle)]) == 1
        assert_one_error_line(capsys.readouterr().err, expected)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_schedules_of_every_version_are_read(version: int, bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    (setting,) = opened.manifest.settings
    data = {
        "version": version,
        "bundle_id": opened.manifest.bundle_id,
        "precisions": ["int8"] * setting.num_steps,
        "origin": "by hand",
        **({"setting": setting.name} if version > 1 else {}),
    }
    write_document(tmp_path / "mine.json", data)
    read = opened.schedule(setting, tmp_path / "mine.json")
    assert (read.precisions, read.reused) == (("int8",) * setting.num_steps, ())
    assert Schedule.uniform(opened.manifest.bundle_id, setting, "int8").version == 3


@pytest.mark.parametrize("choice", ["uniform:", "uniform:fp2", "uniform:reuse0", "uniform:FP16", "uniform:a b\n"])
def test_an_unknown_uniform_precision_lists_those_there_are(
    choice: str, small_bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(small_bundle, out, schedule=choice)) == 1
    assert_one_error_line(capsys.readouterr().err, "the bundle holds fp16, fp8, int8, int4")


def test_an_uncalibrated_bundle_says_what_to_do(bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule_path(bundle).unlink()
    assert main(["run", str(bundle), "--prompt", PROMPT, "--seed", "1", "--out", str(out)]) == 1
    assert_one_error_line(capsys.readouterr().err, "tmpdiff-export calibrate")
