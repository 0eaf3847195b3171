"""Sana's blocks as the torch backend has them, without a GPU: the same functions, and pointwise convolutions as linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch.nn import functional as F

from engines.precision import Precision
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.quantization.ranges import is_pointwise
from tmpdiff_export.targets.torch.kernels.glu_convolution import glu_convolution
from tmpdiff_export.targets.torch.kernels.linear_attention import linear_attention
from tmpdiff_export.targets.torch.layers import Fp8Linear
from tmpdiff_export.targets.torch.lowering import lower_for_torch
from tmpdiff_export.targets.torch.sana import KernelFeedForward, LinearAttentionProcessor, use_sana_kernels


def sana(qk_norm: str | None = None) -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=32,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=24,
        qk_norm=qk_norm,
    ).eval()  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 6, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "timestep": torch.tensor([30.0, 900.0]),
        "encoder_attention_mask": torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]),
    }


def output_of(module: torch.nn.Module) -> torch.Tensor:
    dtype = next(item.dtype for item in module.parameters() if item.is_floating_point())
    given = {name: item.to(dtype) if item.is_floating_point() else item for name, item in inputs().items()}
    with torch.no_grad():
        result: torch.Tensor = module(**given, return_dict=False)[0]
    return result.float()


def sqnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(-10 * torch.log10((found - expected).square().sum() / expected.square().sum()))


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_sana_computes_the_same_over_its_kernels(qk_norm: str | None) -> None:
    module = sana(qk_norm)
    changed = copy.deepcopy(module)
    assert use_sana_kernels(changed) == 4  # a feed-forward network and a linear attention per block
    block = changed.transformer_blocks[0]
    assert isinstance(block.ff, KernelFeedForward)
    assert isinstance(block.attn1.processor, LinearAttentionProcessor)
    assert changed.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(output_of(changed), output_of(module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [Precision.FP8, Precision.INT8])
def test_pointwise_convolutions_are_quantized_as_linear_layers(precision: Precision) -> None:
    module = sana()
    names = [name for name, layer in module.named_modules() if ".ff." in name and is_pointwise(layer)]
    assert len(names) == 4
    layers = {
        name: quantize_layer(module.get_submodule(name).weight.flatten(1), LayerRange(6.0, None), precision, None)
        for name in names
    }
    lowered, counts = lower_for_torch(module, layers, torch.bfloat16)
    assert counts == {f"{precision.value} linear": 4}
    last = lowered.transformer_blocks[1].ff.conv_point
    assert last.codes.shape == (64, 160)
    assert 24.0 < sqnr_db(output_of(lowered), output_of(module)) < 60.0
    apart = copy.deepcopy(module).to(torch.bfloat16)  # diffusers' own network around the same layers
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(apart.get_submodule(parent), child, lowered.get_submodule(name))
    assert sqnr_db(output_of(lowered), output_of(apart)) > sqnr_db(output_of(apart), output_of(module)) + 3.0


def test_a_layer_in_the_place_of_a_convolution_is_called_like_one() -> None:
    convolution = torch.nn.Conv2d(32, 48, 1)
    layer = quantize_layer(convolution.weight.detach().flatten(1), LayerRange(4.0, None), Precision.FP8, None)
    holder = torch.nn.Module()
    holder.inner = convolution
    lowered, _ = lower_for_torch(holder, {"inner": layer}, torch.float16)
    assert isinstance(lowered.inner, Fp8Linear)
    data = torch.randn(2, 32, 5, 7)
    found = lowered.inner(data.half()).float()
    assert found.shape == (2, 48, 5, 7)
    assert sqnr_db(found, convolution(data).detach()) > 25.0


@pytest.mark.parametrize(
    ("options", "whether"),
    [
        ({}, True),
        ({"stride": 2}, False),
        ({"padding": 1}, False),
        ({"groups": 4}, False),
        ({"kernel_size": 3, "padding": 1}, False),
    ],
)
def test_what_is_pointwise(options: dict[str, int], whether: bool) -> None:
    assert is_pointwise(torch.nn.Conv2d(8, 8, **{"kernel_size": 1, **options})) is whether


def test_the_gate_between_the_products_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    data, weight = torch.randn(2, 5, 4, 12, generator=generator), torch.randn(12, 1, 3, 3, generator=generator)
    bias = torch.randn(12, generator=generator)
    convolved = F.conv2d(F.silu(data).permute(0, 3, 1, 2), weight, bias, padding=1, groups=12).permute(0, 2, 3, 1)
    expected = convolved[..., :6] * F.silu(convolved[..., 6:])
    torch.testing.assert_close(glu_convolution(data, weight, bias), expected)
    codes = glu_convolution(data, weight, bias, torch.tensor(0.05), torch.int8)
    assert torch.equal(codes, (expected * 20).round().clamp(-128, 127).to(torch.int8))
    assert codes.unique().numel() > 50


def test_linear_attention_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(4)
    query, key, value = torch.randn(2, 9, 3, 3, 16, generator=generator).unbind(2)
    queries, keys = (item.relu().transpose(1, 2).double() for item in (query, key))
    weights = queries @ keys.transpose(2, 3)
    expected = (weights / weights.sum(-1, keepdim=True) @ value.transpose(1, 2).double()).transpose(1, 2).float()
    torch.testing.assert_close(linear_attention(query, key, value), expected, rtol=1e-4, atol=1e-5)
    codes = linear_attention(query, key, value, torch.tensor(0.004), torch.float8_e4m3fn)
    torch.testing.assert_close(codes.float(), (expected * 250).clamp(-448, 448), rtol=2**-4, atol=2**-6)
