"""Fake engine inspector: the JSON shape of the real one at each profiling verbosity."""

from __future__ import annotations

import json
from typing import Any

from fakes.fake_plan import LayerInfo
from fakes.fake_trt_base import installation

_LONG = {"FLOAT": "FP32", "HALF": "FP16"}
_SHORT = {
    "FLOAT": "Float",
    "HALF": "Half",
    "BF16": "BFloat16",
    "INT8": "Int8",
    "INT32": "Int32",
    "INT64": "Int64",
    "BOOL": "Bool",
    "INT4": "Int4",
}


def format_name(dtype: str, style: str) -> str:
    """How the inspector spells a type; both spellings occur in real engines."""
    if style == "long":
        return f"Row major linear {_LONG.get(dtype, dtype)} format"
    return _SHORT.get(dtype, dtype)


class EngineInspector:
    """Describes the layers of an engine."""

    def __init__(self) -> None:
        raise TypeError("EngineInspector: No constructor defined!")

    @classmethod
    def _fake_create(cls, engine: Any) -> EngineInspector:
        inspector = cls.__new__(cls)
        inspector._engine = engine
        inspector.execution_context = None
        return inspector

    def get_engine_information(self, format: Any) -> str:
        plan = self._engine.fake_plan
        verbosity = plan.profiling_verbosity
        layers = [] if verbosity == "NONE" else [_describe(item, verbosity) for item in plan.layers]
        if format.name == "ONELINE":
            return "\n".join(str(item) for item in layers)
        return json.dumps({"Layers": layers, "Bindings": [item.name for item in plan.tensors]}, indent=1)

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        plan = self._engine.fake_plan
        described = _describe(plan.layers[layer_index], plan.profiling_verbosity)
        return json.dumps(described) if format.name == "JSON" else str(described)


def _describe(layer: LayerInfo, verbosity: str) -> Any:
    if verbosity == "LAYER_NAMES_ONLY":
        return layer.name
    style = installation().formats

    def tensors(rows: Any) -> list[dict[str, Any]]:
        return [
            {"Name": name, "Location": "Device", "Dimensions": list(dims), "Format/Datatype": format_name(dtype, style)}
            for name, dims, dtype in rows
        ]

    return {
        "Name": layer.name,
        "LayerType": layer.kind,
        "Inputs": tensors(layer.inputs),
        "Outputs": tensors(layer.outputs),
        "TacticName": f"fake_{layer.compute.lower()}_{layer.kind}",
        "StreamId": 0,
        "Metadata": f"[ONNX Layer: {layer.name.rsplit('_myl0_', 1)[0]}]",
    }
