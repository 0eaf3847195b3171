"""The `tensorrt-rtx` backend: what it asks of ONNX Runtime's plugin interface, and its refusals.

There is no RTX GPU here, so most tests use the fake of `fakes.fake_rtx`. With TMPDIFF_RTX_PLUGIN set to a site-packages
folder that has the real plugin, the last tests ask that one.
"""

from __future__ import annotations

import ctypes.util
import hashlib
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fakes.fake_rtx import REAL_COMPILER, REAL_OPTIONS, RTX, FakeDevice, FakeRtx
from helpers.paths import ROOT
from helpers.small_plans import CHANNELS, TOKENS, WIDTH, denoiser, inputs
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as state

from engines.backends.onnxruntime import tensorrt_rtx
from engines.backends.onnxruntime.tensorrt_rtx import COMPILED_MODEL, PLUGIN, TensorRtRtxEngine, require_device, version
from engines.documents import FileEntry
from engines.errors import BackendError
from engines.manifest import EngineEntry, TensorSpec

REAL_REGISTER = onnxruntime.register_execution_provider_library
REAL_DETAILS = state.get_hardware_device_ep_incompatibility_details
NO_FALLBACK = "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been explicitly disabled by the user."  # the real words, seen with the plugin 0.5.0
NO_SUPPORT = "NvTensorRTRTX EP does not support GPU with Compute Capability 9.0. Supported compute capabilities are 8.6, 8.9, and 12.0 or newer."
NO_DRIVER = "[ONNXRuntimeError] : 1 : FAIL : Failed to load library plugin.so with error: libcuda.so.1: cannot open shared object file: No such file or directory"


@pytest.fixture(autouse=True)
def _fresh_registration() -> Iterator[None]:
    tensorrt_rtx._registered_provider.cache_clear()
    yield
    tensorrt_rtx._registered_provider.cache_clear()


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRtx:
    return FakeRtx(monkeypatch, tmp_path)


@pytest.fixture
def graph(tmp_path: Path) -> tuple[Path, EngineEntry]:
    """y = float16(latents) * 2 + timestep, strongly typed as the export makes it, and its manifest entry."""
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Mul", ["latents", "two"], ["doubled"]),
                helper.make_node("Cast", ["timestep"], ["half"], to=TensorProto.FLOAT16),
                helper.make_node("Unsqueeze", ["half", "axis"], ["column"]),
                helper.make_node("Add", ["doubled", "column"], ["model_output"]),
            ],
            "denoiser",
            [
                value("latents", TensorProto.FLOAT16, ["batch", 4]),
                value("timestep", TensorProto.FLOAT, ["batch"]),
            ],
            [value("model_output", TensorProto.FLOAT16, ["batch", 4])],
            [numpy_helper.from_array(np.float16(2), "two"), numpy_helper.from_array(np.array([1]), "axis")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    path = tmp_path / "fp16.onnx"
    onnx.save(model, path)
    data = path.read_bytes()
    entry = EngineEntry(
        file=FileEntry(path=path.name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)),
        backend="tensorrt-rtx",
        backend_version="0.5.0",
        device="RTX",
        lowering={},
        onnx_sha256="0" * 64,
        recipe="none",
        sqnr_db=60.0,
        sqnr_floor_db=50.0,
        inputs=(
            TensorSpec(name="latents", dtype="float16", shape=("batch", 4)),
            TensorSpec(name="timestep", dtype="float32", shape=("batch",)),
        ),
        outputs=(TensorSpec(name="model_output", dtype="float16", shape=("batch", 4)),),
    )
    return path, entry


def inputs_of(batch: int) -> dict[str, np.ndarray]:
    latents = np.random.default_rng(batch).normal(size=(batch, 4)).astype(np.float32)
    return {"latents": latents, "timestep": np.full(batch, 3.0, np.float32)}


