"""NVFP4 beside a 16-bit branch of low rank: its numbers, and the graph, the CPU engine and the torch layer of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import numpy_codes
from helpers.stored_graphs import inputs_of, save_stored

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.precision import Precision
from tmpdiff_export.demo import pipeline_folder
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.qdq import insert_qdq
from tmpdiff_export.onnx_graphs.stored import layer_tensors
from tmpdiff_export.pipelines.load import open_pipeline
from tmpdiff_export.quantization import nvfp4
from tmpdiff_export.quantization.codes import LayerRange, QuantizedLayer, quantize_layer
from tmpdiff_export.quantization.low_rank import price_db, share_of_fp8, split
from tmpdiff_export.quantization.ranges import quantizable_layers
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.targets.onnxruntime.cpu import cpu_layer_tensors
from tmpdiff_export.targets.onnxruntime.lowering import lower_for_cpu
from tmpdiff_export.targets.torch.layers import linear_from

RECIPE = RECIPES[Precision.NVFP4]
K, N, RANK = 64, 160, 16
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def structured(width: int, depth: int, seed: int = 0) -> torch.Tensor:
    """As trained weights are: singular values that fall, and a few channels that are far larger than others."""
    left, _, right = torch.linalg.svd(normal(width, depth, seed=seed), full_matrices=False)
    sizes = 1 / (1 + torch.arange(len(right)).float()) + 0.03
    weight = (left * sizes) @ right
    weight[:, :: depth // 4] *= 8
    return weight


def one_outlier_block() -> torch.Tensor:
    weight = 0.02 * normal(N, K, seed=2)
    weight[3, 16:32] = 1e4 * normal(16, seed=3)
    return weight


AWKWARD = {
    "normal": normal(N, K),
    "structured": structured(N, K),
    "outlier block": one_outlier_block(),
    "outlier": torch.zeros(N, K).index_put_((torch.tensor(5), torch.tensor(7)), torch.tensor(3e4)),
    "zero": torch.zeros(N, K),
    "tiny": 1e-20 * normal(N, K),
    "one direction": normal(N, 1) @ normal(1, K, seed=1),
}


def noise_db(expected: torch.Tensor, found: torch.Tensor) -> float:
    error = (found.double() - expected.double()).square().sum() / expected.double().square().sum()
    return -10 * math.log10(float(error))


def made(weight: torch.Tensor, rank: int, smoothing: torch.Tensor | None = None) -> QuantizedLayer:
    return quantize_layer(weight, LayerRange(4.0, smoothing, rank=rank), Precision.NVFP4, 16)


def computed(layer: QuantizedLayer, data: torch.Tensor) -> torch.Tensor:
    """What a layer makes of its input, by its definition, float64 [..., N]."""
    data = data if layer.pre_quant_scale is None else data * layer.pre_quant_scale.float()
    assert layer.input_scale is not None
    seen = torch.from_numpy(numpy_codes.fake_quantize(data.numpy(), layer.input_scale.numpy())).double()
    product = seen @ layer.dequantized().double().T
    if layer.branch is None:
        return product
    return product + data.double() @ layer.branch.down.double().T @ layer.branch.up.double().T


# numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, RANK], ids=["plain", "branch"])
@pytest.mark.parametrize("name", AWKWARD)
def test_scales_are_finite_and_every_code_is_the_nearest_under_the_stored_scale(name: str, rank: int) -> None:
    weight = AWKWARD[name]
    layer = made(weight, rank)
    assert layer.block_scale is not None
    scales = layer.block_scale.float()
    assert bool(scales.isfinite().all())
    assert bool((scales > 0).all())
    assert float(layer.weight_scale) > 0
    residual = weight
    if layer.branch is not None:
        assert bool(layer.branch.up.isfinite().all())
        assert bool(layer.branch.down.isfinite().all())
        residual = weight - layer.branch.weight()
    stored = (scales.double() * layer.weight_scale.double()).repeat_interleave(16, 1)
    grid = torch.cat([-E2M1, E2M1]).double()
    best = (grid * stored[..., None] - residual.double()[..., None]).abs().amin(-1)
    error = (layer.dequantized().double() - residual.double()).abs()
    # a code between two numbers may be either, by a rounding of float32
    assert bool((error <= best + 1e-6 * stored).all())


def test_a_layer_of_zeros_stays_zero() -> None:
    layer = made(torch.zeros(N, K), RANK)
    assert bool((layer.dequantized() == 0).all())
    assert layer.branch is not None
    assert bool((layer.branch.weight() == 0).all())
    assert bool((linear_from(layer, None, torch.float16)(normal(3, K)) == 0).all())


def test_a_branch_takes_what_is_large_and_both_errors_fall() -> None:
    weight, data = structured(384, 256), normal(200, 256, seed=4)
    expected = data @ weight.T
    plain, branched = (noise_db(expected, computed(made(weight, rank), data)) for rank in (0, RANK))
    print(f"{plain:.2f} and {branched:.2f} dB")
    assert plain > 17
    assert branched > plain + 6


def test_rounds_leave_less_than_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = structured(384, 256)

    def error() -> float:
        found = split(weight, RANK, None)
        rounded = nvfp4.dequantize(found.codes, found.block_scale, found.scale)
        return noise_db(weight, found.branch.weight() + rounded)

    several = error()
    monkeypatch.setattr("tmpdiff_export.quantization.low_rank.ROUNDS", 1)
    assert several > error() + 0.3


def test_a_large_weight_is_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = structured(384, 256)
    whole = made(weight, RANK)
    monkeypatch.setattr("tmpdiff_export.quantization.low_rank._VALUES_AT_ONCE", 7 * 256)
    parts = made(weight, RANK)
    assert whole.branch is not None
    assert parts.branch is not None
    found = [noise_db(weight, item.dequantized() + item.branch.weight()) for item in (whole, parts)]
    assert found[1] == pytest.approx(found[0], abs=0.1)
    assert parts.codes.shape == weight.shape


def test_k_must_be_a_multiple_of_16() -> None:
    with pytest.raises(ValueError, match=r"K \(40\) to be a multiple of the block size \(16\)"):
        made(normal(N, 40), RANK)


def test_the_branch_is_nearly_that_of_the_singular_value_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmpdiff_export.quantization.low_rank.ROUNDS", 1)
    weight = structured(384, 256)
    residual = weight - split(weight, RANK, None).branch.weight()
    least = torch.linalg.svdvals(weight)[RANK:].square().sum()
    assert 1 <= float(residual.square().sum() / least) < 1.02


def test_the_same_bytes_come_out_whatever_was_drawn_before() -> None:
    weight = structured(N, K)
    first = made(weight, RANK)
    torch.manual_seed(123)
    torch.randn(7)
    second = made(weight, RANK)
    assert first.branch is not None
    assert second.branch is not None
    pairs = [(first.codes, second.codes), (first.branch.up, second.branch.up), (first.branch.down, second.branch.down)]
    assert all(torch.equal(*pair) for pair in pairs)


def test_on_meta_shapes_and_dtypes_are_the_same() -> None:
    for shape in ((N, K), (8, K)):  # a side smaller than the rank
        real = layer_tensors("a", made(normal(*shape), RANK), shape)
        empty = layer_tensors("a", made(torch.empty(shape, device="meta"), RANK), shape)
        assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}
        assert real["a.low_rank_down"].shape == (K, min(RANK, *shape))


def test_every_layer_of_the_embedded_pipeline_gains() -> None:
    source = open_pipeline(pipeline_folder())
    module = source.family.wrap(source.pipe)
    gains = []
    for name in quantizable_layers(module, "denoiser", RECIPE):
        weight = source.weights.read(f"{name.removeprefix('denoiser.')}.weight").float()
        data = normal(64, weight.shape[1], seed=5)
        expected = data @ weight.T
        plain, branched = (
            noise_db(expected, linear_from(made(weight, rank), None, torch.float16)(data)) for rank in (0, 32)
        )
        gains.append(branched - plain)
    print(f"{min(gains):.2f} to {max(gains):.2f}, mean {np.mean(gains):.2f} dB")
    assert min(gains) > 0.5
    assert np.mean(gains) > 2


# bytes ------------------------------------------------------------------------------------------------------------


def test_what_a_branch_takes_is_priced_by_what_fp8_would_take_more() -> None:
    assert share_of_fp8([(3072, 3072)], 0) == 0
    shape = (3072, 12288)
    share = share_of_fp8([shape] * 3, 32)
    assert share == pytest.approx(16 * 32 * sum(shape) / (3.5 * math.prod(shape)))
    assert share_of_fp8([shape, (16, 64)], 32) > share
    assert price_db(0) == 0
    assert price_db(0.5) == pytest.approx(3.01, abs=0.01)
    assert price_db(share_of_fp8([(64, 64)], 16)) == math.inf


def test_files_have_two_bytes_a_number_of_the_branch_more() -> None:
    shape = (N, K)
    sizes = {}
    for rank in (0, RANK):
        tensors = layer_tensors("a", made(normal(*shape), rank), shape)
        sizes[rank] = sum(item.numel() * item.element_size() for item in tensors.values())
        buffers = dict(linear_from(made(normal(*shape), rank), None, torch.bfloat16).named_buffers())
        in_torch = sum(item.numel() * item.element_size() for item in buffers.values())
        assert in_torch == sizes[rank] + 4  # the input's scale, which graphs hold themselves
    assert sizes[0] == N * K // 2 + N * K // 16 + 4
    assert sizes[RANK] - sizes[0] == 2 * RANK * (N + K)


# graphs and layers ------------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """Two layers that read one activation, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(K, N), torch.nn.Linear(K, N, bias=False)
        self.last = torch.nn.Linear(N, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.a(x) * 0.5 + self.b(x))


