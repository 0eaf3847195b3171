"""ONNX Runtime's CUDA provider: the device loop, what sessions are asked for, refusals, and a build.

There is no GPU here. CUDA is a fake, and so is the provider (`fakes.fake_ort_cuda`): real sessions, optimizers and I/O
binding, on the CPU.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fakes import fake_kernels  # noqa: F401  (registers the kernels)
from fakes.fake_ort_cuda import FakeOrtCuda
from fakes.install import Fakes, install
from helpers.small_loops import loop_of, same_bits, schedule
from helpers.small_plans import CHANNELS, SIDE, TOKENS, WIDTH, SmallModel, denoiser, embedder, table
from helpers.tiny_pipeline import PROMPTS

from engines.backends.choose import HostOptions, open_host
from engines.bundle import Bundle
from engines.errors import BackendError, TmpDiffError
from engines.files import sha256_file
from engines.loop import Loop, host_loop
from engines.manifest import EngineEntry, FileEntry
from engines.precision import DEFAULT_PRECISIONS, Precision
from engines.runtime import DenoiseRuntime

SEEDS = {"fp16": 0, "fp8": 1, "int8": 2, "int4": 3}
DEVICE = "sm90 Fake H200"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return install(monkeypatch)


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch, fakes: Fakes) -> FakeOrtCuda:
    return FakeOrtCuda.install(monkeypatch, fakes.cuda)


Opened = Callable[..., Any]


@pytest.fixture
def opened(fakes: Fakes, ort: FakeOrtCuda, tmp_path: Path) -> Iterator[Opened]:
    """Opens a host with the small denoisers in it; after the test it is closed and nothing may be left."""
    hosts = []

    def open_one(resident_engines: int | None = None) -> Any:
        host: Any = open_host("onnxruntime", DEVICE, HostOptions(resident_engines=resident_engines))
        hosts.append(host)
        for name, seed in SEEDS.items():
            host.add(name, *saved(denoiser(seed), tmp_path / f"{name}.onnx"))
        return host

    yield open_one
    for host in hosts:
        host.close()
        host.close()
    gc.collect()  # an error that was caught holds its frames
    assert fakes.cuda.leaks() == []
    assert ort.alive() == []


def saved(small: SmallModel, path: Path, **changed: Any) -> tuple[EngineEntry, Path]:
    """A file and its manifest entry."""
    onnx.save(small.model, path)
    file = FileEntry(path=path.name, sha256=sha256_file(path), bytes=path.stat().st_size)
    entry = EngineEntry(
        file=file,
        backend="onnxruntime",
        backend_version="1.30.0",
        device=DEVICE,
        lowering={},
        onnx_sha256=file.sha256,
        recipe="none",
        sqnr_db=99.0,
        sqnr_floor_db=1.0,
        inputs=small.inputs,
        outputs=small.outputs,
    )
    return entry.model_copy(update=changed), path


def inputs_of(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    return {
        "latents": random.standard_normal((rows, CHANNELS, SIDE, SIDE)).astype(np.float32),
        "timestep": np.full(rows, 500.0, np.float32),
        "hidden_states": random.standard_normal((rows, TOKENS, WIDTH)).astype(np.float32),
    }


# The loop


@pytest.mark.parametrize("policy", ["younger_first", "lazy"])
@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("pattern", ["hhhhhhhh", "h8i4h8i4", "444i88hh"])
def test_the_device_loop_equals_the_host_loop_bit_for_bit(
    opened: Opened, fakes: Fakes, pattern: str, limit: int | None, policy: str
) -> None:
    host = opened(limit)
    fakes.cuda.scheduler.policy = policy
    for guidance_scale in (4.5, 1.0):
        loop = loop_of(table(8, 3, past_samples=True), schedule(pattern), guidance_scale=guidance_scale)
        first, again = host.denoise(loop), host.denoise(loop)
        assert np.isfinite(first).all()
        assert same_bits(first, again)
        assert same_bits(first, host_loop(loop, host.engine))
        assert limit is None or len(host.resident) <= limit


def test_engines_compute_what_the_same_file_does_on_the_cpu(opened: Opened, tmp_path: Path) -> None:
    from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine

    engine = opened().engine("fp16")
    on_cpu = OnnxRuntimeEngine(tmp_path / "fp16.onnx")
    for rows in (1, 3, 2):  # each batch size is another session
        inputs = inputs_of(rows)
        kept = {name: values.astype(np.float16) for name, values in inputs.items() if name != "timestep"}
        expected = on_cpu.run({**inputs, **kept})["model_output"]
        found = engine.run(inputs)["model_output"]
        assert found.dtype == np.float32
        assert np.abs(found - expected.astype(np.float32)).max() < 2e-3


def test_a_loop_waits_once_and_binds_the_shared_buffers(opened: Opened, fakes: Fakes) -> None:
    host = opened()
    loop = loop_of(table(8, 2), schedule("h8i4h8i4"))
    host.denoise(loop)
    start = len(fakes.cuda.calls)
    host.denoise(loop)
    names = fakes.cuda.names(start)
    assert names.count("run_with_iobinding") == 8
    assert "ONNX Runtime waits" not in names
    assert [name for name in names if "Synchronize" in name] == ["cudaStreamSynchronize"]
    assert "cudaMalloc" not in names
    buffers = {name for name in host._memory._buffers if name.startswith(("latents", "model_output", "timestep"))}
    assert buffers == {"latents float16", "model_output float16", "timestep float32"}


def test_a_buffer_that_grows_is_bound_again(opened: Opened) -> None:
    host = opened()
    small = loop_of(table(4, 1), schedule("h8h8"), samples=1)
    before = host.denoise(small)
    host.denoise(loop_of(table(4, 1), schedule("h8h8"), samples=3))
    assert same_bits(host.denoise(small), before)


def test_one_session_per_engine_and_set_of_sizes(opened: Opened, ort: FakeOrtCuda, fakes: Fakes) -> None:
    host = opened()
    loop = loop_of(table(4, 1), schedule("h8h8"))
    host.denoise(loop)
    host.denoise(loop)
    assert [item.options.sizes for item in ort.opened] == [{"batch": 4}] * 2
    host.denoise(loop_of(table(4, 1), schedule("h8h8"), samples=1))
    assert [item.options.sizes for item in ort.opened[2:]] == [{"batch": 2}] * 2
    assert len(ort.alive()) == 2  # the old ones gave their memory back


def test_an_engine_that_comes_back_is_opened_by_the_loading_thread(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from engines.backends.onnxruntime import plan

    threads: list[bool] = []
    real = plan.open_session
    monkeypatch.setattr(
        plan,
        "open_session",
        lambda *args, **kw: (threads.append(threading.current_thread() is threading.main_thread()), real(*args, **kw))[
            1
        ],
    )
    host = opened(1)
    host.denoise(loop_of(table(4, 1), schedule("h8h8")))
    assert threads == [True, False, False, False]  # the first had to wait for the sizes


def test_sessions_are_asked_for_the_gpu_alone(opened: Opened, ort: FakeOrtCuda) -> None:
    host = opened()
    host.engine("fp16").run(inputs_of(2))
    (session,) = ort.opened
    assert session.options.config["session.disable_cpu_ep_fallback"] == "1"
    assert session.given["user_compute_stream"] == str(host.stream.number)
    assert session.given["device_id"] == "0"
    assert session.given["use_tf32"] == "0"
    assert ort.preloads == 1
    assert ort.severities == [3, 3]  # by `open_host` and by the host; errors only


def test_engines_that_are_no_denoisers_run_too(opened: Opened, tmp_path: Path) -> None:
    host = opened(1)
    small = embedder()
    host.add("text encoder", *saved(small, tmp_path / "text.onnx"))
    host.denoise(loop_of(table(4, 1), schedule("h8h8")))
    ids = np.arange(2 * TOKENS, dtype=np.int64).reshape(2, TOKENS) % 11
    rows = onnx.numpy_helper.to_array(small.model.graph.initializer[0])
    assert np.array_equal(host.engine("text encoder").run({"input_ids": ids})["hidden_states"], rows[ids])
    assert host.resident == ("fp8",)


def test_closing_works_from_another_thread(opened: Opened, ort: FakeOrtCuda, fakes: Fakes) -> None:
    host = opened()
    host.denoise(loop_of(table(4, 1), schedule("h8h8")))
    with ThreadPoolExecutor(1) as new:
        new.submit(host.close).result()
    assert ort.alive() == []
    with pytest.raises(BackendError, match="were closed"):
        host.engine("fp16")


# Refusals


def test_an_onnx_runtime_without_the_provider_is_refused(fakes: Fakes) -> None:
    with pytest.raises(
        BackendError, match=r"needs CUDAExecutionProvider; the installed ONNX Runtime .*onnxruntime-gpu"
    ):
        open_host("onnxruntime", DEVICE)


def test_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeOrtCuda.install(monkeypatch, install(monkeypatch, gpus=0).cuda)
    with pytest.raises(BackendError, match="found no NVIDIA GPU"):
        open_host("onnxruntime", DEVICE)


def test_a_gpu_of_another_architecture_is_refused(opened: Opened, tmp_path: Path) -> None:
    host = opened()
    with pytest.raises(BackendError, match="was built for sm80 Other GPU; this GPU is sm90 Fake H200"):
        host.add("other", *saved(denoiser(9), tmp_path / "other.onnx", device="sm80 Other GPU"))


def test_operators_that_the_provider_lacks_are_named(opened: Opened, ort: FakeOrtCuda) -> None:
    ort.refused = {"Tanh", "ReduceMean"}
    with pytest.raises(BackendError) as caught:
        opened().engine("fp16").run(inputs_of(2))
    assert "engine fp16: CUDAExecutionProvider of ONNX Runtime" in str(caught.value)
    assert "has no kernel for 1 x ReduceMean, 1 x Tanh, and nothing may run on the CPU" in str(caught.value)
    assert "--backend torch" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_provider_that_cannot_start_says_what_is_missing(
    opened: Opened, ort: FakeOrtCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    ort.starts = False
    ort.preload_prints = "Failed to load libcublasLt.so.13: no such file\nPlease follow https://example.org"
    with pytest.raises(BackendError) as caught:
        opened().engine("fp16").run(inputs_of(2))
    assert "CUDAExecutionProvider cannot start (Failed to load libcublasLt.so.13: no such file); it needs" in str(
        caught.value
    )
    assert "cuDNN 9" in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (  # the form of onnxruntime-gpu 1.30
            "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:129 std::conditional_t<THRW, void, "
            f"onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE{', const char*' * 20}) [with ERRTYPE = cudaError]\n"
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=vm ; expr=cudaMalloc((void**)&p, size);",
            "CUDA failure 2: out of memory;",
        ),
        (
            f"Status Message: bfc_arena.cc:358 void* BFCArena::AllocateRawInternal({'size_t, ' * 60}bool) Failed to "
            "allocate memory for requested buffer of size 4096\nline two",
            "Failed to allocate memory for requested buffer of size 4096;",
        ),
    ],
)
def test_a_failure_at_run_time_is_one_line_and_leaves_the_host_usable(
    opened: Opened, ort: FakeOrtCuda, said: str, kept: str
) -> None:
    host = opened()
    loop = loop_of(table(4, 1), schedule("h8h8"))
    expected = host.denoise(loop)
    ort.run_error = RuntimeError(said)
    with pytest.raises(BackendError) as caught:
        host.denoise(loop)
    assert str(caught.value).startswith(f"engine fp16 failed to run: {kept}")
    assert str(caught.value).endswith(
        "; use a smaller batch, limit the resident engines, or end other processes on the GPU"
    )
    assert same_bits(host.denoise(loop), expected)


def test_a_file_that_is_no_graph_is_refused(opened: Opened, tmp_path: Path) -> None:
    host = opened()
    (tmp_path / "fp16.onnx").write_bytes(b"this is no graph\n" * 64)
    with pytest.raises(BackendError, match=r"engine fp16: ONNX Runtime .* cannot load .*fp16\.onnx"):
        host.engine("fp16").run(inputs_of(2))


def test_a_file_of_other_tensors_than_the_manifest_says_is_refused(opened: Opened, tmp_path: Path) -> None:
    host = opened()
    onnx.save(denoiser(0, "float32").model, tmp_path / "fp16.onnx")  # its memory would be bound at half its size
    with pytest.raises(BackendError, match=r"the file has inputs latents float32.*the manifest says latents float16"):
        host.engine("fp16").run(inputs_of(2))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"latents": np.zeros((2, CHANNELS, SIDE, SIDE + 1), np.float32)},
            r"input latents must have shape \[batch, 3, 4, 4\]",
        ),
        ({"timestep": np.zeros(3, np.float32)}, r"input timestep must have shape \[2\], received \[3\]"),
        ({"other": np.zeros(2, np.float32)}, "takes inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(opened: Opened, changed: Mapping[str, np.ndarray], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        opened().engine("fp16").run({**inputs_of(2), **changed})


# Bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """The tiny pipeline, built for (what is told to be) the GPU, at all precisions; do not write into it."""
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    folder = tmp_path_factory.mktemp("cuda")
    options = BuildOptions(
        DEFAULT_PRECISIONS, PROMPTS, num_steps=4, backend="onnxruntime", device="cuda", onnx_dir=folder / "onnx"
    )
    with pytest.MonkeyPatch.context() as patch:
        cuda = install(patch).cuda
        ort = FakeOrtCuda.install(patch, cuda)
        build(tiny_pipeline, folder / "bundle", options)
        assert cuda.leaks() == []
        assert ort.alive() == []
    return folder / "bundle"


def test_a_bundle_holds_the_exported_graphs_as_they_are(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    Bundle.open(bundle).verify()
    assert list(manifest.denoisers) == ["fp16", "fp8", "int8", "int4"]
    for name, entry in manifest.engines().items():
        assert (entry.backend, entry.device) == ("onnxruntime", DEVICE), name
        assert entry.file.sha256 == entry.onnx_sha256
        assert entry.sqnr_db > entry.sqnr_floor_db
    for name, entry in manifest.denoisers.items():
        assert sha256_file(bundle.parent / "onnx" / f"{name}.onnx") == entry.file.sha256
    assert not [path for path in (bundle / "engines").iterdir() if path.suffix != ".onnx"]


def test_the_manifest_counts_what_was_fused_and_what_was_not(bundle: Path) -> None:
    denoisers = Bundle.open(bundle).manifest.denoisers
    assert denoisers["int4"].lowering["MatMulNBits"] == 25
    assert "DequantizeLinear" not in denoisers["int4"].lowering
    for name in ("fp8", "int8"):
        assert denoisers[name].lowering["DequantizeLinear"] >= 33, name
        assert denoisers[name].lowering["QuantizeLinear"] == 13, name
    assert "QuantizeLinear" not in denoisers["fp16"].lowering


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_a_bundle_runs_in_the_device_loop(bundle: Path, limit: int | None, fakes: Fakes, ort: FakeOrtCuda) -> None:
    with DenoiseRuntime.load(bundle, resident_engines=limit) as runtime:
        conditioning, noise = runtime.encode(PROMPTS[:2]), runtime.noise([3, 4])
        plan = runtime.bundle.schedule("uniform:fp16").model_copy(
            update={"precisions": ("fp16", "int4", "int8", "fp8")}
        )
        found = runtime.denoise(conditioning, plan, noise)
        scale = runtime.manifest.sampling.guidance_scale
        loop = Loop(runtime.table, plan.precisions, conditioning.batch(scale), noise, scale)
        assert np.isfinite(found).all()
        assert same_bits(found, host_loop(loop, runtime.denoiser))
        assert runtime.decode(found).shape[0] == 2
    assert fakes.cuda.leaks() == []
    assert ort.alive() == []


def test_engines_agree_with_the_bundle_for_the_cpu(
    bundle: Path, tiny_pipeline: Path, tmp_path: Path, fakes: Fakes, ort: FakeOrtCuda
) -> None:
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    build(
        tiny_pipeline,
        tmp_path / "cpu",
        BuildOptions((Precision.FP16,), PROMPTS, num_steps=4, backend="onnxruntime", device="cpu"),
    )
    with DenoiseRuntime.load(tmp_path / "cpu") as cpu, DenoiseRuntime.load(bundle) as gpu:
        assert cpu.manifest.denoisers["fp16"].device == "cpu"
        conditioning, noise = cpu.encode(PROMPTS[:1]), cpu.noise([1])
        plan = cpu.bundle.schedule("uniform:fp16")
        expected = cpu.denoise(conditioning, plan, noise)
        found = gpu.denoise(conditioning, gpu.bundle.schedule("uniform:fp16"), noise)
    assert -10 * np.log10(np.square(found - expected).sum() / np.square(expected).sum()) > 40


def test_bench_times_the_steps_on_the_device(
    bundle: Path, fakes: Fakes, ort: FakeOrtCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    from tmpdiff_export.cli import main

    assert main(["bench", str(bundle), "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["fp16", "fp8", "int8", "int4"]
    assert result["machine"].startswith(f"{DEVICE}, onnxruntime ")
    assert result["batch"] == 2  # guidance
    assert all(row["median_ms"] > 0 for row in result["rows"])
    assert "25 x MatMulNBits" in result["rows"][3]["runs"]
    steps = result["loops"][0]["swaps"] + 1
    assert [(loop["precisions"], loop["resident_engines"]) for loop in result["loops"]] == [
        (f"fp16/{name}", None) for name in ("fp8", "int8", "int4")
    ]
    opened = len(ort.opened)
    assert main(["bench", str(bundle), "--rounds", "1", "--resident-engines", "1", "--json"]) == 0
    loops = json.loads(capsys.readouterr().out)["loops"]
    assert [(loop["swaps"], loop["resident_engines"]) for loop in loops] == [
        (swaps, limit) for _ in range(3) for limit in (None, 1) for swaps in (steps - 1, 1)
    ]
    # With room for one engine every swap of a mixed loop loads one: 3 pairs, 3 timed rounds at least.
    assert len(ort.opened) - opened > 3 * 3 * (steps - 1)


def test_the_command_lines_run_and_inspect_it(
    bundle: Path, tmp_path: Path, ort: FakeOrtCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines.cli import main as runtime_main
    from tmpdiff_export.cli import main

    arguments = ["run", str(bundle), "--prompt", PROMPTS[0], "--seed", "1", "--schedule", "uniform:int4"]
    arguments += ["--resident-engines", "1"]
    assert runtime_main([*arguments, "--out", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").stat().st_size > 0
    assert {Path(item.path).stem for item in ort.opened} == {"int4", "text_encoder", "vae_decoder"}
    assert main(["inspect", str(bundle)]) == 0
    assert "25 x MatMulNBits" in capsys.readouterr().out
    ort.refused = {"LayerNormalization"}
    assert runtime_main([*arguments, "--out", str(tmp_path / "other.png")]) == 1
    said = capsys.readouterr().err
    assert "has no kernel for" in said
    assert "x LayerNormalization" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "other.png").exists()


def test_a_miscomputed_engine_fails_the_build(
    tiny_pipeline: Path, tmp_path: Path, fakes: Fakes, ort: FakeOrtCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the arithmetic is right: the check of the build has to see it."""
    from fakes import fake_ort_cuda

    from engines.errors import BuildError
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    bind = fake_ort_cuda.Binding.bind_input

    def swapped(self: Any, name: str, *where: Any) -> None:
        bind(self, name, *where)
        if name == "encoder_attention_mask":  # reads the latents in its place
            *rest, _ = where
            self.real.bind_input(name, "cpu", 0, *rest[2:], self.spans["latents"][0])

    monkeypatch.setattr(fake_ort_cuda.Binding, "bind_input", swapped)
    options = BuildOptions((Precision.FP16,), PROMPTS, num_steps=4, backend="onnxruntime", device="cuda")
    with pytest.raises(BuildError, match="fp16: the built engine has an SQNR of"):
        build(tiny_pipeline, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_builds_that_cannot_be_are_refused_before_any_work(tmp_path: Path, fakes: Fakes) -> None:
    from tmpdiff_export.bundling.bundle import build
    from tmpdiff_export.bundling.options import BuildOptions

    for precisions, says in (
        ((Precision.FP16, Precision.NVFP4), "'onnxruntime' on a GPU has no nvfp4; choose from fp16, fp8, int8, int4"),
        ((Precision.FP16,), "needs CUDAExecutionProvider.*; --device cpu builds for this machine's CPU"),
    ):
        options = BuildOptions(precisions, PROMPTS, backend="onnxruntime", device="cuda")
        with pytest.raises(TmpDiffError, match=says):
            build(tmp_path / "no pipeline", tmp_path / "bundle", options)
    with pytest.raises(BackendError, match="--device is for the backends torch and onnxruntime; 'tensorrt'"):
        build(tmp_path, tmp_path / "bundle", BuildOptions((Precision.FP16,), PROMPTS, backend="tensorrt", device="cpu"))


def test_a_provider_that_cannot_start_is_refused_before_any_work(tmp_path: Path, ort: FakeOrtCuda) -> None:
    from tmpdiff_export.targets.onnxruntime.cuda import OnnxCudaTarget

    ort.starts = False
    with pytest.raises(
        BackendError,
        match=r"CUDAExecutionProvider cannot start \(ONNX Runtime's log line above says why\); it needs.*--device cpu builds for",
    ):
        OnnxCudaTarget((Precision.FP16,))
    ort.starts = True
    target = OnnxCudaTarget((Precision.FP16,))
    with pytest.raises(TmpDiffError, match=r"parameters take .* bytes in 16 bit, the GPU has"):
        target.require_memory(1 << 40)
