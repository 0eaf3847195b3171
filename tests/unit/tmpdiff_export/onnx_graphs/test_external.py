"""Graphs that refer to safetensors files: the right bytes, and the refusal of wrong ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from engines.backends.onnx_references import references
from engines.errors import BuildError
from tmpdiff_export.onnx_graphs.external import data_less, data_less_tensors, refer, save_checked
from tmpdiff_export.weights.files import write_tensors

WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4)


def two_products() -> onnx.ModelProto:
    """x [batch, 3] times `a` [3, 4] times `b` [4, 2]."""
    nodes = [helper.make_node("MatMul", ["x", "a"], ["between"]), helper.make_node("MatMul", ["between", "b"], ["y"])]
    values = [helper.make_tensor_value_info(*item) for item in (("x", 1, ("batch", 3)), ("y", 1, ("batch", 2)))]
    weights = [data_less("a", TensorProto.FLOAT, (3, 4)), data_less("b", TensorProto.FLOAT, (4, 2))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_graph_reads_its_weights_from_several_files_that_have_further_names(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one.safetensors", {"a": WEIGHT, "unused": torch.zeros(5, dtype=torch.int64)})
    write_tensors(tmp_path / "two.safetensors", {"b": torch.ones(4, 2)})
    os.link(tmp_path / "one.safetensors", tmp_path / "link")
    model = two_products()
    refer(model, [tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    save_checked(model, tmp_path / "model.onnx")
    assert {item.location for item in references(tmp_path / "model.onnx")} == {"one.safetensors", "two.safetensors"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], WEIGHT.numpy() @ np.ones((4, 2), np.float32))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": WEIGHT}, r"weight b of the graph is in none of w\.safetensors; write it first"),
        (
            {"a": WEIGHT.half(), "b": torch.ones(4, 2)},
            r"weight a is torch\.float16 \[3, 4\] in w\.safetensors, the graph expects torch\.float32 \[3, 4\]",
        ),
        (
            {"a": WEIGHT, "b": torch.ones(4, 3)},
            r"weight b is .* \[4, 3\] in w\.safetensors, the graph expects .* \[4, 2\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", tensors)
    with pytest.raises(BuildError, match=message):
        refer(two_products(), [tmp_path / "w.safetensors"])


def test_a_graph_that_is_not_valid_is_not_written(tmp_path: Path) -> None:
    model = two_products()
    model.graph.initializer[1].dims[0] = 5
    with pytest.raises(BuildError, match=r"ONNX file model\.onnx is not valid"):
        save_checked(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_four_bit_codes_are_stored_two_a_byte() -> None:
    model = two_products()
    model.graph.initializer.append(data_less("codes", TensorProto.INT4, (4, 6)))
    form = data_less_tensors(model)["codes"]
    assert (form.dtype, tuple(form.shape)) == (torch.uint8, (12,))
