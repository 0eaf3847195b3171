"""The fakes for one test, and a small ONNX file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from fakes.install import Fakes, install
from helpers.fake_engines import onnx_model


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return install(monkeypatch)


@pytest.fixture
def runtime(fakes: Fakes) -> Any:
    return sys.modules["cuda.bindings.runtime"]


@pytest.fixture
def driver(fakes: Fakes) -> Any:
    return sys.modules["cuda.bindings.driver"]


@pytest.fixture
def onnx_file(tmp_path: Path) -> Callable[[str], str]:
    def write(kind: str = "fp16") -> str:
        path = tmp_path / f"{kind}.onnx"
        onnx.save(onnx_model(kind), str(path))
        return str(path)

    return write
