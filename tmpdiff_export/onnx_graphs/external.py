"""Weights outside of the graph: data-less initializers, and the safetensors files that they refer to.

A safetensors file holds the tensors' bytes as ONNX wants them, so that external data is a place in it. A tensor has no
place yet while its graph is made: such an initializer is data-less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from engines.errors import BuildError, first_line
from engines.files import atomic_write_bytes
from tmpdiff_export.weights.files import places

# How files store each type; two codes of four bits to a byte, the first in its low half.
_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
}
_FOUR_BIT = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)


def data_less(name: str, data_type: int, dims: Iterable[int]) -> onnx.TensorProto:
    """An initializer of a `TensorProto` type whose values are elsewhere; `refer` says where."""
    return TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)


def tensor_type(dtype: torch.dtype) -> int:
    """The `TensorProto` type of tensors of a dtype."""
    return next(kind for kind, item in _DTYPES.items() if item is dtype)


def is_external(item: onnx.TensorProto) -> bool:
    """Whether the values of an initializer are not in the graph."""
    return bool(item.data_location == TensorProto.EXTERNAL)


def data_less_tensors(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """What files have to hold for a graph, by name: `stored_form` of every data-less initializer."""
    return {item.name: stored_form(item) for item in model.graph.initializer if is_external(item)}


def stored_form(item: onnx.TensorProto) -> torch.Tensor:
    """Shape and dtype in which a file has an initializer's values, on the device "meta".

    Four-bit codes are uint8, two a byte; [K, N] of them is [K N / 2].
    """
    if item.data_type in _FOUR_BIT:
        return torch.empty(math.prod(item.dims) // 2, dtype=torch.uint8, device="meta")
    return torch.empty(tuple(item.dims), dtype=_DTYPES[item.data_type], device="meta")


def refer(model: onnx.ModelProto, paths: Sequence[Path]) -> None:
    """Says where the values of every data-less initializer are, in place.

    Args:
        model: will be saved in the folder of the files; initializers that refer to a file already still do.
        paths: safetensors files of one folder.

    Raises:
        BuildError: a tensor is missing, or has another type or size.
        OSError: a file cannot be read.
    """
    found = {name: place for path in paths for name, place in places(path).items()}
    for item in model.graph.initializer:
        if not is_external(item) or item.external_data:
            continue
        place, form = found.get(item.name), stored_form(item)
        names = ", ".join(path.name for path in paths)
        if place is None:
            raise BuildError(f"weight {item.name} of the graph is in none of {names or 'its files'}; write it first")
        if place.dtype is not form.dtype or place.size_bytes != form.numel() * form.element_size():
            raise BuildError(
                f"weight {item.name} is {place.dtype} {list(place.shape)} in {place.path.name}, the graph expects "
                f"{form.dtype} {list(form.shape)}"
            )
        for key, value in (("location", place.path.name), ("offset", place.offset), ("length", place.size_bytes)):
            item.external_data.add(key=key, value=str(value))


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph; its weights are in the files that it refers to."""
    atomic_write_bytes(path, model.SerializeToString())


def save_checked(model: onnx.ModelProto, path: Path) -> None:
    """Runs `onnx.checker` with shape inference and writes the file.

    The weight files need not be there; the checker, which refuses files with a second name, does not see them.

    Raises:
        BuildError: the checker refuses the graph.
    """
    try:
        onnx.checker.check_model(weights_as_inputs(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"ONNX file {path.name} is not valid: {first_line(error)}") from error
    save_graph(model, path)


def weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that takes its external weights as inputs: all types and shapes, and nothing to read."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    kept = [item for item in graph.initializer if not is_external(item)]
    graph.input.extend(
        helper.make_tensor_value_info(item.name, item.data_type, item.dims)
        for item in graph.initializer
        if is_external(item)
    )
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return result
