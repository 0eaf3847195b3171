"""Settings of a bundle: which one is meant, which engines run it, and bundles of releases that had one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.demo_build import linked_copy
from helpers.runtime_command import PROMPT, arguments, assert_one_error_line, manifest_data, replace, rewrite_manifest
from helpers.stored import schedule_path

from engines.bundle import MANIFEST_NAME, SCHEDULE_NAME, Bundle
from engines.cli import main
from engines.documents import FileEntry, write_document
from engines.errors import BundleError, ScheduleError
from engines.manifest import manifest_identity
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule
from engines.setting_choice import SettingChoice
from engines.setting_entry import SettingEntry, choose_setting

Json = dict[str, Any]
WIDE = SettingChoice(named="wide")


def entry(name: str, scheduler: str, steps: int, height: int, width: int) -> SettingEntry:
    return SettingEntry(
        name=name, scheduler=scheduler, num_inference_steps=steps, num_steps=steps, guidance_scale=4.5,
        latents_shape=(4, height // 8, width // 8), height=height, width=width,
        sampler=FileEntry(path=f"settings/{name}/sampler.json", sha256="a" * 64, bytes=1),
    )  # fmt: skip


SETTINGS = (
    entry("first", "DDIMScheduler", 20, 512, 512),
    entry("quick", "DDIMScheduler", 8, 512, 512),
    entry("wide", "DDIMScheduler", 20, 512, 768),
    entry("euler", "EulerDiscreteScheduler", 8, 512, 768),
)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (SettingChoice(), "first"),
        (SettingChoice(steps=8), "quick"),
        (SettingChoice(size=(512, 768)), "wide"),
        (SettingChoice(steps=8, size=(512, 768)), "euler"),
        (SettingChoice(named="quick"), "quick"),
        (SettingChoice(named="EulerDiscreteScheduler"), "euler"),
        (SettingChoice(steps=20, named="DDIMScheduler", size=(512, 768)), "wide"),
    ],
)
def test_the_first_setting_that_fits_is_meant(choice: SettingChoice, name: str) -> None:
    assert choose_setting(SETTINGS, choice).name == name


def test_where_none_fits_the_settings_are_listed() -> None:
    with pytest.raises(BundleError) as refused:
        choose_setting(SETTINGS[:2], SettingChoice(9, (512, 768), "quick"))
    assert str(refused.value) == (
        "the bundle has no setting for --steps 9 --size 768x512 --scheduler-setting quick; it has first (DDIMScheduler, 20 "
        "steps, 512x512, guidance 4.5); quick (DDIMScheduler, 8 steps, 512x512, guidance 4.5); add one with `tmpdiff-export "
        "calibrate BUNDLE --prompts FILE --steps 9 --size 768x512 --scheduler quick`"
    )


def add_wide(folder: Path) -> None:
    """Gives a bundle a second setting, of wider pictures, whose steps are those of its first."""

    def change(data: Json) -> None:
        (first,) = data["settings"]
        path = folder / "settings/wide/sampler.json"
        path.parent.mkdir()
        shutil.copyfile(folder / first["sampler"]["path"], path)
        channels, rows, columns = first["latents_shape"]
        wide = {"name": "wide", "width": 2 * first["width"], "latents_shape": [channels, rows, 2 * columns]}
        sampler = {**first["sampler"], "path": path.relative_to(folder).as_posix()}
        data["settings"].append({**first, **wide, "sampler": sampler})

    rewrite_manifest(folder, change)


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle with a second setting, "wide"."""
    folder = linked_copy(small_bundle, tmp_path / "bundle")
    add_wide(folder)
    return folder


def test_a_setting_more_leaves_the_bundle_id_and_what_is_bound_to_it(bundle: Path, small_bundle: Path) -> None:
    before, after = Bundle.open(small_bundle), Bundle.open(bundle)
    assert after.manifest.bundle_id == before.manifest.bundle_id
    assert after.manifest.settings[:1] == before.manifest.settings
    assert after.setting() == before.setting()
    assert after.schedule(after.setting()) == before.schedule(before.setting())
    assert after.verify() == before.verify() + 1, "a sampler table more"