def test_the_fake_has_the_interface_of_the_real_library(rtx: FakeRtx) -> None:
    for method in ("__init__", "compile_to_file"):
        real, fake = (inspect.signature(getattr(owner, method)).parameters for owner in (REAL_COMPILER, rtx.compiler))
        assert [(one.name, one.default) for one in fake.values()] == [(one.name, one.default) for one in real.values()]
    documented = REAL_OPTIONS.add_provider_for_devices.__doc__
    assert "OrtEpDevice]" in documented
    assert "Mapping[str, str]" in documented
    assert "(arg0: str, arg1: str) -> None" in REAL_REGISTER.__doc__
    assert "(arg0: str, arg1: OrtHardwareDevice) -> dict" in REAL_DETAILS.__doc__
    assert {"ep_name", "device"} <= set(dir(onnxruntime.OrtEpDevice))
    assert {"vendor_id", "device_id"} <= set(dir(onnxruntime.OrtHardwareDevice))


def test_a_graph_is_compiled_for_its_shapes_and_runs_whole_on_the_gpu(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path
) -> None:
    inputs = inputs_of(2)
    output = TensorRtRtxEngine(*graph, cache=tmp_path / "cache").run(inputs)["model_output"]
    assert output.dtype == np.float32
    np.testing.assert_array_equal(output, (inputs["latents"].astype(np.float16) * np.float16(2) + np.float16(3)))
    assert rtx.registered == [(RTX, str(tmp_path / "plugin.so"))]
    assert len(rtx.compiled) == len(rtx.opened) == 1
    for options in (*rtx.compiled, *rtx.opened):
        assert options.devices == rtx.gpus[:1]
        assert options.config == {"session.disable_cpu_ep_fallback": "1"}
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    profile = {f"nv_profile_{bound}_shapes": "latents:2x4,timestep:2" for bound in ("min", "opt", "max")}
    assert rtx.compiled[0].provider_options == {**profile, "enable_cuda_graph": "1"}
    (model,) = (tmp_path / "cache").glob(f"*/{COMPILED_MODEL}")
    assert rtx.opened[0].provider_options == {
        **profile,
        "enable_cuda_graph": "1",
        "nv_runtime_cache_path": str(model.parent / "kernels"),
    }


def test_a_graph_is_compiled_once_per_machine_and_shapes(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path
) -> None:
    path, entry = graph
    engine = TensorRtRtxEngine(path, entry, cache=tmp_path)
    for batch in (2, 2, 1, 1, 2):
        expected = inputs_of(batch)["latents"].astype(np.float16) * np.float16(2) + np.float16(3)
        np.testing.assert_array_equal(engine.run(inputs_of(batch))["model_output"], expected)
    assert (len(rtx.compiled), len(rtx.opened)) == (2, 3)
    TensorRtRtxEngine(path, entry, cache=tmp_path).run(inputs_of(2))
    assert (len(rtx.compiled), len(rtx.opened)) == (2, 4)

    other = entry.model_copy(update={"file": entry.file.model_copy(update={"sha256": "1" * 64})})
    TensorRtRtxEngine(path, other, cache=tmp_path).run(inputs_of(2))
    assert len(rtx.compiled) == 3
    rtx.gpus.pop(0)
    TensorRtRtxEngine(path, entry, cache=tmp_path).run(inputs_of(2))
    assert len(rtx.compiled) == 4
    rtx.plugin.__version__ = "0.6.0"  # type: ignore[attr-defined]
    TensorRtRtxEngine(path, entry, cache=tmp_path).run(inputs_of(2))
    assert len(rtx.compiled) == 5


def test_a_picture_size_is_compiled_once_like_any_other_size(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path
) -> None:
    small = denoiser(1, any_size=True)
    path = tmp_path / "any.onnx"
    onnx.save(small.model, path)
    entry = graph[1].model_copy(update={"inputs": small.inputs, "outputs": small.outputs})
    engine = TensorRtRtxEngine(path, entry, cache=tmp_path)
    for size in ((4, 4), (6, 10), (6, 10), (4, 4)):
        assert engine.run(inputs(2, size))["model_output"].shape == (2, CHANNELS, *size)
    assert [options.provider_options["nv_profile_opt_shapes"] for options in rtx.compiled] == [
        f"latents:2x{CHANNELS}x{size},timestep:2,hidden_states:2x{TOKENS}x{WIDTH}" for size in ("4x4", "6x10")
    ]
    assert len(rtx.opened) == 3


