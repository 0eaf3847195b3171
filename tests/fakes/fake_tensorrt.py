"""The fake `tensorrt` (or `tensorrt_lean`) module: classes and enumerations put together for one version."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from fakes import fake_builder, fake_context, fake_engine, fake_inspector, fake_network, fake_refit, fake_trt_base
from fakes.fake_trt_base import api_version, enums_of

_SHARED = {
    fake_trt_base: ("Dims", "IHostMemory", "ILogger", "Logger", "IProfiler", "IProgressMonitor", "IStreamReaderV2"),
    fake_engine: ("Runtime", "ICudaEngine"),
    fake_context: ("IExecutionContext",),
    fake_builder: ("IOptimizationProfile", "ITimingCache"),
    fake_refit: ("Refitter",),
}
_FULL_ONLY = {
    fake_builder: ("Builder", "IBuilderConfig"),
    fake_network: ("INetworkDefinition", "ITensor", "ILayer", "OnnxParser", "ParserError"),
    fake_inspector: ("EngineInspector",),
    fake_refit: ("OnnxParserRefitter",),
}
_FULL_ONLY_ENUMS = ("NetworkDefinitionCreationFlag", "OnnxParserFlag", "LayerType", "ErrorCode", "TensorFormat")
_SHORT_NAMES = {
    "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32", "int64": "INT64",
    "bool": "BOOL", "uint8": "UINT8", "fp8": "FP8", "int4": "INT4", "fp4": "FP4", "e8m0": "E8M0",
}  # fmt: skip


def make_module(name: str, version: str, *, lean: bool) -> ModuleType:
    """The module; its classes act on the fake that is installed when they are used."""
    module: Any = ModuleType(name, "A fake; see fakes.")
    module.__version__ = version
    module.__path__ = []
    real = fake_trt_base.read_api(api_version(version))["classes"]
    for source, names in (_SHARED if lean else _SHARED | _merge(_FULL_ONLY)).items():
        for class_name in names:
            setattr(module, class_name, _with_members_of(real[class_name], getattr(source, class_name)))
    if not lean:
        module.init_libnvinfer_plugins = lambda logger, namespace: True
        module.get_nv_onnx_parser_version = lambda: 110400
    for enum_name, enum in enums_of(version).items():
        if not (lean and enum_name in _FULL_ONLY_ENUMS):
            setattr(module, enum_name, enum)
    for short, member in _SHORT_NAMES.items():
        setattr(module, short, enums_of(version)["DataType"][member])
    module.nptype, module.volume = nptype, volume
    return module


def _with_members_of(real: dict[str, Any], cls: type) -> type:
    """The class without the members that the real one of this version does not have yet."""
    newer = {name for name in vars(cls) if not name.startswith(("_", "fake_")) and name not in real}
    if not newer:
        return cls
    kept = {name: member for name, member in vars(cls).items() if name not in {*newer, "__dict__", "__weakref__"}}
    return type(cls.__name__, cls.__bases__, kept)


def _merge(extra: dict[ModuleType, tuple[str, ...]]) -> dict[ModuleType, tuple[str, ...]]:
    return {source: (*_SHARED.get(source, ()), *names) for source, names in extra.items()}


def nptype(trt_type: Any) -> Any:
    """The numpy type; TypeError for those numpy does not have."""
    known = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64}
    known |= {"BOOL": np.bool_, "UINT8": np.uint8}
    if trt_type.name not in known:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return known[trt_type.name]


def volume(iterable: Any) -> int:
    """Product of the elements."""
    result = 1
    for item in iterable:
        result *= item
    return result
