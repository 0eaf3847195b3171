"""Timing caches of builds against the fake TensorRT: kept, reused, merged, and none of them trusted."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.plan_bench import Bench, MakeBench


def test_timings_are_kept_and_reused(bench: Bench) -> None:
    bench.build()
    bench.build()
    first, second = bench.fakes.settings.builds
    assert first.timed == first.layers > 0
    assert second.timed == 0


def test_timings_of_a_cancelled_build_are_kept(bench: Bench) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if " > " in stage and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.build(progress=progress)
    bench.build()
    assert bench.fakes.settings.builds[0].timed == 0


def test_timing_caches_are_apart_per_version_and_gpu(make_bench: MakeBench) -> None:
    paths = {
        make_bench(**options).timing_cache.name
        for options in (
            {},
            {"version": "10.16.1.11"},
            {"name": "Fake B200"},
            {"compute_capability": (10, 0)},
        )
    }
    assert len(paths) == 4
    assert "timing-11.4.0.106-Fake-H200-sm90.cache" in paths


@pytest.mark.parametrize("content", [b"rubbish", b"ftrtCACH{", b""])
def test_a_corrupt_timing_cache_costs_time_only(bench: Bench, content: bytes) -> None:
    bench.timing_cache.write_bytes(content)
    facts = bench.build()
    assert facts.bytes > 0
    if content:
        assert any("is corrupt or of another TensorRT or GPU" in warning for warning in facts.warnings)
    assert bench.fakes.settings.builds[0].timed > 0
    assert bench.build().warnings == ()
    assert bench.fakes.settings.builds[1].timed == 0


def test_a_timing_cache_that_tensorrt_only_warns_of_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX 1.7 gives an empty cache and a warning for one it cannot read."""
    bench.timing_cache.write_bytes(b"rubbish")
    trt: Any = bench.fakes.tensorrt
    create = trt.IBuilderConfig.create_timing_cache

    def lenient(config: Any, data: Any) -> Any:
        if bytes(data) == b"rubbish":
            config._logger.log(
                trt.ILogger.WARNING, "Failed to deserialize timing cache. Returning an empty timing cache."
            )
            return create(config, b"")
        return create(config, data)

    monkeypatch.setattr(trt.IBuilderConfig, "create_timing_cache", lenient)
    (warning,) = bench.build().warnings
    assert "Failed to deserialize timing cache" in warning


def test_a_timing_cache_of_another_gpu_under_this_name_is_not_used(make_bench: MakeBench) -> None:
    other = make_bench(name="Fake B200")
    other.build()
    here = make_bench()
    here.timing_cache.write_bytes(other.timing_cache.read_bytes())
    assert any("another TensorRT or GPU" in warning for warning in here.build().warnings)
    assert here.fakes.settings.builds[0].timed > 0


def test_timings_written_meanwhile_are_not_lost(bench: Bench) -> None:
    """Two builds that start together: the second to end keeps the timings of the first."""
    inner = Bench.__new__(Bench)
    inner.__dict__.update(bench.__dict__)
    started = []

    def progress(stage: str, done: int, total: int) -> None:
        if not started:
            started.append(stage)
            inner.build("int8", target=bench.folder / "other.plan")

    bench.build("fp16", progress=progress)
    bench.build("int8")
    bench.build("fp16")
    assert [build.timed for build in bench.fakes.settings.builds[2:]] == [0, 0]


@pytest.mark.parametrize(
    ("broken", "words"),
    [("atomic_write_bytes", "cannot be written"), ("locked", "cannot be used")],
)
def test_a_timing_cache_that_cannot_be_kept_is_a_warning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: str, words: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(bench.code.timing_cache, broken, fail)
    warnings = bench.build().warnings
    assert f"{words} (Read-only file system)" in warnings[0]
    assert bench.target.exists()