def test_the_cache_is_in_the_users_cache_folder(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    TensorRtRtxEngine(*graph).run(inputs_of(1))
    assert len(list((tmp_path / "xdg/tmpdiff/tensorrt-rtx").glob(f"*/{COMPILED_MODEL}"))) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latents": np.zeros((2, 5), np.float32)}, "input latents must have shape [batch, 4], received [2, 5]"),
        ({"latents": np.zeros((0, 4), np.float32)}, "input latents must have shape [batch, 4], received [0, 4]"),
        ({"timestep": np.zeros(1, np.float32)}, "input timestep must have shape [2], received [1]"),
        ({"latents": np.zeros((2, 4), np.int64)}, "input latents must be float16, received int64"),
        ({"timestep": np.zeros(2, np.float64)}, "input timestep must be float32, received float64"),
        ({"latents": np.full((2, 4), -1e6, np.float32)}, "input latents reaches 1e+06, expected values within float16"),
        ({"sigma": np.zeros(2, np.float32)}, "takes inputs ['latents', 'timestep'], received ['latents', 'sigma'"),
    ],
)
def test_wrong_inputs_are_refused(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path, change: dict[str, np.ndarray], said: str
) -> None:
    engine = TensorRtRtxEngine(*graph, cache=tmp_path)
    with pytest.raises(BackendError) as caught:
        engine.run({**inputs_of(2), **change})
    assert said in str(caught.value)
    assert engine.run(inputs_of(2))["model_output"].shape == (2, 4)


def test_a_graph_that_tensorrt_rtx_does_not_take_is_an_error_and_leaves_nothing(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path
) -> None:
    rtx.compile_error = RuntimeError(NO_FALLBACK)
    engine = TensorRtRtxEngine(*graph, cache=tmp_path / "cache")
    with pytest.raises(BackendError) as caught:
        engine.run(inputs_of(1))
    assert "tensorrt-rtx 0.5.0 (ONNX Runtime" in str(caught.value)
    assert f"cannot compile {graph[0]}: {NO_FALLBACK}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    assert rtx.opened == []


