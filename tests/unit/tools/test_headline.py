"""The study of whole loops: reuse at fixed steps, goals, and the command from end to end without cache-dit."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_pipelines import save_small_pipeline

from tools.headline.__main__ import main
from tools.headline.caching import spread
from tools.headline.goals import at_speedup, findings, frontier
from tools.headline.methods import fixed_reuse

STEPS, FEWER = 6, 4


def row(group: str, speedup: float, ssim: float) -> dict[str, Any]:
    return {"group": group, "speedup": speedup, "ssim": {"mean": ssim}}


def test_rules_reuse_from_a_tenth_of_the_loop_on_and_never_without_enough_computed() -> None:
    rules = fixed_reuse(20, "fp8", (0, 1))
    assert rules["one in 2 reused, order 0, fp8"] == ("fp8", "fp8", *("reuse0", "fp8") * 9)
    assert rules["one in 4 computed, order 1, fp8"] == (
        "fp8",
        "fp8",
        *(*("reuse1",) * 3, "fp8") * 4,
        "reuse1",
        "reuse1",
    )
    assert len(rules) == 10


def test_what_is_both_slower_and_worse_is_not_on_the_frontier() -> None:
    rows = [row("a", 2.0, 0.9), row("b", 1.5, 0.8), row("b", 3.0, 0.5), row("b", 1.2, 0.95)]
    assert frontier(rows) == [(1.0, 1.0), (1.2, 0.95), (2.0, 0.9), (3.0, 0.5)]
    assert at_speedup(rows, 2.5) == pytest.approx(0.7)
    assert at_speedup(rows, 3.1) is None


@pytest.mark.parametrize(("cached", "met"), [(0.95, True), (0.99, False)])
def test_goals_compare_schedules_with_the_best_of_cache_dit_at_every_speed_both_reach(cached: float, met: bool) -> None:
    rows = [row("baseline", 1.0, 1.0), row("schedule", 2.6, 0.96), row("cache-dit A", 2.0, 0.5)]
    goals = findings([*rows, row("cache-dit B", 2.6, cached)])["goals"]
    assert goals["ssim_at_2.5_met"]
    assert set(goals["above_cache_dit"]) == {"1.5", "1.75", "2.0", "2.25", "2.5"}
    assert goals["above_cache_dit_met"] is met


def test_settings_are_spread_over_what_they_compute() -> None:
    assert spread([4, 5], 4) == [4, 5]
    assert spread([4, 5, 6, 10, 20], 3) == [4, 10, 20]


# The command


class FakeCacheDit(types.ModuleType):
    """cache-dit's calls as `tools.headline` makes them, around a denoiser that it leaves as it is."""

    def __init__(self) -> None:
        super().__init__("cache_dit")
        self.refreshed = 0
        self.threshold = 0.0
        self.ForwardPattern = types.SimpleNamespace(Pattern_1="pattern")
        self.DBCacheConfig = lambda **given: given
        self.TaylorSeerCalibratorConfig = lambda **given: given
        self.BlockAdapter = lambda **given: given

    def enable_cache(
        self, adapter: dict[str, Any], cache_config: dict[str, Any], calibrator_config: Any = None
    ) -> None:
        assert len(adapter["blocks"]) == 2
        assert cache_config["Fn_compute_blocks"] == 1
        self.threshold = cache_config.get("residual_diff_threshold", 0.0)

    def refresh_context(self, module: Any, **given: Any) -> None:
        self.refreshed += 1

    def disable_cache(self, module: Any) -> None:
        self.threshold = 0.0

    def summary(self, module: Any, logging: bool) -> list[Any]:
        return [types.SimpleNamespace(cached_steps=list(range(min(STEPS - 1, int(10 * self.threshold)))))]

    def steps_mask(self, total_steps: int, mask_policy: str) -> list[int]:
        return [1] * total_steps


