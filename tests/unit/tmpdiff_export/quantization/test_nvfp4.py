"""NVFP4: rounding, block scales, the graph for TensorRT and the CPU engine, against numpy and ml_dtypes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from helpers import numpy_codes
from helpers.ranges import found_ranges
from helpers.stored_graphs import inputs_of, save_stored
from onnx import TensorProto, helper, numpy_helper

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.errors import BuildError
from engines.precision import DEFAULT_PRECISIONS, Precision, parse_precisions
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.external import save_checked
from tmpdiff_export.onnx_graphs.qdq import insert_qdq
from tmpdiff_export.quantization import nvfp4
from tmpdiff_export.quantization.codes import LayerRange, QuantizedLayer, quantize_layer
from tmpdiff_export.quantization.ranges import quantizable_layers
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.targets.accuracy import sqnr_db
from tmpdiff_export.targets.onnxruntime import nvfp4 as cpu_nvfp4
from tmpdiff_export.targets.onnxruntime.cpu import cpu_layer_tensors
from tmpdiff_export.targets.onnxruntime.lowering import lower_for_cpu

RECIPE = RECIPES[Precision.NVFP4]
K, N = 64, 24
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_outliers(*shape: int) -> np.ndarray:
    """Every fiftieth value is a hundred times larger, one block is zero and one is tiny."""
    values = normal(*shape, seed=1)
    values.reshape(-1)[::50] *= 100
    values.reshape(-1, nvfp4.BLOCK_SIZE)[1] = 0
    values.reshape(-1, nvfp4.BLOCK_SIZE)[2] *= 1e-7
    return values


class Layers(torch.nn.Module):
    """Two layers that read one activation, and one whose K is no multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(K, N)
        self.b = torch.nn.Linear(K, N)
        self.narrow = torch.nn.Linear(N, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.a(x) * 0.5 + self.b(x))


@pytest.fixture(scope="module")
def module() -> Layers:
    return Layers().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graph(module: Layers) -> onnx.ModelProto:
    inputs = [ExportInput("x", torch.from_numpy(normal(2, 7, K)), {0: "batch"})]
    return export_graph(module, inputs, {"y": {0: "batch"}}, half=True)


@pytest.fixture(scope="module")
def layers(module: Layers) -> dict[str, QuantizedLayer]:
    """`a` takes its activation as it is, `b` smoothed."""
    smoothing = np.exp(np.random.default_rng(1).normal(0, 0.3, K)).astype(np.float32)
    return {
        "a": quantize_layer(module.a.weight, LayerRange(4.0, None), Precision.NVFP4, 16),
        "b": quantize_layer(module.b.weight, LayerRange(5.0, torch.from_numpy(smoothing)), Precision.NVFP4, 16),
    }


def cpu_fake_quantize(x: np.ndarray, scale: np.ndarray, folder: Path) -> np.ndarray:
    """`x` through the CPU engine's operator alone."""
    node = cpu_nvfp4.fake_quantize_node("x", "scale", "y")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * x.ndim)],
        [numpy_helper.from_array(scale, "scale")],
    )
    opsets = [helper.make_opsetid("", RECIPE.opset), helper.make_opsetid(cpu_nvfp4.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[cpu_nvfp4.function(RECIPE.opset)], ir_version=10)
    save_checked(model, folder / "operator.onnx")
    return OnnxRuntimeEngine(folder / "operator.onnx").run({"x": x})["y"]


def test_the_cpu_operator_rounds_as_e2m1_casts_do(tmp_path: Path) -> None:
    ties = (E2M1[1:] + E2M1[:-1]) / 2
    edges = np.concatenate([E2M1, ties])
    magnitudes = np.concatenate([edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, np.float32(-9))])
    values = np.concatenate([magnitudes, -magnitudes, np.linspace(-6, 6, 2001, dtype=np.float32)])
    values = np.clip(values, -6, 6)
    blocks = np.zeros((len(values), nvfp4.BLOCK_SIZE), np.float32)
    blocks[:, 0], blocks[:, 1] = 6.0, values  # a block scale of 64 times 2^-6: codes are the values themselves
    measured = cpu_fake_quantize(blocks, np.float32(2**-6), tmp_path)
    expected = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(measured[:, 1], expected)
    assert set(np.abs(expected)) == set(E2M1)


