"""Settings that `calibrate` adds to a bundle: what they are, what is refused, and that none is ever lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import EXPORT, assert_refused, called
from helpers.demo_build import linked_copy
from helpers.paths import ROOT
from helpers.runtime_command import rewrite_manifest
from helpers.tiny_pipeline import PROMPTS, UNSEEN, tiny_options
from helpers.whole_pipeline import whole_pipeline

from calibration.document import Sensitivity
from calibration.scores import transfer
from engines.bundle import Bundle
from engines.errors import BuildError, BundleError, TmpDiffError
from engines.files import sha256_bytes
from engines.runtime import DenoiseRuntime
from engines.setting_choice import SettingChoice
from engines.setting_entry import SettingEntry
from tmpdiff_export.calibrate import settings as bundle_settings
from tmpdiff_export.calibrate.settings import Wanted, open_setting

OWN = "4-64x64-g4.5-t40"
UNIPC = "UniPCMultistepScheduler"


@pytest.fixture
def bundle(built: Callable[[Any], Path], tmp_path: Path) -> Path:
    """FP16 and INT8 of the tiny pipeline for ONNX Runtime, with one setting of 4 steps at 64 x 64."""
    return linked_copy(built(tiny_options()), tmp_path / "bundle")


def names(folder: Path) -> list[str]:
    return [entry.name for entry in Bundle.open(folder).manifest.settings]


def test_what_is_left_open_is_that_of_the_first_setting(bundle: Path) -> None:
    before = Bundle.open(bundle).manifest
    assert open_setting(bundle, Wanted()) == (before.settings[0], False)
    added = [
        open_setting(bundle, Wanted(SettingChoice(steps=6))),
        open_setting(bundle, Wanted(SettingChoice(size=(64, 96)))),
        open_setting(bundle, Wanted(guidance_scale=3.0)),
        open_setting(bundle, Wanted(SettingChoice(6, (96, 64)), guidance_scale=1.0, scheduler=UNIPC)),
    ]
    assert [entry.name for entry, _ in added] == [
        "6-64x64-g4.5-t40", "4-96x64-g4.5-t40", "4-64x64-g3-t40", f"6-64x96-{UNIPC}-g1-t40",
    ]  # fmt: skip
    assert all(new for _, new in added)
    after = Bundle.open(bundle).manifest
    assert after.settings == (*before.settings, *(entry for entry, _ in added))
    assert after.bundle_id == before.bundle_id
    assert Bundle.open(bundle).verify() == len(after.files())
    for entry, _ in added:  # each is found again
        again = Wanted(SettingChoice(named=entry.name), entry.guidance_scale, entry.text_length)
        assert open_setting(bundle, again) == (entry, False)
    assert open_setting(bundle, Wanted(SettingChoice(6, (96, 64)), 1.0, scheduler=UNIPC)) == (added[-1][0], False)


def test_a_setting_begins_with_the_one_that_is_named(bundle: Path) -> None:
    unipc, _ = open_setting(bundle, Wanted(SettingChoice(steps=5), guidance_scale=2.0, scheduler=UNIPC))
    for named in (unipc.name, UNIPC):
        longer, _ = open_setting(bundle, Wanted(SettingChoice(steps=7, named=named)))
        assert longer.name == f"7-64x64-{UNIPC}-g2-t40"
    assert open_setting(bundle, Wanted(SettingChoice(steps=7, named=OWN)))[0].name == "7-64x64-g4.5-t40"


def diffusers_latents(folder: Path, scheduler: Any, entry: SettingEntry) -> np.ndarray:
    pipe = whole_pipeline(folder).pipe
    pipe.scheduler = scheduler(pipe.scheduler.config)
    with torch.inference_mode():
        found: np.ndarray = pipe(
            PROMPTS[0], num_inference_steps=entry.num_inference_steps, height=entry.height, width=entry.width,
            guidance_scale=entry.guidance_scale, max_sequence_length=entry.text_length, use_resolution_binning=False,
            clean_caption=False, generator=torch.Generator().manual_seed(7), output_type="latent",
        ).images.numpy()  # fmt: skip
    return found


def test_settings_with_other_schedulers_draw_what_the_pipeline_draws_with_them(
    bundle: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    config = {"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0", "solver_order": 1}
    config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({**config, "flow_shift": 3.0}))
    made = {
        UNIPC: lambda own: UniPCMultistepScheduler.from_config(own),
        str(file): lambda own: DPMSolverMultistepScheduler.from_config(json.loads(file.read_text())),
    }
    for asked, scheduler in made.items():
        entry, new = open_setting(bundle, Wanted(SettingChoice(steps=6, size=(64, 96)), 3.0, scheduler=asked))
        assert new
        with DenoiseRuntime.load(bundle, setting=SettingChoice(named=entry.name), threads=1) as runtime:
            assert runtime.table.num_inference_steps == 6
            ours = runtime.denoise(runtime.encode(PROMPTS[:1]), runtime.schedule("uniform:fp16"), runtime.noise([7]))
        theirs = diffusers_latents(tiny_pipeline, scheduler, entry)
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs), asked
    assert entry.name.startswith("6-96x64-DPMSolverMultistepScheduler.")
    assert open_setting(bundle, Wanted(SettingChoice(6, (64, 96)), 3.0, scheduler=str(file))) == (entry, False)
    with pytest.raises(
        BundleError, match=r"a scheduler that a file configured.*pass the file again with --scheduler FILE"
    ):
        open_setting(bundle, Wanted(SettingChoice(steps=7, named=entry.name)))
    file.write_text(json.dumps({**config, "flow_shift": 2.0}))
    other, new = open_setting(bundle, Wanted(SettingChoice(6, (64, 96)), 3.0, scheduler=str(file)))
    assert new
    assert other.name != entry.name, "another configuration is another setting"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(SettingChoice(size=(64, 60))), "width 60 does not fit this pipeline; give a positive multiple of 8, such as 64"),
        (Wanted(SettingChoice(size=(8, 64))), None),
        (Wanted(scheduler="UNet2DConditionModel"), "scheduler 'UNet2DConditionModel' is no scheduler of diffusers"),
        (Wanted(scheduler="../x"), "scheduler '../x' is no scheduler of diffusers"),
        (Wanted(scheduler="none.json"), "scheduler configuration none.json does not exist"),
        (Wanted(scheduler="DDPMScheduler"), "DDPMScheduler"),
        (Wanted(SettingChoice(named="other")), "the bundle has no setting for --scheduler-setting other; it has 4-64x64"),
        (Wanted(text_length=20), "needs an engine of the text encoder for its size and text length; the bundle has engines for "
         "40 text tokens: pick one of these, or build the bundle with that --size and --text-length"),
    ],
)  # fmt: skip
def test_what_the_pipeline_or_the_engines_cannot_have_is_refused_and_leaves_nothing(
    wanted: Wanted, says: str | None, bundle: Path
) -> None:
    if says is None:
        assert open_setting(bundle, wanted)[1]
        return
    before = sorted(bundle.rglob("*"))
    with pytest.raises(TmpDiffError) as refused:
        open_setting(bundle, wanted)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert names(bundle) == [OWN]
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "holds a JSON list, expected an object"),
        ("{}", "is no scheduler_config.json: it names no _class_name"),
        ("nonsense", "is not valid JSON"),
        ('{"_class_name": 7}', "is no scheduler_config.json: it names no _class_name"),
        ('{"_class_name": "PNDMPipeline"}', "is no scheduler of diffusers"),
    ],
)
def test_a_file_that_is_no_scheduler_configuration_is_refused(
    text: str, says: str, bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text(text)
    with pytest.raises(BuildError, match=says):
        open_setting(bundle, Wanted(scheduler=str(file)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"_class_name": "DDIMScheduler", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not valid JSON"),
        ('{"_class_name": "DDIMScheduler", "beta_start": NaN}', "is not valid JSON: NaN is not allowed"),
        ('{"_class_name": "DDIMScheduler", "trained_betas": [Infinity]}', "cannot be used: Out of range float values"),
        (None, "is not a regular file"),
    ],
)
def test_a_scheduler_configuration_that_would_hang_or_hide_is_refused(
    text: str | None, says: str, bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scheduler_config.json"
    if text is None:
        os.mkfifo(file)  # reading it would wait for ever
    else:
        file.write_text(text)
    with pytest.raises(BuildError, match=rf"scheduler configuration .*{says}"):
        open_setting(bundle, Wanted(scheduler=str(file)))
    assert names(bundle) == [OWN]


def test_engines_of_fixed_shapes_take_other_steps_but_no_other_size(bundle: Path) -> None:
    def fix(data: dict[str, Any]) -> None:
        for entries in (data["vae_decoder"], *data["denoisers"].values()):
            entries[0].update(for_size=[16, 16])

    rewrite_manifest(bundle, fix)
    assert open_setting(bundle, Wanted(SettingChoice(steps=6)))[1]
    before = sorted(bundle.rglob("*"))
    with pytest.raises(
        BundleError,
        match=r"setting 4-96x64-g4.5-t40 needs an engine of the VAE decoder for its size .*engines for 64x64: pick",
    ):
        open_setting(bundle, Wanted(SettingChoice(size=(64, 96))))
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize("without", ["scheduler", "pixels_per_latent"])
def test_a_bundle_of_an_earlier_release_keeps_its_one_setting(without: str, bundle: Path) -> None:
    rewrite_manifest(bundle, lambda data: (data if without == "scheduler" else data["model"]).pop(without))
    assert open_setting(bundle, Wanted(SettingChoice(steps=4)))[0].name == OWN
    with pytest.raises(
        BundleError, match=r"whose bundles have one setting \(DPM.*, 4 steps, 64x64, .*\); build it again"
    ):
        open_setting(bundle, Wanted(SettingChoice(steps=6)))


ADD = """
import sys
from pathlib import Path
from engines.setting_choice import SettingChoice
from tmpdiff_export.calibrate.settings import Wanted, open_setting
print("ready", flush=True)
sys.stdin.readline()
for steps in map(int, sys.argv[2:]):
    open_setting(Path(sys.argv[1]), Wanted(SettingChoice(steps=steps)))
