"""A UNet's blocks as the torch backend has them, without a GPU: the same functions, and convolutions in FP8."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from engines.precision import Precision
from tmpdiff_export.quantization.codes import LayerRange, QuantizedLayer, quantize_layer
from tmpdiff_export.targets.torch.convolutions import Fp8Convolution
from tmpdiff_export.targets.torch.kernels.convolution import convolution_fp8
from tmpdiff_export.targets.torch.kernels.group_norm import Norm, group_norm
from tmpdiff_export.targets.torch.lowering import lower_for_torch, torch_tensors
from tmpdiff_export.targets.torch.unet import ChannelsLastResnet, ChannelsLastTransformer, use_channels_last


def unet(*, linear_projection: bool) -> UNet2DConditionModel:
    torch.manual_seed(0)
    module = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, use_linear_projection=linear_projection,
    ).eval()  # fmt: skip
    for name, item in module.named_parameters():
        if "norm" in name and item.ndim == 1:  # of ones and zeros, norms in the wrong place would not show
            torch.nn.init.uniform_(item, 0.5, 1.5)
    return module


def output_of(module: torch.nn.Module) -> torch.Tensor:
    dtype = next(item.dtype for item in module.parameters() if item.is_floating_point())
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 16, 12, generator=generator), torch.randn(2, 5, 24, generator=generator)
    with torch.no_grad():
        result: torch.Tensor = module(sample.to(dtype), torch.tensor(700.0), text.to(dtype), return_dict=False)[0]
    return result.float()


def sqnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(-10 * torch.log10((found - expected).square().sum() / expected.square().sum()))


@pytest.mark.parametrize("linear_projection", [True, False])
def test_a_unet_computes_the_same_with_channels_last(linear_projection: bool) -> None:
    module = unet(linear_projection=linear_projection)
    changed = copy.deepcopy(module)
    assert use_channels_last(changed) == 2 + 2 + 4 + 1 + 1 + 2  # residual blocks and transformers: down, mid, up
    assert isinstance(changed.mid_block.resnets[0], ChannelsLastResnet)
    assert isinstance(changed.mid_block.attentions[0], ChannelsLastTransformer)
    assert changed.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(output_of(changed), output_of(module), rtol=1e-4, atol=1e-5)


def quantized(module: torch.nn.Module, names: list[str]) -> dict[str, QuantizedLayer]:
    amaxes: dict[str, float] = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: amaxes.update({name: float(args[0].abs().amax())})
        )
        for name in names
    ]
    output_of(module)
    for handle in handles:
        handle.remove()
    return {
        name: quantize_layer(
            module.get_submodule(name).weight.flatten(1), LayerRange(amaxes[name], None), Precision.FP8, None
        )
        for name in names
    }


def test_convolutions_in_fp8_are_close_and_keep_their_names() -> None:
    module = unet(linear_projection=True)
    names = [name for name, _ in module.named_modules() if name.endswith((".conv1", ".conv2", ".proj_in"))]
    layers = quantized(module, names)
    lowered, counts = lower_for_torch(module, layers, torch.float16)
    assert counts == {"fp8 convolution": len(names) - 4, "fp8 linear": 4}
    first = lowered.mid_block.resnets[0].conv1
    assert isinstance(first, Fp8Convolution)
    stored = torch_tensors("x", layers["mid_block.resnets.0.conv1"], module.mid_block.resnets[0].conv1, torch.float16)
    assert torch.equal(stored["x.codes"].view(torch.uint8), first.codes.view(torch.uint8))
    assert 18.0 < sqnr_db(output_of(lowered), output_of(module)) < 50.0
    shared, counts = lower_for_torch(module, layers, torch.float16, sixteen_bit=True)
    assert "fp8 convolution in a 16-bit product" in counts
    assert sqnr_db(output_of(shared), output_of(module)) > sqnr_db(output_of(lowered), output_of(module))


def test_a_convolution_in_fp8_is_called_like_the_one_it_stands_for() -> None:
    convolution = torch.nn.Conv2d(32, 48, 3, padding=1)
    layer = quantize_layer(convolution.weight.detach().flatten(1), LayerRange(4.5, None), Precision.FP8, None)
    holder = torch.nn.Module()
    holder.inner = convolution
    lowered, _ = lower_for_torch(holder, {"inner": layer}, torch.float16)
    data = torch.randn(2, 32, 5, 7)
    found = lowered.inner(data.half()).float()
    assert found.shape == (2, 48, 5, 7)
    assert sqnr_db(found, convolution(data).detach()) > 25.0


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"kernel_size": 5}])
def test_other_convolutions_stay_in_sixteen_bits(options: dict[str, int]) -> None:
    holder = torch.nn.Module()
    holder.inner = torch.nn.Conv2d(32, 32, **{"kernel_size": 3, "padding": 1, **options})
    layer = quantize_layer(holder.inner.weight.detach().flatten(1), LayerRange(4.5, None), Precision.FP8, None)
    _, counts = lower_for_torch(holder, {"inner": layer}, torch.float16)
    assert counts == {"fp8 weight in a 16-bit Conv2d": 1}


def test_the_operator_is_torchs_convolution_of_the_codes() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randn(1, 6, 5, 16, generator=generator).to(torch.float8_e4m3fn)
    weight = torch.randn(24, 16, 3, 3, generator=generator).to(torch.float8_e4m3fn)
    bias = torch.randn(24, generator=generator).half()
    expected = F.conv2d(codes.float().permute(0, 3, 1, 2), weight.float(), padding=1) * 0.25 + bias[:, None, None]
    rows = weight.float().permute(0, 2, 3, 1).flatten(1).to(torch.float8_e4m3fn)
    found = convolution_fp8(codes, rows, torch.tensor(0.25), bias, torch.float16)
    torch.testing.assert_close(found.permute(0, 3, 1, 2).float(), expected, rtol=2**-10, atol=2**-9)


def test_group_norm_adds_before_it_norms() -> None:
    generator = torch.Generator().manual_seed(3)
    data, added = torch.randn(2, 4, 3, 12, generator=generator) + 5, torch.randn(2, 12, generator=generator)
    norm = Norm(4, torch.rand(12, generator=generator), torch.randn(12, generator=generator), 1e-5, silu=True)
    whole = (data + added[:, None, None]).permute(0, 3, 1, 2)
    expected = F.silu(F.group_norm(whole, 4, norm.weight, norm.bias, 1e-5)).permute(0, 2, 3, 1)
    torch.testing.assert_close(group_norm(data, norm, added), expected)
    codes = group_norm(data, norm, added, torch.tensor(0.01), torch.int8)
    assert torch.equal(codes, (expected * 100).round().clamp(-128, 127).to(torch.int8))
