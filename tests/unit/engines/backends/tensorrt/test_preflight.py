"""What is refused before a TensorRT build starts, and what the refusal names."""

from __future__ import annotations

import pytest

from engines.backends.cuda.gpu import Gpu
from engines.backends.tensorrt.options import PlanOptions
from engines.backends.tensorrt.preflight import (
    LEAST_CAPABILITY,
    BuildEstimate,
    EngineMemory,
    buildable_precisions,
    require_build_memory,
    require_precision,
    require_runtime_memory,
    runtime_estimate,
)
from engines.backends.tensorrt.profiles import ShapeRange, profile
from engines.errors import BackendError, BuildError
from engines.manifest import TensorSpec
from engines.precision import Precision

GIB = 1 << 30
NEWEST = (11, 4)
DENOISER = (
    TensorSpec(name="latents", dtype="float16", shape=("batch", 4, "height", "width")),
    TensorSpec(name="timestep", dtype="float32", shape=("batch",)),
    TensorSpec(name="text", dtype="float16", shape=("batch", "text_length", 768)),
)
RANGES = {
    "batch": ShapeRange(2, 2, 8),
    "height": ShapeRange(32, 64, 128),
    "width": ShapeRange(32, 64, 96),
    "text_length": ShapeRange.parse("77"),
}


def gpu(capability: tuple[int, int], free_gib: float = 80, name: str = "NVIDIA Test") -> Gpu:
    return Gpu(0, name, capability, 80 * GIB, int(free_gib * GIB), "13.0")


# --- precision, compute capability, TensorRT version, hardware compatibility


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), ()),
        ((7, 5), ("fp16", "int8")),
        ((8, 0), ("fp16", "int8", "int4")),
        ((8, 6), ("fp16", "int8", "int4")),
        ((8, 9), ("fp16", "int8", "int4", "fp8")),
        ((9, 0), ("fp16", "int8", "int4", "fp8")),
        ((10, 0), ("fp16", "int8", "int4", "fp8", "nvfp4")),
        ((12, 0), ("fp16", "int8", "int4", "fp8", "nvfp4")),
    ],
)
def test_precisions_by_compute_capability(capability: tuple[int, int], expected: tuple[str, ...]) -> None:
    assert buildable_precisions(gpu(capability), PlanOptions()) == expected
    for precision in LEAST_CAPABILITY:
        if precision in expected:
            require_precision(precision, gpu(capability), NEWEST, PlanOptions())
        else:
            with pytest.raises(BackendError, match=precision):
                require_precision(precision, gpu(capability), NEWEST, PlanOptions())


def test_every_precision_of_the_project_has_a_rule() -> None:
    assert set(LEAST_CAPABILITY) == {precision.value for precision in Precision}


def test_a_refusal_names_the_gpu_and_what_would_work() -> None:
    with pytest.raises(BackendError) as caught:
        require_precision("fp8", gpu((8, 6), name="NVIDIA A10"), NEWEST, PlanOptions())
    assert str(caught.value) == (
        "precision fp8 needs compute capability 8.9 or newer; NVIDIA A10 has compute capability 8.6; "
        "choose fp16, int8, int4, or build on a GPU of 8.9 or newer"
    )
    with pytest.raises(BackendError, match="--backend onnxruntime"):
        require_precision("fp16", gpu((7, 0)), NEWEST, PlanOptions())
    with pytest.raises(BackendError, match=r"no precision 'w8a8'; choose from fp16, int8"):
        require_precision("w8a8", gpu((9, 0)), NEWEST, PlanOptions())


@pytest.mark.parametrize("capability", [(10, 3), (12, 1)])
def test_gpus_newer_than_the_library_are_refused(capability: tuple[int, int]) -> None:
    require_precision("fp16", gpu(capability), (10, 14), PlanOptions())
    with pytest.raises(BackendError, match=r"TensorRT 10\.13 does not support; install 10\.14 or newer"):
        require_precision("fp16", gpu(capability), (10, 13), PlanOptions())


def test_plans_for_ampere_and_newer_leave_out_what_ampere_cannot() -> None:
    options = PlanOptions(hardware_compatibility="ampere_plus")
    assert buildable_precisions(gpu((9, 0)), options) == ("fp16", "int8", "int4")
    with pytest.raises(
        BackendError, match=r"must run from 8\.0 on; choose fp16, int8, int4, or hardware compatibility same"
    ):
        require_precision("fp8", gpu((9, 0)), NEWEST, options)
    with pytest.raises(BackendError, match=r"needs a GPU of compute capability 8\.0 or newer to build on"):
        require_precision("fp16", gpu((7, 5)), NEWEST, options)
    require_precision("fp8", gpu((9, 0)), NEWEST, PlanOptions(hardware_compatibility="same_compute_capability"))


# --- options


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"builder_optimization_level": 6}, "choose from 0 to 5"),
        ({"builder_optimization_level": -1}, "choose from 0 to 5"),
        ({"workspace_bytes": 0}, "not positive"),
        ({"hardware_compatibility": "turing"}, "choose from none, ampere_plus, same_compute_capability"),
    ],
)
def test_options_outside_their_choices_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(BuildError, match=words):
        PlanOptions(**values)  # type: ignore[arg-type]


# --- profiles


