"""Refusals before any work: precision against GPU, and memory estimates for the build and for the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.backends.cuda.gpu import Gpu
from engines.backends.tensorrt.options import PlanOptions
from engines.errors import BackendError, BuildError

_GIB = 1 << 30

# Least compute capability per precision. FP16 and INT8: TensorRT 10.5 dropped everything before Turing, and its
# kernels take INT8 from Turing on. INT4 (weight-only): "Ampere and later" in Model Optimizer's support matrix.
# FP8: Ada; older GPUs end the build with "Networks with FP8 Q/DQ layers require hardware with FP8 support".
# NVFP4: Blackwell. All of them have been in TensorRT since 10.8, before the oldest version this code supports.
LEAST_CAPABILITY = {"fp16": (7, 5), "int8": (7, 5), "int4": (8, 0), "fp8": (8, 9), "nvfp4": (10, 0)}
# TensorRT 10.14's release notes add GB300 and B300 (10.3) and DGX Spark (12.1); older versions do not know them.
LEAST_TENSORRT = {(10, 3): (10, 14), (12, 1): (10, 14)}
_AMPERE = (8, 0)

# The builder loads its kernel library: TensorRT 10.8 on Blackwell logs "Init builder kernel library: CPU +3102,
# GPU +488 (MiB)", the largest seen in public logs.
BUILDER_HOST_BYTES = 3 * _GIB
BUILDER_DEVICE_BYTES = _GIB // 2
# TensorRT's guide: at least two copies of the weights in host memory while building (network and engine), and
# temporary ones where weights are combined; the serialized plan is the third copy for certain.
HOST_WEIGHT_COPIES = 3


def require_precision(precision: str, gpu: Gpu, version: tuple[int, int], options: PlanOptions) -> None:
    """Refuses a precision that this GPU, TensorRT version or hardware compatibility cannot have.

    Args:
        precision: a key of `LEAST_CAPABILITY`.
        gpu: the GPU that the plan is built on.
        version: TensorRT's major and minor.
        options: of them, `hardware_compatibility` matters.

    Raises:
        BackendError: naming the precisions that would work.
    """
    if precision not in LEAST_CAPABILITY:
        raise BackendError(f"TensorRT builds no precision {precision!r}; choose from {', '.join(LEAST_CAPABILITY)}")
    if version < (needed := LEAST_TENSORRT.get(gpu.compute_capability, version)):
        raise BackendError(
            f"{_described(gpu)}, which TensorRT {_dotted(version)} does not support; install {_dotted(needed)} or newer"
        )
    if options.hardware_compatibility == "ampere_plus" and gpu.compute_capability < _AMPERE:
        raise BackendError(
            f"hardware compatibility ampere_plus needs a GPU of compute capability {_dotted(_AMPERE)} or newer to build on; "
            f"{_described(gpu)}; choose none or same_compute_capability"
        )
    able = buildable_precisions(gpu, options)
    if precision in able:
        return
    least = LEAST_CAPABILITY[precision]
    if gpu.compute_capability >= least:
        raise BackendError(
            f"precision {precision} needs compute capability {_dotted(least)}, and a plan with hardware compatibility "
            f"ampere_plus must run from {_dotted(_AMPERE)} on; choose {', '.join(able)}, or hardware compatibility "
            "same_compute_capability or none"
        )
    raise BackendError(
        f"precision {precision} needs compute capability {_dotted(least)} or newer; {_described(gpu)}; "
        + (f"choose {', '.join(able)}" if able else "TensorRT does not run on this GPU, use --backend onnxruntime")
        + f", or build on a GPU of {_dotted(least)} or newer"
    )


def buildable_precisions(gpu: Gpu, options: PlanOptions) -> tuple[str, ...]:
    """The precisions that can be built on `gpu` with these options."""
    # A plan for every Ampere GPU and newer must run on the oldest of them.
    oldest = _AMPERE if options.hardware_compatibility == "ampere_plus" else gpu.compute_capability
    capability = min(oldest, gpu.compute_capability)
    return tuple(name for name, least in LEAST_CAPABILITY.items() if capability >= least)


@dataclass(frozen=True)
class BuildEstimate:
    """Memory that building one plan takes; an estimate from rules, not a measurement.

    Attributes:
        weights_bytes: size of the ONNX file and its external data.
        workspace_bytes: the workspace limit; 0 without one, as TensorRT then makes do with what is free.
    """

    weights_bytes: int
    workspace_bytes: int

    @property
    def device_bytes(self) -> int:
        """One copy of the weights, the workspace and the builder's kernels."""
        return self.weights_bytes + self.workspace_bytes + BUILDER_DEVICE_BYTES

    @property
    def host_bytes(self) -> int:
        """Three copies of the weights (network, engine, plan) and the builder's kernels."""
        return HOST_WEIGHT_COPIES * self.weights_bytes + BUILDER_HOST_BYTES


