"""Folds the arithmetic on shapes that tracing with symbolic axes leaves behind.

A traced transformer computes every reshape from Shape, Gather, Concat and the like: two thirds of its
nodes, and on a small model a tenth of the time. Nearly all of those values do not depend on the symbolic
axes. Instead of reasoning about them, the graph is run at two settings of its symbolic axes: what comes out
equal is a constant, and the target of a reshape copies (0) or infers (-1) the entries that differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tmpdiff_export.onnx_graphs.export import drop_unused, save_graph
from tmpdiff_export.onnx_graphs.fp32 import to_fp32

# Larger "constants" are tables that were computed on purpose; storing them would grow the file.
LARGEST_CONSTANT = 64
_NUMPY = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.INT64: np.int64,
}


def fold_shapes(model: onnx.ModelProto, scratch: Path) -> int:
    """Replaces shape arithmetic by constants, in place.

    Args:
        model: as exported; every graph input has known sizes but for its symbolic axes.
        scratch: path for a temporary copy of the graph, removed afterwards.

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
    first, second = (
        _values(model, names, ends, sizes, scratch) for sizes in ({"batch": 2, "text": 23}, {"batch": 3, "text": 41})
    )
    constants = {
        name: first[name]
        for name in names
        if first[name].size <= LARGEST_CONSTANT and np.array_equal(first[name], second[name])
    }
    for node in reshapes:
        shapes = [(values[f"{node.input[0]}_size"], values[f"{node.output[0]}_size"]) for values in (first, second)]
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


def _shape_only(graph: onnx.GraphProto) -> list[str]:
    """Tensors computed from shapes and constants alone."""
    constant = {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    constant |= {item.name for item in graph.initializer if int(np.prod(item.dims)) <= LARGEST_CONSTANT}
    found: dict[str, None] = {}
    for node in graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            continue
        from_shapes = all(name == "" or name in constant or name in found for name in node.input)
        if node.op_type == "Shape" or (node.op_type != "Constant" and from_shapes):
            found.update(dict.fromkeys(node.output))
    return list(found)


def _values(
    model: onnx.ModelProto, names: Sequence[str], ends: Sequence[str], sizes: Mapping[str, int], scratch: Path
) -> dict[str, np.ndarray]:
    """The tensors called `names`, and the shape of each of `ends` as `<name>_size`, at `sizes` of the symbolic axes.

    Shapes are read off a float32 copy of the graph: ONNX Runtime 1.30 refuses SD3's in FP16, where its own casts do not
    fit together. What is computed from them keeps its types, in a graph of its own.
    """
    shapes = [name for node in model.graph.node if node.op_type == "Shape" for name in node.output]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    to_fp32(probe.graph, Counter())
    del probe.graph.value_info[:]
    probe.graph.node.extend(helper.make_node("Shape", [name], [f"{name}_size"]) for name in ends)
    feeds = {
        value.name: np.ones(
            [sizes[axis.dim_param] if axis.dim_param else axis.dim_value for axis in value.type.tensor_type.shape.dim],
            _NUMPY[value.type.tensor_type.elem_type],
        )
        for value in probe.graph.input
    }
    found = _run(probe, [*shapes, *(f"{name}_size" for name in ends)], feeds, scratch)

    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.graph.input[:], rest.graph.value_info[:]
    nodes = [node for node in rest.graph.node if node.op_type == "Constant" or set(node.output) & {*names} - {*shapes}]
    del rest.graph.node[:]
    rest.graph.node.extend(nodes)
    given = {name: found[name] for name in shapes}
    rest.graph.input.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, value.shape) for name, value in given.items()
    )
    computed = [name for name in names if name not in given]
    return found | (_run(rest, computed, given, scratch) if computed else {})


def _run(
    model: onnx.ModelProto, wanted: Sequence[str], feeds: Mapping[str, np.ndarray], scratch: Path
) -> dict[str, np.ndarray]:
    """Tensors of a graph by name; changes its outputs."""
    import onnxruntime

    from engines.backends.onnxruntime.cpu import PROVIDER

    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    drop_unused(model.graph)
    weights = save_graph(model, scratch)
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(scratch), options, providers=[PROVIDER])
        taken = {item.name: feeds[item.name] for item in session.get_inputs()}
        return dict(zip(wanted, session.run(wanted, taken), strict=True))
    finally:
        scratch.unlink()
        if weights is not None:
            weights.unlink()


def _reshape_target(*runs: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
    """A constant target for a reshape whose (input, output) shapes in two runs are given, None if there is none.

    An entry that differs is 0 where the input has the same size on that axis in both runs (it is copied), and
    -1 once elsewhere (it is inferred).
    """
    after, other = runs[0][1], runs[1][1]
    if after.shape != other.shape:
        return None
    target = after.astype(np.int64)
    inferred = 0
    for axis in np.flatnonzero(after != other):
        if all(axis < len(source) and source[axis] == result[axis] for source, result in runs):
            target[axis] = 0
        else:
            target[axis] = -1
            inferred += 1
    return target if inferred <= 1 and after.all() else None
