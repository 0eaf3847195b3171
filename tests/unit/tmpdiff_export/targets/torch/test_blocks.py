"""Repeated blocks compiled once: which are found, and that calls of the parts compute what the whole does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel
from helpers.needs_compiler import needs_compiler
from helpers.tiny_pipeline import tiny_options

from engines import DenoiseRuntime
from engines.backends.torch.runner import load_package
from engines.documents import FileEntry
from engines.errors import BackendError, BundleError
from engines.manifest import EngineEntry, TensorSpec
from engines.package_entry import PackageCall, PackageEntry
from engines.precision import Precision
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.demo import pipeline_folder
from tmpdiff_export.quantization.codes import LayerRange, quantize_layer
from tmpdiff_export.targets.torch import attention
from tmpdiff_export.targets.torch.blocks import LEAST_BLOCKS, compile_blocks, divide, part_paths
from tmpdiff_export.targets.torch.compile import EngineModule
from tmpdiff_export.targets.torch.lowering import lower_for_torch
from tmpdiff_export.targets.torch.segments import Divided, runs
from tmpdiff_export.weights.streamed import on_meta
from tools.acceptance.random_pipeline import save_random_pipeline

INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")


class Positional(torch.nn.Module):
    """A denoiser as an export wrapper calls it."""

    def __init__(self, denoiser: torch.nn.Module, names: tuple[str, ...] = INPUTS) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output: tuple[torch.Tensor, ...] = self.denoiser(
            **dict(zip(self.names, inputs, strict=True)), return_dict=False
        )
        return output


def flux(pairs: int, singles: int) -> EngineModule:
    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        in_channels=16, num_layers=pairs, num_single_layers=singles, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return engine(Positional(module))


def flux_inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return (
        torch.randn(batch, 16, 16, generator=generator),
        torch.randn(batch, 7, 24, generator=generator),
        torch.randn(batch, 12, generator=generator),
        torch.linspace(0.3, 0.8, batch),
        positions,
        torch.zeros(7, 3),
    )


def engine(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> EngineModule:
    return EngineModule(module, dtype, [False] * len(INPUTS)).eval()


def calls_of(divided: Divided, part: int) -> int:
    return sum(call.package == part for call in divided.calls)


@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_of_a_kind_share_a_part_and_fewer_stay_with_what_surrounds_them(batch: int) -> None:
    module = flux(LEAST_BLOCKS + 1, LEAST_BLOCKS - 1)
    divided = divide(module, "cpu", flux_inputs(batch))
    assert len(divided.parts) == 3  # before, behind, the pairs
    assert [calls_of(divided, part) for part in range(3)] == [1, 1, LEAST_BLOCKS + 1]
    (output,) = divided.outputs
    assert tuple(output.shape) == (batch, 16, 16)
    taken = [position for call in divided.calls for run in call.weights for position in range(*run)]
    assert sorted(taken) == list(range(len(module.tensors)))
    assert all("forward" not in vars(part) for part in module.modules())
    assert all(len(call.weights) == 1 for call in divided.calls if call.package == 2)


def test_a_block_with_other_layers_is_no_equal() -> None:
    module = flux(0, LEAST_BLOCKS + 1)
    odd = module.module.denoiser.single_transformer_blocks[2]
    odd.proj_out = torch.nn.Sequential(odd.proj_out)
    divided = divide(module, "cpu", flux_inputs())
    # Two segments, the kind; between the second and the fourth block lies the odd one.
    assert sorted(calls_of(divided, part) for part in range(len(divided.parts))) == [1, 1, 1, LEAST_BLOCKS]


class Multiplied(torch.nn.Module):
    """Multiplies in a graph within the graph: exported, an autocast region is one."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            data = data.float() * self.factor
        return data + self.layer(data)


class Chain(torch.nn.Module):
    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Multiplied(factor) for factor in factors)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            data = block(data)
        return data


@pytest.mark.parametrize(("factors", "kinds"), [([2.0] * 8, 1), ([2.0] * 4 + [3.0] * 4, 2)])
def test_blocks_that_differ_under_autocast_are_no_equals(factors: list[float], kinds: int) -> None:
    module = Chain(factors)
    with torch.no_grad():
        divided = divide(EngineModule(on_meta(module), torch.float32, [True]).eval(), "cpu", [torch.zeros(2, 8)])
    assert len({call.package for call in divided.calls if len(call.weights)}) == kinds


