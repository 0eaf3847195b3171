"""Attention in FP8 of the torch backend: the operator on a CPU, ranges, layers, and a bundle that has it."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import Attention
from helpers.needs_compiler import needs_compiler
from helpers.runtime_command import rewrite_manifest
from torch.nn import functional as F

from engines.backends.torch.attention import attention_fp8, scales_tensor
from engines.errors import BackendError, BuildError
from engines.manifest import Manifest
from engines.precision import Precision
from engines.runtime import DenoiseRuntime
from tmpdiff_export.quantization.codes import AttentionRange
from tmpdiff_export.targets.torch.activations import FP8, static_codes
from tmpdiff_export.targets.torch.attention import (
    Fp8Processor,
    attend_fp8,
    query_factor,
    require_ranges,
    use_fp8_attention,
    watch_attention,
)
from tmpdiff_export.targets.torch.flux import RotaryProcessor, use_rotary_kernel
from tmpdiff_export.targets.torch.settings import PackageSettings

PROMPTS = ("a large red circle", "a small blue square in the center", "a large green ring", "a white diamond")


def sqnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (found.double() - expected.double()).square().sum() / expected.double().square().sum()
    return float(-10 * torch.log10(noise))


def inputs(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=generator) * factor for factor in (1.0, 2.0, 0.3)]


def test_the_operator_computes_attention_to_the_precision_of_its_codes() -> None:
    parts = inputs(2, 3, 320, 64)
    limits = AttentionRange(*(float(item.abs().max()) for item in parts))
    expected = F.scaled_dot_product_attention(*parts)
    scales = scales_tensor(*limits.scales)
    found = attend_fp8(*parts, scales)
    assert found.dtype == torch.float32
    assert 20.0 < sqnr_db(found, expected) < 30.0  # that of FP8 codes, and not none
    assert sqnr_db(attend_fp8(*(item.half() for item in parts), scales).float(), found) > 30.0


@pytest.mark.parametrize("size", [72, 80, 112])
def test_head_sizes_in_between_are_padded(size: int) -> None:
    query, key, value = inputs(1, 2, 300, size)
    amaxes = [float(item.abs().max()) for item in (query * query_factor(size), key, value)]
    expected = F.scaled_dot_product_attention(query, key, value)
    found = attend_fp8(query, key, value, scales_tensor(*AttentionRange(*amaxes).scales))
    assert found.shape == expected.shape
    assert 20.0 < sqnr_db(found, expected) < 30.0


def test_a_query_that_looks_at_one_key_gets_its_value() -> None:
    query, key = torch.zeros(1, 256, 1, 64), torch.zeros(1, 256, 1, 64)
    query[..., 0], key[0, 17, 0, 0] = 40.0, 40.0
    value = torch.randn(1, 256, 1, 64, generator=torch.Generator().manual_seed(2))
    scales = AttentionRange(40.0, 40.0, float(value.abs().max())).scales
    codes = [static_codes(item, scale, FP8) for item, scale in zip((query, key, value), scales, strict=True)]
    found = attention_fp8(*codes, scales_tensor(*scales))
    assert found.dtype == FP8
    assert torch.equal(found, codes[2][:, 17:18].expand_as(found))  # bit for bit: one scale for values and results


class Layers(torch.nn.Module):
    """One layer of every kind that may, and may not, be in FP8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.alone = Attention(query_dim=128, heads=2, dim_head=64)
        self.crossed = Attention(query_dim=128, heads=2, dim_head=64)
        self.masked = Attention(query_dim=128, heads=2, dim_head=64)
        self.narrow = Attention(query_dim=128, heads=4, dim_head=32)
        self.short = Attention(query_dim=128, heads=2, dim_head=64)

    def forward(self, data: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(1, 1, data.shape[1])
        crossed = self.crossed(data, encoder_hidden_states=text)
        alone = self.alone(data) + self.masked(data, attention_mask=mask) + self.narrow(data)
        return alone + crossed + self.short(data[:, :40]).mean(dim=1, keepdim=True)


def test_ranges_are_of_the_layers_that_can_be_in_fp8() -> None:
    module = Layers().eval()
    before = [layer.processor for layer in module.children()]
    batches = [(torch.randn(1, 256, 128) * factor, torch.randn(1, 20, 128)) for factor in (1.0, 3.0)]
    with torch.no_grad():
        expected = module(*batches[0])
        found: dict[str, AttentionRange] = {}
        with watch_attention(module, found):
            for batch in batches:
                module(*batch)
        require_ranges(module, found)
        assert torch.equal(module(*batches[0]), expected)
    assert [layer.processor for layer in module.children()] == before
    assert list(found) == ["alone"]
    projected = [layer(batches[1][0]) for layer in (module.alone.to_q, module.alone.to_k, module.alone.to_v)]
    amaxes = [float(item.abs().max()) for item in projected]
    assert [found["alone"].query, found["alone"].key, found["alone"].value] == pytest.approx(amaxes, rel=1e-5)


def test_a_denoiser_without_such_a_layer_is_refused() -> None:
    module = Layers().eval()
    found: dict[str, AttentionRange] = {}
    with watch_attention(module, found):
        module(torch.randn(1, 255, 128), torch.randn(1, 20, 128))
    with pytest.raises(BuildError, match="no attention layer can be in FP8; that takes head size 64 to 128, no mask"):
        require_ranges(module, found)


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip


def flux_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    return {
        "hidden_states": torch.randn(1, 256, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 24, generator=generator),
        "pooled_projections": torch.randn(1, 12, generator=generator),
        "timestep": torch.tensor([0.3]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float(),
        "txt_ids": torch.zeros(7, 3),
    }


def test_flux_has_the_same_codes_with_the_kernel_that_makes_them() -> None:
    module = flux()
    found: dict[str, AttentionRange] = {}
    with torch.no_grad(), watch_attention(module, found):
        expected = module(**flux_inputs(), return_dict=False)[0]
    assert sorted(found) == ["single_transformer_blocks.0.attn", "transformer_blocks.0.attn"]
    wrapped = copy.deepcopy(module)
    use_fp8_attention(wrapped, found)
    fused = copy.deepcopy(wrapped)
    assert isinstance(wrapped.transformer_blocks[0].attn.processor, Fp8Processor)
    assert use_rotary_kernel(fused) == 2
    assert isinstance(fused.transformer_blocks[0].attn.processor, RotaryProcessor)
    with torch.no_grad():
        apart, together = (item(**flux_inputs(), return_dict=False)[0] for item in (wrapped, fused))
    assert 24.0 < sqnr_db(apart, expected) < 80.0
    assert 24.0 < sqnr_db(together, expected) < 80.0
    assert sqnr_db(together, apart) > sqnr_db(apart, expected) + 6.0  # rounded at the same places


@needs_compiler
def test_a_bundle_has_it_where_it_was_asked_for(torch_variants: Path) -> None:
    manifest = Manifest.model_validate_json((torch_variants / "manifest.json").read_text())
    nvfp4, fp8, fp16 = (manifest.denoisers[name][0] for name in ("nvfp4", "fp8", "fp16"))
    assert nvfp4.lowering["fp8 attention"] >= 1
    assert nvfp4.package is not None
    assert nvfp4.package.operators == ("attention_fp8",)
    for other in (fp8, fp16, *manifest.text_encoder, *manifest.vae_decoder):
        assert "fp8 attention" not in other.lowering
        assert other.package is not None
        assert other.package.operators == ()
    assert nvfp4.sqnr_db > nvfp4.sqnr_floor_db
    with DenoiseRuntime.load(torch_variants) as loaded:
        picture = loaded.generate(["a red circle"], [3], loaded.schedule("uniform:nvfp4"))
    assert picture.shape == (1, 64, 64, 3)
    assert np.ptp(picture.astype(int)) > 10


@needs_compiler
def test_a_gpu_package_with_the_operator_needs_cudnn(
    torch_variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.backends.torch.package import package_of

    monkeypatch.setitem(sys.modules, "cudnn", None)
    entry = Manifest.model_validate_json((torch_variants / "manifest.json").read_text()).denoisers["nvfp4"][0]
    package_of("nvfp4", entry)  # on a CPU it does not
    with pytest.raises(BackendError, match="needs the module cudnn, which is not installed; pip install nvidia-cudnn"):
        package_of("nvfp4", entry.model_copy(update={"device": "sm90 NVIDIA H100"}))


@needs_compiler
def test_an_operator_that_this_release_does_not_know_is_refused(torch_variants: Path, tmp_path: Path) -> None:
    from engines.errors import BundleError

    copied = tmp_path / "bundle"
    shutil.copytree(torch_variants, copied)
    rewrite_manifest(copied, lambda data: data["denoisers"]["nvfp4"][0]["package"].update(operators=["attention_fp4"]))
    with pytest.raises(BundleError, match="operators"):
        DenoiseRuntime.load(copied)


def test_what_cannot_have_it_is_refused() -> None:
    built = (Precision.FP16, Precision.FP8)
    PackageSettings().require_unset("onnxruntime")
    settings = PackageSettings(fp8_attention=(Precision.FP8,))
    settings.require_built(built)
    with pytest.raises(BackendError, match="of the torch backend; engines of 'tensorrt' have 16-bit attention"):
        settings.require_unset("tensorrt")
    for wrong in (Precision.INT8, Precision.FP16):
        with pytest.raises(BackendError, match=f"names {wrong.value}, expected quantized precisions .*: fp8"):
            PackageSettings(fp8_attention=(Precision.FP8, wrong)).require_built(built)
