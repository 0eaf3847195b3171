"""ONNX Runtime's CUDA provider as a fake, and hosts with small graphs in them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_ort_cuda import FakeOrtCuda
from fakes.install import Fakes
from helpers.provider_graphs import DEVICE, saved
from helpers.small_loops import Opened
from helpers.small_plans import SEEDS, denoiser

from engines.backends.choose import HostOptions, open_host


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch, fakes: Fakes) -> FakeOrtCuda:
    return FakeOrtCuda.install(monkeypatch, fakes.cuda)


@pytest.fixture
def opened(fakes: Fakes, ort: FakeOrtCuda, tmp_path: Path) -> Iterator[Opened]:
    """Opens a host with the small denoisers in it; after the test it is closed and nothing may be left."""
    hosts = []

    def open_one(resident_engines: int | None = None) -> Any:
        host: Any = open_host("onnxruntime", DEVICE, HostOptions(resident_engines=resident_engines))
        hosts.append(host)
        for name, seed in SEEDS.items():
            host.add(name, *saved(denoiser(seed), tmp_path / f"{name}.onnx"))
        return host

    yield open_one
    for host in hosts:
        host.close()
        host.close()
    if ort.alive():
        gc.collect()  # an error that was caught holds its frames; takes long where torch is imported
    assert fakes.cuda.leaks() == []
    assert ort.alive() == []
