"""The build code on a real builder: that of TensorRT for RTX, whose Python API is TensorRT's and which needs no GPU.

It stands in for `tensorrt` up to the serialized plan; loading a plan needs an RTX GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fakes.install import drop_cached
from helpers.demo_build import DemoBuild
from helpers.linear_denoiser import PROFILE, save_model
from helpers.tensorrt_conformance import BINDINGS, ROOT, prepare
from onnx import TensorProto, helper, numpy_helper

from engines.errors import BackendError, BuildError

pytestmark = pytest.mark.long

AS_VERSION = "11.4.0.106"  # the API it is nearest to; Polygraphy looks at it

Build = Callable[..., tuple[bytes, list[str]]]


@pytest.fixture(scope="session")
def rtx() -> Any:
    """The module, fetched if need be; it stays loaded, for its libraries cannot be unloaded."""
    prepare(BINDINGS)
    (folder,) = BINDINGS.glob("rtx-*")
    sys.path.append(str(folder))
    try:
        return importlib.import_module("tensorrt_rtx_bindings")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def build(rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """`builder.serialized_plan` for a GPU of the given architecture: plan and warnings."""
    drop_cached()
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    monkeypatch.setattr(rtx, "__version__", AS_VERSION)
    builder = importlib.import_module("engines.backends.tensorrt.builder")
    options = importlib.import_module("engines.backends.tensorrt.options")
    create = rtx.Builder.create_builder_config

    def run(path: Path, profiles: Any = (PROFILE,), architecture: str = "SM89", progress: Any = None) -> Any:
        def for_architecture(self: Any) -> Any:
            config = create(self)
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(rtx.ComputeCapability, architecture), 0)
            return config

        monkeypatch.setattr(rtx.Builder, "create_builder_config", for_architecture)
        cache = tmp_path / "timing.cache"
        plan, warnings = builder.serialized_plan(path, profiles, options.PlanOptions(), cache, progress)
        return bytes(plan), warnings

    yield run
    drop_cached()


@pytest.mark.parametrize("architecture", ["SM89", "SM120"])
@pytest.mark.parametrize("precision", ["fp16", "fp8", "int8"])
def test_a_plan_is_built(build: Build, tmp_path: Path, precision: str, architecture: str) -> None:
    plan, warnings = build(save_model(tmp_path / f"{precision}.onnx", precision), architecture=architecture)
    assert len(plan) > 10_000
    assert warnings == []


def test_a_profile_per_picture_size_adds_no_weights(build: Build, tmp_path: Path) -> None:
    channels = 512
    path = tmp_path / "convolution.onnx"
    weights = np.random.default_rng(0).normal(0, 0.01, (channels, channels, 3, 3)).astype(np.float16)
    shape = ["batch", channels, "height", "width"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["latents", "weight"], ["model_output"], pads=[1, 1, 1, 1])],
        "convolution",
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT16, shape)],
        [helper.make_tensor_value_info("model_output", TensorProto.FLOAT16, shape)],
        [numpy_helper.from_array(weights, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    profiles = [
        {"latents": tuple((batch, channels, *size) for batch in (1, 1, 4))} for size in ((16, 16), (16, 24), (32, 8))
    ]
    one, three = (build(path, some)[0] for some in (profiles[:1], profiles))
    assert 0 < len(three) - len(one) < weights.nbytes // 2


def test_external_data(build: Build, tmp_path: Path) -> None:
    path = save_model(tmp_path / "large.onnx", "fp16", external=True)
    assert len(build(path)[0]) > 10_000
    (tmp_path / "large.onnx.data").unlink()
    with pytest.raises(BuildError, match=r"parser refuses large\.onnx: .*Failed to open file: .*large\.onnx\.data"):
        build(path)


def test_parser_words(build: Build, tmp_path: Path) -> None:
    path = save_model(tmp_path / "odd.onnx", "fp16", operator="NoSuchOp")
    with pytest.raises(BuildError, match=r"parser refuses odd\.onnx: node last \(NoSuchOp\): .*Plugin not found"):
        build(path)


def test_builder_words(build: Build, tmp_path: Path) -> None:
    (tmp_path / "timing.cache").write_bytes(b"rubbish")
    with pytest.raises(BackendError, match=r"could not build fp8\.onnx: .*sm86.*HW-specific datatypes: fp8_e4m3"):
        build(save_model(tmp_path / "fp8.onnx", "fp8"), architecture="SM86")


def test_a_corrupt_timing_cache_is_a_warning(build: Build, tmp_path: Path) -> None:
    (tmp_path / "timing.cache").write_bytes(b"rubbish")
    plan, (warning,) = build(save_model(tmp_path / "fp16.onnx", "fp16"))
    assert plan
    assert "Failed to deserialize timing cache" in warning


def test_progress_and_cancelling(build: Build, tmp_path: Path) -> None:
    path = save_model(tmp_path / "fp16.onnx", "fp16")
    stages: list[str] = []
    build(path, progress=lambda stage, done, total: stages.append(stage))
    assert {"Building engine", "Building engine > Building engine from subgraph"} <= set(stages)

    def stop(stage: str, done: int, total: int) -> None:
        if stage.endswith("Optimizing graph"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(path, progress=stop)
    assert build(path)[0]


def test_the_exported_graphs_are_accepted(rtx: Any, demo_build: DemoBuild, tmp_path: Path) -> None:
    names = ["fp16", "fp8", "int8", "int4", "text_encoder", "vae_decoder"]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "acceptance" / "accept_onnx.py"),
            "--bindings",
            str(BINDINGS),
            "--arch",
            "sm89",
            "--json",
            str(tmp_path / "verdicts.json"),
            *(str(demo_build.onnx / f"{name}.onnx") for name in names),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "verdicts.json").read_text())["rows"]
    assert [row["file"] for row in rows] == [f"onnx/{name}.onnx" for name in names]
