"""The torch backend without a GPU: layers, lowering, packages compiled for the CPU, bundles of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.tiny_pipeline import PROMPTS

from calibration.choose.allocation import HighSteps
from engines import DenoiseRuntime
from engines.errors import BackendError, BundleError
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP, Manifest, manifest_identity
from engines.precision import Precision
from engines.text import PromptFile

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling packages needs g++")

FLOOR_DB = {Precision.FP8: 26.0, Precision.INT8: 34.0, Precision.INT4: 17.0, Precision.NVFP4: 16.0}
TEXT = "encoder_hidden_states"


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


# bundles -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> dict[str, Path]:
    """The tiny pipeline, built for the torch backend on the CPU, by two workers, and for ONNX Runtime."""
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    folder = tmp_path_factory.mktemp("torch")
    folders = {}
    for backend, device, workers in (("torch", "cpu", 2), ("onnxruntime", None, 1)):
        folders[backend] = folder / backend
        precisions = (Precision.FP16, Precision.FP8, Precision.INT8)
        options = BuildOptions(precisions, PROMPTS, num_steps=4, backend=backend, device=device, workers=workers)
        build(tiny_pipeline, folders[backend], options)
    return folders


@pytest.fixture(scope="module")
def runtime(bundles: dict[str, Path]) -> Iterator[DenoiseRuntime]:
    """The torch bundle, loaded."""
    with DenoiseRuntime.load(bundles["torch"]) as loaded:
        yield loaded


@needs_compiler
def test_a_bundle_says_what_its_packages_are(bundles: dict[str, Path]) -> None:
    import torch

    manifest = Manifest.model_validate_json((bundles["torch"] / "manifest.json").read_text())
    assert manifest.version == 4
    assert list(manifest.denoisers) == ["fp16", "fp8", "int8"]
    for name, entry in manifest.engines().items():
        assert (entry.backend, entry.device, entry.backend_version) == ("torch", "cpu", torch.__version__), name
        assert entry.file.path.endswith(".pt2")
        assert entry.weights is not None
        assert entry.weights.path.endswith(".safetensors")
        assert entry.package is not None
        assert entry.package.batch == (1 if name == "VAE decoder" else 2)
        assert entry.sqnr_db > entry.sqnr_floor_db
    assert manifest.denoisers["int8"].lowering == {"int8 linear": manifest.denoisers["fp8"].lowering["fp8 linear"]}
    stored = {name: entry.bytes for name, entry in manifest.denoisers.items()}
    assert manifest.denoisers["fp8"].weights.bytes < 0.7 * manifest.denoisers["fp16"].weights.bytes, stored  # type: ignore[union-attr]


@needs_compiler
@pytest.mark.parametrize(("name", "floor"), [("fp16", 55.0), ("fp8", 28.0), ("int8", 30.0)])
def test_engines_agree_with_the_onnx_file_of_their_precision(
    runtime: DenoiseRuntime, bundles: dict[str, Path], name: str, floor: float
) -> None:
    with DenoiseRuntime.load(bundles["onnxruntime"]) as other:
        assert runtime.manifest.denoisers[name].onnx_sha256 == other.manifest.denoisers[name].onnx_sha256
        inputs = inputs_of(runtime, 2)
        expected = other.denoiser(name).run(inputs)[MODEL_OUTPUT]
    found = runtime.denoiser(name).run(inputs)[MODEL_OUTPUT]
    assert -10 * np.log10(np.square(found - expected).sum() / np.square(expected).sum()) > floor


@needs_compiler
def test_any_batch_is_made_of_the_compiled_one(runtime: DenoiseRuntime) -> None:
    engine = runtime.denoiser("int8")
    whole = inputs_of(runtime, 5)
    expected = engine.run(whole)[MODEL_OUTPUT]
    for rows in (1, 2, 3, 4):
        found = engine.run({name: values[:rows] for name, values in whole.items()})[MODEL_OUTPUT]
        assert found.shape == expected[:rows].shape
        assert np.array_equal(found, expected[:rows])


@needs_compiler
def test_running_a_package_imports_no_compiler(bundles: dict[str, Path]) -> None:
    script = (
        "import sys; from engines import DenoiseRuntime\n"
        "with DenoiseRuntime.load(sys.argv[1]) as loaded:\n"
        "    loaded.generate(['a red circle'], [3], loaded.bundle.schedule('uniform:int8'))\n"
        "print([name for name in ('torch._inductor.codecache', 'torch._dynamo', 'triton') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(bundles["torch"])], check=True, timeout=120, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]"


@needs_compiler
def test_a_package_runs_without_python(runtime: DenoiseRuntime, bundles: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.numpy import save_file
    from torch.utils.cpp_extension import include_paths, library_paths

    program, source = tmp_path / "run_package", ROOT / "tools" / "cpp" / "run_package.cpp"
    folders = [f"-I{path}" for path in include_paths()]
    libraries = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = ["g++", "-std=c++20", "-O0", abi, *folders, str(source), "-o", str(program), *libraries]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10"], check=True, timeout=300)
    entry = runtime.manifest.denoisers["int8"]
    inputs = inputs_of(runtime, entry.package.batch)  # type: ignore[union-attr]
    save_file(
        {str(position): np.ascontiguousarray(inputs[spec.name]) for position, spec in enumerate(entry.inputs)},
        tmp_path / "inputs.safetensors",
    )
    files = [bundles["torch"] / file.path for file in entry.files()]
    words = [program, *files, tmp_path / "inputs.safetensors", tmp_path / "outputs.bin"]
    subprocess.run(list(map(str, words)), check=True, timeout=120)
    found = np.fromfile(tmp_path / "outputs.bin", np.float32)
    expected = runtime.denoiser("int8").run(inputs)[MODEL_OUTPUT]
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    missing = subprocess.run(
        [str(program), *map(str, files), str(tmp_path / "none"), "x"], capture_output=True, text=True
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("run_package: ")
    assert "none cannot be read" in missing.stderr


@needs_compiler
def test_wrong_inputs_are_refused(runtime: DenoiseRuntime) -> None:
    engine, inputs = runtime.denoiser("fp16"), inputs_of(runtime, 2)
    with pytest.raises(BackendError, match=f"needs input {TEXT}; received latents, timestep"):
        engine.run({name: inputs[name] for name in (LATENTS, TIMESTEP)})
    with pytest.raises(BackendError, match=r"latents has shape \(2, 4, 8, 8\), expected"):
        engine.run({**inputs, LATENTS: inputs[LATENTS][:, :, :8, :8]})


@needs_compiler
def test_a_mixed_schedule_draws_the_picture_that_onnx_runtime_draws(bundles: dict[str, Path]) -> None:
    pictures = {}
    for backend, folder in bundles.items():
        with DenoiseRuntime.load(folder) as loaded:
            pictures[backend] = loaded.generate(["a red circle"], [3], loaded.bundle.schedule("uniform:fp16"))
    difference = np.abs(pictures["torch"].astype(int) - pictures["onnxruntime"].astype(int))
    assert difference.max() <= 2


@needs_compiler
@pytest.mark.usefixtures("all_cores")
def test_calibration_takes_as_many_samples_in_a_call_as_it_is_compiled_for(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tmpdiff_export.calibrate import bundle as calibration_run

    found, rows = [], []
    run = DenoiseRuntime.step

    def counted(self: DenoiseRuntime, state: Any, *others: Any) -> Any:
        rows[-1].append(len(state.latents))
        return run(self, state, *others)

    monkeypatch.setattr(DenoiseRuntime, "step", counted)
    for at_once in (2, 1):
        folder = tmp_path / str(at_once)
        shutil.copytree(bundles["torch"], folder)
        rows.append([])
        if at_once == 1:
            monkeypatch.setattr(calibration_run, "samples_per_call", lambda *_: 1)
        prompts = PromptFile(PROMPTS[:2], PROMPTS[2:])
        monkeypatch.setattr(calibration_run, "_latencies", lambda *_: {"fp16": 3.0, "fp8": 2.0, "int8": 1.0})
        result = calibration_run.calibrate_bundle(folder, prompts, guidance_scale=1.0, budget=HighSteps(2))
        found.append(result.model_dump(exclude={"settings", "latencies_ms"}))
    assert set(rows[0]) == {2, 1}  # two samples of calibration, one of validation
    assert set(rows[1]) == {1}
    assert sum(rows[0]) == sum(rows[1])
    assert found[0] == found[1]
    folder = tmp_path / "workers"
    shutil.copytree(bundles["torch"], folder)
    monkeypatch.undo()
    monkeypatch.setattr(calibration_run, "_latencies", lambda *_: {"fp16": 3.0, "fp8": 2.0, "int8": 1.0})
    result = calibration_run.calibrate_bundle(folder, prompts, guidance_scale=1.0, budget=HighSteps(2), workers=2)
    assert result.model_dump(exclude={"settings", "latencies_ms"}) == found[0]


@needs_compiler
def test_the_runtime_command_runs_a_torch_bundle(bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    command = [sys.executable, "-m", "engines", "run", bundles["torch"], "--prompt", "a red circle", "--seed", "1"]
    command += ["--out", out, "--schedule", "uniform:int8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


@needs_compiler
def test_a_limit_on_resident_engines_needs_a_gpu(bundles: dict[str, Path]) -> None:
    with pytest.raises(BackendError, match=r"on a GPU; this one's engines run on torch \(cpu\)"):
        DenoiseRuntime.load(bundles["torch"], resident_engines=1)


@needs_compiler
def test_damage_is_found_before_anything_is_loaded(bundles: dict[str, Path], tmp_path: Path) -> None:
    for suffix in (".pt2", ".safetensors"):
        copy = tmp_path / suffix
        shutil.copytree(bundles["torch"], copy)
        path = copy / "engines" / f"int8{suffix}"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with DenoiseRuntime.load(copy) as loaded, pytest.raises(BundleError, match=f"int8{suffix}"):
            loaded.denoiser("int8")


@needs_compiler
def test_the_reference_may_be_made_of_the_weights_of_another_engine(
    torch_variants: Path, bundles: dict[str, Path]
) -> None:
    assert {path.name for path in (torch_variants / "engines").glob("fp*")} == {
        "fp16.pt2",
        "fp8.pt2",
        "fp8.safetensors",
    }
    with DenoiseRuntime.load(torch_variants) as loaded, DenoiseRuntime.load(bundles["torch"]) as separate:
        fp16, fp8 = (loaded.manifest.denoisers[name] for name in ("fp16", "fp8"))
        assert list(loaded.manifest.denoisers) == ["fp16", "fp8", "nvfp4"]
        assert fp16.weights == fp8.weights
        assert fp16.lowering == {"fp8 linear in a 16-bit product": fp8.lowering["fp8 linear"]}
        assert fp16.sqnr_floor_db == fp8.sqnr_floor_db
        assert fp8.sqnr_db < fp16.sqnr_db < separate.manifest.denoisers["fp16"].sqnr_db - 10
        inputs = inputs_of(loaded, 2)
        found, exact = (item.denoiser("fp16").run(inputs)[MODEL_OUTPUT] for item in (loaded, separate))
        error = np.square(found - exact).sum() / np.square(exact).sum()
        assert 20.0 < -10 * np.log10(error) < 50.0  # that of FP8 weights, and not none
        picture = loaded.generate(["a red circle"], [3], loaded.bundle.schedule("uniform:fp16"))
        assert picture.shape == (1, 64, 64, 3)


@needs_compiler
def test_nvfp4_is_emulated_with_its_own_error_and_says_so(torch_variants: Path) -> None:
    with DenoiseRuntime.load(torch_variants) as loaded:
        entry = loaded.manifest.denoisers["nvfp4"]
        layers = loaded.manifest.denoisers["fp8"].lowering["fp8 linear"]
        assert entry.lowering == {"nvfp4 linear emulated in a 16-bit product": layers, "fp8 attention": 2}
        inputs = inputs_of(loaded, 2)
        found, fp8 = (loaded.denoiser(name).run(inputs)[MODEL_OUTPUT] for name in ("nvfp4", "fp8"))
    error = np.square(found - fp8).sum() / np.square(fp8).sum()
    assert entry.sqnr_floor_db < -10 * np.log10(error) < 26.0  # that of 4-bit codes, and not none


@needs_compiler
def test_two_workers_make_what_one_process_makes(torch_variants: Path, bundles: dict[str, Path]) -> None:
    alone, spread = (
        Manifest.model_validate_json((folder / "manifest.json").read_text())
        for folder in (torch_variants, bundles["torch"])
    )
    assert spread.range_calibration == alone.range_calibration
    for one, two in (
        (alone.denoisers["fp8"], spread.denoisers["fp8"]),
        (alone.text_encoder, spread.text_encoder),
        (alone.vae_decoder, spread.vae_decoder),
    ):
        # The hash of the weights among it; a package holds paths, and has another one each time.
        assert one.model_dump(exclude={"file"}) == two.model_dump(exclude={"file"})


@needs_compiler
def test_weights_in_another_folder_than_their_package_are_refused(torch_variants: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(torch_variants, copy)
    (copy / "elsewhere").mkdir()
    shutil.copyfile(copy / "engines" / "fp8.safetensors", copy / "elsewhere" / "fp8.safetensors")
    data = json.loads((copy / "manifest.json").read_text())
    data["denoisers"]["fp16"]["weights"]["path"] = "elsewhere/fp8.safetensors"
    data["bundle_id"] = manifest_identity(data)
    (copy / "manifest.json").write_text(json.dumps(data))
    with (
        DenoiseRuntime.load(copy) as loaded,
        pytest.raises(BackendError, match=r"lie in another folder than engines/fp16\.pt2, expected the same"),
    ):
        loaded.denoiser("fp16")


def test_what_cannot_share_weights_is_refused() -> None:
    from tmpdiff_export.targets.torch.settings import PackageSettings

    built = (Precision.FP16, Precision.FP8)
    PackageSettings().require_unset("onnxruntime")
    settings = PackageSettings(share_weights=Precision.FP8)
    settings.require_built(built)
    with pytest.raises(
        BackendError, match="is for packages of the torch backend; engines of 'tensorrt' hold their own"
    ):
        settings.require_unset("tensorrt")
    for wrong in (Precision.INT8, Precision.FP16):
        with pytest.raises(
            BackendError, match=f"names {wrong.value}, expected a quantized precision that is built: fp8"
        ):
            PackageSettings(share_weights=wrong).require_built(built)


@needs_compiler
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend_version": "2.0.1"}, "was compiled by torch 2.0.1, installed is .*; install torch 2.0, or build"),
        ({"package": None}, "the manifest does not describe its torch package"),
        ({"device": "sm90 NVIDIA H100"}, "found no NVIDIA GPU|cuda.bindings"),
    ],
)
def test_a_package_that_cannot_run_here_is_refused(
    bundles: dict[str, Path], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundles["torch"], copy)
    data = json.loads((copy / "manifest.json").read_text())
    for entry in data["denoisers"].values():
        entry.update(change)
    data["bundle_id"] = manifest_identity(data)
    (copy / "manifest.json").write_text(json.dumps(data))
    with DenoiseRuntime.load(copy) as loaded, pytest.raises(BackendError, match=says):
        loaded.denoiser("fp16")


def inputs_of(runtime: DenoiseRuntime, rows: int) -> dict[str, np.ndarray]:
    """Denoiser inputs, every row its own."""
    rng = np.random.default_rng(1)
    text = runtime.encode(list(PROMPTS)).guided
    whole = {name: np.concatenate([values, values])[:rows] for name, values in text.items()}
    shape = (rows, *runtime.manifest.sampling.latents_shape)
    return {
        LATENTS: rng.standard_normal(shape, dtype=np.float32),
        TIMESTEP: np.full(rows, runtime.table.timesteps[1], np.float32),
        **whole,
    }
