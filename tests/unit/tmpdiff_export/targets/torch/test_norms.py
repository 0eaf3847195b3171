"""Norms, modulations and residuals as one kernel, without a GPU: the same functions as diffusers' blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch.nn import functional as F

from engines.precision import Precision
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.targets.torch.activations import Codes
from tmpdiff_export.targets.torch.flux import use_rotary_kernel
from tmpdiff_export.targets.torch.fusion import fuse
from tmpdiff_export.targets.torch.kernels.norms import Affine, Modulation, add_norm_modulated, norm_modulated
from tmpdiff_export.targets.torch.layers import StaticLinear, linear_from
from tmpdiff_export.targets.torch.norms import use_norm_kernel

FP8 = torch.float8_e4m3fn


def flux() -> torch.nn.Module:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def flux_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 24, generator=generator),
        "pooled_projections": torch.randn(2, 12, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": torch.arange(48.0).view(16, 3) % 5,
        "txt_ids": torch.zeros(7, 3),
    }


def sd3() -> torch.nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=3, attention_head_dim=16,
        joint_attention_dim=32, caption_projection_dim=48, pooled_projection_dim=16, pos_embed_max_size=16,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip


def sd3_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "pooled_projections": torch.randn(2, 16, generator=generator),
        "timestep": torch.tensor([3.0, 900.0]),
    }


def pixart() -> torch.nn.Module:
    return PixArtTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=24, num_attention_heads=2, cross_attention_dim=48,
        caption_channels=12, num_embeds_ada_norm=1000, norm_type="ada_norm_single", in_channels=4, out_channels=8,
    )  # fmt: skip


def pixart_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
        "timestep": torch.tensor([3.0, 900.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


FAMILIES = pytest.mark.parametrize(
    ("make", "inputs", "blocks"),
    [(flux, flux_inputs(), 4), (sd3, sd3_inputs(), 3), (pixart, pixart_inputs(), 2)],
    ids=["flux", "sd3", "pixart"],
)


def made(make: Any) -> torch.nn.Module:
    """With weights such that all that modulates shows in the result."""
    torch.manual_seed(0)
    module: torch.nn.Module = make().eval()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            if layer.bias is not None:
                torch.nn.init.normal_(layer.bias, std=0.3)
    return module


def call(module: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = module(**inputs, return_dict=False)[0]
    return output


def half(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: item.half() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for name, item in inputs.items()
    }


@FAMILIES
def test_families_compute_the_same(make: Any, inputs: dict[str, Any], blocks: int) -> None:
    module = made(make)
    use_rotary_kernel(module)
    changed = copy.deepcopy(module)
    assert use_norm_kernel(changed) == blocks
    assert use_norm_kernel(changed) == 0
    assert changed.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(call(changed, inputs), call(module, inputs), rtol=1e-4, atol=1e-4)


@FAMILIES
@pytest.mark.parametrize("precision", [Precision.FP8, Precision.INT8])
def test_norms_make_the_codes_of_the_layers_behind_them(
    make: Any, inputs: dict[str, Any], blocks: int, precision: Precision
) -> None:
    module = made(make)
    quantized = copy.deepcopy(module).half()
    readers: dict[str, list[str]] = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, torch.nn.Linear) or "blocks." not in name or "norm" in name:
            continue
        codes = quantize_layer(layer.weight, LayerRange(6.0, None), precision, None)
        parent, _, child = name.rpartition(".")
        bias = None if layer.bias is None else layer.bias.detach()
        setattr(quantized.get_submodule(parent), child, linear_from(codes, bias, torch.float16))
        if child in ("to_q", "to_k", "to_v", "proj_mlp") or child.startswith("add_"):
            key = f"{parent}.attn" if child == "proj_mlp" else f"{parent} {child[:4] == 'add_'}"
            readers.setdefault(key.removesuffix(" False"), []).append(name)
    apart = copy.deepcopy(quantized)
    fuse(quantized, readers.values())
    taken: list[torch.dtype] = []
    for layer in quantized.modules():
        if isinstance(layer, StaticLinear):
            layer.register_forward_pre_hook(lambda _, args: taken.append(args[0].dtype))
    found, expected = call(quantized, half(inputs)).float(), call(apart, half(inputs)).float()
    dtype = FP8 if precision is Precision.FP8 else torch.int8
    assert taken.count(dtype) >= 4 * blocks
    # A rounding that differs moves some codes by one step.
    assert (found - expected).square().sum() < 2e-3 * expected.square().sum()


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
@pytest.mark.parametrize("smooth", [False, True])
def test_codes_of_a_normed_sum_are_those_of_its_parts(dtype: torch.dtype, smooth: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    data, branch = (torch.randn(2, 5, 12, generator=generator).bfloat16() for _ in range(2))
    table = torch.randn(2, 6, 12, generator=generator).bfloat16()
    smoothing = torch.rand(12, generator=generator).bfloat16() if smooth else None
    modulation, codes = Modulation(table, 3, 4, 2), Codes(dtype, torch.tensor(0.02), smoothing)
    total = (data.double() + table[:, 2, None].double() * branch.double()).bfloat16()
    rows = F.layer_norm(total.double(), (12,), eps=1e-6) * (1 + table[:, 4, None].double()) + table[:, 3, None].double()
    made, summed = add_norm_modulated(data, branch, modulation, 1e-6, codes)
    assert torch.equal(summed, total)
    limit = 448.0 if dtype is FP8 else 127.0
    scaled = rows if smoothing is None else rows * smoothing.double()
    expected = (scaled / 0.02).clamp(-limit - (dtype is torch.int8), limit)
    assert made.dtype == dtype
    assert ((made.double() - expected).abs() <= (0.51 if dtype is torch.int8 else 2**-4 * expected.abs() + 2**-9)).all()
    assert torch.equal(norm_modulated(total, modulation, 1e-6, codes).float(), made.float())
    plain, ungated = add_norm_modulated(data, branch, modulation._replace(gate=None), 1e-6, None)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(ungated, data + branch)


def test_codes_of_a_norm_with_its_own_weight_are_those_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(4)
    data, branch = (torch.randn(2, 5, 12, generator=generator).half() for _ in range(2))
    own = Affine(*(torch.randn(12, generator=generator).half() for _ in range(2)))
    expected = F.layer_norm((data + branch).double(), (12,), own.weight.double(), own.bias.double(), 1e-5)
    made, total = add_norm_modulated(data, branch, own, 1e-5, Codes(torch.int8, torch.tensor(0.02), None))
    assert torch.equal(total, data + branch)
    assert ((made.double() - (expected / 0.02).clamp(-128, 127)).abs() <= 0.51).all()
    assert torch.equal(norm_modulated(total, own, 1e-5, None), expected.half())


def test_norms_of_other_layers_stay_in_16_bit() -> None:
    module = made(pixart)
    module.transformer_blocks[0].norm1 = torch.nn.LayerNorm(48)  # with a weight
    module.transformer_blocks[1].set_chunk_feed_forward(2)
    assert use_norm_kernel(module) == 0
    changed = made(pixart)
    assert use_norm_kernel(changed) == 2
    with pytest.raises(ValueError, match="expected a timestep"):
        changed.transformer_blocks[0](torch.randn(1, 4, 48))


def test_a_norm_of_two_tensors_is_that_of_both_joined() -> None:
    generator = torch.Generator().manual_seed(3)
    joined = torch.randn(2, 7, 12, generator=generator)
    change = Modulation(torch.randn(2, 3, 12, generator=generator), 0, 1)
    expected = norm_modulated(joined, change, 1e-6, None)
    assert torch.equal(norm_modulated(joined[:, 3:], change, 1e-6, None, joined[:, :3]), expected)
