"""Writes the API of real TensorRT bindings as JSON, which the fakes take their enumerations from and are compared with.

    python tests/fakes/read_api.py tensorrt > tests/fakes/api/tensorrt-11.4.0.106.json

Needs only the bindings to be importable (stub libraries will do), no GPU.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

CLASSES = {
    "Builder",
    "Dims",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProfiler",
    "IProgressMonitor",
    "IStreamReaderV2",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "Refitter",
    "Runtime",
}
# Of these enumerations no member is used.
SKIPPED_ENUMS = re.compile(
    r"Plugin|Operation|Mode$|MoE|Attention|Causal|Resize|Format$|Activation|Loop|Trip|Pooling|Quick"
)
KEPT_ENUMS = ("TensorIOMode", "LayerInformationFormat", "TensorFormat")


def describe(module: Any) -> dict[str, Any]:
    """Enumerations, and per class each property and the parameter names of each overload of each method."""
    enums, classes = {}, {}
    for name in sorted(vars(module)):
        item = getattr(module, name)
        if not isinstance(item, type):
            continue
        if hasattr(item, "__members__") and name[0].isupper():
            if name in KEPT_ENUMS or not SKIPPED_ENUMS.search(name):
                enums[name] = {key: int(value) for key, value in item.__members__.items()}
        elif name in CLASSES:
            classes[name] = {key: _member(item, key) for key in sorted(dir(item)) if not key.startswith("_")}
            classes[name]["__init__"] = _member(item, "__init__")
    severity = {key: int(value) for key, value in module.ILogger.Severity.__members__.items()}
    return {"version": module.__version__, "enums": enums, "severity": severity, "classes": classes}


def _member(owner: type, name: str) -> Any:
    for base in owner.__mro__:
        if isinstance(vars(base).get(name), property):
            return "property" if vars(base)[name].fset is not None else "read-only property"
    member = getattr(owner, name)
    if not callable(member) or isinstance(member, type):
        return "constant"
    signatures = re.findall(rf"(?:^|\d+\. ){name}\((self[^\n]*)\) ->", member.__doc__ or "", re.MULTILINE)
    return [re.findall(r"(?:^|, )(\w+)(?=:|,|$)", re.sub(r"\[[^\]]*\]", "", item)) for item in signatures]


if __name__ == "__main__":
    text = json.dumps(describe(importlib.import_module(sys.argv[1])), indent=1)
    print(re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda match: "[" + " ".join(match[1].split()) + "]", text))