def test_a_failure_on_the_gpu_is_not_retried_on_the_cpu(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = TensorRtRtxEngine(*graph, cache=tmp_path)
    engine.run(inputs_of(1))
    rtx.run_error = state.EPFail("NvTensorRTRTX EP execution context enqueue failed.")
    with pytest.raises(BackendError, match=r"engine fp16.onnx failed: .* execution context enqueue failed"):
        engine.run(inputs_of(1))
    assert "Falling back" not in capfd.readouterr().out


def test_a_damaged_compiled_model_names_the_folder_to_delete(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path
) -> None:
    TensorRtRtxEngine(*graph, cache=tmp_path).run(inputs_of(1))
    (model,) = tmp_path.glob(f"*/{COMPILED_MODEL}")
    model.write_bytes(b"torn")
    engine = TensorRtRtxEngine(*graph, cache=tmp_path)
    with pytest.raises(BackendError, match=f"cannot load .*; delete the folder {model.parent} to compile it again"):
        engine.run(inputs_of(1))
    shutil.rmtree(model.parent)
    assert engine.run(inputs_of(1))["model_output"].shape == (1, 4)


def test_a_cache_that_cannot_be_written_says_so(rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackendError, match=r"cannot write compiled engines to .*; set XDG_CACHE_HOME to a folder"):
        TensorRtRtxEngine(*graph, cache=tmp_path / "file" / "cache").run(inputs_of(1))


def test_another_process_may_be_faster(
    rtx: FakeRtx, graph: tuple[Path, EngineEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_to_file = rtx.compiler.compile_to_file

    def beside_another(self: Any, output_model_path: str) -> None:
        compile_to_file(self, output_model_path)
        scratch = Path(output_model_path).parent
        shutil.copytree(scratch, scratch.parent / scratch.name.split(".")[1])

    monkeypatch.setattr(rtx.compiler, "compile_to_file", beside_another)
    assert TensorRtRtxEngine(*graph, cache=tmp_path / "cache").run(inputs_of(1))["model_output"].shape == (1, 4)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_gpu_of_another_compute_capability_is_refused_by_name(rtx: FakeRtx, graph: tuple[Path, EngineEntry]) -> None:
    rtx.gpus = []
    rtx.notes = NO_SUPPORT
    rtx.hardware = [FakeDevice("", 0x1022, 0), FakeDevice("", 0x10DE, 0x2335), FakeDevice("", 0x10DE, 0x2335)]
    with pytest.raises(BackendError) as caught:
        TensorRtRtxEngine(*graph)
    assert str(caught.value) == (
        f"backend 'tensorrt-rtx' found no GPU it can use: {NO_SUPPORT}; run on a host with an NVIDIA driver and a GPU "
        "of compute capability 8.6, 8.9, 12.0, 12.1, or use a bundle built with --backend onnxruntime"
    )


def test_a_host_without_a_gpu_or_a_driver_is_told_so(rtx: FakeRtx) -> None:
    rtx.refusal = RuntimeError(NO_DRIVER)
    for _ in range(2):  # a failed registration is tried again
        with pytest.raises(BackendError, match=r"found no NVIDIA driver: .*libcuda.so.1: .*capability 8.6, 8.9, 12.0"):
            require_device()
    rtx.refusal = RuntimeError("undefined symbol: OrtGetApiBase")
    with pytest.raises(BackendError, match="cannot load the plugin: undefined symbol: OrtGetApiBase; reinstall"):
        require_device()
    rtx.refusal = None
    gpus, rtx.gpus = rtx.gpus, []
    with pytest.raises(BackendError, match="found no GPU it can use: ONNX Runtime lists no NVIDIA GPU; run on a host"):
        require_device()
    rtx.gpus = gpus
    assert require_device() is gpus[0]


def test_versions_name_the_plugin_and_onnx_runtime(rtx: FakeRtx) -> None:
    assert version() == f"0.5.0 (ONNX Runtime {onnxruntime.__version__})"


@pytest.mark.skipif(importlib.util.find_spec(PLUGIN) is not None, reason="the plugin is installed")
def test_without_the_plugin_the_error_says_what_to_install(graph: tuple[Path, EngineEntry]) -> None:
    for call in (require_device, version, lambda: TensorRtRtxEngine(*graph)):
        with pytest.raises(BackendError) as caught:
            call()
        assert f"needs the module {PLUGIN}, which is not installed" in str(caught.value)
        assert "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13" in str(caught.value)


real_plugin = pytest.mark.skipif(
    not os.environ.get("TMPDIFF_RTX_PLUGIN") or ctypes.util.find_library("cuda") is not None,
    reason="TMPDIFF_RTX_PLUGIN names no site-packages folder with the plugin, or this host has an NVIDIA driver",
)
ASK = """
import sys
sys.path.append(sys.argv[1])
from engines.backends.onnxruntime.tensorrt_rtx import require_device, version
from engines.errors import BackendError
print(version())
try:
    require_device()
except BackendError as error:
    print(error)
"""
CUDA_FUNCTIONS = (
    "cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCurrent cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCurrent "
    "cuDestroyExternalMemory cuDestroyExternalSemaphore cuDeviceGetCount cuDriverGetVersion "
    "cuExternalMemoryGetMappedBuffer cuGetErrorString cuGetProcAddress_v2 cuImportExternalMemory "
    "cuImportExternalSemaphore cuInit cuSignalExternalSemaphoresAsync cuStreamGetCtx cuWaitExternalSemaphoresAsync"
)
NVML_FUNCTIONS = "nvmlErrorString nvmlInit_v2 nvmlShutdown nvmlSystemGetDriverVersion"


def ask_real_plugin(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, os.environ["TMPDIFF_RTX_PLUGIN"]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@real_plugin
def test_the_real_plugin_without_a_driver() -> None:
    installed, said = ask_real_plugin()
    assert installed.endswith(f" (ONNX Runtime {onnxruntime.__version__})")
    assert said.startswith("backend 'tensorrt-rtx' found no NVIDIA driver: ")
    assert "libcuda.so.1: cannot open shared object file" in said


@real_plugin
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to make libraries that stand in for a driver")
def test_the_real_plugin_with_a_driver_that_has_no_gpu(tmp_path: Path) -> None:
    for name, functions, status in (("libcuda.so.1", CUDA_FUNCTIONS, 100), ("libnvidia-ml.so.1", NVML_FUNCTIONS, 9)):
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(tmp_path / name)],
            input="".join(f"int {function}(void){{return {status};}}\n" for function in functions.split()),
            text=True,
            check=True,
        )
    _, said = ask_real_plugin(LD_LIBRARY_PATH=str(tmp_path))
    assert said.startswith("backend 'tensorrt-rtx' found no GPU it can use: ONNX Runtime lists no NVIDIA GPU; run on ")
