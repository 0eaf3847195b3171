"""What the engine inspector's JSON says about a plan: how many layers, and how much time, at which precision.

Pure functions on the parsed JSON of `ProfilingVerbosity.DETAILED`. A tensor carries its type in
"Format/Datatype" up to TensorRT 10 ("Half", "FP8", "Row major linear FP16 format"); TensorRT 11 splits
that field into a format and a data type. Types are recognised by their words, so that a new layout
or a renamed field does not matter; what is not recognised is counted as "other".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from engines.errors import BuildError
from engines.plan_entry import LayerShare

OTHER = "other"
# Narrowest first: a layer that reads FP8 and FP16 tensors multiplies in FP8.
_PRECISIONS = ("nvfp4", "int4", "fp8", "int8", "fp16", "bf16", "fp32")
_WORDS = {
    "fp4": "nvfp4", "e2m1": "nvfp4", "fp4e2m1": "nvfp4", "float4": "nvfp4",
    "int4": "int4", "i4": "int4", "s4": "int4", "u4": "int4",
    "fp8": "fp8", "e4m3": "fp8", "e4m3fn": "fp8", "fp8e4m3": "fp8", "float8": "fp8", "f8": "fp8",
    "int8": "int8", "i8": "int8", "s8": "int8",
    "fp16": "fp16", "half": "fp16", "float16": "fp16", "f16": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
    "fp32": "fp32", "float": "fp32", "float32": "fp32", "f32": "fp32", "tf32": "fp32",
}  # fmt: skip
# An operand pair in a kernel's name: "e4m3e4m3" in sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn.
_OPERANDS = re.compile(r"(?:bf16|tf32|e4m3|e2m1|f16|f32|i8|s8|i4|s4|u4)+")
_OPERAND = re.compile(r"bf16|tf32|e4m3|e2m1|f16|f32|i8|s8|i4|s4|u4")
# Layers that move or convert data and compute nothing: an Int8 reformat is not a quantized layer.
_MOVING = {
    "reformat", "noop", "constant", "shuffle", "slice", "concatenation", "copy", "signal", "wait",
    "shapehosttodevice", "devicetoshapehost", "shape_call",
}  # fmt: skip
MOVING = "data movement"
# Which ONNX nodes a layer came from, and those that only convert: Q/DQ nodes by the names exporters give them.
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_CONVERTING = re.compile(r"(?:Quantize|Dequantize)Linear(?:_\d+)?$|_dq$")
QUANTIZED = {"nvfp4", "int4", "fp8", "int8"}


def read_inspector(text: str) -> list[dict[str, Any]]:
    """The layers in the inspector's JSON.

    Raises:
        BuildError: not the JSON of a plan that was built with detailed profiling verbosity.
    """
    try:
        data = json.loads(text, strict=False)  # ONNX node names are joined with control characters
    except ValueError as error:
        raise BuildError(f"the engine inspector's output is not JSON ({error}); update TensorRT") from None
    layers = data.get("Layers") if isinstance(data, dict) else None
    if not isinstance(layers, list) or not layers:
        raise BuildError("the engine inspector lists no layers; build the plan with detailed profiling verbosity")
    if not all(isinstance(layer, dict) for layer in layers):
        raise BuildError(
            "the engine inspector gives layer names only; build the plan with detailed profiling verbosity"
        )
    return layers


def layer_precision(layer: Mapping[str, Any]) -> str:
    """The precision a layer computes at; `MOVING` for those that move or convert data, `OTHER` if it is not said.

    It is the narrowest type among the layer's inputs, weights and its kernel's operands; the outputs
    decide only where those say nothing.
    """
    nodes = _ONNX_NODE.findall(str(layer.get("Metadata", "")))
    only_converts = bool(nodes) and all(_CONVERTING.search(node) for node in nodes)
    if only_converts or str(layer.get("LayerType", "")).lower() in _MOVING:
        return MOVING
    read = {*_types(layer.get("Inputs")), *_types([layer.get("Weights")]), *_tactic_types(layer.get("TacticName"))}
    found = read or set(_types(layer.get("Outputs")))
    return next((precision for precision in _PRECISIONS if precision in found), OTHER)


def summarize(
    layers: Iterable[Mapping[str, Any]], times_ms: Mapping[str, float] | None = None
) -> dict[str, LayerShare]:
    """Layers and time by precision.

    Args:
        layers: as `read_inspector` returns them.
        times_ms: layer name -> time of one run or the sum of several, from an `IProfiler`; None if the
            plan was not profiled. Time of layers that the inspector does not list counts as `OTHER`.

    Returns:
        Precision (or `MOVING`, `OTHER`) -> its layers, the narrowest precision first.
    """
    precisions = [(str(layer.get("Name", "")), layer_precision(layer)) for layer in layers]
    counts = dict.fromkeys((*_PRECISIONS, MOVING, OTHER), 0)
    for _, precision in precisions:
        counts[precision] += 1
    if times_ms is None:
        return {name: LayerShare(layers=count) for name, count in counts.items() if count}
    spent = dict.fromkeys(counts, 0.0)
    of_layer = dict(precisions)
    for name, time_ms in times_ms.items():
        spent[of_layer.get(name, OTHER)] += time_ms
    total = sum(spent.values())
    return {
        name: LayerShare(layers=count, time_share=spent[name] / total if total > 0 else None)
        for name, count in counts.items()
        if count or spent[name] > 0
    }


def require_quantized(precision: str, shares: Mapping[str, LayerShare]) -> None:
    """Refuses a quantized plan in which nothing is.

    Any layer that reads quantized data counts, unless it came from Q/DQ nodes alone: a false alarm would
    stop a good build, and what slips through shows in its latency (`speed_warning`).

    Raises:
        BuildError: naming the layers by precision.
    """
    if precision in QUANTIZED and precision not in shares:
        counts = ", ".join(f"{name} {share.layers}" for name, share in shares.items())
        raise BuildError(
            f"the {precision} plan has no {precision} layers (layers by precision: {counts}): TensorRT fused none of its "
            "Q/DQ nodes; leave this precision out, or quantize other layers of the model"
        )


def speed_warning(precision: str, latency_ms: float, fp16_ms: float) -> str | None:
    """What to tell the user if a quantized engine gains nothing over FP16, else None."""
    if precision not in QUANTIZED or latency_ms < fp16_ms:
        return None
    return (
        f"{precision} is not faster than fp16 here ({latency_ms:.3f} ms against {fp16_ms:.3f} ms a call); "
        "no schedule will use it unless it needs less memory"
    )


def _types(tensors: Any) -> Iterable[str]:
    """Known types of inspector entries for tensors or weights; anything else in the list is passed over."""
    for tensor in tensors if isinstance(tensors, list) else []:
        if not isinstance(tensor, dict):
            continue
        fields = {key.lower().replace(" ", ""): str(value) for key, value in tensor.items()}
        # "Type" is the field of weights. A data type is more exact than a format: formats call an Int64 tensor INT8.
        for key in ("datatype", "type", "format/datatype", "format"):
            if key in fields:
                yield from _words(fields[key])
                break


def _words(text: str) -> list[str]:
    """The first known type in a description such as "Channel major FP16 format where channel % 8 == 0"."""
    tokens = re.findall(r"[a-z0-9]+", text.lower())
    return [_WORDS[token] for token in tokens if token in _WORDS][:1]


def _tactic_types(tactic: Any) -> list[str]:
    """The operand types in a matrix kernel's name; later tokens are outputs and accumulators."""
    tokens = str(tactic or "").lower().split("_")
    operands = next((token for token in tokens if _OPERANDS.fullmatch(token)), "")
    return [_WORDS[operand] for operand in _OPERAND.findall(operands)]
