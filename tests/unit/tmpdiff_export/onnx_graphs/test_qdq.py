"""Codes, scales, Q/DQ insertion and CPU lowering on small layers whose results numpy can state exactly."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from helpers.stored_graphs import inputs_of, save_stored
from onnx import TensorProto, numpy_helper

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.qdq import insert_qdq
from tmpdiff_export.quantization.codes import LayerRange, QuantizedLayer, quantize_layer
from tmpdiff_export.quantization.ranges import quantizable_layers
from tmpdiff_export.quantization.recipes import RECIPES, stays_high_precision
from tmpdiff_export.targets.accuracy import sqnr_db
from tmpdiff_export.targets.onnxruntime.cpu import cpu_layer_tensors
from tmpdiff_export.targets.onnxruntime.lowering import lower_for_cpu

QUANTIZED = (Precision.FP8, Precision.INT8, Precision.INT4)
K, N = 256, 96


class TwoLinears(torch.nn.Module):
    """Two layers that read the same activation, as q and k do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(K, N)
        self.b = torch.nn.Linear(K, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) * 0.5 + self.b(x)


@pytest.fixture(scope="module")
def module() -> TwoLinears:
    return TwoLinears().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def activation() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 7, K)).astype(np.float32)


@pytest.fixture(scope="module")
def graph(module: TwoLinears, activation: np.ndarray) -> onnx.ModelProto:
    inputs = [ExportInput("x", torch.from_numpy(activation), {0: "batch"})]
    return export_graph(module, inputs, {"y": {0: "batch"}}, half=True)


def quantized(
    module: TwoLinears, precision: Precision, pre_quant_scale: np.ndarray | None = None
) -> dict[str, QuantizedLayer]:
    recipe = RECIPES[precision]
    scale = None if pre_quant_scale is None else torch.from_numpy(pre_quant_scale)
    found = LayerRange(None if recipe.weight_only else 4.0, scale)
    return {
        name: quantize_layer(module.get_submodule(name).weight, found, precision, recipe.block_size)
        for name in ("a", "b")
    }


def saved(lowered: onnx.ModelProto, folder: Path, module: TwoLinears, layers: dict[str, QuantizedLayer]) -> Path:
    return save_stored(lowered, folder / "engine.onnx", module, layers, cpu_layer_tensors)


def expected(module: TwoLinears, layers: dict[str, QuantizedLayer], x: np.ndarray) -> np.ndarray:
    """What the codes and scales say, in float64."""
    total = np.zeros((*x.shape[:-1], N))
    for name, factor in (("a", 0.5), ("b", 1.0)):
        layer = layers[name]
        data = x.astype(np.float64)
        if layer.pre_quant_scale is not None:
            data = data * layer.pre_quant_scale.double().numpy()
        if layer.input_scale is not None:
            scale = float(layer.input_scale)
            if layer.precision is Precision.FP8:
                data = (
                    np.clip(data / scale, -448, 448)
                    .astype(np.float32)
                    .astype(ml_dtypes.float8_e4m3fn)
                    .astype(np.float64)
                )
            else:
                data = np.clip(np.rint(data / scale), -128, 127)
            data = data * scale
        bias = module.get_submodule(name).bias.double().numpy()
        total += factor * (data @ layer.dequantized().T.double().numpy() + bias)
    return total


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("smooth", [False, True])
def test_the_cpu_engine_computes_what_codes_and_scales_say(
    precision: Precision,
    smooth: bool,
    module: TwoLinears,
    graph: onnx.ModelProto,
    activation: np.ndarray,
    tmp_path: Path,
) -> None:
    scale = np.exp(np.random.default_rng(1).normal(0, 0.3, K)).astype(np.float32) if smooth else None
    layers = quantized(module, precision, scale)
    lowered, counts = lower_for_cpu(insert_qdq(graph, inputs_of(layers), RECIPES[precision]))
    measured = OnnxRuntimeEngine(saved(lowered, tmp_path, module, layers)).run({"x": activation})["y"]
    # An activation on the edge between two codes may round either way in FP32; hence dB and not equality.
    assert sqnr_db(expected(module, layers, activation), measured) > 55.0
    kind = {Precision.FP8: "fp8-emulated", Precision.INT8: "MatMulIntegerToFloat", Precision.INT4: "MatMulNBits"}
    assert counts[kind[precision]] == 2


def test_int8_products_do_not_saturate_on_the_cpu(module: TwoLinears, graph: onnx.ModelProto, tmp_path: Path) -> None:
    layers = quantized(module, Precision.INT8)
    lowered, _ = lower_for_cpu(insert_qdq(graph, inputs_of(layers), RECIPES[Precision.INT8]))
    path = saved(lowered, tmp_path, module, layers)
    largest = np.full((1, 7, K), 4.0, np.float32)  # pairs of products beyond 16 bits, which CPUs without VNNI would cut
    measured = OnnxRuntimeEngine(path).run({"x": largest})["y"]
    assert sqnr_db(expected(module, layers, largest), measured) > 55.0


