"""The study of whole loops: rules, goals, cache-dit's settings, what fails, the figure, and the command without cache-dit."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_pipelines import save_small_pipeline

from engines.conditioning import Conditioning
from engines.errors import TmpDiffError
from tools.headline.__main__ import main
from tools.headline.caching import VARIANTS, sparse_mask, thresholds
from tools.headline.figure import draw, families
from tools.headline.goals import at_speedup, best_points, findings, frontier
from tools.headline.measure import Study
from tools.headline.methods import OURS, PEER, Batch, Method, fixed_reuse
from tools.headline.order import Part

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


def test_of_errors_less_is_better() -> None:
    rows = [{"speedup": speedup, "typical_error": error} for speedup, error in ((1.5, 0.2), (2.0, 0.1), (3.0, 0.4))]
    assert best_points(rows, "typical_error") == [(2.0, 0.1), (3.0, 0.4)]


@pytest.mark.parametrize("num_steps", [28, 50])
def test_thresholds_are_found_for_the_steps_they_compute(num_steps: int) -> None:
    tried: list[float] = []

    def computed(threshold: float) -> int:
        tried.append(threshold)
        return max(4, min(num_steps, round(num_steps * (1.1 - 1.5 * threshold))))

    wanted = [round(num_steps / times) for times in (1.5, 1.9, 2.4, 3.1, 4.0)]
    found = thresholds(computed, wanted, num_steps)
    assert found == sorted(found)
    assert [computed(threshold) for threshold in found] == pytest.approx(wanted, abs=2)
    assert len(tried) <= 2 + 4 * len(wanted) + len(found)


def test_thresholds_that_jump_give_what_there_is() -> None:
    found = thresholds(lambda threshold: 28 if threshold < 0.4 else 16 if threshold < 0.6 else 3, [19, 15, 9, 7], 28)
    assert [threshold >= 0.6 for threshold in found] == [False, True]
    assert thresholds(lambda threshold: 28, [19, 15], 28) == []


@pytest.mark.parametrize("num_steps", [6, 28, 50])
def test_a_sparse_mask_computes_the_first_steps_and_the_last(num_steps: int) -> None:
    mask = sparse_mask(num_steps)
    assert len(mask) == num_steps
    assert (mask[0], mask[1], mask[-1]) == (1, 1, 1)
    assert sum(mask) == max(4, round(0.21 * num_steps))


# What a study does when methods fail or time runs out


class Loops:
    """Methods whose loops are counted, and a pool that compares at once."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def method(self, name: str, reference: str, *, fails: bool = False, is_reference: bool = False) -> Method:
        def denoise(batch: Batch) -> np.ndarray:
            self.calls[name] = self.calls.get(name, 0) + 1
            if fails:
                raise RuntimeError("out of memory\nsecond line")
            return batch.noise

        def open_() -> Any:
            return nullcontext(denoise)

        return Method(name, "group", reference, open_, lambda: 3.0, is_reference=is_reference)

    def part(self, name: str, reference: str = PEER, **what: bool) -> Part:
        return Part(name, lambda: iter([self.method(name, reference, **what)]))


def study() -> Study:
    batch = Batch(Conditioning({}, 1), np.ones((1, 4, 2, 2), dtype=np.float32))

    def compared(pictures: np.ndarray, references: np.ndarray) -> list[Future[dict[str, float]]]:
        futures = [Future() for _ in pictures]
        for future in futures:
            future.set_result({"ssim": 1.0})
        return futures

    runtime: Any = types.SimpleNamespace(decode=lambda latents: np.zeros((len(latents), 8, 8, 3), dtype=np.uint8))
    pool: Any = types.SimpleNamespace(begin=compared)
    return Study(runtime, [batch, batch], pool)


