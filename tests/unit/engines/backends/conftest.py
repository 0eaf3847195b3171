"""The fakes of TensorRT and CUDA, for one test."""

from __future__ import annotations

import pytest
from fakes import fake_kernels  # noqa: F401  (registers the kernels)
from fakes.install import Fakes, install


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return install(monkeypatch)
