"""Layers of the torch backend, without a GPU: they compute what their codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.precision import Precision

FLOOR_DB = {Precision.FP8: 26.0, Precision.INT8: 34.0, Precision.INT4: 17.0, Precision.NVFP4: 16.0}


def layer_of(weight: np.ndarray, precision: Precision, smoothing: np.ndarray | None = None) -> Any:
    from tmpdiff_export.quantization.codes import LayerRange, quantize_layer

    weight_only = precision is Precision.INT4
    scaled = weight if smoothing is None else weight / smoothing
    block_size = {Precision.INT4: 128, Precision.NVFP4: 16}.get(precision)
    return quantize_layer(LayerRange(scaled, None if weight_only else 5.0, smoothing), precision, block_size)


@pytest.mark.parametrize("precision", FLOOR_DB)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_compute_what_their_codes_stand_for(precision: Precision, smoothed: bool, dtype: str) -> None:
    import torch

    from tmpdiff_export.targets.torch.layers import linear_from

    rng = np.random.default_rng(5)
    weight = rng.standard_normal((96, 256), dtype=np.float32)
    smoothing = rng.uniform(0.5, 1.0, 256).astype(np.float32) if smoothed else None
    bias = torch.from_numpy(rng.standard_normal(96, dtype=np.float32))
    data = torch.from_numpy(rng.standard_normal((2, 33, 256), dtype=np.float32))
    layer = linear_from(layer_of(weight, precision, smoothing), bias, getattr(torch, dtype))
    found = layer(data).float()
    expected = data @ torch.from_numpy(weight).T + bias
    assert found.shape == expected.shape
    assert -10 * np.log10(((found - expected).square().sum() / expected.square().sum()).item()) > FLOOR_DB[precision]


def test_int4_codes_survive_packing() -> None:
    import torch

    from tmpdiff_export.targets.torch.layers import linear_from, pack_int4

    codes = torch.randint(-8, 8, (7, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_int4(codes)
    assert packed.shape == (7, 32)
    assert torch.equal(torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8) - 8, codes)
    layer = layer_of(np.random.default_rng(0).standard_normal((16, 256), dtype=np.float32), Precision.INT4)
    weight = linear_from(layer, None, torch.float16)(torch.eye(256)).float().T.numpy()
    assert np.abs(weight - layer.dequantized().T).max() < 2e-3 * np.abs(weight).max()  # float16


def test_nvfp4_values_are_those_of_the_reference() -> None:
    import torch

    from tmpdiff_export.quantization import nvfp4
    from tmpdiff_export.targets.torch import nvfp4 as torch_nvfp4

    rng = np.random.default_rng(3)
    values = rng.standard_normal((40, 256), dtype=np.float32) * np.exp(rng.normal(0, 2, (40, 1))).astype(np.float32)
    values[3, :16] = 0.0
    for covered in (1.0, 0.01):  # all of it, and saturating
        scale = nvfp4.tensor_scale(covered * float(np.abs(values).max()))
        found = torch_nvfp4.fake_quantize(torch.from_numpy(values), torch.from_numpy(scale))
        np.testing.assert_array_equal(found.numpy(), nvfp4.fake_quantize(values, scale))
    codes, blocks = nvfp4.quantize_blocks(values, scale)
    stored = torch.frombuffer(bytearray(nvfp4.packed(codes)), dtype=torch.uint8).view(40, 128)
    scales = torch.from_numpy(blocks.view(np.uint8)).view(torch.float8_e4m3fn)
    found = torch_nvfp4.dequantize(stored, scales, torch.from_numpy(scale))
    np.testing.assert_array_equal(found.numpy(), nvfp4.dequantize_blocks(codes, blocks, scale))


def test_int8_products_are_exact() -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.int8 import int8_linear

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (40, 512), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (24, 512), dtype=torch.int8, generator=generator)
    scale = torch.rand(24, generator=generator)
    expected = (codes.long() @ weight.long().T).float() * scale
    assert torch.equal(int8_linear(codes, weight, scale, None, torch.float32), expected)


def test_layers_without_a_product_run_from_their_dequantized_weight_and_are_counted() -> None:
    import torch

    from tmpdiff_export.targets.torch.lowering import lower_for_torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = torch.nn.Linear(256, 32), torch.nn.Linear(32, 24)
            self.conv = torch.nn.Conv2d(4, 8, 3)

    module = Module()
    layers = {
        "even": layer_of(module.even.weight.detach().numpy(), Precision.FP8),
        "odd": layer_of(module.odd.weight.detach().numpy(), Precision.FP8),
    }
    before = {name: item.clone() for name, item in module.state_dict().items()}
    lowered, counts = lower_for_torch(module, layers, torch.bfloat16)
    assert counts == {"fp8 linear": 1, "fp8 weight in a 16-bit Linear": 1}
    assert lowered.even.input_scale.dtype == lowered.even.weight_scale.dtype == torch.float32
    assert lowered.conv.weight.dtype == torch.bfloat16
    stands_for = torch.from_numpy(layers["odd"].dequantized().T).to(torch.bfloat16)
    assert torch.equal(lowered.odd.weight.data, stands_for)
    assert all(torch.equal(item, before[name]) for name, item in module.state_dict().items())
    conv = layer_of(module.conv.weight.detach().flatten(1).numpy(), Precision.INT8)
    lowered, counts = lower_for_torch(module, {"even": layers["even"]}, torch.float16, sixteen_bit=True)
    assert counts == {"fp8 linear in a 16-bit product": 1}
    data = torch.randn(3, 256)
    stands_for = torch.from_numpy(layers["even"].dequantized().T).half()
    expected = torch.nn.functional.linear(data.half(), stands_for, module.even.bias.half())
    assert torch.equal(lowered.even(data), expected)
    lowered, counts = lower_for_torch(module, {"conv": conv}, torch.float16)
    assert counts == {"int8 weight in a 16-bit Conv2d": 1}
    assert (lowered.conv.weight.float() - module.conv.weight).abs().max() < 0.01 * module.conv.weight.abs().max()


def test_weights_of_a_text_encoder_that_has_run_can_travel_to_a_worker(tmp_path: Path) -> None:
    import pickle

    import torch
    from helpers.small_text import SecondLastHidden
    from safetensors.torch import load_file

    from tmpdiff_export.targets.torch.compile import EngineModule, store_weights

    encoder, ids = SecondLastHidden(), torch.arange(7)[None]
    with torch.no_grad():
        expected = encoder(ids)  # transformers puts hooks into the model, local functions
        stored = store_weights(EngineModule(encoder, torch.float32, [True]).eval(), tmp_path / "weights.safetensors")
        again = pickle.loads(pickle.dumps(stored))
        weights = load_file(tmp_path / "weights.safetensors")
        found = torch.func.functional_call(again, weights, (ids,))
        assert torch.equal(encoder(ids), expected)
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)