def test_settings_share_the_loaded_engines(bundle: Path) -> None:
    with DenoiseRuntime.load(bundle, threads=1) as square:
        wide = square.at(WIDE)
        assert wide.setting.name == "wide"
        assert wide.denoiser("int8") is square.denoiser("int8")
        assert wide.noise([1]).shape == (1, 4, 16, 32)
        schedule = wide.schedule("uniform:int8")
        pictures = wide.generate([PROMPT], [1], schedule)
        assert pictures.shape == (1, 64, 128, 3)
        assert square.generate([PROMPT], [1], square.schedule()).shape == (1, 64, 64, 3)
    with DenoiseRuntime.load(bundle, setting=WIDE, threads=1) as alone:
        np.testing.assert_array_equal(alone.generate([PROMPT], [1], schedule), pictures)
    with DenoiseRuntime.load(bundle) as square, pytest.raises(BundleError, match="has no setting for --steps 99"):
        square.at(SettingChoice(steps=99))


def test_a_schedule_runs_in_its_own_setting_only(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    first, wide = opened.manifest.settings
    assert opened.schedule_path(wide) == bundle / "settings/wide" / SCHEDULE_NAME
    with pytest.raises(
        BundleError, match=r"has no schedule for its setting wide yet.*--scheduler-setting wide`, or pass"
    ):
        opened.schedule(wide)
    with pytest.raises(ScheduleError, match=f"schedule was made for setting {first.name}, the one that runs is wide"):
        opened.schedule(wide, schedule_path(bundle))
    with DenoiseRuntime.load(bundle, setting=WIDE) as runtime:
        noise = runtime.noise([1])
        with pytest.raises(ScheduleError, match="was made for setting"):
            runtime.denoise(runtime.encode([PROMPT]), opened.schedule(first), noise)
    shutil.copyfile(schedule_path(bundle), opened.schedule_path(wide))
    with pytest.raises(ScheduleError, match="was made for setting"):
        opened.verify()
    Schedule.uniform(opened.manifest.bundle_id, wide, "int8").save(opened.schedule_path(wide))
    assert opened.schedule(wide).precisions == ("int8",) * wide.num_steps
    assert opened.verify() == len(opened.manifest.files()) + 2


def test_the_command_draws_in_the_setting_that_is_asked_for(
    bundle: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    assert main(arguments(bundle, out, "--size", "128x64", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["setting"] == "wide"
    assert Image.open(out).size == (128, 64)
    assert main(["run", str(bundle), "--prompt", PROMPT, "--seed", "1", "--out", str(out), "--size", "128x64"]) == 1
    assert_one_error_line(
        capsys.readouterr().err, "has no schedule for its setting wide yet; run `tmpdiff-export calibrate"
    )


def picked(**sizes: Any) -> Callable[[Json], None]:
    """The INT8 denoiser as two engines, one of them for the wide pictures; `sizes` are of the first setting's."""

    def change(data: Json) -> None:
        (int8,) = data["denoisers"]["int8"]
        (fp8,) = data["denoisers"]["fp8"]
        other = {**fp8, "recipe": "for wide ones", "for_size": [16, 32]}
        data["denoisers"]["int8"] = [{**int8, **sizes}, other]

    return change


def test_the_engine_for_the_size_and_text_length_of_the_setting_runs(bundle: Path) -> None:
    rewrite_manifest(bundle, picked(for_size=[16, 16], for_text=40))
    with DenoiseRuntime.load(bundle, threads=1) as square:
        wide = square.at(WIDE)
        found = {name: wide.generate([PROMPT], [1], schedule_of(wide, name)) for name in ("int8", "fp8")}
        np.testing.assert_array_equal(found["int8"], found["fp8"])
        assert square.denoiser("int8") is not wide.denoiser("int8")
        assert (square.generate([PROMPT], [1], schedule_of(square, "int8")) !=
                square.generate([PROMPT], [1], schedule_of(square, "fp8"))).any()  # fmt: skip
        names = list(square.manifest.engines())
    assert [name for name in names if "int8" in name] == [
        "denoiser int8 (64x64, 40 text tokens)",
        "denoiser int8 (128x64)",
    ]


def schedule_of(runtime: DenoiseRuntime, precision: str) -> Schedule:
    return runtime.schedule(f"uniform:{precision}")


@pytest.mark.parametrize(
    ("sizes", "listed"),
    [
        ({"for_size": [8, 8]}, "32x32; 128x64"),
        ({"for_size": [16, 16], "for_text": 39}, "64x64, 39 text tokens; 128x64"),
    ],
)
def test_where_no_engine_is_for_the_setting_it_is_one_line(
    bundle: Path, out: Path, sizes: Json, listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_manifest(bundle, picked(**sizes))
    assert main(arguments(bundle, out)) == 1
    assert_one_error_line(
        capsys.readouterr().err,
        f"no engine of int8 runs setting {Bundle.open(bundle).setting().name} (DPMSolverMultistepScheduler, 4 steps, 64x64, "
        f"guidance 4.5, 40 text tokens); there are engines for {listed}; build the bundle with that --size and --text-length",
    )
    assert main(arguments(bundle, out, "--scheduler-setting", "wide")) == 0


@pytest.fixture
def old(small_bundle: Path, tmp_path: Path) -> Path:
    """A bundle as releases with format 5 wrote it, calibrated: one setting, whose files lie in the bundle's folder."""
    folder = linked_copy(small_bundle, tmp_path / "old")
    data = manifest_data(folder)
    (setting,) = data.pop("settings")
    sampler = {**setting.pop("sampler"), "path": "sampler.json"}
    shutil.move(folder / "settings" / setting["name"] / "sampler.json", folder / "sampler.json")
    shutil.rmtree(folder / "settings")
    (folder / "scheduler.json").unlink()
    kept = ("scheduler", "num_inference_steps", "num_steps", "guidance_scale", "latents_shape", "height", "width")
    known = ("tokenizer", "max_tokens", "pad_token_id", "lowercase")
    engine = [key for key in data["vae_decoder"][0] if not key.startswith("for_")]
    old = {
        "version": 5,
        "created_with": "tmpdiff-export 0.1.0",
        "model": {
            key: data["model"][key] for key in ("pipeline_class", "denoiser_class", "denoiser_sha256", "parameters")
        },
        "sampling": {key: setting[key] for key in kept},
        "sampler": sampler,
        "text": {key: data["texts"][0][key] for key in known},
        "further_texts": [],
        **{name: {key: data[name][0][key] for key in engine} for name in ("text_encoder", "vae_decoder")},
        "denoisers": {name: {key: found[key] for key in engine} for name, (found,) in data["denoisers"].items()},
        "range_calibration": data["range_calibration"],
    }
    old["bundle_id"] = manifest_identity(old)
    replace(folder / MANIFEST_NAME, json.dumps(old).encode())
    precisions = ["fp16", "int8", "int8", "fp16"]
    schedule = {"version": 1, "bundle_id": old["bundle_id"], "precisions": precisions, "origin": "by hand"}
    write_document(folder / SCHEDULE_NAME, {**schedule, "predicted_error": None, "predicted_latency": None})
    return folder


def test_a_bundle_of_an_earlier_release_draws_what_it_drew(old: Path, small_bundle: Path, out: Path) -> None:
    assert main(["verify", str(old)]) == 0
    with DenoiseRuntime.load(old, threads=1) as before, DenoiseRuntime.load(small_bundle, threads=1) as now:
        assert (before.setting.name, before.setting.text_length) == ("default", None)
        assert before.schedule().setting is None
        assert schedule_path(old) == old / SCHEDULE_NAME
        expected = now.generate([PROMPT], [7], now.schedule())
        np.testing.assert_array_equal(before.generate([PROMPT], [7], before.schedule()), expected)
    for choice in ((), ("--steps", "4"), ("--scheduler-setting", "default")):
        command = ["run", str(old), "--prompt", PROMPT, "--seed", "7", "--out", str(out), *choice]
        assert main(command) == 0
