"""Ranges: modelopt's, from one run over the batches, whether or not the weights are there between layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.modelopt_ranges import judged, judged_alone
from helpers.ranges import found_ranges

from engines.errors import BuildError
from engines.precision import Precision
from tmpdiff_export.bundling.observed import SEARCH_BATCHES
from tmpdiff_export.quantization.observers import observe
from tmpdiff_export.quantization.ranges import find_ranges, smoothing_scales, spread
from tmpdiff_export.quantization.recipes import RECIPES, Awq, SmoothQuant, Variant
from tmpdiff_export.weights.streamed import streamed, taken_weights

WIDTH, GROUP = 256, ["q", "k", "v"]
QUANTIZED = (Precision.FP8, Precision.INT8, Precision.INT4, Precision.NVFP4)
CASES = [(precision, variant) for precision in QUANTIZED for variant in RECIPES[precision].variants]


class Block(torch.nn.Module):
    """Attention with a shared input, a feed-forward network, a convolution, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, WIDTH, 3, padding=1)
        self.q, self.k, self.v = (torch.nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False, True))
        self.wide, self.narrow = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)
        self.twice = torch.nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.conv.weight *= torch.exp(torch.randn(WIDTH, 1, 1, 1))
            for spread, layer in enumerate((self.q, self.k, self.v, self.wide, self.narrow, self.twice)):
                layer.weight *= torch.exp(0.4 * spread * torch.randn(1, layer.in_features))
            self.twice.weight[0] = 0.0

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        data = self.conv(picture).flatten(2).transpose(1, 2) * 8.0
        query, key, value = (layer(data) for layer in (self.q, self.k, self.v))
        data = data + torch.nn.functional.scaled_dot_product_attention(query, key, value)
        data = data + self.narrow(torch.nn.functional.gelu(self.wide(data)))
        return self.twice(self.twice(data) * 3.0)


LAYERS = ["conv", "q", "k", "v", "wide", "narrow", "twice"]
LINEAR = LAYERS[1:]


@pytest.fixture(scope="module")
def module() -> Block:
    return Block().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    channels = torch.exp(torch.randn(1, 4, 1, 1, generator=generator))
    return [(torch.randn(2, 4, 4, 5, generator=generator) * channels * (1 + index),) for index in range(9)]


def weight_of(module: torch.nn.Module) -> Callable[[str], torch.Tensor]:
    return lambda name: module.get_submodule(name).weight.flatten(1)


@pytest.fixture(scope="module")
def found(module: Block, batches: list[tuple[torch.Tensor]]) -> dict:
    wanted = {item: LAYERS if RECIPES[item].convolutions == 1 else LINEAR for item in QUANTIZED}
    return found_ranges(module, wanted, batches, weight_of(module))


@pytest.mark.parametrize(("precision", "variant"), CASES, ids=lambda item: getattr(item, "name", item))
def test_ranges_are_modelopts(
    precision: Precision, variant: Variant, module: Block, batches: list[tuple[torch.Tensor]], found: dict
) -> None:
    names = LAYERS if RECIPES[precision].convolutions == 1 else LINEAR
    expected = judged(module, names, precision, variant, batches, [GROUP])
    ours = found[precision][variant.name]
    assert list(ours) == names
    for name, wanted in expected.items():
        made = ours[name]
        if variant.smoothing is None:
            assert made.input_amax == wanted.input_amax
        else:
            assert made.input_amax == (
                None if precision is Precision.INT4 else pytest.approx(wanted.input_amax, rel=1e-6)
            )
        weight = weight_of(module)(name).numpy()
        assert (made.pre_quant_scale is None) == (wanted.pre_quant_scale is None)
        if made.pre_quant_scale is not None:
            assert made.pre_quant_scale.dtype == torch.float32
            np.testing.assert_allclose(made.pre_quant_scale.numpy(), wanted.pre_quant_scale, rtol=1e-6)
            weight = weight / made.pre_quant_scale.numpy()
        np.testing.assert_allclose(weight, wanted.weight, rtol=1e-6)
        largest = max(float(np.abs(expected[other].weight).max()) for other in GROUP)
        shared = precision is Precision.NVFP4 and name in GROUP
        if shared and variant.smoothing is not None:  # as close as the scaled weights are
            assert made.shared_weight_amax == pytest.approx(largest, rel=1e-6)
        else:
            assert made.shared_weight_amax == (largest if shared else None)