@pytest.mark.parametrize(
    "values", [normal(5, K), normal(2, 7, K), with_outliers(3, 9, K)], ids=["2d", "3d", "outliers"]
)
@pytest.mark.parametrize("covered", [1.0, 0.01], ids=["calibrated", "saturating"])
def test_the_cpu_operator_is_the_reference_bit_for_bit(values: np.ndarray, covered: float, tmp_path: Path) -> None:
    scale = numpy_codes.tensor_scale(covered * float(np.abs(values).max()))
    expected = numpy_codes.fake_quantize(values, scale)
    np.testing.assert_array_equal(cpu_fake_quantize(values, scale, tmp_path), expected)
    found = nvfp4.fake_quantize(torch.from_numpy(values), torch.from_numpy(scale))
    np.testing.assert_array_equal(found.numpy(), expected)


def test_codes_are_nearest_under_the_stored_block_scale() -> None:
    values = with_outliers(40, K)
    scale = nvfp4.tensor_scale(float(np.abs(values).max()))
    codes, block_scales = nvfp4.quantize_blocks(torch.from_numpy(values), scale)
    assert (codes.dtype, block_scales.dtype) == (torch.uint8, torch.float8_e4m3fn)
    assert block_scales.shape == (40, K // nvfp4.BLOCK_SIZE)
    stored = np.repeat((block_scales.float() * scale).numpy(), nvfp4.BLOCK_SIZE, axis=-1)
    grid = np.concatenate([-E2M1[::-1], E2M1])
    best = np.abs(grid * stored[..., None] - values[..., None]).min(axis=-1)
    error = np.abs(nvfp4.dequantize(codes, block_scales, scale).numpy() - values)
    np.testing.assert_allclose(error, best, rtol=1e-5, atol=1e-9)


def test_the_largest_block_gets_the_largest_scale_and_zeros_stay_zero() -> None:
    values = torch.zeros(2, 32)
    values[0, 3] = 12.0
    scale = nvfp4.tensor_scale(12.0)
    codes, block_scales = nvfp4.quantize_blocks(values, scale)
    assert float(block_scales[0, 0]) == nvfp4.E4M3_MAX
    assert (block_scales.float() > 0).all()
    torch.testing.assert_close(nvfp4.dequantize(codes, block_scales, scale), values, rtol=1e-6, atol=0)
    zero = nvfp4.tensor_scale(0.0)
    assert zero.dtype == torch.float32
    assert torch.equal(nvfp4.fake_quantize(torch.zeros(1, 16), zero), torch.zeros(1, 16))


def test_values_beyond_the_calibrated_range_saturate() -> None:
    measured = nvfp4.fake_quantize(torch.full((1, 16), 1000.0), nvfp4.tensor_scale(10.0))
    torch.testing.assert_close(measured, torch.full((1, 16), 10.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("values", "floor_db"), [(normal(256, 512), 20.0), (with_outliers(256, 512), 26.5)])
def test_sqnr_of_a_quantized_weight(values: np.ndarray, floor_db: float) -> None:
    layer = quantize_layer(torch.from_numpy(values), LayerRange(None, None), Precision.NVFP4, 16)
    measured = sqnr_db(values, layer.dequantized().numpy())
    print(f"{measured:.2f} dB")
    assert measured > floor_db


def test_k_must_be_a_multiple_of_16(module: Layers) -> None:
    with pytest.raises(ValueError, match=r"K \(24\) to be a multiple of the block size \(16\)"):
        quantize_layer(module.narrow.weight, LayerRange(1.0, None), Precision.NVFP4, 16)
    assert quantizable_layers(module, "denoiser", RECIPE) == ["a", "b"]


def test_the_file_stores_codes_and_scales_and_passes_the_checker(
    module: Layers, graph: onnx.ModelProto, layers: dict[str, QuantizedLayer], tmp_path: Path
) -> None:
    quantized = insert_qdq(graph, inputs_of(layers), RECIPE)
    model = onnx.load(save_stored(quantized, tmp_path / "model.onnx", module, layers))
    assert {(item.domain, item.version) for item in model.opset_import} == {("", 23), ("trt", 1)}
    stored = {item.name: item for item in model.graph.initializer}
    for name, layer in layers.items():
        assert f"{name}.weight" not in stored, "the FP16 weight is still in the file"
        codes, block_scale, scale = (stored[f"{name}.weight_{part}"] for part in ("codes", "block_scale", "scale"))
        kinds = (codes.data_type, block_scale.data_type, scale.data_type)
        assert kinds == (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT)
        assert len(codes.raw_data) == K * N // 2
        read = numpy_helper.to_array(codes).astype(np.float32), numpy_helper.to_array(block_scale).astype(np.float32)
        np.testing.assert_array_equal(read[0], layer.codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32))
        np.testing.assert_array_equal(
            read[0] * np.repeat(read[1] * numpy_helper.to_array(scale), 16, axis=1), layer.dequantized().numpy()
        )
    assert stored["narrow.weight^T"].data_type == TensorProto.FLOAT16
    custom = [node for node in model.graph.node if node.domain]
    assert [node.op_type for node in custom] == ["TRT_FP4DynamicQuantize"] * 2
    scales = [float(numpy_helper.to_array(stored[node.input[1]])) for node in custom]
    assert scales == pytest.approx([4.0 / (448 * 6), 5.0 / (448 * 6)])


def test_the_checker_still_checks_what_follows_the_custom_operator(
    graph: onnx.ModelProto, layers: dict[str, QuantizedLayer], tmp_path: Path
) -> None:
    model = insert_qdq(graph, inputs_of(layers), RECIPE)
    cast = next(node for node in model.graph.node if node.name == "x/cast")
    cast.attribute[0].i = TensorProto.FLOAT  # the product would then mix FP32 and FP16
    with pytest.raises(BuildError, match=r"model\.onnx is not valid"):
        save_checked(model, tmp_path / "model.onnx")


def test_the_cpu_engine_computes_what_codes_and_scales_say(
    module: Layers, graph: onnx.ModelProto, layers: dict[str, QuantizedLayer], tmp_path: Path
) -> None:
    lowered, counts = lower_for_cpu(insert_qdq(graph, inputs_of(layers), RECIPE))
    path = save_stored(lowered, tmp_path / "engine.onnx", module, layers, cpu_layer_tensors)
    assert (counts["nvfp4-emulated"], counts["nvfp4-emulated-activations"]) == (2, 2)
    assert {item.domain for item in lowered.opset_import} == {"", cpu_nvfp4.DOMAIN}

    x = with_outliers(2, 7, K)
    total = np.zeros((2, 7, N))
    for name, factor in (("a", 0.5), ("b", 1.0)):
        layer = layers[name]
        data = x if layer.pre_quant_scale is None else x * layer.pre_quant_scale.float().numpy()
        assert layer.input_scale is not None
        seen = numpy_codes.fake_quantize(data, layer.input_scale.numpy()).astype(np.float64)
        bias = module.get_submodule(name).bias.numpy()
        total += factor * (seen @ layer.dequantized().T.double().numpy() + bias)
    narrow = module.narrow
    expected = total @ narrow.weight.double().numpy().T
    expected += narrow.bias.numpy()
    measured = OnnxRuntimeEngine(path).run({"x": x})["y"]
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_layers_that_read_one_activation_share_their_tensor_scales(module: Layers) -> None:
    batches = [(torch.from_numpy(normal(2, 7, K, seed=seed)),) for seed in (3, 4)]

    def weight(name: str) -> torch.Tensor:
        return module.get_submodule(name).weight

    ranges = found_ranges(module, {Precision.NVFP4: ["a", "b"]}, batches, weight)[Precision.NVFP4]["max"]
    made = {name: quantize_layer(weight(name), found, Precision.NVFP4, 16) for name, found in ranges.items()}
    weight_amax = max(float(layer.weight.abs().max()) for layer in (module.a, module.b))
    input_amax = max(float(batch[0].abs().max()) for batch in batches)
    for layer in made.values():
        assert layer.weight_scale == nvfp4.tensor_scale(weight_amax)
        assert layer.input_scale == nvfp4.tensor_scale(input_amax)


def test_nvfp4_is_built_when_it_is_named_only() -> None:
    assert parse_precisions("nvfp4,fp16,int4") == (Precision.FP16, Precision.INT4, Precision.NVFP4)
    assert Precision.NVFP4 not in DEFAULT_PRECISIONS
    assert {*DEFAULT_PRECISIONS, Precision.NVFP4} == set(Precision) == set(RECIPES)