"""


def test_processes_that_add_settings_at_once_lose_none(bundle: Path) -> None:
    asked = ([*range(5, 25)], [*range(15, 35)])  # some of them both ask for
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(bundle), *map(str, steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        )
        for steps in asked
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        with ThreadPoolExecutor() as together:
            list(together.map(lambda process: process.communicate(b"\n"), processes))
        assert [process.returncode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(names(bundle)) == sorted([OWN, *(f"{steps}-64x64-g4.5-t40" for steps in range(5, 35))])
    assert Bundle.open(bundle).verify() == len(Bundle.open(bundle).manifest.files())


@pytest.mark.parametrize("at", ["manifest_text", "atomic_write_text"])
def test_a_crash_before_the_manifest_is_written_leaves_the_bundle_as_it_was(
    at: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundle_settings, at, crash)
        with pytest.raises(KeyboardInterrupt):
            open_setting(bundle, Wanted(SettingChoice(steps=6)))
    left = bundle / "settings/6-64x64-g4.5-t40/sampler.json"
    assert left.exists()
    assert names(bundle) == [OWN]
    assert Bundle.open(bundle).verify() > 0
    left.write_text("{")  # or half of it
    entry, new = open_setting(bundle, Wanted(SettingChoice(steps=6)))
    assert new
    assert sha256_bytes(left.read_bytes()) == entry.sampler.sha256
    with DenoiseRuntime.load(bundle, setting=SettingChoice(steps=6)) as runtime:
        assert runtime.num_steps == 6


@pytest.fixture(scope="module")
def swept(
    made_once: Callable[[str, Callable[[Path], object]], Path], built: Callable[[Any], Path], planted_latencies: None
) -> Path:
    """A bundle whose setting of 8 steps is calibrated by a full sweep, and a prompt file beside it; do not write."""

    def make(folder: Path) -> None:
        (folder / "prompts.txt").write_text("\n".join(["[calibration]", *PROMPTS, "[validation]", *UNSEEN]))
        bundle = linked_copy(built(tiny_options(num_steps=8)), folder / "bundle")
        done = calibrate(bundle, "--method", "sweep")
        assert done.returncode == 0, done.stderr

    return made_once("swept", make) / "bundle"


def calibrate(bundle: Path, *words: object) -> Any:
    given = ("--prompts", bundle.parent / "prompts.txt", "--high-steps", 3, "--samples", 2, "--threads", 1)
    return called(EXPORT, "calibrate", bundle, *given, *words)


@pytest.fixture
def own(swept: Path, tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_bytes((swept.parent / "prompts.txt").read_bytes())
    return linked_copy(swept, tmp_path / "bundle")


@pytest.mark.usefixtures("planted_latencies")
def test_a_setting_more_takes_the_scores_of_another_one_and_says_so(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_SCATTER", 1e9)
    monkeypatch.setattr(transfer.Comparison, "holds", True)
    done = calibrate(own, "--steps", 11)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "setting 11-64x64-g4.5-t40 was added to the bundle: DPMSolverMultistepScheduler, 11 steps, 64x64" in said
    assert "scores were carried over from setting 8-64x64-g4.5-t40, which the checks here confirm" in said
    bundle = Bundle.open(own)
    first, longer = bundle.manifest.settings
    found = Sensitivity.load(bundle.sensitivity_path(longer))
    assert (found.method, found.num_steps) == ("transfer", 11)
    assert found.transfer is not None
    assert (found.transfer.setting, found.transfer.num_steps) == (first.name, 8)
    assert found.settings is not None
    assert (found.settings.setting, found.settings.bundle_id) == (longer.name, bundle.manifest.bundle_id)
    assert bundle.schedule(longer).setting == longer.name
    assert bundle.schedule(first).setting == first.name
    assert bundle.verify() == len(bundle.manifest.files()) + 2
    shown = called(EXPORT, "inspect", own)
    assert shown.returncode == 0, shown.stderr
    for entry in (first, longer):
        assert f"setting {entry.name}: {entry.described}" in shown.stdout
        assert f"setting {entry.name}:\n" in shown.stdout
    again = calibrate(own, "--steps", 11)
    assert again.returncode == 0, again.stderr
    assert "was added" not in again.stdout + again.stderr
    assert len(Bundle.open(own).manifest.settings) == 2


@pytest.mark.usefixtures("planted_latencies")
def test_scores_that_the_check_refuses_are_searched_for(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.Comparison, "holds", False)
    done = calibrate(own, "--steps", 11)
    assert done.returncode == 0, done.stderr
    assert "scores of setting 8-64x64-g4.5-t40 are not carried over, but searched for: " in done.stdout + done.stderr
    bundle = Bundle.open(own)
    found = Sensitivity.load(bundle.sensitivity_path(bundle.setting(SettingChoice(steps=11))))
    assert (found.method, found.transfer) == ("bisection", None)


@pytest.mark.usefixtures("planted_latencies")
def test_a_setting_of_another_size_that_nobody_calibrated_runs_at_one_precision_or_says_why_not(
    own: Path, tmp_path: Path
) -> None:
    open_setting(own, Wanted(SettingChoice(size=(64, 96))))
    run = ("run", own, "--prompt", PROMPTS[0], "--seed", 1, "--out", tmp_path / "picture.png", "--size", "96x64")
    assert_refused(
        called(EXPORT, *run),
        "has no schedule for its setting 8-96x64-g4.5-t40 yet; run `tmpdiff-export calibrate "
        f"{own} --prompts FILE --scheduler-setting 8-96x64-g4.5-t40`, or pass --schedule uniform:fp16",
    )
    assert called(EXPORT, *run, "--schedule", "uniform:int8").returncode == 0
    for words in (("report", own, "--out", tmp_path / "report.html"), ("schedule", own)):
        assert_refused(called(EXPORT, *words, "--size", "96x64"), "--scheduler-setting 8-96x64-g4.5-t40`")
    done = calibrate(own, "--scheduler-setting", "8-96x64-g4.5-t40")  # as it was said
    assert done.returncode == 0, done.stderr
    assert called(EXPORT, *run).returncode == 0
    report = called(EXPORT, "report", own, "--out", tmp_path / "report.html", "--size", "96x64")
    assert report.returncode == 0, report.stderr
    assert "8-96x64-g4.5-t40: DPMSolverMultistepScheduler, 8 steps, 96x64" in (tmp_path / "report.html").read_text()