def test_a_search_finds_different_alphas_and_those_of_modelopt(
    module: Block, batches: list[tuple[torch.Tensor]]
) -> None:
    """Without sharing, so that a wrong choice of one layer shows; and in finer steps than the recipe's."""
    from tmpdiff_export.quantization.awq import channel_scale, search_scales, weight_share

    batches = spread(batches, SEARCH_BATCHES)

    def run() -> None:
        for batch in batches:
            module(*batch)

    observed = observe(module, LINEAR, run, range(len(batches)))
    search = Awq(alpha_step=0.1)
    scales = search_scales(module, observed, run, LINEAR, search, 128)
    expected = judged_alone(module, LINEAR, Precision.INT4, Variant("awq", search), batches)
    chosen = set()
    for name in LINEAR:
        np.testing.assert_allclose(scales[name].numpy(), expected[name].pre_quant_scale, rtol=1e-6)
        share, mean = weight_share(module.get_submodule(name).weight, 128), observed.inputs[name].channel_mean
        alphas = torch.arange(0, 1.1, 0.1).tolist()
        chosen |= {
            round(alpha, 1) for alpha in alphas if torch.allclose(1 / channel_scale(mean, share, alpha), scales[name])
        }
    assert len(chosen) > 1


def test_streamed_weights_give_the_same_ranges(batches: list[tuple[torch.Tensor]], found: dict) -> None:
    module = Block().eval()
    weights = {name: item.clone() for name, item in taken_weights(module).items()}
    wanted = {Precision.INT8: LAYERS, Precision.INT4: LINEAR, Precision.NVFP4: LINEAR}
    with streamed(module, weights.__getitem__, "cpu"):
        again = found_ranges(module, wanted, batches, lambda name: weights[f"{name}.weight"].flatten(1))
    for precision in wanted:
        for variant, ranges in again[precision].items():
            for name, item in ranges.items():
                other = found[precision][variant][name]
                assert (item.input_amax, item.shared_weight_amax) == (other.input_amax, other.shared_weight_amax)
                if item.pre_quant_scale is not None:
                    assert torch.equal(item.pre_quant_scale, other.pre_quant_scale)
                    assert not item.pre_quant_scale.is_inference()


def test_one_pass_over_the_batches_and_one_over_those_of_the_search(
    module: Block, batches: list[tuple[torch.Tensor]]
) -> None:
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    before = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in module.modules()]
    try:
        found_ranges(module, {Precision.INT8: LAYERS, Precision.FP8: LINEAR}, batches, weight_of(module))
        assert len(calls) == len(batches)
        found_ranges(module, {Precision.INT8: LAYERS, Precision.INT4: LINEAR}, batches, weight_of(module))
        assert len(calls) == 2 * len(batches) + 6
    finally:
        after = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in module.modules()]
        handle.remove()
    assert after == before


def test_layers_reading_one_tensor_are_found(module: Block, batches: list[tuple[torch.Tensor]]) -> None:
    observed = observe(module, LAYERS, lambda: module(*batches[0]))
    assert observed.groups == (tuple(GROUP),)
    assert observed.groups_of(["q", "wide", "v"]) == [["q", "v"]]
    assert observed.groups_of(["q", "wide"]) == []
    assert observed.inputs["conv"].amax == float(batches[0][0].abs().max())
    assert observed.inputs["conv"].channel_amax is None


def test_readers_of_the_data_itself_are_found_again_and_again() -> None:
    """As of a text that cross-attention reads in every block."""
    module = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("k", "v")})
    data = torch.ones(2, 4)
    holder = torch.nn.Module()
    holder.layers, holder.forward = module, lambda item: module["k"](item) + module["v"](item)
    for _ in range(2):
        assert observe(holder, ["layers.k", "layers.v"], lambda: holder(data)).groups == (("layers.k", "layers.v"),)


def test_channels_that_are_zero_are_scaled_by_finite_numbers() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3)).requires_grad_(False)
    layer[0].weight[:, 2:] = 0.0
    data = torch.randn(5, 4)
    data[:, 1::2] = 0.0  # channel 1 of the input alone, channel 2 of the weight alone, channel 3 of both
    observed = observe(layer, ["0"], lambda: layer(data))
    scale = smoothing_scales(observed, ["0"], SmoothQuant(0.5), weight_of(layer))["0"]
    assert scale[1:].tolist() == pytest.approx([1e4, 1e-4, 1.0])


def test_a_group_is_smoothed_as_a_whole(module: Block, batches: list[tuple[torch.Tensor]]) -> None:
    observed = observe(module, LINEAR, lambda: module(*batches[0]))
    with pytest.raises(BuildError, match="layers q, k, v read one activation, but only some of them were smoothed"):
        find_ranges(observed, LINEAR, RECIPES[Precision.INT8], {"q": torch.ones(WIDTH)}, weight_of(module))


def test_layers_without_numbers_are_refused(module: Block, batches: list[tuple[torch.Tensor]]) -> None:
    module = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 4), "unused": torch.nn.Linear(4, 4)})
    with pytest.raises(BuildError, match="layer unused was never called"):
        observe(module, ["used", "unused"], lambda: module["used"](torch.ones(1, 4)))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(BuildError, match=f"layer used: the largest magnitude of its input is {wrong}, expected a"):
            observe(module, ["used"], lambda wrong=wrong: module["used"](torch.tensor([[1.0, wrong, 2.0, 3.0]])))
