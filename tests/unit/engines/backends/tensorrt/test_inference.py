"""One call of a plan, and plans, hosts and loops that are refused.

TensorRT and CUDA are fakes (see `fakes`): what a real GPU computes, needs and takes in time is not shown here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.cuda_enums import cudaError_t
from fakes.install import Fakes, install
from helpers.small_loops import Opened, loop_of, same_bits, schedule
from helpers.small_plans import CHANNELS, SEEDS, SIDE, TOKENS, WIDTH, denoiser, entry, inputs, table

from engines.errors import BackendError
from engines.loop import Loop, host_loop


def test_an_engine_takes_either_floating_type_and_returns_float32(opened: Opened) -> None:
    engine = opened().engine("fp16")
    given = inputs()
    half = {name: values.astype(np.float16) for name, values in given.items()}
    result = engine.run(given)["model_output"]
    assert result.dtype == np.float32
    assert result.shape == given["latents"].shape
    assert same_bits(engine.run(half)["model_output"], result)
    reference = np.tanh(
        given["latents"] * denoiser_weight() + given["hidden_states"].mean((1, 2)).reshape(-1, 1, 1, 1) + 0.5
    )
    np.testing.assert_allclose(result, reference, atol=5e-3)


def denoiser_weight() -> np.ndarray:
    return np.random.default_rng(SEEDS["fp16"]).standard_normal((1, CHANNELS, 1, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given.pop("timestep"), r"takes inputs \['hidden_states', 'latents', 'timestep'\], received"),
        (lambda given: given.update(other=np.zeros(2, np.float32)), "received .*'other'"),
        (lambda given: given.update(timestep=np.zeros(2, np.int64)), "input timestep must be float32, received int64"),
        (lambda given: given.update(inputs(5)), r"\(5, 3, 4, 4\), optimization profile 0 takes \(1, 3, 4, 4\) to \(4, 3, 4, 4\)"),
        (lambda given: given.update(hidden_states=np.zeros((1, TOKENS, WIDTH), np.float16)), "dimension batch"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(opened: Opened, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    engine = opened().engine("fp16")
    given = inputs()
    change(given)
    with pytest.raises(BackendError, match=words):
        engine.run(given)
    assert engine.run(inputs())["model_output"].shape == (2, CHANNELS, SIDE, SIDE)


def test_a_failed_inference_is_over_before_its_engine_gives_way(opened: Opened, fakes: Fakes) -> None:
    host = opened(1)
    expected = opened().engine("fp8").run(inputs())["model_output"]
    engine = host.engine("fp16")
    fakes.cuda.fail("cudaMemcpyAsync", cudaError_t.cudaErrorInvalidValue, nth=4)  # the download
    with pytest.raises(BackendError, match="invalid argument"):
        engine.run(inputs())
    assert same_bits(host.engine("fp8").run(inputs())["model_output"], expected)


def test_a_plan_file_can_be_opened_and_timed_by_itself(fakes: Fakes, tmp_path: Path) -> None:
    from engines.backends.cuda.timing import latency_ms
    from engines.backends.tensorrt.host import open_engine
    from engines.backends.tensorrt.profiling import layer_times

    _, path = entry(fakes, denoiser(0), tmp_path, "alone")
    with open_engine(path, version_compatible=False) as (engine, plan):
        shapes = {name: values.shape for name, values in inputs().items()}
        before = engine.run(inputs())["model_output"]
        times = layer_times(engine, plan, shapes)
        layer_ms = fakes.settings.layer_ms["FP16"]
        assert len(times) >= 4
        assert max(times.values()) == pytest.approx(max(fakes.settings.layer_ms["FP32"], layer_ms))
        assert latency_ms(engine, shapes) > 0
        assert same_bits(engine.run(inputs())["model_output"], before)
        with pytest.raises(BackendError, match="takes inputs"):
            latency_ms(engine, {"latents": (1, 2)})
    assert fakes.cuda.leaks() == []


# Refusals


def test_without_a_gpu_no_runtime_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, gpus=0)
    from engines.backends.tensorrt.host import open_engine, tensorrt_host

    with pytest.raises(BackendError, match="found no NVIDIA GPU"):
        tensorrt_host()
    with pytest.raises(BackendError, match="found no NVIDIA GPU"), open_engine(tmp_path, version_compatible=True):
        pass


def test_host_code_runs_only_for_plans_that_say_they_have_it(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(names=())
    small = denoiser(0)
    host.add("fp16", *entry(fakes, small, tmp_path, "said", flags=("VERSION_COMPATIBLE",)))
    host.add("fp8", *entry(fakes, small, tmp_path, "unsaid", flags=("VERSION_COMPATIBLE",), version_compatible=False))
    host.engine("fp16")
    with pytest.raises(BackendError, match="host code"):
        host.engine("fp8")


def test_the_lean_runtime_runs_version_compatible_plans_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fakes = install(monkeypatch)
    entries = [
        entry(fakes, denoiser(0), tmp_path, "portable", flags=("VERSION_COMPATIBLE",)),
        entry(fakes, denoiser(0), tmp_path, "bound"),
    ]
    fakes = install(monkeypatch, lean=True)
    from engines.backends.tensorrt.host import tensorrt_host

    host = tensorrt_host()
    host.add("fp16", *entries[0])
    assert host.engine("fp16").run(inputs())["model_output"].shape == (2, CHANNELS, SIDE, SIDE)
    with pytest.raises(BackendError, match="only the lean runtime is installed"):
        host.add("fp8", *entries[1])
    host.close()
    assert fakes.cuda.leaks() == []


@pytest.mark.parametrize(
    ("capability", "compatibility", "runs"),
    [((8, 9), "none", False), ((8, 9), "ampere_plus", True), ((8, 9), "same_compute_capability", False), ((7, 5), "ampere_plus", False)],
)  # fmt: skip
def test_a_plan_for_other_gpus_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], compatibility: str, runs: bool
) -> None:
    built, path = entry(install(monkeypatch), denoiser(0), tmp_path, "x", hardware_compatibility=compatibility)
    install(monkeypatch, compute_capability=capability, name="Fake L4")
    from engines.backends.tensorrt.host import tensorrt_host

    host = tensorrt_host()
    if runs:
        host.add("fp16", built, path)
    else:
        with pytest.raises(BackendError, match=r"sm90 Fake H200 .* this GPU is sm\d\d Fake L4"):
            host.add("fp16", built, path)
    host.close()


def test_a_stripped_plan_is_refused(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(names=())
    host.add("fp16", *entry(fakes, denoiser(0, weights=128), tmp_path, "x", flags=("STRIP_PLAN",)))
    with pytest.raises(BackendError, match="stripped plan"):
        host.engine("fp16")


def test_an_altered_plan_ends_in_tensorrts_words(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    host = opened(names=())
    built, path = entry(fakes, denoiser(0), tmp_path, "x")
    path.write_bytes(path.read_bytes()[:-1])
    host.add("fp16", built, path)
    with pytest.raises(BackendError, match=r"cannot load engine fp16 .*truncated or corrupt"):
        host.engine("fp16")
    path.write_bytes(b"")
    with pytest.raises(BackendError, match="cannot be read"):
        host.engine("fp16")


def test_a_manifest_without_the_plans_description_is_refused(fakes: Fakes, opened: Opened, tmp_path: Path) -> None:
    built, path = entry(fakes, denoiser(0), tmp_path, "x")
    with pytest.raises(BackendError, match="does not describe its TensorRT plan"):
        opened(names=()).add("fp16", built.model_copy(update={"plan": None}), path)


def test_a_plan_that_takes_another_type_than_the_manifest_says_is_refused(
    fakes: Fakes, opened: Opened, tmp_path: Path
) -> None:
    built, path = entry(fakes, denoiser(0), tmp_path, "x")
    single = tuple(spec.model_copy(update={"dtype": "float32"}) for spec in built.inputs)
    host = opened(names=())
    host.add("fp16", built.model_copy(update={"inputs": single}), path)
    with pytest.raises(BackendError, match="hidden_states as float16, which its manifest entry does not say"):
        host.denoise(loop_of(table(2, 1), schedule("hh")))


def test_weights_are_streamed_where_the_plan_says_so(
    fakes: Fakes, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 1000
    monkeypatch.setattr(fakes.tensorrt.ICudaEngine, "get_weight_streaming_automatic_budget", lambda self: budget)
    host = opened(names=())
    small = denoiser(0, weights=1 << 16)
    host.add("fp16", *entry(fakes, small, tmp_path, "streamed", flags=("WEIGHT_STREAMING",)))
    host.add("fp8", *entry(fakes, small, tmp_path, "kept", flags=("WEIGHT_STREAMING",), weight_streaming=False))
    assert host.engine("fp16").plan.engine.weight_streaming_budget_v2 == budget
    assert host.engine("fp8").plan.engine.weight_streaming_budget_v2 > 1 << 17
    loop = loop_of(table(3, 1), schedule("h8h"))
    assert same_bits(host.denoise(loop), host_loop(loop, host.engine))


def test_an_error_that_is_kept_does_not_keep_device_memory(
    opened: Opened, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes.tensorrt.IExecutionContext, "set_input_shape", lambda *_: False)
    host = opened(names=("fp16",))
    with pytest.raises(BackendError, match="engine fp16: TensorRT refuses the shapes") as failure:
        host.engine("fp16").run(inputs())
    host.close()
    assert fakes.cuda.leaks() == []
    assert failure.value.__traceback__ is not None


@pytest.mark.parametrize(
    ("loop", "error", "words"),
    [
        (loop_of(table(2, 1), ("fp16", "fp4")), BackendError, "no engine 'fp4' was added; there are fp16"),
        (loop_of(table(2, 1), schedule("hhh")), ValueError, "3 precisions for a table of 2 steps"),
        (loop_of(table(2, 1), schedule("hh"), samples=3), BackendError, "optimization profile 0 takes"),
    ],
)
def test_loops_that_cannot_run_are_refused(opened: Opened, loop: Loop, error: type[Exception], words: str) -> None:
    host = opened(names=("fp16",))
    with pytest.raises(error, match=words):
        host.denoise(loop)
    good = loop_of(table(2, 1), schedule("hh"))
    assert same_bits(host.denoise(good), host_loop(good, host.engine))


def test_other_conditioning_than_the_engine_takes_is_named(opened: Opened) -> None:
    loop = loop_of(table(2, 1), schedule("hh"))
    with pytest.raises(BackendError, match=r"takes inputs .*'hidden_states'.* received .*'pooled'"):
        opened().denoise(
            Loop(loop.table, loop.precisions, {"pooled": loop.conditioning["hidden_states"]}, loop.noise, 4.5)
        )


def test_a_closed_host_says_so(opened: Opened) -> None:
    host = opened()
    engine = host.engine("fp16")
    host.close()
    for call in (
        lambda: host.engine("fp16"),
        lambda: engine.run(inputs()),
        lambda: host.denoise(loop_of(table(1, 1), ("fp16",))),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_a_limit_below_one_is_refused(fakes: Fakes) -> None:
    from engines.backends.tensorrt.host import tensorrt_host

    with pytest.raises(ValueError, match="resident_engines is 0"):
        tensorrt_host(resident_engines=0)
