"""Hosts with small plans in them, and the bench that plans are built on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.install import Fakes, install
from helpers.plan_bench import Bench, MakeBench
from helpers.small_loops import Opened
from helpers.small_plans import SEEDS, denoiser, entry


@pytest.fixture
def opened(fakes: Fakes, tmp_path: Path) -> Iterator[Opened]:
    """Opens a host with the small denoisers in it; after the test it is closed and nothing may be left.

    With `sizes`, their plans have an optimization profile for each.
    """
    from engines.backends.tensorrt.host import tensorrt_host

    hosts = []

    def open_host(resident_engines: int | None = None, names: tuple[str, ...] = tuple(SEEDS), **options: Any) -> Any:
        host = tensorrt_host(resident_engines=resident_engines)
        hosts.append(host)
        for name in names:
            small = denoiser(SEEDS[name], weights=64 << SEEDS[name], any_size="sizes" in options)
            host.add(name, *entry(fakes, small, tmp_path, name, **options))
        return host

    yield open_host
    for host in hosts:
        host.close()
        host.close()
    assert fakes.cuda.leaks() == []


@pytest.fixture
def make_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeBench:
    return lambda **options: Bench(install(monkeypatch, **options), tmp_path)


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    return make_bench()
