"""Codes and scales of weights: those of numpy and ml_dtypes bit for bit, and their shapes without any weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import numpy_codes

from engines.precision import Precision
from tmpdiff_export.quantization.codes import LayerRange, QuantizedLayer, fp16_scale, quantize_layer
from tmpdiff_export.quantization.packing import pack, unpack
from tmpdiff_export.quantization.recipes import RECIPES

QUANTIZED = (Precision.FP8, Precision.INT8, Precision.INT4, Precision.NVFP4)
N, K = 96, 256


def awkward(seed: int = 0) -> torch.Tensor:
    """Every magnitude there is, ties between codes, zeros of both signs, a row of zeros and a tiny one."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((N, K)).astype(np.float32) * np.exp(rng.normal(0, 2, (N, 1))).astype(np.float32)
    weight[3] = 0.0
    weight[4] = -0.0
    weight[5] *= 1e-9
    weight[6] = rng.integers(-14, 15, K) / 2.0
    weight[7, ::50] *= 1000.0
    weight[8] = np.linspace(-6.0, 6.0, K)
    weight[9, :16] = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0]
    return torch.from_numpy(weight)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def require_equal(layer: QuantizedLayer, expected: numpy_codes.NumpyLayer) -> None:
    np.testing.assert_array_equal(bits(layer.codes), expected.codes.view(np.uint8))
    assert layer.weight_scale.shape == expected.weight_scale.shape
    np.testing.assert_array_equal(layer.weight_scale.numpy(), expected.weight_scale)
    assert (layer.block_scale is None) == (expected.block_scale is None)
    if layer.block_scale is not None and expected.block_scale is not None:
        np.testing.assert_array_equal(bits(layer.block_scale), expected.block_scale.view(np.uint8))


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_scales_are_those_of_numpy_bit_for_bit(precision: Precision, dtype: torch.dtype) -> None:
    block_size = RECIPES[precision].block_size
    weight = awkward().to(dtype)
    before = weight.clone()
    wide = weight.float().numpy()
    require_equal(
        quantize_layer(weight, LayerRange(None, None), precision, block_size),
        numpy_codes.quantize(wide, precision, block_size),
    )
    scale = torch.from_numpy(np.exp(np.random.default_rng(1).normal(0, 0.5, K)).astype(np.float32))
    amax = float(weight.float().abs().max()) * 1.5 if precision is Precision.NVFP4 else None
    layer = quantize_layer(weight, LayerRange(3.3, scale, amax), precision, block_size)
    require_equal(layer, numpy_codes.quantize(wide / scale.numpy(), precision, block_size, amax))
    assert torch.equal(weight, before)
    assert layer.input_scale is not None
    expected = numpy_codes.tensor_scale(3.3) if precision is Precision.NVFP4 else numpy_codes.fp16_scale(3.3, precision)
    assert layer.input_scale.dtype == (torch.float32 if precision is Precision.NVFP4 else torch.float16)
    assert layer.input_scale.numpy() == expected
    assert layer.pre_quant_scale is not None
    assert torch.equal(layer.pre_quant_scale, scale.half())


@pytest.mark.parametrize("precision", QUANTIZED)
def test_any_layout_of_a_weight_gives_the_same_codes(precision: Precision) -> None:
    weight, block_size = awkward(), RECIPES[precision].block_size
    expected = quantize_layer(weight, LayerRange(None, None), precision, block_size)
    found = quantize_layer(weight.T.contiguous().T, LayerRange(None, None), precision, block_size)
    assert found.codes.is_contiguous()
    np.testing.assert_array_equal(bits(found.codes), bits(expected.codes))
    assert torch.equal(found.dequantized(), expected.dequantized())


def test_a_large_weight_is_rounded_to_nvfp4_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = awkward()
    expected = quantize_layer(weight, LayerRange(None, None), Precision.NVFP4, 16)
    monkeypatch.setattr("tmpdiff_export.quantization.nvfp4._VALUES_AT_ONCE", 5 * 16)
    found = quantize_layer(weight, LayerRange(None, None), Precision.NVFP4, 16)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantized(), expected.dequantized())


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("smoothed", [False, True])
def test_without_a_weight_shapes_and_dtypes_come_out(precision: Precision, smoothed: bool) -> None:
    block_size = RECIPES[precision].block_size
    ranges = LayerRange(None if precision is Precision.INT4 else 3.0, torch.ones(K) * 2 if smoothed else None)
    real = quantize_layer(awkward().half(), ranges, precision, block_size)
    empty = quantize_layer(torch.empty(N, K, dtype=torch.float16, device="meta"), ranges, precision, block_size)
    for name in ("codes", "weight_scale", "input_scale", "pre_quant_scale", "block_scale"):
        one, two = getattr(real, name), getattr(empty, name)
        assert (one is None) == (two is None), name
        if one is not None:
            assert (two.device.type, two.dtype, two.shape) == ("meta", one.dtype, one.shape), name
    assert empty.dequantized().shape == (N, K)


@pytest.mark.parametrize(
    ("precision", "floor_db"),
    [(Precision.FP8, 29.0), (Precision.INT8, 40.0), (Precision.INT4, 18.0), (Precision.NVFP4, 20.0)],
)
def test_quantized_weights_are_as_near_as_their_format_allows(precision: Precision, floor_db: float) -> None:
    weight = torch.from_numpy(np.random.default_rng(2).standard_normal((N, K)).astype(np.float32))
    layer = quantize_layer(weight, LayerRange(1.0, None), precision, RECIPES[precision].block_size)
    noise = (layer.dequantized() - weight).square().sum() / weight.square().sum()
    assert -10 * torch.log10(noise) > floor_db


@pytest.mark.parametrize(("precision", "block_size"), [(Precision.INT4, 128), (Precision.NVFP4, 16)])
def test_blocks_have_to_be_whole(precision: Precision, block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"K \(200\) to be a multiple of the block size \({block_size}\)"):
        quantize_layer(torch.zeros(4, 200), LayerRange(None, None), precision, block_size)


def test_tiny_scales_stay_normal_fp16_numbers() -> None:
    scale = fp16_scale(torch.tensor([0.0, 1e-9, 1.0]), Precision.INT8)
    assert scale.dtype == torch.float16
    assert (scale.float() >= 6.1e-5).all()


def test_codes_are_packed_low_nibble_first() -> None:
    codes = torch.tensor([[2, 15, 1, 0], [9, 8, 7, 6]], dtype=torch.uint8)
    packed = pack(codes)
    assert packed.tolist() == [[0xF2, 0x01], [0x89, 0x67]]
    assert torch.equal(unpack(packed), codes)
