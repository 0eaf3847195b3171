"""A FAKE of ONNX Runtime's plugin interface with TensorRT-RTX's plugin, put into the real onnxruntime module.

It records what it is asked, "compiles" by copying the graph, and runs it with ONNX Runtime on the CPU. It shows that
names, arguments and options are right and that data goes through unharmed. It does not show that TensorRT-RTX takes a
graph, nor anything of its speed or rounding.
"""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from onnxruntime.capi import _pybind_state as state

from engines.backends.onnxruntime.tensorrt_rtx import PLUGIN

RTX = "NvTensorRTRTXExecutionProvider"
REAL_SESSION, REAL_COMPILER = onnxruntime.InferenceSession, onnxruntime.ModelCompiler
REAL_OPTIONS = onnxruntime.SessionOptions


class FakeDevice:
    """Stands in for OrtEpDevice and, as `device`, for its OrtHardwareDevice."""

    def __init__(self, ep_name: str, vendor_id: int, device_id: int) -> None:
        self.ep_name, self.vendor_id, self.device_id = ep_name, vendor_id, device_id

    @property
    def device(self) -> FakeDevice:
        return self


class FakeSessionOptions:
    """Records what is set on a SessionOptions; attributes that the real one lacks are refused."""

    def __init__(self) -> None:
        self.__dict__.update(config={}, devices=[], provider_options={})

    def __setattr__(self, name: str, value: object) -> None:
        assert hasattr(REAL_OPTIONS, name)
        self.__dict__[name] = value

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.config[key] = value

    def add_provider_for_devices(self, devices: Sequence[FakeDevice], options: Mapping[str, str]) -> None:
        assert all(isinstance(text, str) for pair in options.items() for text in pair)
        self.__dict__.update(devices=list(devices), provider_options=dict(options))


class FailingSession:
    """The C++ session, which fails as an execution provider does once `FakeRtx.run_error` is set."""

    def __init__(self, session: Any, fake: FakeRtx) -> None:
        self._session, self._fake = session, fake

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *args: Any) -> Any:
        if self._fake.run_error is not None:
            raise self._fake.run_error
        return self._session.run(*args)


class FakeRtx:
    """A FAKE of onnxruntime's plugin interface and of the plugin's module.

    Attributes:
        gpus: the devices that the plugin offers once registered.
        hardware: every device that ONNX Runtime lists.
        notes: why the plugin does not take them.
        refusal: raised when the library is registered.
        compile_error: raised when a model is compiled.
        run_error: raised when a session runs.
        registered: (name, path) of every registration.
        compiled: options of every compilation.
        opened: options of every session.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.gpus = [FakeDevice(RTX, 0x10DE, 0x2684), FakeDevice(RTX, 0x10DE, 0x2B85)]
        self.hardware: list[FakeDevice] = []
        self.notes: str | None = None
        self.refusal: Exception | None = None
        self.compile_error: Exception | None = None
        self.run_error: Exception | None = None
        self.registered: list[tuple[str, str]] = []
        self.compiled: list[FakeSessionOptions] = []
        self.opened: list[FakeSessionOptions] = []
        self.plugin = types.ModuleType(PLUGIN)
        self.plugin.__spec__ = importlib.machinery.ModuleSpec(PLUGIN, None)
        self.plugin.__version__ = "0.5.0"  # type: ignore[attr-defined]
        self.plugin.get_ep_name = lambda: RTX  # type: ignore[attr-defined]
        self.plugin.get_library_path = lambda: str(folder / "plugin.so")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, PLUGIN, self.plugin)
        fake = self

        class FakeModelCompiler:
            """Signature as the real class; writes the graph as it is."""

            def __init__(
                self,
                sess_options,
                input_model_path_or_bytes,
                embed_compiled_data_into_model=False,
                external_initializers_file_path=None,
                external_initializers_size_threshold=1024,
                flags=onnxruntime.OrtCompileApiFlags.NONE,
                graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
                get_initializer_location_func=None,
            ) -> None:
                assert flags == onnxruntime.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED
                assert not embed_compiled_data_into_model
                assert graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
                self._options, self._source = sess_options, input_model_path_or_bytes

            def compile_to_file(self, output_model_path=None) -> None:
                shutil.copyfile(self._source, output_model_path)  # the real one leaves a file when it fails, too
                if fake.compile_error is not None:
                    raise fake.compile_error
                fake.compiled.append(self._options)

        class FakeSession(REAL_SESSION):  # type: ignore[misc, valid-type]
            def __init__(self, path, options, providers=None, **kwargs) -> None:
                assert providers is None
                fake.opened.append(options)
                super().__init__(path, providers=["CPUExecutionProvider"], **kwargs)
                self._sess = FailingSession(self._sess, fake)

        self.compiler = FakeModelCompiler
        for name, value in {
            "register_execution_provider_library": self.register,
            "get_ep_devices": self.devices,
            "SessionOptions": FakeSessionOptions,
            "ModelCompiler": FakeModelCompiler,
            "InferenceSession": FakeSession,
        }.items():
            monkeypatch.setattr(onnxruntime, name, value)  # raises if the real module has no such name
        monkeypatch.setattr(state, "get_hardware_devices", lambda: self.hardware)
        monkeypatch.setattr(
            state,
            "get_hardware_device_ep_incompatibility_details",
            lambda name, device: {"reasons_bitmask": 2, "notes": self.notes, "error_code": 0},
        )

    def register(self, name: str, path: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        assert name not in [known for known, _ in self.registered], f"EP library is already registered under {name}"
        self.registered.append((name, path))

    def devices(self) -> list[FakeDevice]:
        cpu = FakeDevice("CPUExecutionProvider", 0x1022, 0)
        return [cpu, FakeDevice("CUDAExecutionProvider", 0x10DE, 7), *(self.gpus if self.registered else [])]