def test_a_module_without_repeated_blocks_is_one_part() -> None:
    module = EngineModule(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.float32, [False])
    divided = divide(module, "cpu", (torch.zeros(2, 4),))
    assert (len(divided.parts), len(divided.calls)) == (1, 1)
    assert divided.calls[0].weights == ((0, 2),)


def test_nothing_is_read_of_the_weights() -> None:
    with torch.device("meta"):
        module = flux(LEAST_BLOCKS, LEAST_BLOCKS)
    divided = divide(module, "cpu", flux_inputs())
    assert [calls_of(divided, part) for part in range(4)] == [1, 1, LEAST_BLOCKS, LEAST_BLOCKS]


@needs_compiler
@pytest.mark.parametrize("precision", [None, Precision.FP8, Precision.INT8])
def test_the_parts_compute_what_the_whole_does(precision: Precision | None, tmp_path: Path) -> None:
    module = flux(LEAST_BLOCKS, LEAST_BLOCKS)
    layers = {
        name: quantize_layer(layer.weight.detach(), LayerRange(6.0, None), precision, None)
        for name, layer in module.module.named_modules()
        if precision is not None and isinstance(layer, torch.nn.Linear) and "blocks" in name
    }
    if precision is not None:
        lowered, _ = lower_for_torch(module.module, layers, torch.float16)
        module = engine(lowered, torch.float16)
    package, found = compiled(module, flux_inputs(), tmp_path)
    assert len(package.blocks) == 3
    with torch.no_grad():
        (expected,) = module(*flux_inputs())
    noise = (found - expected).square().sum() / expected.square().sum()
    assert noise < (
        1e-10 if precision is None else 1e-4
    )  # a compiler rounds elsewhere: some codes are their neighbours


@needs_compiler
def test_blocks_that_give_one_value_and_take_no_rotary_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = SanaTransformer2DModel(
        num_layers=LEAST_BLOCKS, num_attention_heads=2, attention_head_dim=16, sample_size=8, in_channels=4, out_channels=4,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
    )  # fmt: skip
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    module = EngineModule(Positional(denoiser, names), torch.float32, [False] * 3).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.tensor([3.0, 700.0])
    package, found = compiled(module, inputs, tmp_path)
    assert len(package.calls) == LEAST_BLOCKS + 2
    with torch.no_grad():
        (expected,) = module(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def compiled(module: EngineModule, inputs: tuple[torch.Tensor, ...], folder: Path) -> tuple[PackageEntry, torch.Tensor]:
    """The packages as the manifest has them, and what they compute."""
    path = folder / "engine.pt2"
    divided = compile_blocks(module, "cpu", inputs, path)
    _, *others = part_paths(path, len(divided.parts))
    package = PackageEntry(
        batch=2,
        dtype="float32",
        weights_bytes=0,
        blocks=tuple(FileEntry(path=f"engines/{other.name}", sha256="0" * 64, bytes=1) for other in others),
        calls=divided.calls,
        results=divided.results,
    )
    runner, weights = load_package("engine", package, path, None), tuple(module.tensors.values())
    (output,) = runner(weights, inputs)
    with pytest.raises(BackendError, match=f"takes weight {len(weights) - 1}, its engine's files hold 2; build"):
        runner(weights[:2], inputs)
    return package, output


def test_positions_that_follow_one_another_are_one_run() -> None:
    assert runs([0, 1, 2, 5, 7, 8]) == ((0, 3), (5, 6), (7, 9))
    assert runs([]) == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"package": 1}, "call 0 is of package 1, there are 1"),
        ({"inputs": (1,)}, r"call 0 takes values \(1,\), 1 are known"),
        ({"weights": ((3, 3),)}, r"call 0 takes weights \(\(3, 3\),\), expected"),
        ({"outputs": 2}, ""),
    ],
)
def test_calls_that_do_not_fit_are_refused(call: dict[str, object], message: str) -> None:
    given = {"package": 0, "weights": ((0, 1),), "inputs": (0,), "outputs": 1, **call}
    calls = (PackageCall.model_validate(given),)
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 1))

    def entry(**changed: object) -> EngineEntry:
        package = {"batch": 1, "dtype": "float32", "weights_bytes": 0, "calls": calls, "results": (1,), **changed}
        file = FileEntry(path="engines/x.pt2", sha256="0" * 64, bytes=1)
        return EngineEntry(
            file=file, backend="torch", backend_version="2", device="cpu", lowering={}, onnx_sha256="0" * 64, recipe="none",
            sqnr_db=0.0, sqnr_floor_db=0.0, inputs=(spec,), outputs=(spec,), package=PackageEntry.model_validate(package),
        )  # fmt: skip

    if message:
        with pytest.raises(ValueError, match=message):
            entry()
        return
    assert entry().files() == (entry().file,)
    with pytest.raises(ValueError, match=r"results are values \(3,\), 3 are known"):
        entry(results=(3,))
    with pytest.raises(ValueError, match="calls give 2 results, expected 1"):
        entry(results=(1, 2))
    with pytest.raises(ValueError, match="1 further packages and no calls"):
        entry(calls=(), results=(), blocks=(entry().file,))