@contextmanager
def faked() -> Iterator[FakeCacheDit]:
    fake = FakeCacheDit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cache_dit", fake)
        yield fake


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that `measure` was run in, and its result."""
    from engines.precision import Precision
    from engines.runtime import DenoiseRuntime
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions
    from tools.headline.methods import chosen

    folder = tmp_path_factory.mktemp("headline")
    prompts, unseen = ["a red circle", "a blue square"], ["a green ring", "a white triangle", "a cyan diamond"]
    save_small_pipeline("sd3", folder / "pipeline")
    precisions = (Precision.FP16, Precision.INT8)
    options = BuildOptions(precisions=precisions, prompts=prompts, steps=(STEPS, FEWER), backend="onnxruntime")
    build(folder / "pipeline", folder / "bundle", options)
    (folder / "prompts.txt").write_text("\n".join(["[calibration]", *prompts, "[validation]", *unseen]) + "\n")
    with DenoiseRuntime.load(folder / "bundle", threads=1) as runtime:
        choices = ("fp16", "int8", "reuse1", "int8", "reuse0", "fp16")
        chosen(runtime, choices, "by hand").save(folder / "latency 0.5.json")
    with faked() as fake:
        words = ["measure", folder / "bundle", "--pipeline", folder / "pipeline", "--prompts", folder / "prompts.txt"]
        words += ["--steps", STEPS, "--fewer", FEWER, "--schedules", folder / "latency 0.5.json", "--samples", 3]
        words += ["--batch", 2, "--points", 2, "--workers", 1, "--device", "cpu", "--compile-backend", "eager"]
        assert main([str(word) for word in [*words, "--threads", 1, "--out", folder / "result.json"]]) == 0
        assert fake.refreshed > 0
    return folder, json.loads((folder / "result.json").read_text())


@pytest.mark.long
def test_every_kind_of_method_is_measured_against_its_own_reference(measured: tuple[Path, dict[str, Any]]) -> None:
    rows = {found["name"]: found for found in measured[1]["rows"]}
    assert measured[1]["setting"]["prompts"] == 2  # the third fills no batch
    assert not measured[1]["failed"]
    for name in ("16-bit compiled", "uniform fp16"):
        assert rows[name]["ssim"]["mean"] == 1
        assert rows[name]["typical_error"] == 0
    assert rows["latency 0.5"]["computed"] == 4
    assert rows["latency 0.5"]["choices"] == ["fp16", "int8", "reuse1", "int8", "reuse0", "fp16"]
    assert 0 < rows["latency 0.5"]["typical_error"] < 1
    assert {f"{FEWER} steps, fp16", f"{FEWER} steps, int8", f"{FEWER} steps, 16-bit compiled"} <= set(rows)
    groups = {found["group"] for found in rows.values()}
    assert {"cache-dit DBCache F1B0", "cache-dit DBCache F1B0, TaylorSeer 2"} <= groups
    assert "cache-dit DBCache F4B0" not in groups  # the denoiser has two blocks


@pytest.mark.long
def test_the_compiled_denoiser_of_diffusers_draws_what_the_bundle_draws(measured: tuple[Path, dict[str, Any]]) -> None:
    import torch

    from engines.runtime import DenoiseRuntime
    from tools.headline.measure import make_batches
    from tools.headline.peer import Peer, peer_method

    folder = measured[0]
    with DenoiseRuntime.load(folder / "bundle", threads=1) as runtime:
        (batch,) = make_batches(runtime, ["a red circle", "a blue square"], 2, 7, print)
        ours = runtime.denoise(batch.conditioning, runtime.schedule("uniform:fp16"), batch.noise)
        peer = Peer(folder / "pipeline", torch.device("cpu"), fp8=False, compile_backend="eager")
        with peer_method(peer, runtime, "peer", "peer").open() as denoise:
            np.testing.assert_allclose(denoise(batch), ours, rtol=0, atol=2e-3 * np.abs(ours).max())


@pytest.mark.long
def test_results_are_drawn_and_their_schedules_timed_on_other_bundles(measured: tuple[Path, dict[str, Any]]) -> None:
    folder = measured[0]
    assert main(["figure", str(folder / "result.json"), "--out", str(folder / "figure.png")]) == 0
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    words = ["loops", folder / "bundle", "--like", folder / "result.json", "--steps", STEPS, "--repeats", 1]
    assert main([str(word) for word in [*words, "--threads", 1, "--out", folder / "loops.json"]]) == 0
    rows = json.loads((folder / "loops.json").read_text())["rows"]
    assert [found["name"] for found in rows] == ["uniform fp16", "uniform int8", "latency 0.5"]
