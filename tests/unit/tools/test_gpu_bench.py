"""The GPU benchmark tool, on small denoisers on the CPU: same code, other device."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import weakref
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.commands import called
from helpers.needs_compiler import needs_compiler

from engines.precision import Precision
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.quantization.recipes import RECIPES
from tmpdiff_export.targets.torch.layers import linear_from


def part(name: str) -> ModuleType:
    """A module of the tool."""
    return importlib.import_module(f"tools.gpu_bench.{name}")


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return called("tools.gpu_bench", *args)


def prepared(name: str, folder: Path):
    """A `Bench` of a small denoiser with its baseline measured."""
    run, rows, document = part("run"), part("rows"), part("document")
    setting = rows.Setting(tiny=True, backend="eager", repeats=1, warm_ups=1)
    written = document.Document(folder / "out.json", {"command": "test", "rows": {}})
    bench = run.prepare(part("zoo").MODELS[name], torch.device("cpu"), setting, written)
    baseline = bench.measure(rows.BASELINE)
    return bench, baseline


@pytest.mark.parametrize("precision", [Precision.FP8, Precision.INT8, Precision.INT4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantization_on_the_device_is_the_exporters(precision: Precision, dtype: torch.dtype) -> None:
    quantize = part("quantize")
    torch.manual_seed(3)
    layer = torch.nn.Linear(256, 48).to(dtype)
    with torch.no_grad():
        layer.weight[5] *= 40
        layer.weight[7] = 0  # its scale is the smallest that float16 holds well
    amax = 3.21 if precision is not Precision.INT4 else None
    codes = quantize_layer(layer.weight, LayerRange(amax, None), precision, RECIPES[precision].block_size)
    expected = linear_from(codes, layer.bias.detach(), dtype)
    made = quantize.quantized_linear(layer, precision, None if amax is None else torch.tensor(amax), dtype)
    assert type(made) is type(expected)
    wanted = dict(expected.named_buffers())
    assert set(dict(made.named_buffers())) == set(wanted)
    for name, tensor in made.named_buffers():
        assert tensor.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(tensor.float().numpy(), wanted[name].float().numpy(), err_msg=name)
    data = torch.randn(5, 256).to(dtype)
    assert torch.equal(made(data), expected(data))


def test_the_choice_of_layers_is_the_exporters() -> None:
    from tmpdiff_export.quantization.ranges import quantizable_layers
    from tools.acceptance.miniatures import miniature

    quantize = part("quantize")
    for name in ("flux", "sd3", "unet-sdxl"):
        wrapper = miniature(name).wrap()
        for precision in (Precision.FP8, Precision.INT8, Precision.INT4):
            expected = [
                found.removeprefix("denoiser.")
                for found in quantizable_layers(wrapper, "denoiser", RECIPES[precision])
                if isinstance(wrapper.get_submodule(found), torch.nn.Linear)
            ]
            assert list(quantize.choose_layers(wrapper.denoiser, precision).names) == expected


@pytest.mark.parametrize("name", ["flux", "sana", "pixart", "sd3", "sdxl"])
def test_published_sizes(name: str) -> None:
    import diffusers

    model = part("zoo").MODELS[name]
    with torch.device("meta"):
        module = getattr(diffusers, model.denoiser_class)(**model.config)
    found = part("models").stored_elements(module)
    assert found == pytest.approx(model.published, rel=part("models").TOLERANCE)


def test_operations_are_counted_exactly(tmp_path: Path) -> None:
    bench, _ = prepared("pixart", tmp_path)
    layers = dict(bench.module.named_modules())
    width, tokens, text, batch = 128, 64, 16, 2
    assert bench.work.linear["transformer_blocks.0.attn1.to_q"] == 2 * batch * tokens * width * width
    assert bench.work.linear["transformer_blocks.0.attn2.to_k"] == 2 * batch * text * width * width
    assert set(bench.work.linear) == {name for name, item in layers.items() if isinstance(item, torch.nn.Linear)}
    assert bench.work.attention == {
        (batch, 4, tokens, tokens, 32): 3 * 4 * batch * tokens * tokens * width,
        (batch, 4, tokens, text, 32): 3 * 4 * batch * tokens * text * width,
    }
    assert bench.work.convolution == {"pos_embed.proj": 2 * batch * tokens * width * 4 * 4}

    sana, _ = prepared("sana", tmp_path)  # linear attention: two products per block, of [33, N] [N, 32] and back
    assert sana.work.other_products == 3 * 2 * (2 * batch * 4 * 33 * 64 * 32)


def test_blocks_of_one_class_are_compiled_once(tmp_path: Path) -> None:
    torch._dynamo.reset()
    bench, baseline = prepared("flux", tmp_path)
    assert (baseline["compiled_blocks"], baseline["compiled_graphs"]) == (4, 2)
    for row in ("fp8", "int8", "int4", "shared-fp8", "shared-int8"):
        result = bench.measure(row)
        assert result["compiled_graphs"] == 2, row
        assert result["quantized_layers"] > 0
        assert 8 < result["error"]["sqnr_db"] < 60


@needs_compiler
@pytest.mark.long
def test_a_package_is_as_accurate_as_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAST_TOKENS", "HEAD_SIZES"):  # the small denoiser's attention is short and narrow
        monkeypatch.setattr(
            f"tmpdiff_export.targets.torch.attention.{name}", {"LEAST_TOKENS": 1, "HEAD_SIZES": (32,)}[name]
        )
    bench, _ = prepared("flux", tmp_path)
    whole, layers = bench.measure("fp8-attention-package"), bench.measure("fp8-attention")
    assert layers["error"]["sqnr_db"] < bench.measure("fp8")["error"]["sqnr_db"]  # attention was in FP8
    assert abs(whole["error"]["sqnr_db"] - layers["error"]["sqnr_db"]) < 2.0
    assert whole["package_bytes"] > 1000
    assert whole["weights_file_bytes"] >= whole["weights_bytes"] > 0.5 * layers["weights_bytes"]


def test_a_finished_row_leaves_no_memory_behind(tmp_path: Path) -> None:
    bench, baseline = prepared("pixart", tmp_path)
    made = []
    original = bench.make

    def make(row: str):
        module, about = original(row)
        made.append(weakref.ref(module.get_submodule("transformer_blocks.1.attn1.to_q")))
        return module, about

    bench.make = make
    result = bench.measure("int8")
    gc.collect()
    assert made[0]() is None
    assert result["own_bytes"] < result["weights_bytes"] < baseline["weights_bytes"]
    assert baseline["own_bytes"] == 0


def test_the_floor_adds_up() -> None:
    work = part("work").Work(linear={"a": 100, "b": 50}, convolution={"c": 30}, attention={(1, 1, 2, 2, 2): 40})
    rates = {
        "product_flops": {"16-bit": 10.0, "fp8": 20.0, "int8": None},
        "attention_flops": {"1x1x2x2x2": 4.0},
        "bandwidth": 1.0,
    }
    floor = part("ceilings").floor
    assert floor(work, rates, ("a",), "fp8", 0)["floor_ms"] == pytest.approx(1e3 * (100 / 20 + 80 / 10 + 40 / 4))
    assert floor(work, rates, (), "16-bit", 40)["floor_ms"] == pytest.approx(40e3)  # reading the weights takes longer
    assert floor(work, rates, ("a",), "int8", 0)["floor_ms"] is None


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n", "gemm"),
        ("_int8_linear", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128", "attention"),
        ("triton_red_fused_native_layer_norm_add_mul_3", "norm"),
        ("triton_poi_fused__to_copy_clamp_gelu_mul_7", "elementwise or quantize"),
        ("triton_poi_fused_addmm_gelu_mul_2", "elementwise or quantize"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
    ],
)
def test_kernels_are_grouped(kernel: str, group: str) -> None:
    assert part("profiling").kernel_class(kernel) == group


def test_one_failed_row_leaves_the_others(tmp_path: Path) -> None:
    out = tmp_path / "sana.json"
    quick = ("--device", "cpu", "--tiny", "--compile-backend", "eager", "--repeats", 2, "--warm-ups", 1)
    done = command("sana", "--out", out, *quick, "--rows", "torchao-fp8,fp8", "--profile", "fp8")
    assert done.returncode == 1, done.stderr  # torchao is not installed, or wants a GPU
    content = json.loads(out.read_text())
    assert {name: row["status"] for name, row in content["rows"].items()} == {
        "16-bit": "ok",
        "torchao-fp8": "failed",
        "fp8": "ok",
    }
    assert "torchao-fp8: failed" in done.stdout
    assert content["rows"]["fp8"]["profile"]["kernels"]
    assert content["baseline_again"]["repeats"] == 1
    assert content["residents"][1]["engines"] == ["16-bit", "fp8"]

    link = tmp_path / "link.json"
    done = command("link", out, "--out", link, "--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stderr
    done = command("tables", out, link)
    assert done.returncode == 0, done.stderr
    assert "| fp8 | " in done.stdout
    assert "- torchao-fp8: failed: " in done.stdout
    assert "Computed from the fastest copy, not measured" in done.stdout


def test_a_failed_part_leaves_the_row_its_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tables = part("rows"), part("tables")
    bench, _ = prepared("sana", tmp_path)
    bench.setting = rows.Setting(tiny=True, backend="eager", repeats=1, warm_ups=1, profiled=("fp8",))

    def refuse(step: object) -> None:
        raise RuntimeError("no counters")

    monkeypatch.setattr(rows, "profile_step", refuse)
    result = bench.measure("fp8")
    assert result["part_errors"] == {"profile": "RuntimeError: no counters"}
    assert result["step"]["repeats"] == 1
    assert tables.failures({"rows": {"fp8": result}}) == ["- fp8: profile failed: RuntimeError: no counters"]


def test_rows_without_time_are_skipped(tmp_path: Path) -> None:
    run, rows = part("run"), part("rows")
    setting = rows.Setting(tiny=True, backend="eager", repeats=1, warm_ups=1, seconds_limit=0.0)
    out = tmp_path / "out.json"
    model = part("zoo").MODELS["sana"]
    assert run.measure_model(model, ["16-bit", "fp8"], out, torch.device("cpu"), setting, "test")
    content = json.loads(out.read_text())
    assert content["rows"]["16-bit"]["status"] == "ok"
    assert content["rows"]["fp8"]["status"] == "skipped"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("flux", "--device", "cpu", "--out", "x.json"), "pass --tiny"),
        (("flux", "--device", "cpu", "--tiny", "--out", "x.json", "--rows", "fp9"), "unknown row 'fp9'; choose from"),
        (("tables", "pyproject.toml"), "pyproject.toml"),
    ],
)
def test_what_cannot_be_run_is_refused(args: tuple[str, ...], words: str) -> None:
    done = command(*args)
    assert done.returncode == 1
    assert words in done.stderr
