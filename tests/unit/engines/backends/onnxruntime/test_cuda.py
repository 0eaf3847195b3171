"""ONNX Runtime's CUDA provider: the device loop, what sessions are asked for, refusals.

There is no GPU here. CUDA is a fake, and so is the provider (`fakes.fake_ort_cuda`): real sessions, optimizers and I/O
binding, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from fakes.fake_ort_cuda import FakeOrtCuda
from fakes.install import Fakes, install
from helpers.provider_graphs import DEVICE, saved
from helpers.small_loops import Opened, loop_of, same_bits, schedule
from helpers.small_plans import CHANNELS, SIDE, TOKENS, denoiser, embedder, inputs, table

from engines.backends.choose import open_host
from engines.errors import BackendError
from engines.loop import host_loop

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
        given = inputs(rows)
        kept = {name: values.astype(np.float16) for name, values in given.items() if name != "timestep"}
        expected = on_cpu.run({**given, **kept})["model_output"]
        found = engine.run(given)["model_output"]
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


def test_a_picture_size_is_a_set_of_sizes_too(opened: Opened, ort: FakeOrtCuda, tmp_path: Path) -> None:
    host = opened()
    for name, seed in (("one", 1), ("two", 2)):
        host.add(name, *saved(denoiser(seed, any_size=True), tmp_path / f"{name}.onnx"))
    for size in ((4, 4), (6, 10), (4, 4)):
        whole = [host.engine(name).run(inputs(2, size))["model_output"] for name in ("one", "two", "one")]
        assert same_bits(whole[0], whole[2])
        assert whole[0].shape == (2, CHANNELS, *size)
        # What engines of this kind had last is what the next one opens at.
        rows = [host.engine("one").run({**inputs(2, size), "latents": inputs(2, size)["latents"][::-1]})]
        assert rows[0]["model_output"].shape == whole[0].shape
    given = [tuple(item.options.sizes.items()) for item in ort.opened]
    assert set(given) == {
        (("batch", 2), ("height", 4), ("width", 4)),
        (("batch", 2), ("height", 6), ("width", 10)),
    }
    fixed = opened().engine("fp16")
    with pytest.raises(BackendError, match=r"must have shape \[batch, 3, 4, 4\], received \[2, 3, 6, 10\]"):
        fixed.run(inputs(2, (6, 10)))


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
    host.engine("fp16").run(inputs(2))
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
        opened().engine("fp16").run(inputs(2))
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
        opened().engine("fp16").run(inputs(2))
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
    with pytest.raises(BackendError, match=r"engine fp16: cannot load .*fp16\.onnx: as an ONNX file it is malformed"):
        host.engine("fp16").run(inputs(2))
    (tmp_path / "fp16.onnx").write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
    with pytest.raises(BackendError, match=r"engine fp16: ONNX Runtime .* cannot load .*fp16\.onnx"):
        host.engine("fp16").run(inputs(2))


def test_a_file_of_other_tensors_than_the_manifest_says_is_refused(opened: Opened, tmp_path: Path) -> None:
    host = opened()
    onnx.save(denoiser(0, "float32").model, tmp_path / "fp16.onnx")  # its memory would be bound at half its size
    with pytest.raises(BackendError, match=r"the file has inputs latents float32.*the manifest says latents float16"):
        host.engine("fp16").run(inputs(2))


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
        opened().engine("fp16").run({**inputs(2), **changed})