def test_exact_products_are_those_of_cpus_that_need_no_help(
    module: TwoLinears, graph: onnx.ModelProto, activation: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = quantized(module, Precision.INT8)
    lowered, _ = lower_for_cpu(insert_qdq(graph, inputs_of(layers), RECIPES[Precision.INT8]))
    path = saved(lowered, tmp_path, module, layers)
    found = OnnxRuntimeEngine(path).run({"x": activation})["y"]
    monkeypatch.setattr("engines.backends.onnxruntime.cpu._VNNI", frozenset())
    helped = OnnxRuntimeEngine(path).run({"x": activation})["y"]
    np.testing.assert_array_equal(found, helped)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_onnx_file_is_standard_strongly_typed_and_stores_codes(
    precision: Precision, module: TwoLinears, graph: onnx.ModelProto, tmp_path: Path
) -> None:
    layers = quantized(module, precision)
    model = insert_qdq(graph, inputs_of(layers), RECIPES[precision])
    model = onnx.load(save_stored(model, tmp_path / "model.onnx", module, layers))
    assert [(item.domain, item.version) for item in model.opset_import] == [("", RECIPES[precision].opset)]
    stored = {item.name: item for item in model.graph.initializer}
    kinds = {
        Precision.FP8: TensorProto.FLOAT8E4M3FN,
        Precision.INT8: TensorProto.INT8,
        Precision.INT4: TensorProto.INT4,
    }
    for name, layer in layers.items():
        codes = stored[f"{name}.weight_codes"]
        assert codes.data_type == kinds[precision]
        read = numpy_helper.to_array(codes).astype(np.float32)
        np.testing.assert_array_equal(read, layer.codes.T.float().numpy())
        scale = numpy_helper.to_array(stored[f"{name}.weight_scale"])
        np.testing.assert_array_equal(scale, layer.weight_scale.T.numpy())
        assert f"{name}.weight" not in stored, "the FP16 weight is still in the file"
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert stored[node.input[1]].data_type == TensorProto.FLOAT16
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == (0 if precision is Precision.INT4 else 1), "layers that share an input share its Q/DQ"


def test_layers_with_different_input_scales_get_quantizers_of_their_own(
    module: TwoLinears, graph: onnx.ModelProto, activation: np.ndarray, tmp_path: Path
) -> None:
    layers = {
        name: quantize_layer(module.get_submodule(name).weight, LayerRange(amax, None), Precision.INT8, None)
        for name, amax in (("a", 4.0), ("b", 2.0))
    }
    model = insert_qdq(graph, inputs_of(layers), RECIPES[Precision.INT8])
    lowered, _ = lower_for_cpu(model)
    measured = OnnxRuntimeEngine(saved(lowered, tmp_path, module, layers)).run({"x": activation})["y"]
    assert sqnr_db(expected(module, layers, activation), measured) > 55.0


def test_a_layer_that_is_not_in_the_graph_is_an_error(module: TwoLinears, graph: onnx.ModelProto) -> None:
    layers = quantized(module, Precision.INT8)
    layers["missing"] = layers["a"]
    with pytest.raises(BuildError, match=r"1 of 3 layers were not found.*missing"):
        insert_qdq(graph, inputs_of(layers), RECIPES[Precision.INT8])


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("transformer_blocks.0.attn1.to_q", False),
        ("transformer_blocks.0.ff.net.0.proj", False),
        ("single_transformer_blocks.3.proj_out", False),  # Flux: a block's own projection, not the final one
        ("down_blocks.0.attentions.0.proj_out", False),  # UNet, likewise
        ("proj_out", True),
        ("adaln_single.linear", True),
        ("norm_out.linear", True),
        ("transformer_blocks.0.norm1.linear", True),
        ("caption_projection.linear_1", True),
        ("time_embedding.linear_1", True),
        ("x_embedder", True),
    ],
)
def test_what_stays_in_high_precision(name: str, stays: bool) -> None:
    assert (stays_high_precision(name, RECIPES[Precision.INT8]) is not None) is stays


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(BuildError, match="no layer can be quantized"):
        quantizable_layers(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, groups=3)), "denoiser", RECIPES[Precision.FP8])


def test_sqnr_of_known_noise_and_of_broken_output() -> None:
    reference = np.array([3.0, 4.0])
    assert sqnr_db(reference, reference + np.array([0.3, -0.4])) == pytest.approx(20.0)
    assert sqnr_db(reference, reference) == 200.0
    assert sqnr_db(reference, np.array([np.nan, 4.0])) == -200.0
