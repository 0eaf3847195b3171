"""Layers of the torch backend, without a GPU: they compute what their codes stand for."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from engines.precision import Precision

FLOOR_DB = {Precision.FP8: 26.0, Precision.INT8: 34.0, Precision.INT4: 17.0, Precision.NVFP4: 16.0}


def layer_of(weight: np.ndarray, precision: Precision, smoothing: np.ndarray | None = None) -> Any:
    import torch

    from tmpdiff_export.quantization.codes import LayerRange, quantize_layer

    weight_only = precision is Precision.INT4
    block_size = {Precision.INT4: 128, Precision.NVFP4: 16}.get(precision)
    scale = None if smoothing is None else torch.from_numpy(smoothing)
    found = LayerRange(None if weight_only else 5.0, scale)
    return quantize_layer(torch.from_numpy(weight), found, precision, block_size)


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

    from tmpdiff_export.targets.torch.layers import linear_from

    layer = layer_of(np.random.default_rng(0).standard_normal((16, 256), dtype=np.float32), Precision.INT4)
    linear = linear_from(layer, None, torch.float16)
    assert (linear.codes.shape, linear.codes.dtype) == ((16, 128), torch.uint8)
    weight = linear(torch.eye(256)).float().T
    assert (weight - layer.dequantized()).abs().max() < 2e-3 * weight.abs().max()  # float16


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
    stands_for = layers["odd"].dequantized().to(torch.bfloat16)
    assert torch.equal(lowered.odd.weight.data, stands_for)
    assert all(torch.equal(item, before[name]) for name, item in module.state_dict().items())
    conv = layer_of(module.conv.weight.detach().flatten(1).numpy(), Precision.INT8)
    lowered, counts = lower_for_torch(module, {"even": layers["even"]}, torch.float16, sixteen_bit=True)
    assert counts == {"fp8 linear in a 16-bit product": 1}
    data = torch.randn(3, 256)
    stands_for = layers["even"].dequantized().half()
    expected = torch.nn.functional.linear(data.half(), stands_for, module.even.bias.half())
    assert torch.equal(lowered.even(data), expected)
    lowered, counts = lower_for_torch(module, {"conv": conv}, torch.float16)
    assert counts == {"int8 weight in a 16-bit Conv2d": 1}
    assert (lowered.conv.weight.float() - module.conv.weight).abs().max() < 0.01 * module.conv.weight.abs().max()


@pytest.mark.parametrize("precision", FLOOR_DB)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_lowered_module_without_data_has_the_tensors_that_its_file_stores(
    precision: Precision, smoothed: bool, dtype: str
) -> None:
    import torch

    from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
    from tmpdiff_export.quantization.recipes import RECIPES
    from tmpdiff_export.targets.torch.lowering import lower_for_torch, torch_tensors

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.odd = torch.nn.Linear(256, 128), torch.nn.Linear(128, 24, bias=False)
            self.conv = torch.nn.Conv2d(1, 8, 3)

        def forward(self, data: torch.Tensor) -> torch.Tensor:
            return self.conv(self.odd(self.first(data))[:, None])

    torch.manual_seed(0)
    module = Module().eval().requires_grad_(False)
    names = ["first", "odd"] + ["conv"] * (precision is Precision.INT8)
    block_size, kind = RECIPES[precision].block_size, getattr(torch, dtype)

    def layers(device: str) -> dict[str, Any]:
        made = {}
        for name in names:
            weight = module.get_submodule(name).weight.flatten(1).to(device)
            scale = torch.full((weight.shape[1],), 0.7) if smoothed else None
            found = LayerRange(None if precision is Precision.INT4 else 5.0, scale)
            made[name] = quantize_layer(weight, found, precision, block_size)
        return made

    expected, counts = lower_for_torch(module, layers("cpu"), kind)
    empty, same = lower_for_torch(copy.deepcopy(module).to("meta"), layers("meta"), kind)
    assert same == counts
    wanted = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    without = {**dict(empty.named_parameters()), **dict(empty.named_buffers())}
    assert without.keys() == wanted.keys()
    for name, item in without.items():
        assert (item.device.type, item.dtype, item.shape) == ("meta", wanted[name].dtype, wanted[name].shape), name
    stored: dict[str, torch.Tensor] = {}
    for name, layer in layers("cpu").items():
        stored |= torch_tensors(name, layer, module.get_submodule(name), kind)
    for name, item in stored.items():
        assert item.dtype == wanted[name].dtype, name
        assert torch.equal(item.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)), name
    own = {name for name in stored if name.partition(".")[0] in names}
    assert own == stored.keys()
    rest = {name: item.to(kind) for name, item in module.named_parameters() if name not in stored and name in wanted}
    assert stored.keys() | rest.keys() == wanted.keys()
    data = torch.randn(3, 5, 256).to(kind)
    assert torch.equal(torch.func.functional_call(empty, {**stored, **rest}, (data,)), expected(data))


def test_a_text_encoder_that_has_run_can_travel_to_a_worker() -> None:
    import pickle

    import torch

    from tmpdiff_export.targets.torch.compile import EngineModule, without_capturing_hooks
    from tmpdiff_export.weights.streamed import on_meta
    from tools.acceptance.small_text import SecondLastHidden

    encoder, ids = SecondLastHidden(), torch.arange(7)[None]
    with torch.no_grad():
        expected = encoder(ids)  # transformers puts hooks into the model, local functions
        weights = {
            f"module.{name}": item for name, item in EngineModule(encoder, torch.float32, [True]).tensors.items()
        }
        empty = on_meta(encoder)
        without_capturing_hooks(empty)
        again = pickle.loads(pickle.dumps(EngineModule(empty, torch.float32, [True]).eval()))
        found = torch.func.functional_call(again, weights, (ids,))
        assert torch.equal(encoder(ids), expected)
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)
