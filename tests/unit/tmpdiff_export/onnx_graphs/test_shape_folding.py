"""Arithmetic on shapes is folded, without weights, and without a change of what the graph computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from helpers.stored_graphs import save_stored

from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.shape_folding import Sizes, fold_shapes


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


class Halving(torch.nn.Module):
    """As a UNet: halves, rounded up, and back to the size there was; and what rounds down, and cuts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = torch.nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.table = torch.nn.Parameter(torch.randn(1, 64, 64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        rows, columns = height // 2, width // 2
        halves = self.down(self.down(x))
        back = torch.nn.functional.interpolate(halves, size=x.shape[2:], mode="nearest")
        cut = x[:, :, : 2 * rows, : 2 * columns].reshape(x.shape[0], 4, rows, 2, columns, 2).mean(dim=(3, 5))
        table = self.table[:, (64 - rows) // 2 :][:, :rows, :columns].permute(0, 3, 1, 2)
        return back + (cut + table).mean(dim=(2, 3), keepdim=True) + height / width + height % 2


def test_nothing_that_depends_on_height_or_width_becomes_a_constant(tmp_path: Path) -> None:
    axes = {0: "batch", 2: "height", 3: "width"}
    module = Halving().eval().requires_grad_(False)
    graph = export_graph(module, [ExportInput("x", torch.zeros(1, 4, 16, 8), axes)], {"y": axes}, half=False)
    before = len(graph.graph.node)
    assert fold_shapes(graph, Sizes(largest=64)) == before - len(graph.graph.node) > 20
    engine = onnxruntime.InferenceSession(save_stored(graph, tmp_path / "graph.onnx", module))
    for height, width in ((16, 8), (8, 16), (13, 21), (33, 17), (64, 64)):
        data = torch.randn(3, 4, height, width)
        with torch.inference_mode():
            expected = module(data).numpy()
        np.testing.assert_allclose(engine.run(None, {"x": data.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


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
    assert fold_shapes(after, Sizes()) > 20
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
