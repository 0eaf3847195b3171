"""Range calibration and references on a GPU (`build --range-device cuda`): those of the CPU, to FP32's rounding."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def missing() -> str | None:
    """Why no such test can run here, or None."""
    for name in ("torch", "diffusers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


DEVICES = ("cpu", "cuda")
pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def test_ranges_and_references_are_those_of_the_cpu(tmp_path: Path) -> None:
    import numpy as np
    import torch

    from engines.precision import Precision
    from tmpdiff_export.demo import pipeline_folder
    from tmpdiff_export.devices import on
    from tmpdiff_export.pipelines.families.family import DENOISER
    from tmpdiff_export.pipelines.load import computing, gather_batches, open_pipeline
    from tmpdiff_export.pipelines.settings import SettingRequest, resolve
    from tmpdiff_export.quantization.codes import quantize_layer
    from tmpdiff_export.quantization.observers import Observed, observe
    from tmpdiff_export.quantization.ranges import calibrate_ranges, observable_layers, quantizable_layers
    from tmpdiff_export.quantization.recipes import RECIPES
    from tmpdiff_export.targets.accuracy import sqnr_db, torch_outputs
    from tmpdiff_export.targets.torch.attention import watch_attention
    from tmpdiff_export.weights.streamed import OnDevice, streamed
    from tools.acceptance.random_pipeline import save_random_pipeline

    save_random_pipeline(
        tmp_path / "pipeline", pipeline_folder() / "tokenizer", heads=4, head_size=64, layers=2, latent_side=32
    )
    source = open_pipeline(tmp_path / "pipeline")
    setting = resolve(source.facts, SettingRequest(3))

    module = source.family.wrap(source.pipe).eval()
    layers = [name.removeprefix(f"{DENOISER}.") for name in observable_layers(module, DENOISER)]
    attention: list[dict] = [{}, {}]

    def gathered(device: str, limits: dict) -> tuple[list, Observed]:
        batches: list = []

        def run() -> None:
            batches.extend(gather_batches(source, setting, ["a red circle"], 0, lambda: None))

        read = OnDevice(source.weights.read, device)
        with (
            source.filled(source.other_models),
            computing(source, read, device),
            watch_attention(source.denoiser, limits),
        ):
            observed = observe(source.denoiser, layers, run, range(3))
        return batches, observed.renamed(f"{DENOISER}.")

    (here, first), (there, second) = (
        gathered(device, limits) for device, limits in zip(DEVICES, attention, strict=True)
    )
    assert len(here) == len(there) == 3
    for one, two in zip(here, there, strict=True):
        for cpu, gpu in zip(one, two, strict=True):
            assert gpu.device.type == "cpu"
            torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-3)

    def read(name: str) -> torch.Tensor:
        return source.weights.read(name.removeprefix(f"{DENOISER}."))

    def weight(name: str) -> torch.Tensor:
        return read(f"{name}.weight").flatten(1)

    expected, found = (torch_outputs(module, read, here, device) for device in DEVICES)
    assert sqnr_db(np.concatenate(expected), np.concatenate(found)) > 80.0
    chosen = {
        precision: quantizable_layers(module, DENOISER, RECIPES[precision])
        for precision in (Precision.FP8, Precision.INT8, Precision.INT4, Precision.NVFP4)
    }
    ranges = []
    for device, observed in zip(DEVICES, (first, second), strict=True):

        def search(device: str = device) -> None:
            with torch.inference_mode(), streamed(module, read, device):
                for batch in here:
                    module(*on(batch, device))

        ranges.append(calibrate_ranges(module, chosen, observed, search, weight))
    assert attention[0]
    assert attention[0].keys() == attention[1].keys()
    for name, limits in attention[0].items():
        assert attention[1][name].scales == pytest.approx(limits.scales, rel=1e-3)
    for precision, names in chosen.items():
        for variant in RECIPES[precision].variants:
            one, two = (found[precision][variant.name] for found in ranges)
            for name in names:
                assert (two[name].input_amax or 0.0) == pytest.approx(one[name].input_amax or 0.0, rel=1e-2)
                if one[name].pre_quant_scale is not None:
                    assert two[name].pre_quant_scale.device.type == "cpu"
                    torch.testing.assert_close(two[name].pre_quant_scale, one[name].pre_quant_scale, rtol=1e-2, atol=0)
                layer, same = (
                    quantize_layer(weight(name).to(device), one[name], precision, RECIPES[precision].block_size)
                    for device in DEVICES
                )
                parts = ("codes", "weight_scale", "block_scale", "input_scale", "pre_quant_scale")
                if one[name].rank:  # products round otherwise: other directions, which leave as little
                    divided = weight(name).float() / one[name].pre_quant_scale
                    left = [
                        float((divided - (item.dequantized() + item.branch.weight()).cpu()).square().sum())
                        for item in (layer, same)
                    ]
                    assert left[1] == pytest.approx(left[0], rel=0.02)
                    parts = ("input_scale", "pre_quant_scale")
                for part in parts:
                    expected, found = getattr(layer, part), getattr(same, part)
                    assert (expected is None) == (found is None)
                    if expected is not None:
                        assert found.device.type == DEVICES[1]
                        assert torch.equal(found.cpu().float(), expected.float()), f"{name}: {part}"
    assert {item.device.type for item in module.parameters()} == {"cpu"}
    assert not any(item.is_inference() for item in module.parameters()), "an export takes no inference tensors"
