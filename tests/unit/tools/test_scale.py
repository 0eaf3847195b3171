"""The proof tool: the folders it writes, what it sees of a command, resuming, and its table."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.errors import TmpDiffError
from tmpdiff_export.weights.source import SourceWeights
from tools.scale import __main__ as scale
from tools.scale import phases, table
from tools.scale.folder import random_tensor, write_folder
from tools.scale.models import FULL, PIPELINES, SMALL
from tools.scale.phases import Setting, bundle_files, words_of
from tools.scale.watch import Attempt, Peaks, resident, stages_of, tree, watched

MEBIBYTE = 1 << 20


def setting(folder: Path, **changes: Any) -> Setting:
    """Of a small FLUX.1 on the CPU."""
    whole = Setting(
        name="flux", folder=folder, text=SMALL, vae=SMALL, tiny=True, device="cpu", backend="torch", precisions="fp16,fp8",
        fp8_attention="", compile="whole", steps=4, side=128, prompts=2, samples=1, rounds=3, build_options=(),
        compile_backend="eager", seconds_limit=None,
    )  # fmt: skip
    return replace(whole, **changes)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_a_folder_is_what_diffusers_would_save(name: str, tmp_path: Path) -> None:
    import diffusers

    pipeline = PIPELINES[name]
    components = pipeline.components(text=SMALL, vae=SMALL, tiny=True)
    told: list[tuple[str, int, int]] = []
    sizes = write_folder(tmp_path, pipeline, components, "cpu", lambda *words: told.append(words))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == pipeline.pipeline_class
    assert set(sizes) == set(components)
    assert {component for component, done, total in told if done == total} == set(components)
    denoiser = SourceWeights.open(tmp_path / pipeline.denoiser)
    assert denoiser.dtype == pipeline.bench.dtype
    kind = getattr(diffusers, pipeline.bench.denoiser_class)
    loaded = kind.from_pretrained(tmp_path / pipeline.denoiser, torch_dtype=torch.float32)
    inputs = replace(pipeline.bench, dtype=torch.float32).input_sets(loaded, torch.device("cpu"), tiny=True)[0]
    with torch.no_grad():
        output = loaded(**inputs, return_dict=False)[0]
    assert torch.isfinite(output).all()
    assert 0.1 < float(output.std()) < 100.0
    before = (tmp_path / pipeline.denoiser / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert write_folder(tmp_path, pipeline, components, "cpu", lambda *words: None) == sizes
    assert (tmp_path / pipeline.denoiser / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before


def test_the_published_denoisers_and_a_t5_xxl() -> None:
    found = {}
    for name, pipeline in PIPELINES.items():
        components = pipeline.components(text=FULL, vae=SMALL, tiny=False)
        assert components[pipeline.denoiser].config == pipeline.bench.config
        found[name] = components
    sizes = {}
    for name in ("flux", "pixart-1b"):
        import diffusers

        config = found[name]["transformer"].config
        with torch.device("meta"):
            module = getattr(diffusers, found[name]["transformer"].kind)(**config)
        sizes[name] = sum(item.numel() for item in module.parameters())
    assert sizes["flux"] == pytest.approx(11.9e9, rel=0.01)
    assert sizes["pixart-1b"] == pytest.approx(1.0e9, rel=0.02)
    assert found["flux"]["text_encoder_2"].config["num_layers"] == 24


def test_weights_keep_activations_of_unit_size() -> None:
    generator = torch.Generator().manual_seed(0)
    linear, norm = torch.nn.Linear(400, 300), torch.nn.LayerNorm(300)
    weight = random_tensor(linear, "weight", linear.weight.detach().to(torch.bfloat16), generator)
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().std()) == pytest.approx(400**-0.5, rel=0.02)
    assert torch.equal(random_tensor(norm, "weight", norm.weight.detach(), generator), torch.ones(300))
    assert float(random_tensor(norm, "bias", norm.bias.detach(), generator).std()) < 0.03
    positions = random_tensor(norm, "ids", torch.empty(1, 5, dtype=torch.int64, device="meta"), generator)
    assert positions.tolist() == [[0, 1, 2, 3, 4]]


def test_a_command_is_watched_with_its_children() -> None:
    child = f"import time; count = {150 * MEBIBYTE}; data = b'x' * count; time.sleep(1.0)"
    words = f"import subprocess, sys; print('{{}}'); sys.exit(subprocess.call([sys.executable, '-c', {child!r}]))"
    noted: list[Attempt] = []
    attempt = watched([sys.executable, "-c", words], noted.append)
    assert attempt.status == 0
    assert attempt.output == "{}\n"
    assert attempt.seconds > 1.0
    assert attempt.peaks.anonymous > 150 * MEBIBYTE
    assert attempt.peaks.total >= attempt.peaks.anonymous
    assert 150 * MEBIBYTE < attempt.peaks.one_process < 250 * MEBIBYTE
    assert attempt.peaks.device is None
    assert noted[-1] is attempt


def test_a_command_that_takes_too_long_is_ended_and_says_what_it_said() -> None:
    words = (
        "import sys, time; print('7 s: find ranges, 1 of 2, 3 s in it', file=sys.stderr, flush=True); time.sleep(60)"
    )
    begun = time.perf_counter()
    attempt = watched([sys.executable, "-c", words], lambda _: None, seconds_limit=1.0)
    assert time.perf_counter() - begun < 20.0
    assert attempt.status == -15
    assert list(attempt.stages) == ["find ranges"]
    assert attempt.data()["status"] == -15


def test_seconds_by_stage_come_from_lines_of_progress() -> None:
    lines = [
        "estimate: host memory 2.2 GB",
        "30 s: run pipeline, 1 of 8, 28 s in it, peak memory 1.0 GB",
        "60 s: run pipeline, 5 of 8, 58 s in it, peak memory 1.0 GB",
        "90 s: quantize fp8-smooth, 3 of 9, 10 s in it, peak memory 1.2 GB",
    ]
    assert stages_of(lines, 100.0) == {"run pipeline": 78.0, "quantize fp8-smooth": 20.0}
    assert stages_of(lines[:1], 100.0) == {}


def test_a_tree_is_found_in_proc(tmp_path: Path) -> None:
    for process, parent in ((10, 1), (11, 10), (12, 11), (20, 1)):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "stat").write_text(f"{process} (a ) b) S {parent} 1 1\n")
        (tmp_path / str(process) / "status").write_text("Name:\tx\nVmHWM:\t  9 kB\nRssAnon:\t 4 kB\nRssFile:\t 2 kB\n")
    (tmp_path / "self").mkdir()
    assert sorted(tree(10, tmp_path)) == [10, 11, 12]
    assert resident(10, tmp_path) == {"VmHWM": 9 << 10, "RssAnon": 4 << 10, "RssFile": 2 << 10}
    assert resident(99, tmp_path) == {}
    peaks = Peaks()
    peaks.look(10, tmp_path)
    assert (peaks.total, peaks.anonymous, peaks.file, peaks.one_process) == (18 << 10, 12 << 10, 6 << 10, 9 << 10)


def test_a_phase_that_is_done_is_skipped_and_one_that_was_not_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    failing = ["bench"]

    def words(phase: str, asked: Setting) -> list[str]:
        ran.append(phase)
        return [sys.executable, "-c", f"import sys; print('{{}}'); sys.exit({int(phase in failing)})"]

    monkeypatch.setattr(phases, "words_of", words)
    out = tmp_path / "out.json"
    asked = setting(tmp_path / "out")
    chosen = ["calibrate", "bench", "peer"]
    assert not scale.prove(asked, chosen, out)
    assert ran == chosen
    found = json.loads(out.read_text())["phases"]
    assert [found[phase]["status"] for phase in chosen] == ["done", "failed", "done"]
    failing.clear()
    assert scale.prove(asked, chosen, out)
    assert ran == [*chosen, "bench"]
    found = json.loads(out.read_text())["phases"]
    assert [attempt["status"] for attempt in found["bench"]["attempts"]] == [1, 0]
    assert found["bench"]["seconds"] >= sum(attempt["seconds"] for attempt in found["bench"]["attempts"]) * 0.999
    with pytest.raises(TmpDiffError, match="holds the result of other options"):
        scale.prove(replace(asked, steps=5), ["bench"], out)


def test_without_a_bundle_nothing_else_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('the disk is full')"]
    monkeypatch.setattr(phases, "words_of", lambda *_: failing)
    assert not scale.prove(setting(tmp_path), ["build", "run"], tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["phases"]
    assert list(found) == ["build"]
    assert found["build"]["attempts"][0]["errors"] == ["the disk is full"]


def test_every_pipeline_is_one_that_the_product_builds() -> None:
    from tmpdiff_export.pipelines.families.table import FAMILIES

    assert {pipeline.pipeline_class for pipeline in PIPELINES.values()} <= set(FAMILIES)


def test_on_a_cpu_there_is_no_limit_to_run_under(tmp_path: Path) -> None:
    assert phases.run_phase("run-limited", setting(tmp_path), {}, lambda _: None)["status"] == "none"


def test_commands_are_those_of_a_user(tmp_path: Path) -> None:
    build = words_of(
        "build", setting(tmp_path, fp8_attention="fp8", compile="blocks", build_options=("--workers", "2"))
    )
    assert build[3] == "build"
    assert build[-2:] == ["--workers", "2"]
    for option, value in (
        ("--compile", "blocks"),
        ("--fp8-attention", "fp8"),
        ("--batch", "1:1:1"),
        ("--size", "128x128"),
    ):
        assert build[build.index(option) + 1] == value
    assert "--batch" not in words_of("build", setting(tmp_path, backend="onnxruntime"))
    assert "--resident-engines" not in words_of("bench", setting(tmp_path))
    assert "--resident-engines" in words_of("bench", setting(tmp_path, device="cuda"))
    with pytest.raises(TmpDiffError, match="phase is 'fly', expected one of make, build"):
        words_of("fly", setting(tmp_path))


def test_a_file_under_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "a").write_bytes(b"12345")
    (tmp_path / "b").hardlink_to(tmp_path / "engines" / "a")
    assert sum(bundle_files(tmp_path).values()) == 5


def test_a_table_of_a_result() -> None:
    peaks = {"total": 30 * 10**9, "anonymous": 5 * 10**9, "file": 1, "one_process": 1, "device": 20 * 10**9}
    attempts = [{"seconds": 100.0, "status": 0, "peak_bytes": peaks, "stages_s": {"find ranges": 60.0}}]
    engines = {"fp16": {"sqnr_db": 40.0, "sqnr_floor_db": 30.0}}
    loop = {"precisions": "fp16/fp8", "resident_engines": 1, "swaps": 7, "over_sum_percent": 0.3, "swap_ms": 0.1}
    rows = [{"name": "fp16", "median_ms": 80.0}, {"name": "fp8", "median_ms": 40.0}]
    result = {
        "setting": {"title": "FLUX.1-dev", "precisions": "fp16,fp8", "backend": "torch", "text": "small"},
        "machine": {"gpu": None, "libraries": {"torch": "2", "diffusers": "0"}, "date": "2026-01-01"},
        "phases": {
            "make": {"status": "done", "weights_bytes": {"transformer": 24 * 10**9}},
            "build": {
                "status": "done", "seconds": 100.0, "attempts": attempts, "parameters": 12 * 10**9, "engines": engines,
                "files": {"a": 36 * 10**9}, "separate_bytes": 39 * 10**9,
            },
            "bench": {
                "status": "done", "seconds": 9.0, "attempts": attempts, "result": {"rows": rows, "loops": [loop]},
            },
            "peer": {"status": "done", "result": {"median_ms": 88.0}},
            "run": {"status": "failed"},
        },
    }  # fmt: skip
    shown = table.table(result)
    assert "| host peak over the 16-bit weights | 1.25 (anonymous 0.21) |" in shown
    assert "| step, ms | fp16 80.0, fp8 40.0 |" in shown
    assert "1.0030 (0.10 ms a swap)" in shown
    assert "| compiled 16-bit diffusers module, ms; times as fast are | 88.0; fp16 1.10, fp8 2.20 |" in shown
    assert "| run | failed: see the file |" in shown
    assert "36.00; 39.00" in shown


@pytest.mark.long  # a build
def test_a_small_pipeline_goes_through_every_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    words = ["pixart", "--tiny", "--device", "cpu", "--backend", "onnxruntime", "--precisions", "fp16,int8"]
    options = ["--side", "128", "--steps", "4", "--rounds", "3", "--compile-backend", "eager", "--out", str(out)]
    assert scale.main([*words, *options]) == 0
    found = json.loads(out.read_text())
    assert {name: phase["status"] for name, phase in found["phases"].items()} == {
        **dict.fromkeys(phases.PHASES, "done"),
        "run-limited": "none",
    }
    build = found["phases"]["build"]
    assert build["attempts"][0]["stages_s"]
    assert build["attempts"][0]["peak_bytes"]["total"] > 100 * MEBIBYTE
    assert sum(build["files"].values()) <= build["separate_bytes"] + 10**6
    assert str(tmp_path) not in out.read_text()
    assert table.main([str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| step, ms | fp16 " in shown
    assert "loop over the sum of its steps, fp16/int8, 3 swaps" in shown