@pytest.fixture(scope="module")
def module() -> Layers:
    return Layers().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graph(module: Layers) -> onnx.ModelProto:
    return export_graph(module, [ExportInput("x", normal(2, 7, K), {0: "batch"})], {"y": {0: "batch"}}, half=True)


@pytest.fixture(scope="module")
def layers(module: Layers) -> dict[str, QuantizedLayer]:
    """`a` and `b` take their activation smoothed, `last` as it is; its branch is large enough to be stored in 16 bits."""
    smoothing = normal(K, seed=6).mul(0.3).exp()
    return {
        "a": made(module.a.weight, RANK, smoothing),
        "b": made(module.b.weight, RANK, smoothing),
        "last": made(module.last.weight, 32),
    }


def test_the_graph_has_two_products_and_an_addition_of_a_branch(
    module: Layers, graph: onnx.ModelProto, layers: dict[str, QuantizedLayer], tmp_path: Path
) -> None:
    model = onnx.load(save_stored(insert_qdq(graph, inputs_of(layers), RECIPE), tmp_path / "m.onnx", module, layers))
    stored = {item.name: item for item in model.graph.initializer}
    assert tuple(stored["a.low_rank_down"].dims) == (K, RANK)
    assert tuple(stored["last.low_rank_up"].dims) == (32, 300)
    readers = {name: node for node in model.graph.node for name in node.input}
    producers = {name: node for node in model.graph.node for name in node.output}
    for name in layers:
        down, up = readers[f"{name}.low_rank_down"], readers[f"{name}.low_rank_up"]
        assert up.input[0] == down.output[0]
        quantize = [node for node in model.graph.node if node.domain == "trt" and node.input[0] == down.input[0]]
        assert len(quantize) == 1  # the branch reads what is quantized beside it, before it is
        total = readers[up.output[0]]
        assert total.op_type == "Add"
        assert {producers[item].op_type for item in total.input} == {"MatMul"}
    smoothed = {readers[f"{name}.low_rank_down"].input[0] for name in ("a", "b")}
    assert len(smoothed) == 1
    assert producers[smoothed.pop()].op_type == "Mul"


