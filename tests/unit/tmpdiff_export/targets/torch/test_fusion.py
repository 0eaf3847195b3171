"""What the torch backend writes anew in a denoiser, without a GPU: the same functions, and the same names of layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch.nn import functional as F

from engines.precision import Precision
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.targets.torch.flux import CodesSingleBlock, RotaryProcessor, use_rotary_kernel
from tmpdiff_export.targets.torch.fusion import fuse, replace_tanh_gelu, same_input, share_codes
from tmpdiff_export.targets.torch.kernels.gelu_codes import TanhGelu, gelu_codes
from tmpdiff_export.targets.torch.kernels.rotary import norm_rotary
from tmpdiff_export.targets.torch.layers import Fp8Linear, linear_from


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    for name, item in module.named_parameters():
        if (
            "norm_" in name and name.endswith("weight") and item.ndim == 1
        ):  # of ones, norms in the wrong place would not show
            torch.nn.init.uniform_(item, 0.5, 1.5)
    return module


def flux_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    side, text = 4, 7
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
    return {
        "hidden_states": torch.randn(2, side * side, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, text, 24, generator=generator),
        "pooled_projections": torch.randn(2, 12, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": positions,
        "txt_ids": torch.zeros(text, 3),
    }


def test_flux_computes_the_same_with_the_rotary_processor() -> None:
    module = flux()
    changed = copy.deepcopy(module)
    assert use_rotary_kernel(changed) == 4
    with torch.no_grad():
        expected = module(**flux_inputs(), return_dict=False)[0]
        found = changed(**flux_inputs(), return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert not torch.equal(found, torch.zeros_like(found))


def test_only_plain_flux_attention_gets_the_processor() -> None:
    module = flux()
    fused = module.transformer_blocks[0].attn
    fused.fuse_projections()
    adapter = type("Adapter", (FluxAttnProcessor,), {})()
    module.single_transformer_blocks[1].attn.processor = adapter
    assert use_rotary_kernel(module) == 2
    assert module.single_transformer_blocks[1].attn.processor is adapter
    assert isinstance(module.transformer_blocks[1].attn.processor, RotaryProcessor)
    assert not isinstance(fused.processor, RotaryProcessor)


def test_codes_of_queries_are_scaled_and_saturate() -> None:
    generator = torch.Generator().manual_seed(2)
    text, image = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 5, 3, 8, generator=generator)
    weight, rotary = torch.linspace(0.5, 1.5, 8), (torch.ones(7, 8), torch.zeros(7, 8))  # no rotation
    expected = torch.cat([F.rms_norm(text, (8,), weight, 1e-6), F.rms_norm(image, (8,), 2 * weight, 1e-6)], dim=1)
    found = norm_rotary((text, weight), (image, 2 * weight), rotary, 1e-6, torch.float8_e4m3fn, torch.tensor(0.005))
    assert expected.abs().max() * 200 > 448
    torch.testing.assert_close(found.float(), (expected * 200).clamp(-448, 448), rtol=2**-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gelu_is_torchs_tanh_gelu(dtype: torch.dtype) -> None:
    data = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 100.0, -100.0, 3e4, -3e4])]).to(dtype)
    exact = F.gelu(data.double(), approximate="tanh")
    found = TanhGelu()(data)
    assert found.dtype == dtype
    bound = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert ((found.double() - exact).abs() <= bound * exact.abs() + 1e-6).all()


def test_gelu_is_replaced_under_the_same_layer_names() -> None:
    torch.manual_seed(0)
    module = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16,
        caption_channels=12, num_embeds_ada_norm=1000, norm_type="ada_norm_single", in_channels=4, out_channels=8,
    ).eval()  # fmt: skip
    changed = copy.deepcopy(module)
    # A feed-forward network per block, and the caption projection.
    assert replace_tanh_gelu(changed) == 3
    assert not any(isinstance(item, torch.nn.GELU) for item in changed.modules())
    assert changed.state_dict().keys() == module.state_dict().keys()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([3.0, 900.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad():
        torch.testing.assert_close(
            changed(**inputs, return_dict=False)[0], module(**inputs, return_dict=False)[0], rtol=1e-4, atol=1e-5
        )


def quantized(module: torch.nn.Module, precision: Precision, smoothing: bool) -> torch.nn.Module:
    """A float16 copy whose feed-forward layers and `proj_out` of single blocks take codes."""
    changed = copy.deepcopy(module).half()
    chosen = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and (".net." in name or ("single" in name and "proj_out" in name))
    ]
    random = np.random.default_rng(0)
    for name in chosen:
        layer = module.get_submodule(name)
        factors = random.uniform(0.5, 2.0, layer.in_features).astype(np.float32) if smoothing else None
        found = LayerRange(4.0, None if factors is None else torch.from_numpy(factors))
        codes = quantize_layer(layer.weight, found, precision, None)
        parent, _, child = name.rpartition(".")
        setattr(changed.get_submodule(parent), child, linear_from(codes, layer.bias.detach(), torch.float16))
    return changed


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("precision", [Precision.FP8, Precision.INT8])
def test_fused_layers_compute_what_they_did_apart(precision: Precision, smoothing: bool) -> None:
    module = flux()
    apart = quantized(module, precision, smoothing)
    fused = copy.deepcopy(apart)
    fuse(fused, ())
    assert [type(block) for block in fused.single_transformer_blocks] == [CodesSingleBlock] * 2
    assert sum(getattr(layer, "after_gelu", False) for layer in fused.modules()) == 4
    assert fused.state_dict().keys() == apart.state_dict().keys()
    inputs = {name: item.half() for name, item in flux_inputs().items()}
    with torch.no_grad():
        expected = apart(**inputs, return_dict=False)[0].float()
        found = fused(**inputs, return_dict=False)[0].float()
    # A rounding that differs moves some codes by one step.
    assert (found - expected).square().sum() < 1e-4 * expected.square().sum()


def test_shared_weights_stay_in_16_bit_products() -> None:
    apart = quantized(flux(), Precision.INT8, False)
    for layer in apart.modules():
        if hasattr(layer, "sixteen_bit"):
            layer.sixteen_bit = True
    fuse(apart, ())
    assert not any(isinstance(block, CodesSingleBlock) for block in apart.single_transformer_blocks)
    assert not any(getattr(layer, "after_gelu", False) for layer in apart.modules())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_of_joined_rows_are_those_of_the_joined_tensor(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(5, width, generator=generator).mul(30.0).half() for width in (6, 10))
    smoothing, scale = torch.rand(16, generator=generator).half(), torch.tensor(0.05)
    joined = torch.cat([first, F.gelu(second, approximate="tanh")], dim=1) * smoothing
    limit = 448.0 if dtype is torch.float8_e4m3fn else 127.0
    expected = (joined.float() / scale).clamp(-limit - (dtype is torch.int8), limit)
    found = gelu_codes(first, second, scale, smoothing, dtype).float()
    assert expected.max() == limit or expected.min() <= -limit  # some saturate
    assert ((found - expected).abs() <= (0.51 if dtype is torch.int8 else 2**-4 * expected.abs() + 2**-10)).all()


def test_layers_that_read_the_same_input_share_its_codes() -> None:
    module = quantized(flux(), Precision.FP8, False)
    for block in (*module.transformer_blocks, *module.single_transformer_blocks):
        for name in ("to_q", "to_k", "to_v"):
            layer = getattr(block.attn, name)
            codes = quantize_layer(layer.weight.float(), LayerRange(3.0, None), Precision.FP8, None)
            setattr(block.attn, name, linear_from(codes, layer.bias.detach(), torch.float16))
    ranges = {
        name: LayerRange(3.0 if ".to_" in name else 4.0, None)
        for name, layer in module.named_modules()
        if isinstance(layer, Fp8Linear)
    }
    ranges["transformer_blocks.1.attn.to_k"] = LayerRange(3.0000002, None)
    apart = copy.deepcopy(module)
    assert share_codes(module, same_input(ranges)) == 7
    first, second = (block.attn for block in module.transformer_blocks)
    assert first.to_k.leader == first.to_v.leader == (first.to_q,)
    assert second.to_k.leader == ()  # another range: another input
    assert second.to_v.leader == (second.to_q,)
    assert module.state_dict().keys() == apart.state_dict().keys()
    inputs = {name: item.half() for name, item in flux_inputs().items()}
    with torch.no_grad():
        assert torch.equal(module(**inputs, return_dict=False)[0], apart(**inputs, return_dict=False)[0])
        copied = copy.deepcopy(module)
        copied.transformer_blocks[0].attn.to_q.input_scale.fill_(1.0)
        rows = torch.randn(4, 48).half()
        taken = copied.transformer_blocks[0].attn
        assert taken.to_k.leader == (taken.to_q,)  # its own, not that of the original
        assert not torch.equal(taken.to_k(rows), first.to_k(rows))


def test_joined_rows_may_begin_with_codes_of_another_scale() -> None:
    generator = torch.Generator().manual_seed(4)
    data = torch.randn(5, 6, generator=generator).to(torch.float8_e4m3fn)
    second, scales = torch.randn(5, 10, generator=generator).half(), (torch.tensor(0.5), torch.tensor(0.05))
    expected = gelu_codes((data.float() * 0.5).half(), second, scales[1], None, torch.int8)
    found = gelu_codes(data, second, scales[1], None, torch.int8, scales[0])
    assert torch.equal(found, expected)
