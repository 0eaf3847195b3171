"""Clean ONNX graphs of torch modules: one float type, weights by name only, under the names of the parameters."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch

from engines.errors import BuildError, first_line
from tmpdiff_export.onnx_graphs.external import data_less, is_external
from tmpdiff_export.onnx_graphs.stored import TRANSPOSED
from tmpdiff_export.onnx_graphs.tracing import plain_operators, traced_tensors, without_arithmetic

EXPORT_OPSET = 20


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
    module: torch.nn.Module, inputs: Sequence[ExportInput], outputs: Mapping[str, Mapping[int, str]], *, half: bool
) -> onnx.ModelProto:
    """Exports `module` and returns its graph without weights.

    Its parameters and buffers are data-less initializers (`external.data_less`), called as in the module, and
    `<name>^T` where the transposed weight is used. Their values do not count, so that they may be placeholders. What the
    module computes from constants alone is in the graph.

    Uses torch's TorchScript exporter without constant folding, because that keeps the name of every
    parameter, by which scales are attached later.

    Args:
        module: on the CPU, traced in inference mode; as it was afterwards, bit for bit.
        inputs: in the order of `module.forward`.
        outputs: graph outputs with their symbolic axes.
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
    names = [item.name for item in inputs]
    written = io.BytesIO()
    shapes: list[tuple[int, ...]] = []
    try:
        with (
            traced_tensors(module, half=half),
            without_arithmetic(module),
            plain_operators(),
            torch.inference_mode(),
            _noting_outputs(module, shapes),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                examples,
                written,
                export_params=False,
                keep_initializers_as_inputs=True,  # else weights that are equal would become one
                input_names=names,
                output_names=list(outputs),
                opset_version=EXPORT_OPSET,
                dynamo=False,
                do_constant_folding=False,
                dynamic_axes=axes,
            )
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, torch.onnx.OnnxExporterError) as error:
        raise BuildError(f"ONNX export of {type(module).__name__} failed: {first_line(error)}") from error
    model = onnx.load_from_string(written.getvalue())
    _take_weights(model.graph, names)
    for value, shape in zip(model.graph.output, shapes, strict=True):
        _set_sizes(value, shape, outputs[value.name])
    tidy(model)
    return model


@contextlib.contextmanager
def _noting_outputs(module: torch.nn.Module, shapes: list[tuple[int, ...]]) -> Iterator[None]:
    """Within it `shapes` becomes those of what `module` has returned last."""

    def note(_: torch.nn.Module, __: Any, returned: Any) -> None:
        results = returned if isinstance(returned, tuple) else (returned,)
        shapes[:] = [tuple(int(size) for size in item.shape) for item in results]

    handle = module.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _set_sizes(value: onnx.ValueInfoProto, shape: Sequence[int], symbols: Mapping[int, str]) -> None:
    """Gives an output its shape, in place: behind reshapes of symbolic sizes the exporter loses the others."""
    kind = value.type.tensor_type
    value.CopyFrom(
        onnx.helper.make_tensor_value_info(
            value.name, kind.elem_type, [symbols.get(axis, size) for axis, size in enumerate(shape)]
        )
    )


def _take_weights(graph: onnx.GraphProto, inputs: Sequence[str]) -> None:
    """Makes data-less initializers of the graph inputs that are weights, in place."""
    for value in graph.input:
        if value.name not in inputs:
            kind = value.type.tensor_type
            graph.initializer.append(data_less(value.name, kind.elem_type, [axis.dim_value for axis in kind.shape.dim]))
    kept = [value for value in graph.input if value.name in inputs]
    del graph.input[:]
    graph.input.extend(kept)


def tidy(model: onnx.ModelProto) -> None:
    """Folds Identity of weights and Transpose of matrices, drops stale shapes and unused nodes, in place."""
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
        if node.op_type == "Transpose" and source is not None and is_external(source) and len(source.dims) == 2:
            # A permutation of two axes that changed nothing would have been an Identity.
            folded = data_less(f"{source.name}{TRANSPOSED}", source.data_type, source.dims[::-1])
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


def _inputs_of(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _inputs_of(inner)
