"""Attention layers of diffusers' own class over fewer kernels, without a GPU: the same functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0

from engines.precision import Precision
from tmpdiff_export.quantization.codes import AttentionRange, LayerRange, quantize_layer
from tmpdiff_export.targets.torch.attention import Fp8Processor, use_fp8_attention, watch_attention
from tmpdiff_export.targets.torch.cross import CrossProcessor, use_cross_processor
from tmpdiff_export.targets.torch.joint import JointProcessor, use_joint_processor
from tmpdiff_export.targets.torch.kernels.cross_attention import cross_attention
from tmpdiff_export.targets.torch.layers import linear_from


def sqnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (found.double() - expected.double()).square().sum() / expected.double().square().sum()
    return float(-10 * torch.log10(noise + 1e-30))


def sd3(qk_norm: str | None = "rms_norm") -> SD3Transformer2DModel:
    torch.manual_seed(0)
    module = SD3Transformer2DModel(
        sample_size=32, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=64,
        joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=16, pos_embed_max_size=16,
        dual_attention_layers=(0, 1), qk_norm=qk_norm,
    ).eval()  # fmt: skip
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    for name, item in module.named_parameters():
        if "norm_" in name and name.endswith("weight") and item.ndim == 1:
            torch.nn.init.uniform_(item, 0.5, 1.5)
    return module


def sd3_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 32, 32, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "pooled_projections": torch.randn(2, 16, generator=generator),
        "timestep": torch.tensor([3.0, 900.0]),
    }


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    module = PixArtTransformer2DModel(
        sample_size=32, num_layers=2, attention_head_dim=72, num_attention_heads=2, cross_attention_dim=144,
        caption_channels=12, num_embeds_ada_norm=1000, norm_type="ada_norm_single", in_channels=4, out_channels=8,
    ).eval()  # fmt: skip
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return module


def pixart_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 32, 32, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "timestep": torch.tensor([3.0, 900.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def call(module: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = module(**inputs, return_dict=False)[0]
    return output


def test_sd3_computes_the_same_with_the_processor() -> None:
    module = sd3()
    changed = copy.deepcopy(module)
    assert use_joint_processor(changed) == 5  # three blocks, two of them with attention of the picture alone
    torch.testing.assert_close(call(changed, sd3_inputs()), call(module, sd3_inputs()), rtol=2e-5, atol=2e-5)
    assert use_joint_processor(sd3(None)) == 0  # nothing to be taken away


@pytest.mark.parametrize(
    ("module", "inputs", "layers"),
    [(sd3(), sd3_inputs(), 5), (sd3(None), sd3_inputs(), 5), (pixart(), pixart_inputs(), 2)],
    ids=["sd3", "sd3 without norms", "pixart"],
)
def test_codes_of_attention_are_rounded_where_they_were(
    module: torch.nn.Module, inputs: dict[str, Any], layers: int
) -> None:
    found: dict[str, AttentionRange] = {}
    with watch_attention(module, found):
        expected = call(module, inputs)
    assert len(found) == layers
    wrapped = copy.deepcopy(module)
    use_fp8_attention(wrapped, found)
    joint = copy.deepcopy(wrapped)
    assert use_joint_processor(joint) == layers
    apart, together = call(wrapped, inputs), call(joint, inputs)
    assert 20.0 < sqnr_db(apart, expected) < 60.0
    assert sqnr_db(together, apart) > sqnr_db(apart, expected) + 6.0


def test_an_output_projection_in_fp8_takes_the_results_codes() -> None:
    module = sd3()
    found: dict[str, AttentionRange] = {}
    with watch_attention(module, found):
        expected = call(module, sd3_inputs())
    for name, layer in list(module.named_modules()):
        if name.endswith(("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0")):
            codes = quantize_layer(layer.weight, LayerRange(4.0, None), Precision.FP8, None)
            parent, _, child = name.rpartition(".")
            linear = linear_from(codes, layer.bias.detach(), torch.bfloat16)
            setattr(module.get_submodule(parent), child, linear)
    use_fp8_attention(module, found)
    twice = copy.deepcopy(module)
    assert use_joint_processor(module) == 5
    once_db, twice_db = (sqnr_db(call(item, sd3_inputs()), expected) for item in (module, twice))
    assert once_db > twice_db  # rounded once to codes, not twice


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_is_the_same_with_its_processor(masked: bool) -> None:
    module = pixart()
    changed = copy.deepcopy(module)
    assert use_cross_processor(changed) == 2
    assert isinstance(changed.transformer_blocks[0].attn2.processor, CrossProcessor)
    mask = {"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])} if masked else {}
    inputs = {**pixart_inputs(), **mask}
    torch.testing.assert_close(call(changed, inputs), call(module, inputs), rtol=2e-5, atol=2e-5)


def test_self_attention_in_sixteen_bits_is_the_same_with_the_processor() -> None:
    module = pixart()
    changed = copy.deepcopy(module)
    assert use_joint_processor(changed) == 2
    torch.testing.assert_close(call(changed, pixart_inputs()), call(module, pixart_inputs()), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_of_cross_attention_are_those_of_its_result(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, tokens, 3, 16, generator=generator) for tokens in (9, 5, 5))
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(0.25).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    torch.testing.assert_close(cross_attention(query, key, value), expected)
    found = cross_attention(query, key, value, torch.tensor(0.01), dtype).float()
    limits = (-448, 448) if dtype is torch.float8_e4m3fn else (-128, 127)
    step = 2**-4 * 1.001 * expected.abs() * 100 + 2**-10 if dtype is torch.float8_e4m3fn else 0.501
    assert ((found - (expected * 100).clamp(*limits)).abs() <= step).all()


def test_other_processors_and_layers_keep_theirs() -> None:
    module = pixart()
    found: dict[str, AttentionRange] = {}
    with watch_attention(module, found):
        call(module, pixart_inputs())
    use_fp8_attention(module, found)
    first, second = (block.attn1 for block in module.transformer_blocks)
    first.processor = Fp8Processor(type("Other", (AttnProcessor2_0,), {})())
    second.residual_connection = True
    assert use_joint_processor(module) == 0
    assert isinstance(module.transformer_blocks[0].attn2.processor, AttnProcessor2_0)
    module.transformer_blocks[1].attn2.rescale_output_factor = 2.0
    assert use_cross_processor(module) == 1
    assert isinstance(module.transformer_blocks[1].attn2.processor, AttnProcessor2_0)
    second.residual_connection = False
    assert use_joint_processor(module) == 1
    data = torch.randn(1, 256, 144)
    assert isinstance(second.processor, JointProcessor)
    with pytest.raises(ValueError, match="no attention mask"):
        second(data, attention_mask=torch.zeros(1, 1, 256))
    with pytest.raises(ValueError, match="no text for a layer without projections"):
        second(data, encoder_hidden_states=data)


def test_scales_of_products_are_tensors_of_their_own() -> None:
    # Inductor takes a scale that is a part of a tensor for the whole of it, and fails on a GPU.
    module = sd3()
    found: dict[str, AttentionRange] = {}
    with watch_attention(module, found):
        call(module, sd3_inputs())
    for name, layer in list(module.named_modules()):
        if isinstance(layer, torch.nn.Linear) and ".attn" in name:
            codes = quantize_layer(layer.weight, LayerRange(4.0, None), Precision.FP8, None)
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, linear_from(codes, layer.bias.detach(), torch.bfloat16))
    use_fp8_attention(module, found)
    assert use_joint_processor(module) == 5
    layer = module.transformer_blocks[0].attn
    arguments = torch.randn(1, 256, 128), torch.randn(1, 8, 128)
    graph = torch.export.export(layer, arguments, strict=False).graph
    products = [node for node in graph.nodes if node.target is torch.ops.aten._scaled_mm.default]
    assert len(products) == 8
    assert all(scale.op == "placeholder" for node in products for scale in node.args[2:4])
