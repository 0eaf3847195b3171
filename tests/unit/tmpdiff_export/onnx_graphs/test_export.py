"""Graphs are traced without weights: from placeholders, without arithmetic, and the module is as it was."""

from __future__ import annotations

import copy
import resource
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.stored_graphs import save_stored

from engines.errors import BuildError
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.external import is_external
from tmpdiff_export.weights.streamed import hollow

OUTPUTS = {"y": {0: "batch"}}


class Parts(torch.nn.Module):
    """A convolution, layers with one weight, equal biases, a table of indices, buffers that are float32 and that are not."""

    float32_buffers = ("fine",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.tied = torch.nn.Linear(32, 32)
        self.tied.weight = self.first.weight
        for layer in (self.first, self.second, self.tied):
            torch.nn.init.zeros_(layer.bias)
        self.convolution = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norm = torch.nn.RMSNorm(32, eps=1e-6)
        self.register_buffer("order", torch.randperm(32))
        self.register_buffer("coarse", torch.randn(32))
        self.register_buffer("fine", torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolution(x)
        x = self.norm(self.tied(torch.nn.functional.silu(self.second(self.first(x)))))
        x = x[..., self.order] + self.coarse
        return (x.float() * self.fine).to(x.dtype)


@pytest.fixture
def module() -> Parts:
    return Parts().eval().requires_grad_(False)


@pytest.fixture
def inputs() -> list[ExportInput]:
    return [ExportInput("x", torch.randn(2, 4, 8, 32, generator=torch.Generator().manual_seed(1)), {0: "batch"})]


@pytest.mark.parametrize("half", [False, True])
def test_the_graph_computes_what_the_module_does(
    half: bool, module: Parts, inputs: list[ExportInput], tmp_path: Path
) -> None:
    graph = export_graph(module, inputs, OUTPUTS, half=half)
    session = onnxruntime.InferenceSession(save_stored(graph, tmp_path / "model.onnx", module))
    for batch in (1, 2):
        x = inputs[0].example[:batch]
        (measured,) = session.run(None, {"x": x.numpy().astype(np.float16 if half else np.float32)})
        tolerance = 5e-2 if half else 1e-5
        np.testing.assert_allclose(measured, module(x).numpy(), rtol=tolerance, atol=tolerance)


def test_weights_are_names_with_types_and_shapes(module: Parts, inputs: list[ExportInput]) -> None:
    graph = export_graph(module, inputs, OUTPUTS, half=True).graph
    kinds = onnx.TensorProto
    found = {item.name: (item.data_type, tuple(item.dims)) for item in graph.initializer if is_external(item)}
    assert found == {
        "first.weight^T": (kinds.FLOAT16, (32, 32)),  # of `tied` too
        "second.weight^T": (kinds.FLOAT16, (32, 32)),
        **{f"{name}.bias": (kinds.FLOAT16, (32,)) for name in ("first", "second", "tied")},  # equal, and each its own
        "convolution.weight": (kinds.FLOAT16, (4, 4, 3, 3)),
        "convolution.bias": (kinds.FLOAT16, (4,)),
        "norm.weight": (kinds.FLOAT16, (32,)),
        "order": (kinds.INT64, (32,)),
        "coarse": (kinds.FLOAT16, (32,)),
        "fine": (kinds.FLOAT, (32,)),
    }
    assert not any(item.raw_data or item.external_data for item in graph.initializer if is_external(item))
    assert [value.name for value in graph.input] == ["x"]


def test_values_do_not_count(module: Parts, inputs: list[ExportInput]) -> None:
    empty = copy.deepcopy(module)
    hollow(empty)
    graphs = [export_graph(item, inputs, OUTPUTS, half=True).SerializeToString() for item in (module, empty)]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("half", [False, True])
def test_the_module_is_as_it_was(half: bool, module: Parts, inputs: list[ExportInput]) -> None:
    before = {name: (item, item.data_ptr(), item.clone()) for name, item in module.state_dict(keep_vars=True).items()}
    export_graph(module, inputs, OUTPUTS, half=half)
    after = module.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (item, place, values) in before.items():
        assert after[name] is item
        assert item.data_ptr() == place
        assert item.dtype is values.dtype
        assert torch.equal(item, values)
    assert "forward" not in vars(module)
    assert torch.nn.functional.conv2d is torch.conv2d


def test_a_large_module_is_traced_in_the_memory_of_its_graph() -> None:
    """16 G parameters and activations of 256 MB each: neither is ever there."""
    layers = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(16384, 16384, device="meta"), torch.nn.GELU()) for _ in range(64))
    ).eval()
    hollow(layers)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    example = torch.zeros(1, 1, dtype=torch.float16).expand(8192, 16384)
    graph = export_graph(layers, [ExportInput("x", example, {0: "batch"})], OUTPUTS, half=True)
    assert sum(node.op_type in ("MatMul", "Gemm") for node in graph.graph.node) == 64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB; one activation is more
    assert time.monotonic() - started < 60


def test_a_module_that_ignores_its_inputs_is_refused() -> None:
    class Ignoring(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight

    with pytest.raises(BuildError, match="the module ignores its inputs"):
        export_graph(Ignoring(), [ExportInput("x", torch.zeros(1), {})], {"y": {}}, half=False)
