"""A UNet's blocks as the torch backend has them, without a GPU: the same functions, and convolutions in FP8."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from engines.precision import Precision
from tmpdiff_export.quantization.codes import LayerRange, QuantizedLayer, quantize_layer
from tmpdiff_export.targets.torch.activations import FP8, Codes
from tmpdiff_export.targets.torch.convolutions import Fp8Convolution
from tmpdiff_export.targets.torch.fusion import CodesGeglu, fuse, same_input
from tmpdiff_export.targets.torch.kernels.convolution import convolution_fp8
from tmpdiff_export.targets.torch.kernels.geglu import geglu
from tmpdiff_export.targets.torch.kernels.group_norm import Norm, group_norm
from tmpdiff_export.targets.torch.layers import StaticLinear
from tmpdiff_export.targets.torch.lowering import lower_for_torch, place_codes, torch_tensors
from tmpdiff_export.targets.torch.unet import (
    ChannelsLastResnet,
    ChannelsLastTransformer,
    NormedBlock,
    use_channels_last,
)


def unet(*, linear_projection: bool, layers: int = 1) -> UNet2DConditionModel:
    torch.manual_seed(0)
    module = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, use_linear_projection=linear_projection,
        transformer_layers_per_block=layers,
    ).eval()  # fmt: skip
    for name, item in module.named_parameters():
        if "norm" in name and item.ndim == 1:  # of ones and zeros, norms in the wrong place would not show
            torch.nn.init.uniform_(item, 0.5, 1.5)
    return module


def output_of(module: torch.nn.Module) -> torch.Tensor:
    dtype = next(item.dtype for item in module.parameters() if item.is_floating_point())
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 16, 12, generator=generator), torch.randn(2, 5, 32, generator=generator)
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


def test_a_unets_blocks_add_norm_and_make_codes_in_one() -> None:
    module = unet(linear_projection=True, layers=3)
    changed = copy.deepcopy(module)
    fuse(changed, ())
    blocks = [part for part in changed.modules() if isinstance(part, NormedBlock)]
    assert len(blocks) == 3 * 4
    assert all(isinstance(block.ff.net[0], CodesGeglu) for block in blocks)
    assert changed.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(output_of(changed), output_of(module), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"no arguments for cross attention, got \['scale'\]"):
        blocks[0](torch.randn(1, 4, 64), cross_attention_kwargs={"scale": 1.0})


@pytest.mark.parametrize("precision", [Precision.FP8, Precision.INT8])
def test_layers_of_a_unets_blocks_take_codes(precision: Precision) -> None:
    module = unet(linear_projection=True, layers=2)
    names = [name for name, layer in module.named_modules() if "blocks" in name and isinstance(layer, torch.nn.Linear)]
    names = [name for name in names if ".transformer_blocks." in name]
    seen: dict[str, LayerRange] = {}
    layers = quantized(module, names, precision, seen)
    apart = copy.deepcopy(module).half().requires_grad_(requires_grad=False)
    place_codes(apart, layers, torch.float16, sixteen_bit=False)
    together = copy.deepcopy(apart)
    fuse(together, same_input(seen))
    taken: dict[str, torch.dtype] = {}
    for name, layer in together.named_modules():
        if isinstance(layer, StaticLinear):
            layer.register_forward_pre_hook(lambda _, args, name=name: taken.update({name: args[0].dtype}))
    found, expected = output_of(together), output_of(apart)
    codes = FP8 if precision is Precision.FP8 else torch.int8
    first = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"}
    for name, dtype in taken.items():
        inside = name.split(".transformer_blocks.")[1].split(".", 1)[1]
        assert (dtype == codes) == (inside in first), name
    assert len(taken) == len(names)
    assert sqnr_db(found, expected) > 30.0  # a rounding that differs moves some codes by one step


def test_blocks_of_another_kind_stay_as_they_are() -> None:
    module = unet(linear_projection=True, layers=2)
    first, second = (module.mid_block.attentions[0], module.down_blocks[1].attentions[0])
    first.transformer_blocks[1].set_chunk_feed_forward(2)  # then the sum before it is made, too
    second.transformer_blocks[0].norm2 = torch.nn.LayerNorm(64, bias=False)
    use_channels_last(module)
    assert sum(isinstance(part, NormedBlock) for part in module.modules()) == 2 * 2
    assert not any(isinstance(part, NormedBlock) for part in (*first.modules(), *second.modules()))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("smooth", [False, True])
def test_codes_of_geglu_are_those_of_its_parts(dtype: torch.dtype, smooth: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    data = torch.randn(2, 3, 24, generator=generator).mul(3.0).half()
    smoothing = torch.rand(12, generator=generator).half() if smooth else None
    exact = data[..., :12].double() * F.gelu(data[..., 12:].double())
    torch.testing.assert_close(geglu(data, None).double(), exact, rtol=2**-11, atol=1e-6)
    scaled = (exact if smoothing is None else exact * smoothing.double()) / 0.03
    limit = 448.0 if dtype is FP8 else 127.0
    expected = scaled.clamp(-limit - (dtype is torch.int8), limit)
    found = geglu(data, Codes(dtype, torch.tensor(0.03), smoothing))
    assert found.dtype == dtype
    step = 0.51 if dtype is torch.int8 else 2**-4 * expected.abs() + 2**-9
    assert ((found.double() - expected).abs() <= step).all()


def quantized(
    module: torch.nn.Module,
    names: list[str],
    precision: Precision = Precision.FP8,
    seen: dict[str, LayerRange] | None = None,
) -> dict[str, QuantizedLayer]:
    """Quantized layers by name; `seen` is given the ranges that they were made with."""
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
    ranges = {name: LayerRange(amaxes[name], None) for name in names}
    if seen is not None:
        seen.update(ranges)
    return {
        name: quantize_layer(module.get_submodule(name).weight.flatten(1), found, precision, None)
        for name, found in ranges.items()
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
