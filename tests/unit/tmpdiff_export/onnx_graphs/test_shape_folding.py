"""Arithmetic on shapes is folded, without weights, and without a change of what the graph computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from helpers.stored_graphs import save_stored

from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.shape_folding import fold_shapes


class Attention(torch.nn.Module):
    """Reshapes as attention has them: a symbolic batch, a symbolic text length, fixed heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        batch, _, width = x.shape
        q = self.projection(x).view(batch, -1, 4, width // 4).transpose(1, 2)
        k = text.view(batch, -1, 4, width // 4).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        return out.transpose(1, 2).reshape(batch, -1, width).squeeze(1)


def test_folding_shapes_changes_no_bit_at_any_size(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    shape = {"x": (2, 9, 32), "text": (2, 5, 32)}
    inputs = [
        ExportInput(name, torch.zeros(size), {0: "batch", **({1: "text"} if name == "text" else {})})
        for name, size in shape.items()
    ]
    module = Attention().eval().requires_grad_(False)
    before = export_graph(module, inputs, {"y": {0: "batch"}}, half=False)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    assert fold_shapes(after) > 20
    assert not any(node.op_type in ("Shape", "Gather", "Concat", "If") for node in after.graph.node)
    engines = []
    for name, model in (("before", before), ("after", after)):
        path = save_stored(model, tmp_path / f"{name}.onnx", module)
        options = onnxruntime.SessionOptions()  # constants let its optimizer fuse more, which rounds differently
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        engines.append(onnxruntime.InferenceSession(str(path), options))
    for batch, length in ((1, 1), (2, 5), (3, 7), (5, 40)):
        arrays = {
            "x": generator.standard_normal((batch, 9, 32)).astype(np.float32),
            "text": generator.standard_normal((batch, length, 32)).astype(np.float32),
        }
        expected, measured = (engine.run(None, arrays)[0] for engine in engines)
        assert expected.shape == (batch, 9, 32)
        np.testing.assert_array_equal(measured, expected)
