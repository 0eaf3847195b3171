"""Folds the arithmetic on shapes that tracing with symbolic axes leaves behind.

A traced transformer computes every reshape from Shape, Gather, Concat and the like: two thirds of its
nodes, and on a small model a tenth of the time. Nearly all of those values do not depend on the symbolic
axes. Instead of reasoning about them, ONNX Runtime works out all shapes at some settings of the symbolic axes: what
comes out equal is a constant, and the target of a reshape copies (0) or infers (-1) the entries that differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tmpdiff_export.onnx_graphs.export import drop_unused
from tmpdiff_export.onnx_graphs.external import is_external, weights_as_inputs
from tmpdiff_export.onnx_graphs.fp32 import retype

# Larger "constants" are tables that were computed on purpose; storing them would grow the file.
LARGEST_CONSTANT = 64
# What is the same for all of them is a constant. Heights and widths are even, as most denoisers want them, and no more
# than that: halves rounded up are no halves rounded down.
_BATCHES, _TEXTS = (11, 13, 17), (23, 41, 37)
_SIZES = (58, 94, 122)


def fold_shapes(model: onnx.ModelProto, largest: int | None = None) -> int:
    """Replaces shape arithmetic by constants, in place; needs no weights.

    Args:
        model: as exported; every graph input has known sizes but for its symbolic axes, of which it may have those of
            a denoiser: batch, text, height and width.
        largest: height and width that the graph takes, 8 or more; None for any.

    Returns:
        The number of nodes removed.
    """
    graph = model.graph
    names = _shape_only(graph)
    if not names:
        return 0
    before = len(graph.node)
    reshapes = [node for node in graph.node if node.op_type == "Reshape" and node.input[1] in set(names)]
    ends = list(dict.fromkeys(name for node in reshapes for name in (node.input[0], node.output[0])))
    runs = [_values(model, names, ends, sizes) for sizes in _settings(largest)]
    constants = {
        name: runs[0][name]
        for name in names
        if runs[0][name].size <= LARGEST_CONSTANT and all(np.array_equal(runs[0][name], run[name]) for run in runs)
    }
    for node in reshapes:
        shapes = [(values[f"{node.input[0]}_size"], values[f"{node.output[0]}_size"]) for values in runs]
        target = _reshape_target(*shapes)
        if target is not None:
            node.input[1] = f"{node.output[0]}_shape"
            graph.initializer.append(numpy_helper.from_array(target, node.input[1]))
    kept = []
    for node in graph.node:
        folded = [name for name in node.output if name in constants]
        for name in folded:
            graph.initializer.append(numpy_helper.from_array(constants[name], name))
        if len(folded) < len(node.output):
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused(graph)
    return before - len(graph.node)


def _settings(largest: int | None) -> list[dict[str, int]]:
    """Sizes of the symbolic axes that the graph is looked at with."""
    sizes = _SIZES if largest is None or largest >= max(_SIZES) else (largest - 6, largest - 4, largest)
    return [
        {"batch": batch, "text": text, "height": height, "width": width}
        for batch, text, height, width in zip(_BATCHES, _TEXTS, sizes, (*sizes[2:], *sizes[:2]), strict=True)
    ]


def _shape_only(graph: onnx.GraphProto) -> list[str]:
    """Tensors computed from shapes and constants alone."""
    constant = {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    constant |= {item.name for item in graph.initializer if _is_small(item)}
    found: dict[str, None] = {}
    for node in graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            continue
        from_shapes = all(name == "" or name in constant or name in found for name in node.input)
        if node.op_type == "Shape" or (node.op_type != "Constant" and from_shapes):
            found.update(dict.fromkeys(node.output))
    return list(found)


def _is_small(item: onnx.TensorProto) -> bool:
    return not is_external(item) and int(np.prod(item.dims)) <= LARGEST_CONSTANT


def _values(
    model: onnx.ModelProto, names: Sequence[str], ends: Sequence[str], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The tensors called `names`, and the shape of each of `ends` as `<name>_size`, at `sizes` of the symbolic axes.

    Shapes are read off a float32 copy of the graph: ONNX Runtime refuses SD3's in FP16, where its own casts do not
    fit together. What is computed from them keeps its types, in a graph of its own.
    """
    shapes = [name for node in model.graph.node if node.op_type == "Shape" for name in node.output]
    probe = weights_as_inputs(model)
    retype(probe.graph)
    del probe.graph.value_info[:]
    for value in probe.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = sizes[axis.dim_param]
    probe.graph.node.extend(helper.make_node("Shape", [name], [f"{name}_size"]) for name in ends)
    wanted = [*shapes, *(f"{name}_size" for name in ends)]
    found = _constants(probe, wanted) if wanted else {}

    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.graph.input[:], rest.graph.value_info[:]
    nodes = [node for node in rest.graph.node if node.op_type == "Constant" or set(node.output) & {*names} - {*shapes}]
    del rest.graph.node[:]
    rest.graph.node.extend(nodes)
    rest.graph.initializer.extend(numpy_helper.from_array(found[name], name) for name in shapes)
    computed = [name for name in names if name not in shapes]
    return found | dict(zip(computed, _session(rest, computed).run(computed, {}), strict=True)) if computed else found


def _constants(model: onnx.ModelProto, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Tensors that ONNX Runtime finds to be constant without running the graph, by name; changes its outputs."""
    copies = {name: f"{name}/copy" for name in wanted}  # an output of a graph is not folded, what it is a copy of is
    model.graph.node.extend(helper.make_node("Identity", [name], [copy]) for name, copy in copies.items())
    with tempfile.TemporaryDirectory() as scratch:
        folded = Path(scratch) / "folded.onnx"
        _session(model, list(copies.values()), folded)
        graph = onnx.load(folded).graph
    values = {item.name: item for item in graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    return {name: numpy_helper.to_array(values[sources.get(copy, copy)]) for name, copy in copies.items()}


def _session(model: onnx.ModelProto, wanted: Sequence[str], folded: Path | None = None) -> Any:
    """An ONNX Runtime session for a graph, whose outputs it changes; with its constants folded it is written to `folded`."""
    from engines.backends.onnxruntime.cpu import PROVIDER
    from engines.backends.onnxruntime.session import library

    onnxruntime = library()
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    drop_unused(model.graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folded is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])


def _reshape_target(*runs: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
    """A constant target for a reshape whose (input, output) shapes in some runs are given, None if there is none.

    An entry that differs is 0 where the input has the same size on that axis in all runs (it is copied), and
    -1 once elsewhere (it is inferred).
    """
    after = runs[0][1]
    if any(after.shape != other.shape for _, other in runs):
        return None
    target = after.astype(np.int64)
    inferred = 0
    for axis in np.flatnonzero(np.any([after != other for _, other in runs], axis=0)):
        if all(axis < len(source) and source[axis] == result[axis] for source, result in runs):
            target[axis] = 0
        else:
            target[axis] = -1
            inferred += 1
    return target if inferred <= 1 and after.all() else None
