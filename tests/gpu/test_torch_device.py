"""The torch backend on a real GPU: kernels, packages, the device loop with CUDA graphs, and the limit on residents."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_denoiser import REUSING, SHAPE, TEXT, WIDTH, denoiser, loop_inputs, make_loop, require_agreement

from engines.documents import FileEntry
from engines.errors import BackendError
from engines.files import sha256_bytes
from engines.loop import host_loop
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP, EngineEntry, TensorSpec
from engines.package_entry import PackageEntry
from engines.precision import Precision


def missing() -> str | None:
    """Why no such test can run here, or None."""
    for name in ("torch", "triton", "safetensors", "cuda"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

BATCH = 2
BLOCK_SIZES = {"int4": 128, "nvfp4": 16}
PRECISIONS = ("fp16", "fp8", "int8", "int4", "nvfp4")
WITH_ATTENTION = "fp8-attention"
FLOOR_DB = {"fp16": 55.0, "fp8": 24.0, WITH_ATTENTION: 22.0, "int8": 28.0, "int4": 18.0, "nvfp4": 14.0}


@pytest.mark.parametrize("dtype", ["float16", "float32"])  # two kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(4608, 3072, 3072), (2000, 2240, 1152), (300, 640, 1000), (154, 1152, 72), (2, 256, 48)],
)
def test_the_int8_kernel_is_exact(rows: int, depth: int, columns: int, bias: bool, dtype: str) -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.int8 import int8_linear

    generator = torch.Generator("cuda").manual_seed(rows)
    codes = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, device="cuda", generator=generator)
    weight = torch.randint(-127, 128, (columns, depth), dtype=torch.int8, device="cuda", generator=generator)
    scale = torch.rand(columns, device="cuda", generator=generator) * 1e-4 + 1e-5
    added = torch.randn(columns, device="cuda", generator=generator).half() if bias else None
    found = int8_linear(codes, weight, scale, added, getattr(torch, dtype))
    sums = (codes.double() @ weight.double().T).float()  # below 2^53: exact
    expected = sums * scale + (0 if added is None else added.float())
    # The last operation may be a fused multiply-add; float16 results are rounded once more.
    bound = 1e-6 * expected.abs().max() if dtype == "float32" else 2.0**-11 * expected.abs() + 2.0**-24
    assert ((found.float() - expected).abs() <= bound + 1e-6 * expected.abs().max()).all()


def test_the_int8_kernel_is_exact_in_a_package_of_many_programs(tmp_path: Path) -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.int8 import int8_linear

    class Product(torch.nn.Module):
        def forward(self, codes: Any, weight: Any, scale: Any) -> Any:
            return int8_linear(codes, weight, scale, None, torch.float16)

    generator = torch.Generator("cuda").manual_seed(1)
    codes = torch.randint(-128, 128, (8192, 384), dtype=torch.int8, device="cuda", generator=generator)
    weight = torch.randint(-127, 128, (1536, 384), dtype=torch.int8, device="cuda", generator=generator)
    scale = torch.rand(1536, device="cuda", generator=generator) * 1e-4 + 1e-5
    program = torch.export.export(Product(), (codes, weight, scale), strict=False)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "product.pt2"))
    call = torch._inductor.aoti_load_package(package)
    expected = int8_linear(codes, weight, scale, None, torch.float16)
    for _ in range(3):
        assert torch.equal(call(codes, weight, scale), expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize(("text", "image", "heads", "size"), [(0, 300, 24, 128), (77, 256, 24, 128), (5, 16, 3, 16)])
def test_the_rotary_kernel_computes_what_torch_does(
    text: int, image: int, heads: int, size: int, dtype: str, compiled: bool
) -> None:
    import torch

    from tmpdiff_export.targets.torch.kernels.rotary import norm_rotary

    generator = torch.Generator().manual_seed(image)
    kind = getattr(torch, dtype)
    model = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    parts = [torch.randn(2, tokens, heads, size, generator=generator).to(model) for tokens in (text, image)]
    weights = [torch.rand(size, generator=generator).add(0.5).to(model) for _ in range(2)]
    angle = torch.rand(text + image, size // 2, generator=generator).mul(6.0).repeat_interleave(2, dim=1)
    first, second = zip(parts, weights, strict=True)
    scale = None if kind is model else torch.tensor(0.005)
    expected = norm_rotary(first, second, (angle.cos(), angle.sin()), 1e-6, torch.float32, scale)
    torch._dynamo.reset()  # it compiles one function so many times only
    call = torch.compile(norm_rotary, fullgraph=True, dynamic=False) if compiled else norm_rotary
    on_gpu = [tuple(item.cuda() for item in items) for items in (first, second, (angle.cos(), angle.sin()))]
    found = call(*on_gpu, 1e-6, kind, None if scale is None else scale.cuda())
    assert found.dtype == kind
    limit = torch.finfo(kind).max
    half_step = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float8_e4m3fn: 2.0**-4}[kind] * 1.01
    smallest = 2.0**-10 if kind is torch.float8_e4m3fn else 1e-6
    expected = expected.clamp(-limit, limit)
    assert ((found.float().cpu() - expected).abs() <= half_step * 2 * expected.abs() + smallest + 1e-5).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("rows", "first", "second"), [(300, 0, 1536), (77, 1152, 4608), (3, 40, 1000)])
def test_the_gelu_kernel_makes_the_codes_that_torch_makes(
    rows: int, first: int, second: int, dtype: str, smoothing: bool, compiled: bool
) -> None:
    import torch
    from torch.nn import functional as F

    from tmpdiff_export.targets.torch.kernels.gelu_codes import gelu_codes

    generator = torch.Generator().manual_seed(rows)
    parts = [torch.randn(rows, width, generator=generator).mul(2.0).half() for width in (first, second)]
    factors = torch.rand(first + second, generator=generator).add(0.5).half() if smoothing else None
    kind, scale = getattr(torch, dtype), torch.tensor(0.03 if dtype == "int8" else 0.01)
    joined = torch.cat([parts[0].float(), F.gelu(parts[1].float(), approximate="tanh")], dim=1)
    limits = (-448.0, 448.0) if kind is torch.float8_e4m3fn else (-128.0, 127.0)
    expected = (joined * (1.0 if factors is None else factors.float()) / scale).clamp(*limits)
    torch._dynamo.reset()  # it compiles one function so many times only
    call = torch.compile(gelu_codes, fullgraph=True, dynamic=False) if compiled else gelu_codes
    cuda = [None if item is None else item.cuda() for item in (*parts, scale, factors)]
    found = call(*cuda, kind).float().cpu()
    assert expected.max() == limits[1]  # some saturate
    step = 0.501 if kind is torch.int8 else 2.0**-4 * 1.001 * expected.abs() + 2.0**-10
    assert ((found - expected).abs() <= step).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("tokens", "columns", "branch"), [(333, 1536, True), (300, 1152, False), (50, 3072, True)])
def test_the_norm_kernel_computes_what_torch_does(
    tokens: int, columns: int, branch: bool, affine: bool, dtype: str, compiled: bool
) -> None:
    import torch

    from tmpdiff_export.targets.torch.activations import Codes
    from tmpdiff_export.targets.torch.kernels.norms import Affine, Modulation, add_norm_modulated, norm_modulated

    generator = torch.Generator().manual_seed(tokens)
    kind = getattr(torch, dtype)
    model = torch.float16 if dtype == "float16" else torch.bfloat16
    data, more = (torch.randn(2, tokens, columns, generator=generator).to(model) for _ in range(2))
    table = torch.randn(2, 6, columns, generator=generator).to(model)
    factors = torch.rand(columns, generator=generator).to(model) if kind is torch.int8 else None
    scale = torch.tensor(0.03)

    def run(device: str) -> tuple[torch.Tensor, ...]:
        rows, added, made = (item.to(device) for item in (data, more, table))
        codes = None
        if kind is not model:
            codes = Codes(kind, scale.to(device), None if factors is None else factors.to(device))
        own = Affine(made[0, 0].contiguous(), made[0, 1].contiguous()) if affine else None
        if branch:
            return add_norm_modulated(rows, added, own or Modulation(made, 3, 4, 2), 1e-6, codes)
        before, rows = rows[:, :7], rows[:, 7:]  # as they come: parts of one tensor
        return norm_modulated(rows, own or Modulation(made, 0, 1), 1e-6, codes, before), rows

    torch._dynamo.reset()  # it compiles one function so many times only
    call = torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
    (found, total), (expected, summed) = (
        tuple(part.float().cpu() for part in made) for made in (call("cuda"), run("cpu"))
    )
    # Sums in another order may round to the neighbour, and then all that follows a little elsewhere.
    least = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.int8: 0.0, torch.float8_e4m3fn: 2.0**-3}[kind]
    assert ((found - expected).abs() <= 1.01 * least * expected.abs() + (1.0 if kind is torch.int8 else 0.01)).all()
    assert (found != expected).float().mean() < 0.02
    assert ((total - summed).abs() <= 2.0**-7 * summed.abs() + 1e-6).all()


needs_cudnn = pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="cudnn is not installed")


@needs_cudnn
@pytest.mark.parametrize(("batch", "tokens", "heads", "size"), [(2, 1301, 3, 128), (1, 256, 8, 64), (1, 4608, 24, 128)])
def test_fp8_attention_is_that_of_the_reference(batch: int, tokens: int, heads: int, size: int) -> None:
    import torch
    from torch.nn import functional as F

    from engines.backends.torch.attention import scales_tensor
    from tmpdiff_export.quantization.codes import AttentionRange
    from tmpdiff_export.targets.torch.attention import attend_fp8

    generator = torch.Generator("cuda").manual_seed(tokens)
    shape = (batch, heads, tokens, size)
    parts = [torch.randn(shape, generator=generator, device="cuda") * factor for factor in (1.0, 2.0, 0.3)]
    scales = scales_tensor(*AttentionRange(*(float(item.abs().max()) for item in parts)).scales)
    found = attend_fp8(*(item.half() for item in parts), scales.cuda()).float()
    expected = F.scaled_dot_product_attention(*parts)
    first = attend_fp8(*(item[:1, :2].cpu() for item in parts), scales)  # on a CPU

    def sqnr_db(one: Any, other: Any) -> float:
        return float(-10 * torch.log10((one - other).square().sum() / other.square().sum()))

    noise = sqnr_db(found, expected)
    print(f"{shape}: {noise:.1f} dB, on a CPU {sqnr_db(first, expected[:1, :2].cpu()):.1f} dB")
    assert noise > 18.0
    assert noise > sqnr_db(first, expected[:1, :2].cpu()) - 2.0
    assert sqnr_db(found[:1, :2].cpu(), first) > noise


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size"), [(2, 300, 3, 64), (1, 1024, 2, 96), (1, 513, 2, 128), (1, 256, 1, 64)]
)
def test_the_attention_kernel_is_that_of_the_reference(batch: int, tokens: int, heads: int, size: int) -> None:
    import torch

    from engines.backends.torch.attention import attention_fp8, scales_tensor
    from tmpdiff_export.targets.torch.activations import FP8, static_codes
    from tmpdiff_export.targets.torch.kernels.triton.attention import attend_codes_op

    generator = torch.Generator("cuda").manual_seed(tokens)
    factors = torch.tensor([1.5, 1.0, 0.3], device="cuda")[:, None, None]
    whole = torch.randn(batch, tokens, 3, heads, size, generator=generator, device="cuda") * factors
    parts = list(whole.half().unbind(2))  # as one product of all three gives them
    scales = scales_tensor(*(float(item.abs().max()) / 448 for item in parts)).cuda()
    codes = [static_codes(item, scales[row, 0], FP8).contiguous() for row, item in enumerate(parts)]
    found = attend_codes_op(codes[0], codes[1], parts[2], scales).float().cpu()
    again = attend_codes_op(*parts, scales).float().cpu()  # makes the codes itself, by an inexact division
    assert -10 * torch.log10((again - found).square().sum() / found.square().sum()) > 30.0
    expected = attention_fp8(*(item.cpu() for item in codes), scales.cpu()).float()
    noise = (found - expected).square().sum() / expected.square().sum()
    assert -10 * torch.log10(noise) > 20.0  # weights and results are rounded to three bits in both


@needs_cudnn
def test_a_package_with_fp8_attention_runs_in_the_device_loop(tmp_path: Path) -> None:
    from engines.backends.torch.host import torch_host

    names = ("fp16", WITH_ATTENTION)
    with closing(torch_host()) as made:
        for name in names:
            made.add(name, *compiled(tmp_path, name))
        for rows in (1, 2, 3):
            require_agreement(made.engine(WITH_ATTENTION), rows, FLOOR_DB[WITH_ATTENTION])
        loop = make_loop(12, 3, 4.5, names)
        first, again = made.denoise(loop), made.denoise(loop)  # now every engine has its CUDA graph
        assert made.notes == {}
        expected = host_loop(loop, made.engine)
    assert np.isfinite(expected).all()
    assert np.array_equal(first, expected)
    assert np.array_equal(again, expected)


@pytest.mark.parametrize("name", PRECISIONS[1:])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_compute_what_their_codes_stand_for(name: str, dtype: str) -> None:
    import torch

    from tmpdiff_export.targets.torch.layers import linear_from

    layer, weight = quantized(np.random.default_rng(3), 512, 384, Precision(name))
    data = torch.randn(2, 77, 512, generator=torch.Generator().manual_seed(1))
    module = linear_from(layer, torch.arange(384) / 100.0, getattr(torch, dtype)).to("cuda")
    found = module(data.to("cuda", module.dtype)).float().cpu()
    expected = data @ torch.from_numpy(weight).T + torch.arange(384) / 100.0
    noise = (found - expected).square().sum() / expected.square().sum()
    assert -10 * torch.log10(noise) > FLOOR_DB[name] - (0 if dtype == "float16" else 2)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[EngineEntry, Path]]:
    """A small denoiser, compiled at every precision."""
    folder = tmp_path_factory.mktemp("packages")
    return {name: compiled(folder, name) for name in PRECISIONS}


@pytest.fixture
def host(packages: dict[str, tuple[EngineEntry, Path]]) -> Iterator[Any]:
    from engines.backends.torch.host import torch_host

    with closing(torch_host()) as made:
        for name, (entry, path) in packages.items():
            made.add(name, entry, path)
        yield made


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_packages_agree_with_fp32_torch_at_any_batch(host: Any, name: str, rows: int) -> None:
    require_agreement(host.engine(name), rows, FLOOR_DB[name])


@pytest.mark.parametrize("choices", [PRECISIONS, REUSING], ids=["computed", "reusing"])
@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
def test_the_device_loop_is_bit_equal_to_the_host_loop(
    host: Any, guidance_scale: float, choices: tuple[str, ...]
) -> None:
    loop = make_loop(12, 3, guidance_scale, choices)
    first, again = host.denoise(loop), host.denoise(loop)  # now every engine has its CUDA graph
    assert host.notes == {}
    expected = host_loop(loop, host.engine)
    assert np.isfinite(expected).all()
    assert np.array_equal(first, expected)
    assert np.array_equal(again, expected)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_on_resident_engines_changes_nothing_but_time(
    host: Any, packages: dict[str, tuple[EngineEntry, Path]], limit: int
) -> None:
    from engines.backends.torch.host import torch_host

    loop = make_loop(12, 1, 4.5, PRECISIONS)
    with closing(torch_host(resident_engines=limit)) as limited:
        for name, (entry, path) in packages.items():
            limited.add(name, entry, path)
        found = [limited.denoise(loop) for _ in range(3)]
        assert len(limited.resident) <= limit
    expected = host.denoise(loop)
    for latents in found:
        assert np.array_equal(latents, expected)


def test_a_loop_that_swaps_takes_the_time_of_its_steps(host: Any) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}

    def timed(precisions: tuple[str, ...]) -> float:
        begin = time.perf_counter()
        host.denoise(make_loop(40, 1, 4.5, precisions, seconds))
        return time.perf_counter() - begin

    for _ in range(5):
        for name in PRECISIONS:
            timed((name,))
    for values in seconds.values():
        del values[:-40]
    alone = {name: statistics.median(values) for name, values in seconds.items()}
    for values in seconds.values():
        values.clear()
    timed(PRECISIONS)
    mixed = {name: statistics.median(values) for name, values in seconds.items()}
    print({name: f"{alone[name] * 1e6:.0f} us alone, {mixed[name] * 1e6:.0f} us in turns" for name in PRECISIONS})
    assert sum(mixed.values()) < 1.25 * sum(alone.values())  # small steps on a shared host; figures come from bench


def test_memory_is_given_back(packages: dict[str, tuple[EngineEntry, Path]]) -> None:
    import torch

    from engines.backends.torch.host import torch_host

    def once() -> int:
        with closing(torch_host()) as made:
            for name, (entry, path) in packages.items():
                made.add(name, entry, path)
            made.denoise(make_loop(8, 2, 4.5, PRECISIONS))
            made.denoise(make_loop(8, 2, 4.5, PRECISIONS))
        return torch.cuda.memory_allocated()

    once()
    before = once()
    assert once() <= before


def test_another_gpu_and_another_torch_are_refused(packages: dict[str, tuple[EngineEntry, Path]]) -> None:
    from engines.backends.torch.host import torch_host

    entry, path = packages["fp16"]
    with closing(torch_host()) as made:
        with pytest.raises(BackendError, match="compiled for sm75 Other GPU; this GPU is"):
            made.add("fp16", entry.model_copy(update={"device": "sm75 Other GPU"}), path)
        with pytest.raises(BackendError, match=r"compiled by torch 1\.0\.0"):
            made.add("fp16", entry.model_copy(update={"backend_version": "1.0.0"}), path)


def test_a_file_that_is_no_package_ends_in_our_error(
    packages: dict[str, tuple[EngineEntry, Path]], tmp_path: Path
) -> None:
    from engines.backends.torch.host import torch_host

    path = tmp_path / "fp16.pt2"
    path.write_bytes(b"this is no package\n" * 64)
    with closing(torch_host()) as made:
        made.add("fp16", packages["fp16"][0], path)
        with pytest.raises(BackendError, match="cannot load engine fp16"):
            made.engine("fp16").run(loop_inputs(2))


def compiled(folder: Path, name: str) -> tuple[EngineEntry, Path]:
    """The package of a precision and its manifest entry."""
    import torch

    from engines.backends.cuda.gpu import current_gpu
    from engines.backends.torch.library import VERSION
    from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
    from tmpdiff_export.targets.torch.compile import EngineModule, compile_package
    from tmpdiff_export.targets.torch.lowering import lower_for_torch
    from tmpdiff_export.weights.files import write_tensors
    from tmpdiff_export.weights.streamed import on_meta

    module = denoiser()
    layers, attention = {}, {}
    if name == WITH_ATTENTION:
        from tmpdiff_export.targets.torch.attention import require_ranges, watch_attention

        with torch.no_grad(), watch_attention(module, attention):
            module(*(torch.from_numpy(item) for item in loop_inputs(BATCH).values()))
        require_ranges(module, attention)
        name = "fp8"
    if name != "fp16":
        for layer in ("q", "k", "v", "wide", "narrow"):
            weight, found = module.get_submodule(layer).weight, LayerRange(None if name == "int4" else 6.0, None)
            layers[layer] = quantize_layer(weight, found, Precision(name), BLOCK_SIZES.get(name))
    lowered, _ = lower_for_torch(module, layers, torch.float16, attention=attention)
    whole = EngineModule(lowered, torch.float16, [False, True, False]).eval()
    inputs = [torch.from_numpy(loop_inputs(BATCH)[key]).to("cuda") for key in (LATENTS, TIMESTEP, TEXT)]
    path = folder / f"{name}{'-attention' if attention else ''}.pt2"
    # What no precision changes is in one file, which all engines share.
    common = {key: item for key, item in whole.tensors.items() if "inside" in key or "outside" in key or "norm" in key}
    own = {key: item for key, item in whole.tensors.items() if key not in common}
    weights = [folder / "shared.safetensors", path.with_suffix(".safetensors")]
    for file_path, tensors in zip(weights, (common, own), strict=True):
        if not file_path.exists():
            write_tensors(file_path, tensors)
    whole.module = on_meta(whole.module)
    compile_package(whole, "cuda", inputs, path)
    gpu = current_gpu()
    file = FileEntry(path=f"engines/{path.name}", sha256=sha256_bytes(b""), bytes=0)
    entry = EngineEntry(
        file=file,
        weights=tuple(FileEntry(path=f"engines/{item.name}", sha256=file.sha256, bytes=0) for item in weights),
        backend="torch",
        backend_version=VERSION,
        device=gpu.described,
        lowering={},
        onnx_sha256=file.sha256,
        recipe="none",
        sqnr_db=0.0,
        sqnr_floor_db=0.0,
        inputs=(
            TensorSpec(name=LATENTS, dtype="float32", shape=("batch", *SHAPE)),
            TensorSpec(name=TIMESTEP, dtype="float32", shape=("batch",)),
            TensorSpec(name=TEXT, dtype="float32", shape=("batch", 16, WIDTH)),
        ),
        outputs=(TensorSpec(name=MODEL_OUTPUT, dtype="float32", shape=("batch", *SHAPE)),),
        package=PackageEntry(
            batch=BATCH, dtype="float16", weights_bytes=0, operators=("attention_fp8",) if attention else ()
        ),
    )
    return entry, path


def quantized(rng: np.random.Generator, depth: int, width: int, precision: Precision) -> tuple[Any, np.ndarray]:
    """A layer and the weight [N, K] that it was made from."""
    from tmpdiff_export.quantization.codes import LayerRange, quantize_layer

    weight = rng.standard_normal((width, depth), dtype=np.float32)
    weight_only = precision is Precision.INT4
    import torch

    found = LayerRange(None if weight_only else 5.0, None)
    return quantize_layer(torch.from_numpy(weight), found, precision, BLOCK_SIZES.get(precision.value)), weight
