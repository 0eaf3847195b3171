"""Clean ONNX export of a torch module: one float type, parameters under their torch names."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from engines.errors import BuildError, first_line
from tmpdiff_export.quantization.sixteen_bit import sixteen_bit_tensors

EXPORT_OPSET = 20
EXTERNAL_DATA_BYTES = 2_000_000_000


@dataclass(frozen=True)
class ExportInput:
    """One graph input: its name, an example, and which axes are symbolic.

    Attributes:
        name: graph input name.
        example: a tensor of the traced shape; floating inputs become FP16 unless `keep_dtype`.
        axes: axis number to symbol, for example {0: "batch"}.
        keep_dtype: leave the example's dtype (a timestep of 999.5 does not exist in FP16).
    """

    name: str
    example: torch.Tensor
    axes: Mapping[int, str]
    keep_dtype: bool = False


def export_graph(
    module: torch.nn.Module,
    inputs: Sequence[ExportInput],
    outputs: Mapping[str, Mapping[int, str]],
    path: Path,
    *,
    half: bool,
) -> onnx.ModelProto:
    """Exports `module` and returns the graph with its weights in memory.

    Uses torch's TorchScript exporter without constant folding, because that keeps the name of every
    parameter, by which scales are attached later.

    Args:
        module: traced in inference mode; with `half` it is in FP16 meanwhile and as it was afterwards, bit for bit.
        inputs: in the order of `module.forward`.
        outputs: graph outputs with their symbolic axes.
        path: scratch file for the exporter; large models leave weight files beside it.
        half: FP16 tensors throughout (a denoiser) or FP32 (text encoders and VAEs, some of which
            overflow in FP16).

    Raises:
        BuildError: the exporter does not support the module.
    """
    axes = {item.name: dict(item.axes) for item in inputs if item.axes}
    axes |= {name: dict(symbols) for name, symbols in outputs.items()}
    examples = tuple(
        item.example.half() if half and item.example.is_floating_point() and not item.keep_dtype else item.example
        for item in inputs
    )
    try:
        with (
            _half_precision(module) if half else contextlib.nullcontext(),
            torch.inference_mode(),
            _static_squeeze(),
            _plain_rms_norm(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                examples,
                str(path),
                input_names=[item.name for item in inputs],
                output_names=list(outputs),
                opset_version=EXPORT_OPSET,
                dynamo=False,
                do_constant_folding=False,
                dynamic_axes=axes,
            )
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, torch.onnx.OnnxExporterError) as error:
        raise BuildError(f"ONNX export of {type(module).__name__} failed: {first_line(error)}") from error
    model = onnx.load(path)
    tidy(model)
    return model


def tidy(model: onnx.ModelProto) -> None:
    """Folds Identity and Transpose of initializers, drops stale shapes and unused nodes, in place."""
    graph = model.graph
    initializers = {item.name: item for item in graph.initializer}
    alias: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = alias.get(name, name)
        source = initializers.get(node.input[0]) if len(node.input) == 1 else None
        if node.op_type == "Identity" and source is not None:
            alias[node.output[0]] = node.input[0]
            continue
        if node.op_type == "Transpose" and source is not None:
            order = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
            folded = numpy_helper.from_array(numpy_helper.to_array(source).transpose(order).copy(), f"{source.name}^T")
            if folded.name not in initializers:
                initializers[folded.name] = folded
                graph.initializer.append(folded)
            alias[node.output[0]] = folded.name
            continue
        kept.append(node)
    for item in graph.output:
        if item.name in alias:
            raise BuildError(f"graph output {item.name} is a constant; the module ignores its inputs")
    del graph.node[:]
    graph.node.extend(kept)
    del graph.value_info[:]
    drop_unused(graph)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Removes nodes and initializers that no output needs, in place."""
    live = {item.name for item in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in live for name in node.output):
            kept.append(node)
            live.update(_inputs_of(node))
    kept.reverse()
    del graph.node[:]
    graph.node.extend(kept)
    weights = [item for item in graph.initializer if item.name in live]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers."""
    return sum(item.ByteSize() for item in model.graph.initializer)


def save_graph(model: onnx.ModelProto, path: Path) -> Path | None:
    """Writes a graph; above 2 GB its weights go to `<path>.data`, whose path is returned."""
    if weight_bytes(model) < EXTERNAL_DATA_BYTES:
        onnx.save(model, path)
        return None
    data = path.with_suffix(path.suffix + ".data")
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    # Saving leaves the weights in the file only; the caller's graph keeps its own.
    load_external_data_for_model(model, str(path.parent))
    return data


def save_checked(model: onnx.ModelProto, path: Path) -> Path | None:
    """Runs `onnx.checker` with shape inference and writes the file; above 2 GB weights go beside it.

    Returns:
        The weight file beside `path`, or None if everything is in `path`.

    Raises:
        BuildError: the checker refuses the graph.
    """
    data = save_graph(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"ONNX file {path.name} is not valid: {first_line(error)}") from error
    return data


def is_float16(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor holds FP16 values."""
    return bool(tensor.data_type == TensorProto.FLOAT16)


def _inputs_of(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _inputs_of(inner)


@contextlib.contextmanager
def _half_precision(module: torch.nn.Module) -> Iterator[None]:
    tensors = list(sixteen_bit_tensors(module))
    original = [item.data for item in tensors]
    try:
        for item in tensors:
            item.data = item.data.half()
        yield
    finally:
        for item, data in zip(tensors, original, strict=True):
            item.data = data


@contextlib.contextmanager
def _static_squeeze() -> Iterator[None]:
    """Lets `squeeze(dim)` of a dimension other than 1 be the no-op it is.

    With symbolic axes the TorchScript exporter cannot know the size and writes an If whose Squeeze
    branch fails shape inference; the traced size decides here instead.
    """
    original = torch.Tensor.squeeze

    def squeeze(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
        if len(dims) == 1 and isinstance(dims[0], int) and int(tensor.shape[dims[0]]) != 1:
            return tensor
        return original(tensor, *dims)

    torch.Tensor.squeeze = squeeze
    try:
        yield
    finally:
        torch.Tensor.squeeze = original


@contextlib.contextmanager
def _plain_rms_norm() -> Iterator[None]:
    """Writes `torch.nn.RMSNorm` as plain operations: at this opset the exporter has none for it.

    In FP32, as torch computes it for FP16 tensors.
    """
    original = torch.nn.RMSNorm.forward

    def forward(norm: torch.nn.RMSNorm, data: torch.Tensor) -> torch.Tensor:
        axes = list(range(-len(norm.normalized_shape), 0))
        wide = data.float()
        eps = torch.finfo(data.dtype).eps if norm.eps is None else norm.eps
        result = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)
        return (result if norm.weight is None else result * norm.weight.float()).to(data.dtype)

    torch.nn.RMSNorm.forward = forward
    try:
        yield
    finally:
        torch.nn.RMSNorm.forward = original