def require_build_memory(estimates: Mapping[str, BuildEstimate], gpu: Gpu, host_bytes: int | None) -> None:
    """Refuses builds that cannot fit, before any work.

    Args:
        estimates: by precision.
        gpu: its free memory counts.
        host_bytes: available host memory, None where the system does not tell.

    Raises:
        BuildError: naming the precisions or the workspace limit that would fit.
    """
    for precision, estimate in estimates.items():
        if estimate.device_bytes > gpu.free_bytes:
            have = f"{gpu.name} has {_size(gpu.free_bytes)} free"
            need = (
                f"{_size(estimate.device_bytes)} of device memory (weights {_size(estimate.weights_bytes)}, "
                f"workspace {_size(estimate.workspace_bytes)}, builder {_size(BUILDER_DEVICE_BYTES)})"
            )
            spare = gpu.free_bytes - estimate.weights_bytes - BUILDER_DEVICE_BYTES
            ways = [f"pass a workspace limit of at most {spare >> 20} MiB"] if spare >> 20 > 0 else []
            fitting = [name for name, other in estimates.items() if other.device_bytes <= gpu.free_bytes]
        elif host_bytes is not None and estimate.host_bytes > host_bytes:
            have = f"{_size(host_bytes)} is available"
            need = (
                f"{_size(estimate.host_bytes)} of host memory ({HOST_WEIGHT_COPIES} x weights "
                f"{_size(estimate.weights_bytes)}, builder {_size(BUILDER_HOST_BYTES)})"
            )
            ways = []
            fitting = [name for name, other in estimates.items() if other.host_bytes <= host_bytes]
        else:
            continue
        if fitting:
            ways.append(f"build only {', '.join(fitting)}")
        ways.append("build on a host with more memory")
        raise BuildError(f"building {precision} needs about {need} and {have}; {', or '.join(ways)}")


@dataclass(frozen=True)
class EngineMemory:
    """What one engine of a bundle takes on the GPU, as its plan says.

    Attributes:
        weights_bytes: its weights.
        scratch_bytes: one execution context at the largest shapes of any optimization profile.
        streamable_bytes: the part of the weights that can stay in host memory; 0 without weight streaming.
    """

    weights_bytes: int
    scratch_bytes: int
    streamable_bytes: int = 0


@dataclass(frozen=True)
class RuntimeEstimate:
    """What a bundle takes on the GPU: engines share one scratch, and only some are resident.

    Attributes:
        weights_bytes: weights of the resident engines, the largest ones where not all are.
        scratch_bytes: the largest scratch of any engine.
        io_bytes: input and output buffers at the largest shapes.
    """

    weights_bytes: int
    scratch_bytes: int
    io_bytes: int

    @property
    def device_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.scratch_bytes + self.io_bytes


def runtime_estimate(engines: Mapping[str, EngineMemory], io_bytes: int, resident: int | None) -> RuntimeEstimate:
    """The memory of a bundle with at most `resident` engines on the GPU, None for all of them."""
    largest_first = sorted((engine.weights_bytes for engine in engines.values()), reverse=True)
    return RuntimeEstimate(
        sum(largest_first[:resident]), max((engine.scratch_bytes for engine in engines.values()), default=0), io_bytes
    )


def require_runtime_memory(
    engines: Mapping[str, EngineMemory], io_bytes: int, resident: int | None, gpu: Gpu
) -> RuntimeEstimate:
    """Refuses a bundle that does not fit on `gpu`.

    Returns:
        The estimate it was judged by.

    Raises:
        BackendError: naming the number of resident engines that fits, or what else would.
    """
    estimate = runtime_estimate(engines, io_bytes, resident)
    if estimate.device_bytes <= gpu.free_bytes:
        return estimate
    counts = range(min(resident or len(engines), len(engines)) - 1, 0, -1)
    fitting = [n for n in counts if runtime_estimate(engines, io_bytes, n).device_bytes <= gpu.free_bytes]
    if fitting:
        way = f"pass --resident-engines {fitting[0]}"
    elif all(
        engine.weights_bytes - engine.streamable_bytes + estimate.scratch_bytes + io_bytes <= gpu.free_bytes
        for engine in engines.values()
    ):
        way = "pass --resident-engines 1 and a weight streaming budget"
    else:
        way = "build with weight streaming or a smaller largest shape, or use a GPU with more memory"
    raise BackendError(
        f"the engines {', '.join(engines)} need about {_size(estimate.device_bytes)} of device memory (resident weights "
        f"{_size(estimate.weights_bytes)}, scratch {_size(estimate.scratch_bytes)}, inputs and outputs {_size(io_bytes)}) "
        f"and {gpu.name} has {_size(gpu.free_bytes)} free; {way}"
    )


def _described(gpu: Gpu) -> str:
    return f"{gpu.name} has compute capability {_dotted(gpu.compute_capability)}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB // 10 else f"{count / (1 << 20):.1f} MiB"