def test_the_cpu_engine_and_the_torch_layers_compute_what_the_layer_says(
    module: Layers, graph: onnx.ModelProto, layers: dict[str, QuantizedLayer], tmp_path: Path
) -> None:
    lowered, counts = lower_for_cpu(insert_qdq(graph, inputs_of(layers), RECIPE))
    engine = OnnxRuntimeEngine(save_stored(lowered, tmp_path / "e.onnx", module, layers, cpu_layer_tensors))
    assert (counts["nvfp4-emulated"], counts["nvfp4-emulated-activations"], counts["low-rank-branches"]) == (3, 2, 3)
    x = normal(2, 7, K, seed=7)
    middle = 0.5 * (computed(layers["a"], x) + module.a.bias) + computed(layers["b"], x)
    # `last` quantizes what comes of them: a rounding of float32 may choose its other neighbour
    expected = computed(layers["last"], middle.float()) + module.last.bias
    assert noise_db(expected, torch.from_numpy(engine.run({"x": x.numpy()})["y"])) > 60
    a, b, last = (linear_from(layers[name], module.get_submodule(name).bias, torch.float32) for name in layers)
    assert noise_db(expected, last(a(x) * 0.5 + b(x))) > 60
    a, b, last = (linear_from(layers[name], module.get_submodule(name).bias, torch.float16) for name in layers)
    assert noise_db(expected, last(a(x) * 0.5 + b(x))) > 30


def test_a_layer_that_computes_in_16_bit_has_its_branch_too(module: Layers) -> None:
    layer = made(module.last.weight, 32)
    linear = linear_from(layer, module.last.bias, torch.float16)
    linear.sixteen_bit = True
    data = normal(5, N, seed=8)
    assert layer.branch is not None
    expected = data @ (layer.dequantized() + layer.branch.weight()).T + module.last.bias
    assert noise_db(expected, linear(data)) > 50
