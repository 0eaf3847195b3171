"""TensorRT for RTX: ONNX Runtime's plugin execution provider for RTX GPUs.

A bundle holds the exported, strongly typed ONNX graph, and the machine that runs it compiles it once. Compiled
models are not put into bundles: each is for one GPU architecture, one plugin version and one set of shapes, and
from Python the plugin compiles only where it has a GPU. The graph runs on every architecture that has its
precision, and its hash is checked like that of any other file of the bundle.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from engines.backends.onnxruntime.session import OnnxSession, axis_sizes, library, require_names, words
from engines.backends.table import require_backend
from engines.documents import canonical_json
from engines.engine import Arrays
from engines.errors import BackendError, TmpDiffError
from engines.files import sha256_bytes, staged_folder
from engines.manifest import EngineEntry, TensorSpec

BACKEND: Final = "tensorrt-rtx"
PLUGIN: Final = "onnxruntime_ep_nv_tensorrt_rtx"
COMPUTE_CAPABILITIES: Final = ((8, 6), (8, 9), (12, 0), (12, 1))
NVIDIA_VENDOR_ID: Final = 0x10DE
COMPILED_MODEL: Final = "engine.onnx"

_WHERE = (
    f"run on a host with an NVIDIA driver and a GPU of compute capability "
    f"{', '.join(f'{major}.{minor}' for major, minor in COMPUTE_CAPABILITIES)}, or use a bundle built with "
    "--backend onnxruntime"
)
_DRIVER_LIBRARIES = ("libcuda.so", "libnvidia-ml.so", "nvcuda.dll", "nvml.dll")

Shapes = Mapping[str, tuple[int, ...]]


class TensorRtRtxEngine:
    """An exported ONNX graph, the whole of it on the plugin's execution provider.

    The graph is compiled for the shapes of the first call, at a later call with other shapes again: fixed shapes
    get specialized kernels and a CUDA graph. Compiled models and kernels are kept in the cache folder, so each
    combination of graph, shapes, GPU model and library versions is compiled once. One compiled model is
    loaded at a time. Not thread-safe.
    """

    def __init__(self, path: Path, entry: EngineEntry, *, cache: Path | None = None) -> None:
        """Checks that there is a GPU; compiles and loads nothing.

        Args:
            path: the ONNX file, whose hash has been checked.
            entry: its manifest entry.
            cache: folder of compiled models, None for `default_cache()`.

        Raises:
            BackendError: see `require_device`.
        """
        self._device = require_device()
        self._path = path
        self._entry = entry
        self._cache = cache or default_cache()
        self._shapes: Shapes | None = None
        self._session: OnnxSession | None = None

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One inference; see `engines.engine.Engine`.

        Args:
            inputs: host arrays as `entry.inputs` says; float32 is taken, and converted, where that is float16.

        Returns:
            New host arrays by output name; float32 for every output of a floating type.

        Raises:
            BackendError: an input is missing, of the wrong dtype or shape or too large for float16, the
                provider does not take the whole graph, or the library failed.
        """
        specs = self._entry.inputs
        require_names(self._path.name, [spec.name for spec in specs], inputs)
        shapes = input_shapes(self._path.name, specs, inputs)
        feeds = {spec.name: _as_typed(self._path.name, spec, inputs[spec.name]) for spec in specs}
        if self._session is None or shapes != self._shapes:
            self._session = None  # frees its device memory before the next one takes it
            self._session = self._open(shapes)
            self._shapes = shapes
        outputs = self._session.run(feeds)
        return {name: _as_float32(value) for name, value in outputs.items()}

    def _open(self, shapes: Shapes) -> OnnxSession:
        model = self._compiled(shapes)
        options = self._options({**profile_options(shapes), "nv_runtime_cache_path": str(model.parent / "kernels")})
        try:
            return OnnxSession(model, options, name=self._path.name)
        except BackendError as error:
            raise BackendError(f"{error}; delete the folder {model.parent} to compile it again") from error

    def _compiled(self, shapes: Shapes) -> Path:
        """The compiled model for `shapes`, from the cache folder or put there now."""
        folder = self._cache / self._key(shapes)
        model = folder / COMPILED_MODEL
        if model.is_file():
            return model
        try:
            with staged_folder(folder) as scratch:
                self._compile(shapes, scratch / COMPILED_MODEL)
        except OSError as error:
            raise BackendError(
                f"cannot write compiled engines to {self._cache}: {error}; set XDG_CACHE_HOME to a folder that can be "
                "written and has room"
            ) from error
        except TmpDiffError:
            if not model.is_file():  # else another process was faster
                raise
        return model

    def _compile(self, shapes: Shapes, target: Path) -> None:
        onnxruntime = library()
        try:
            onnxruntime.ModelCompiler(
                self._options(profile_options(shapes)),
                str(self._path),
                embed_compiled_data_into_model=False,  # a protobuf ends at 2 GB
                flags=onnxruntime.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED,
                graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
            ).compile_to_file(str(target))
        except Exception as error:  # its exception classes share no public base
            raise BackendError(
                f"{BACKEND} {version()} cannot compile {self._path}: {words(error)}; the log lines of TensorRT-RTX "
                "above name the node or layer, and not every GPU has every precision (FP8 needs 8.9, FP4 12.0)"
            ) from error

    def _options(self, provider_options: Mapping[str, str]) -> Any:
        """Session options: everything on the GPU, the graph as it was exported.

        ONNX Runtime's optimizers would fold or move Q/DQ pairs, which carry the precision of a strongly typed
        graph. With the fallback on, one node that TensorRT-RTX cannot parse sends the whole graph to the CPU.
        """
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([self._device], dict(provider_options))
        return options

    def _key(self, shapes: Shapes) -> str:
        """Names everything that a compiled model depends on."""
        gpu = self._device.device
        parts = {
            "files": [file.sha256 for file in self._entry.files()],
            "gpu": [gpu.vendor_id, gpu.device_id],
            "options": profile_options(shapes),
            "version": version(),
        }
        return sha256_bytes(canonical_json(parts))