def test_what_fails_leaves_the_others_with_a_line_each() -> None:
    loops, made, written = Loops(), study(), list[tuple[list[str], list[str]]]()

    def broken() -> Any:
        raise TmpDiffError("cache-dit is not installed")

    parts = [loops.part("baseline", is_reference=True), Part("cache-dit", broken), loops.part("bad", fails=True)]
    parts += [loops.part("schedule", OURS), loops.part("good")]
    left_out, failed = made.run_all(parts, lambda: False, lambda out, lines: written.append((list(out), list(lines))))
    assert [found["name"] for found in made.rows(wait=True)] == ["baseline", "good"]
    assert failed == [
        "cache-dit: TmpDiffError: cache-dit is not installed",
        "bad: RuntimeError: out of memory",
        "schedule: TmpDiffError: not compared, as the 16-bit run of all steps of the bundle was not measured",
    ]
    assert not left_out
    assert written[0] == (["cache-dit", "bad", "schedule", "good"], [])
    assert len(written) == 4


def test_without_a_baseline_there_is_nothing_to_tell() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        study().run_all([Loops().part("baseline", fails=True, is_reference=True)], lambda: False, lambda *_: None)


def test_when_time_is_over_whole_methods_are_left_out_and_no_loop_of_them_is_run() -> None:
    loops, made = Loops(), study()
    parts = [loops.part(name, is_reference=name == "baseline") for name in ("baseline", "a", "b", "c")]
    left_out, failed = made.run_all(parts, lambda: "a" in loops.calls, lambda *_: None)
    assert (left_out, failed) == (["b", "c"], [])
    assert set(loops.calls) == {"baseline", "a"}
    assert loops.calls["a"] == 1 + 2  # warm-up and both batches


# The figure, of made-up results


def made_up(num_steps: int, *, lpips: bool = True) -> dict[str, Any]:
    """A result file of the right form whose figures mean nothing."""
    groups = {
        "baseline": 0.0, "uniform": 1e-5, "schedule": 1e-4, "reuse at fixed steps, fp8": 4e-4, "fewer steps, fp8": 6e-3,
        "fewer steps, 16-bit compiled": 5e-3, "cache-dit DBCache": 2e-3, "cache-dit TaylorSeer, steps mask": 1e-3,
        "cache-dit and torchao FP8: DBCache": 3e-3, "torchao FP8": 1e-5,
    }  # fmt: skip
    rows = [
        {"name": f"{group} {speedup}", "group": group, "speedup": 1.0 if group == "baseline" else speedup,
         "typical_error": error * speedup, "ssim": {"mean": 1 - 10 * error * speedup}}
        | ({"lpips": {"mean": 5 * error * speedup}} if lpips else {})
        for group, error in groups.items()
        for speedup in ((1.0,) if group in ("baseline", "torchao FP8") else (1.5, 2.0, 3.0, 4.0))
    ]  # fmt: skip
    setting = {"num_steps": num_steps, "denoiser": "SD3Transformer2DModel", "parameters_m": 445.0, "prompts": 96}
    return {"rows": rows, "setting": setting | {"picture": "512x512", "batch": 8, "machine": "made up"}}


@pytest.mark.parametrize(("lpips", "columns"), [(True, 3), (False, 2)])
def test_the_figure_has_a_row_for_every_number_of_steps_and_a_line_for_every_family(lpips: bool, columns: int) -> None:
    contents = [made_up(28, lpips=lpips), made_up(50, lpips=lpips)]
    assert list(families(contents[0]["rows"])) == [
        "calibrated schedule", "cache-dit", "cache-dit and torchao FP8", "reuse at fixed steps", "fewer steps",
        "uniform precision", "torchao FP8",
    ]  # fmt: skip
    figure = draw(contents)
    assert len(figure.axes) == 2 * columns
    assert [axes.get_yscale() for axes in figure.axes[:columns]] == ["linear"] * (columns - 1) + ["log"]
    assert {"28 steps", "50 steps"} <= {axes.get_ylabel() for axes in figure.axes}
    for axes in figure.axes:
        names = axes.get_legend_handles_labels()[1]
        assert {"calibrated schedule", "cache-dit", "cache-dit and torchao FP8"} <= set(names)
        assert len(names) == len(set(names))


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
    assert {f"cache-dit {variant.name}" for variant in VARIANTS} <= groups
    assert rows["cache-dit TaylorSeer, steps mask, sparse"]["computed"] == STEPS


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