def test_a_package_that_returns_another_number_of_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.torch.runner.load_runner", lambda *_: lambda weights, inputs: list(inputs))
    call = PackageCall(package=0, weights=(), inputs=(0,), outputs=2)
    package = PackageEntry(batch=1, dtype="float32", weights_bytes=0, calls=(call,), results=(2,))
    with pytest.raises(BackendError, match="returns 1 values, the manifest says 2; build the bundle again"):
        load_package("engine", package, Path("x.pt2"), None)((), (torch.zeros(1),))


class TextEncoder(torch.nn.Module):
    """A T5 encoder as an export wrapper calls it."""

    def __init__(self, layers: int) -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        torch.manual_seed(0)
        self.inner = T5EncoderModel(
            T5Config(
                vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=layers, num_heads=2, use_cache=False,
                feed_forward_proj="gated-gelu", is_encoder_decoder=False,
            )
        ).eval()  # fmt: skip

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.inner(ids)[0]
        return hidden


@needs_compiler
def test_blocks_that_are_stored_narrow_and_give_more_than_tensors(tmp_path: Path) -> None:
    module = TextEncoder(LEAST_BLOCKS + 1)  # the first of them has a table of positions
    for item in module.parameters():
        item.data = item.data.to(torch.bfloat16) if item.ndim == 2 else item.data
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    engine = EngineModule(module, torch.float32, [True]).eval()
    package, found = compiled(engine, (ids,), tmp_path)
    assert len(package.calls) == LEAST_BLOCKS + 2
    with torch.no_grad():
        (expected,) = engine(ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.long  # builds
def test_a_bundle_of_blocks_is_whole_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_pipeline(
        tmp_path / "pipeline",
        pipeline_folder() / "tokenizer",
        heads=4,
        head_size=32,
        layers=LEAST_BLOCKS,
        latent_side=16,
    )
    monkeypatch.setattr(attention, "LEAST_TOKENS", 1)
    monkeypatch.setattr(attention, "HEAD_SIZES", (32,))
    options = tiny_options(
        "fp16", "fp8", backend="torch", device="cpu", compile="blocks", fp8_attention=(Precision.FP8,)
    )
    manifest = build(tmp_path / "pipeline", tmp_path / "bundle", options)
    for name, (entry,) in manifest.denoisers.items():
        assert entry.package is not None
        assert len(entry.package.blocks) == 2, name
        assert [call.package for call in entry.package.calls] == [0, *[2] * LEAST_BLOCKS, 1]
        assert entry.sqnr_db > entry.sqnr_floor_db
    own = [file.path for file in manifest.denoisers["fp8"][0].weights]
    assert "engines/fp8.attention.safetensors" in own
    with DenoiseRuntime.load(tmp_path / "bundle") as runtime:  # every file's hash is checked
        schedule = runtime.schedule("uniform:fp8")
        picture = runtime.generate(["a red circle"], [3], schedule)
        assert np.ptp(picture.astype(int)) > 10
    (tmp_path / "bundle" / "engines" / "fp8.2.pt2").unlink()
    with DenoiseRuntime.load(tmp_path / "bundle") as runtime, pytest.raises(BundleError, match=r"fp8\.2\.pt2"):
        runtime.denoiser("fp8")
