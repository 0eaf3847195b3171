"""Convolutions in eight bits: the CPU engine against what codes and scales say, and which convolutions are quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.stored_graphs import inputs_of, save_stored

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.precision import Precision
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.onnx_graphs.qdq import insert_qdq
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.quantization.ranges import quantizable_layers
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.targets.accuracy import sqnr_db
from tmpdiff_export.targets.onnxruntime.cpu import cpu_layer_tensors
from tmpdiff_export.targets.onnxruntime.lowering import lower_for_cpu
from tmpdiff_export.targets.torch.activations import static_codes

RECIPE = RECIPES[Precision.INT8]


class Wrapper(torch.nn.Module):
    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x)


@pytest.mark.parametrize("precision", [Precision.FP8, Precision.INT8])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 5), "padding": (0, 2), "stride": (1, 2), "bias": False},
    ],
    ids=str,
)
def test_the_cpu_engine_computes_what_codes_and_scales_say(options: dict, precision: Precision, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Two of them, so that the second reads what the first wrote.
    first, second = torch.nn.Conv2d(6, 10, 3, padding=1), torch.nn.Conv2d(10, 7, **options)
    module = Wrapper(torch.nn.Sequential(first, torch.nn.SiLU(), second)).eval().requires_grad_(False)
    x = torch.randn(2, 6, 9, 12)
    names = quantizable_layers(module, "denoiser", RECIPE)
    assert names == ["denoiser.0", "denoiser.2"]

    with torch.inference_mode():
        between = module.denoiser[:2](x)
    layers = {
        name: quantize_layer(layer.weight.flatten(1), LayerRange(float(data.abs().max()), None), precision, None)
        for name, layer, data in zip(names, (first, second), (x, between), strict=True)
    }
    inputs = [ExportInput("x", x, {0: "batch"})]
    base = export_graph(module, inputs, {"y": {0: "batch"}}, half=True)
    model = insert_qdq(base, inputs_of(layers), RECIPES[precision])
    save_stored(model, tmp_path / "strong.onnx", module, layers)
    lowered, counts = lower_for_cpu(model)
    integer = precision is Precision.INT8
    assert counts.get("MatMulIntegerToFloat", 0) == (2 if integer else 0)
    assert ("Conv" not in {node.op_type for node in lowered.graph.node}) is integer
    path = save_stored(lowered, tmp_path / "engine.onnx", module, layers, cpu_layer_tensors)

    def quantized(name: str, layer: torch.nn.Conv2d, data: torch.Tensor) -> torch.Tensor:
        scale = float(layers[name].input_scale)
        codes = static_codes(data, scale, torch.int8 if integer else torch.float8_e4m3fn).double()
        weight = layers[name].dequantized().reshape(layer.weight.shape).double()
        bias = None if layer.bias is None else layer.bias.double()
        return torch.nn.functional.conv2d(codes * scale, weight, bias, layer.stride, layer.padding)

    for batch in (x, torch.randn(3, 6, 9, 12)):
        expected = quantized(names[1], second, torch.nn.functional.silu(quantized(names[0], first, batch))).numpy()
        measured = OnnxRuntimeEngine(path).run({"x": batch.numpy()})["y"]
        assert measured.shape == expected.shape
        # A code on the edge between two values may round either way; hence dB and not equality.
        assert sqnr_db(expected, measured) > 55.0


def test_only_plain_convolutions_are_quantized_and_only_in_eight_bits() -> None:
    denoiser = torch.nn.ModuleDict(
        {
            "plain": torch.nn.Conv2d(8, 8, 3),
            "pointwise": torch.nn.Conv2d(8, 8, 1),
            "wide": torch.nn.Conv2d(512, 512, 1),
            "down_blocks": torch.nn.ModuleList(
                [torch.nn.ModuleDict({"resnet": torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(512, 512, 1)})})]
            ),
            "depthwise": torch.nn.Conv2d(8, 8, 3, groups=8),
            "dilated": torch.nn.Conv2d(8, 8, 3, dilation=2),
            "reflecting": torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            "conv_in": torch.nn.Conv2d(8, 8, 3),
            "block": torch.nn.ModuleDict({"conv_shortcut": torch.nn.Conv2d(8, 8, 1)}),
            "upsamplers": torch.nn.ModuleList([torch.nn.Conv2d(8, 8, 3)]),
            "linear": torch.nn.Linear(128, 8),
        }
    )
    module = Wrapper(denoiser)
    assert quantizable_layers(module, "denoiser", RECIPE) == [
        "denoiser.plain", "denoiser.pointwise", "denoiser.wide", "denoiser.down_blocks.0.resnet.conv1", "denoiser.linear",
    ]  # fmt: skip
    assert quantizable_layers(module, "denoiser", RECIPES[Precision.FP8]) == ["denoiser.wide", "denoiser.linear"]
    for precision in (Precision.INT4, Precision.NVFP4):
        assert quantizable_layers(module, "denoiser", RECIPES[precision]) == ["denoiser.linear"]