def test_ranges_are_read_from_text() -> None:
    assert ShapeRange.parse("1:2:8") == ShapeRange(1, 2, 8)
    assert ShapeRange.parse("77") == ShapeRange(77, 77, 77)
    assert str(ShapeRange.parse("1:2:8")) == "1:2:8"


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4", "a", "1:-2:3", "1.5", "1: 2:3", "²"])
def test_malformed_ranges_are_refused(text: str) -> None:
    with pytest.raises(BuildError, match="malformed; expected MIN:OPT:MAX"):
        ShapeRange.parse(text)


@pytest.mark.parametrize("text", ["0", "2:1:4", "1:5:4"])
def test_unordered_ranges_are_refused(text: str) -> None:
    with pytest.raises(BuildError, match="1 <= MIN <= OPT <= MAX"):
        ShapeRange.parse(text)


def test_a_profile_puts_sizes_for_symbols() -> None:
    assert profile(DENOISER, RANGES) == {
        "latents": ((2, 4, 32, 32), (2, 4, 64, 64), (8, 4, 128, 96)),
        "timestep": ((2,), (2,), (8,)),
        "text": ((2, 77, 768), (2, 77, 768), (8, 77, 768)),
    }


def test_a_profile_takes_any_symbol() -> None:
    spec = TensorSpec(name="pixels", dtype="float32", shape=("views", 3))
    assert profile([spec], {"views": ShapeRange(1, 2, 3)}) == {"pixels": ((1, 3), (2, 3), (3, 3))}


def test_missing_and_useless_ranges_are_named() -> None:
    with pytest.raises(
        BuildError, match=r"no shape range was given for height, width; .* batch, height, width, text_length"
    ):
        profile(DENOISER, {"batch": RANGES["batch"], "text_length": RANGES["text_length"]})
    with pytest.raises(BuildError, match=r"given for frames, which no input has; .* batch, height, width, text_length"):
        profile(DENOISER, {**RANGES, "frames": ShapeRange(1, 1, 1)})


# --- memory


def test_a_build_that_fits_is_not_refused() -> None:
    require_build_memory({"fp16": BuildEstimate(24 * GIB, 8 * GIB)}, gpu((9, 0)), host_bytes=128 * GIB)
    require_build_memory({"fp16": BuildEstimate(24 * GIB, 8 * GIB)}, gpu((9, 0)), host_bytes=None)


def test_a_build_that_is_too_large_names_a_workspace_that_fits() -> None:
    estimates = {"fp16": BuildEstimate(20 * GIB, 8 * GIB), "int4": BuildEstimate(6 * GIB, 8 * GIB)}
    with pytest.raises(BuildError) as caught:
        require_build_memory(estimates, gpu((8, 9), free_gib=24), host_bytes=256 * GIB)
    assert str(caught.value) == (
        "building fp16 needs about 28.5 GiB of device memory (weights 20.0 GiB, workspace 8.0 GiB, builder 0.5 GiB) and "
        "NVIDIA Test has 24.0 GiB free; pass a workspace limit of at most 3584 MiB, or build only int4, or build on a "
        "host with more memory"
    )
    fitting = BuildEstimate(20 * GIB, 3584 << 20)
    require_build_memory({"fp16": fitting}, gpu((8, 9), free_gib=24), host_bytes=None)


def test_weights_that_never_fit_do_not_blame_the_workspace() -> None:
    with pytest.raises(BuildError) as caught:
        require_build_memory({"fp16": BuildEstimate(30 * GIB, GIB)}, gpu((8, 9), free_gib=24), host_bytes=None)
    assert "workspace limit" not in str(caught.value)


def test_a_build_may_lack_host_memory() -> None:
    with pytest.raises(
        BuildError, match=r"75\.0 GiB of host memory \(3 x weights 24\.0 GiB, .* 32\.0 GiB is available"
    ):
        require_build_memory({"fp16": BuildEstimate(24 * GIB, 0)}, gpu((9, 0)), host_bytes=32 * GIB)


ENGINES = {
    "fp16": EngineMemory(24 * GIB, 2 * GIB),
    "fp8": EngineMemory(12 * GIB, 3 * GIB),
    "int4": EngineMemory(6 * GIB, 1 * GIB),
}


def test_a_bundle_shares_one_scratch_and_limits_residents() -> None:
    assert runtime_estimate(ENGINES, GIB, None).device_bytes == (24 + 12 + 6 + 3 + 1) * GIB
    assert runtime_estimate(ENGINES, GIB, 2).device_bytes == (24 + 12 + 3 + 1) * GIB
    assert runtime_estimate(ENGINES, GIB, 9) == runtime_estimate(ENGINES, GIB, None)


def test_a_bundle_that_does_not_fit_names_the_residents_that_do() -> None:
    assert require_runtime_memory(ENGINES, GIB, None, gpu((9, 0), 46)).device_bytes == 46 * GIB
    with pytest.raises(BackendError, match=r"need about 46\.0 GiB .* has 45\.0 GiB free; pass --resident-engines 2"):
        require_runtime_memory(ENGINES, GIB, None, gpu((9, 0), 45))
    with pytest.raises(BackendError, match=r"pass --resident-engines 1$"):
        require_runtime_memory(ENGINES, GIB, 2, gpu((9, 0), 30))
    with pytest.raises(BackendError, match="build with weight streaming"):
        require_runtime_memory(ENGINES, GIB, 1, gpu((9, 0), 20))


def test_streamable_weights_make_room() -> None:
    streamable = {name: EngineMemory(e.weights_bytes, e.scratch_bytes, e.weights_bytes) for name, e in ENGINES.items()}
    with pytest.raises(BackendError, match="--resident-engines 1 and a weight streaming budget"):
        require_runtime_memory(streamable, GIB, None, gpu((9, 0), 8))