def require_device() -> Any:
    """The `onnxruntime.OrtEpDevice` that engines run on: the first GPU that the plugin offers.

    CUDA_VISIBLE_DEVICES chooses among several.

    Raises:
        BackendError: the plugin is not installed or cannot be loaded, there is no driver, or no GPU that it
            supports.
    """
    name = _registered_provider()
    devices = [device for device in library().get_ep_devices() if device.ep_name == name]
    if not devices:
        raise BackendError(f"backend {BACKEND!r} found no GPU it can use: {_why_no_device(name)}; {_WHERE}")
    return devices[0]


def version() -> str:
    """Versions of the installed plugin and ONNX Runtime, for example "0.5.0 (ONNX Runtime 1.31.1)".

    Raises:
        BackendError: one of them is not installed.
    """
    return f"{_plugin().__version__} (ONNX Runtime {library().__version__})"


def default_cache() -> Path:
    """The user's folder of compiled models, under XDG_CACHE_HOME (on Windows LOCALAPPDATA)."""
    variable, default = ("LOCALAPPDATA", "~/AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get(variable) or os.path.expanduser(default)) / "tmpdiff" / BACKEND


def profile_options(shapes: Shapes) -> dict[str, str]:
    """Provider options for an optimization profile of one shape per input, and its CUDA graph.

    Every input is named: for one that is not, the plugin assumes a range of its own. Inputs are separated by
    commas; at a semicolon, which the plugin's option reference shows, its parser drops the rest.
    """
    profile = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return {f"nv_profile_{bound}_shapes": profile for bound in ("min", "opt", "max")} | {"enable_cuda_graph": "1"}


def input_shapes(engine: str, specs: Sequence[TensorSpec], inputs: Arrays) -> dict[str, tuple[int, ...]]:
    """The shapes of a call's inputs, checked against what the engine takes.

    Raises:
        BackendError: an axis differs from its spec, is empty, or one symbol has two sizes.
    """
    shapes = {spec.name: inputs[spec.name].shape for spec in specs}
    axis_sizes(engine, specs, shapes)
    return shapes


def _plugin() -> ModuleType:
    require_backend(BACKEND)
    library()  # before the plugin, which imports it too, so that its telemetry is off
    return importlib.import_module(PLUGIN)


@functools.cache  # a process registers a library once
def _registered_provider() -> str:
    """Registers the plugin with ONNX Runtime; the name of its execution provider."""
    plugin = _plugin()
    name = str(plugin.get_ep_name())
    path = Path(plugin.get_library_path())
    try:
        # The wheel brings the CUDA runtime without the name that the plugin looks it up by; once loaded it is found.
        for runtime in path.parent.glob("libcudart.so.*"):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        library().register_execution_provider_library(name, str(path))
    except Exception as error:  # its exception classes share no public base
        said = words(error)
        if any(driver in said for driver in _DRIVER_LIBRARIES):
            raise BackendError(f"backend {BACKEND!r} found no NVIDIA driver: {said}; {_WHERE}") from error
        raise BackendError(
            f"backend {BACKEND!r}: ONNX Runtime {library().__version__} cannot load the plugin: {said}; reinstall "
            "onnxruntime-ep-nv-tensorrt-rtx-cu13 and an ONNX Runtime that it supports (1.24 or newer)"
        ) from error
    return name


def _why_no_device(name: str) -> str:
    """What the plugin says of every NVIDIA GPU that ONNX Runtime lists."""
    from onnxruntime.capi import _pybind_state as state  # the package does not export these two

    gpus = [device for device in state.get_hardware_devices() if device.vendor_id == NVIDIA_VENDOR_ID]
    if not gpus:
        return "ONNX Runtime lists no NVIDIA GPU"
    said = (state.get_hardware_device_ep_incompatibility_details(name, gpu)["notes"] for gpu in gpus)
    return " | ".join(dict.fromkeys(notes or "the plugin gave no reason" for notes in said))


def _as_typed(engine: str, spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """The array in the dtype that the graph has."""
    if array.dtype == np.float32 and spec.dtype == "float16":
        try:
            with np.errstate(over="raise"):
                return array.astype(np.float16)
        except FloatingPointError as error:
            raise BackendError(
                f"engine {engine}: input {spec.name} reaches {float(np.abs(array[np.isfinite(array)]).max()):g}, "
                "expected values within float16 (65504)"
            ) from error
    return array


def _as_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array
