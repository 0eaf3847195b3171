"""Memory and disk that a build will take, by rules, against what there is: refused before the work, with the numbers."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines.backends.tensorrt.preflight import BuildEstimate
from engines.errors import BackendError, BuildError
from engines.precision import BITS_PER_WEIGHT, REFERENCE, Precision
from tmpdiff_export.bundling.preflight import existing_folder
from tmpdiff_export.memory import host_available_bytes, size_text
from tmpdiff_export.quantization.recipes import RECIPES

_GIB = 1 << 30
LIBRARY_BYTES = 2 * _GIB
"""A process with torch, diffusers and a compiler."""
COMPILER_BYTES = _GIB // 2
"""One of the processes that compile a GPU's kernels; 16 of them had 7.4 GB beside their parents at FLUX.1-dev's size."""
WORKSPACE_BYTES = 2 * _GIB
"""On a GPU: kernels, and what a compiler tries."""
CACHE_BYTES = _GIB // 2
"""Of torch's compiler, an engine."""
# Tensors of an activation's size that are alive at once.
_DENOISER_TENSORS = 8
_DECODER_TENSORS, _DECODER_CHANNELS = 6, 128
# Side of the largest layer to that of most, both as squares: 6869 to 3072 and more in FLUX.1.
_LARGEST_SIDE_TO_MEAN = 2


@dataclass(frozen=True)
class BuildSize:
    """What the estimate of a build is made of.

    Attributes:
        backend: resolved.
        device: what the engines are for, "cpu" or "cuda".
        range_device: where the pipeline runs in float32, "cpu" or "cuda".
        precisions: engines of the denoiser.
        parameters: of the denoiser.
        component_parameters: of text encoders and VAE decoder together.
        largest_layer: parameters of the largest layer of any of them.
        activation_bytes: see `activation_bytes`.
        workers: processes that make engines side by side.
        keeps_onnx: whether `--onnx-dir` receives the graphs and their weights.
        compiler_processes: that torch starts for a GPU's kernels, of all workers together.
    """

    backend: str
    device: str
    range_device: str
    precisions: tuple[Precision, ...]
    parameters: int
    component_parameters: int
    largest_layer: int
    activation_bytes: int
    workers: int = 1
    keeps_onnx: bool = False
    compiler_processes: int = 0


@dataclass(frozen=True)
class Available:
    """What there is.

    Attributes:
        host_bytes: memory that this process may still take, None where the system does not tell.
        gpu_bytes: free memory of the GPU, None without one.
        disk_bytes: free where the bundle is made, and what finished stages of the same build have there already.
        onnx_bytes: free where `--onnx-dir` lies; None where that is the same file system.
    """

    host_bytes: int | None
    gpu_bytes: int | None
    disk_bytes: int
    onnx_bytes: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What a build takes; each in bytes, by what it is for.

    Attributes:
        host: memory; all at once.
        gpu: memory; one after the other. Empty where nothing runs on a GPU.
        disk: beside the bundle, its stages included; they are the same files.
        onnx: in `--onnx-dir`.
    """

    host: Mapping[str, int]
    gpu: Mapping[str, int]
    disk: Mapping[str, int]
    onnx: Mapping[str, int]

    @property
    def host_bytes(self) -> int:
        """Peak."""
        return sum(self.host.values())

    @property
    def gpu_bytes(self) -> int:
        """Peak; 0 where nothing runs on a GPU."""
        return max(self.gpu.values(), default=0)

    @property
    def disk_bytes(self) -> int:
        """Most at a time."""
        return sum(self.disk.values())

    @property
    def onnx_bytes(self) -> int:
        """All of it; 0 where nothing is kept."""
        return sum(self.onnx.values())

    def described(self, available: Available) -> str:
        """One line for the user."""
        found: list[tuple[str, int, int | None]] = [("host memory", self.host_bytes, available.host_bytes)]
        if self.gpu:
            found.append(("GPU memory", self.gpu_bytes, available.gpu_bytes))
        disk = self.disk_bytes + (self.onnx_bytes if available.onnx_bytes is None else 0)
        found.append(("disk", disk, available.disk_bytes))
        if self.onnx and available.onnx_bytes is not None:
            found.append(("disk of --onnx-dir", self.onnx_bytes, available.onnx_bytes))
        parts = [
            f"{what} {size_text(need)}" + ("" if have is None else f" (of {size_text(have)})")
            for what, need, have in found
        ]
        return f"estimate: {', '.join(parts)}"


def activation_bytes(tokens: int, samples: int, largest_layer: int, height: int, width: int) -> int:
    """Float32 activations of the larger of two: a call of the denoiser, and the VAE decoder at full resolution.

    Args:
        tokens: positions that the denoiser computes on, those of the text included.
        samples: of its largest call.
        largest_layer: its parameters; the root stands for the width of a row.
        height: of a picture, in pixels.
        width: the same.
    """
    denoiser = _DENOISER_TENSORS * samples * tokens * math.isqrt(largest_layer) * 4
    return max(denoiser, _DECODER_TENSORS * _DECODER_CHANNELS * height * width * 4)


def estimate(size: BuildSize) -> Estimate:
    """What a build of this size takes. Rules, not measurements: see the names of the parts."""
    largest_engine = max(size.parameters, size.component_parameters)
    at_once = min(size.workers, len(size.precisions) + 2)
    host = {
        "libraries": LIBRARY_BYTES * (1 if size.workers == 1 else 1 + at_once),
        "a layer in FP32, four times": 4 * 4 * size.largest_layer,
        # The models that are run for the ranges go before an engine of their size is made.
        "engines, or the models beside the denoiser": max(
            _engine_host_bytes(size, largest_engine) * at_once, 2 * size.component_parameters
        ),
    }
    if size.compiler_processes:
        host["the compiler's processes"] = COMPILER_BYTES * size.compiler_processes
    gpu = {}
    if size.range_device == "cuda":
        gpu["16-bit weights, a layer in FP32 and activations"] = (
            2 * largest_engine + 4 * size.largest_layer + size.activation_bytes
        )
    else:
        host["activations"] = size.activation_bytes
    if size.device == "cuda":
        gpu["engines"] = (2 * largest_engine + WORKSPACE_BYTES) * at_once
    tried = {item: _variant_bytes(size, item) for item in size.precisions}
    stored = {item: max(counts) for item, counts in tried.items()}
    components = 2 * size.component_parameters
    disk = {"text encoders and VAE decoder": components, **{item.value: count for item, count in stored.items()}}
    trials = max(sum(counts) - max(counts) for counts in tried.values())
    if trials > 0:
        disk["variants on trial"] = trials
    if size.backend == "tensorrt":  # plans have weights in them
        disk["the backend's own layout"] = sum(stored.values()) + components
    if size.backend == "torch":
        disk["compiler's cache"] = CACHE_BYTES * (len(size.precisions) + 2)
    kept = {"ONNX graphs and their weights": sum(stored.values())} if size.keeps_onnx else {}
    return Estimate(host, gpu, disk, kept)


def require_fit(size: BuildSize, available: Available) -> Estimate:
    """Refuses a build that does not fit.

    Returns:
        The estimate it was judged by.

    Raises:
        BuildError: the numbers, and what would fit.
    """
    needs = estimate(size)
    onnx_here = available.onnx_bytes is None

    def disk(found: Estimate) -> int:
        return found.disk_bytes + (found.onnx_bytes if onnx_here else 0)

    parts = {**needs.disk, **(needs.onnx if onnx_here else {})}
    fewer = [("a build without --onnx-dir", replace(size, keeps_onnx=False))] if size.keeps_onnx else []
    _require(size, ("disk", disk, parts), available.disk_bytes, [*fewer, *_fewer_precisions(size)])
    if available.onnx_bytes is not None:
        onnx = ("disk in --onnx-dir", lambda found: found.onnx_bytes, needs.onnx)
        _require(size, onnx, available.onnx_bytes, [*fewer, *_fewer_precisions(size)])
    alone = [("--workers 1", replace(size, workers=1))] if size.workers > 1 else []
    elsewhere = {"cpu": "cuda", "cuda": "cpu"}[size.range_device]
    ranges = [(f"--range-device {elsewhere}", replace(size, range_device=elsewhere))]
    if available.host_bytes is not None:
        on_gpu = ranges if elsewhere == "cuda" and available.gpu_bytes else []
        _require(
            size, ("host memory", lambda found: found.host_bytes, needs.host), available.host_bytes, alone + on_gpu
        )
    if available.gpu_bytes is not None:
        on_cpu = ranges if elsewhere == "cpu" else []
        _require(size, ("GPU memory", lambda found: found.gpu_bytes, needs.gpu), available.gpu_bytes, alone + on_cpu)
    return needs


def find_available(out: Path, onnx_dir: Path | None, kept_bytes: int = 0) -> Available:
    """What there is here.

    Args:
        out: the bundle to make.
        onnx_dir: of the build.
        kept_bytes: of finished stages, which need not be written again.
    """
    beside = existing_folder(out.parent)
    onnx = None if onnx_dir is None else existing_folder(onnx_dir)
    apart = onnx is not None and os.stat(onnx).st_dev != os.stat(beside).st_dev
    return Available(
        host_bytes=host_available_bytes(),
        gpu_bytes=_gpu_free_bytes(),
        disk_bytes=shutil.disk_usage(beside).free + kept_bytes,
        onnx_bytes=shutil.disk_usage(onnx).free if onnx is not None and apart else None,
    )


def _gpu_free_bytes() -> int | None:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    from engines.backends.cuda.gpu import current_gpu  # as for TensorRT beside a torch for CPUs

    try:
        return current_gpu().free_bytes
    except BackendError:
        return None


def _engine_host_bytes(size: BuildSize, parameters: int) -> int:
    """What one engine takes of the host's memory while it is made and checked."""
    if size.backend == "tensorrt":
        return BuildEstimate(2 * parameters, 0).host_bytes
    if size.backend == "onnxruntime" and size.device == "cpu":
        return 4 * parameters  # the session widens 16-bit weights
    return 0 if size.backend == "torch" and size.device == "cuda" else 2 * parameters


def _variant_bytes(size: BuildSize, precision: Precision) -> list[int]:
    """The weights of an engine by every variant of its recipe; branches of low rank take no more than FP8 would."""
    codes = BITS_PER_WEIGHT[precision]
    side = max(1, math.isqrt(size.largest_layer) // _LARGEST_SIDE_TO_MEAN)
    bits = (
        codes + min(32 * variant.rank / side, BITS_PER_WEIGHT[Precision.FP8] - codes) if variant.rank else codes
        for variant in RECIPES[precision].variants
    )
    return [int(size.parameters * item / 8) for item in bits] or [int(size.parameters * codes / 8)]


def _fewer_precisions(size: BuildSize) -> list[tuple[str, BuildSize]]:
    """The same build without its largest engines, one less each time."""
    quantized = [item for item in size.precisions if item is not REFERENCE]
    quantized.sort(key=lambda item: BITS_PER_WEIGHT[item] * len(RECIPES[item].variants))
    fewer = []
    for count in range(len(quantized) - 1, -1, -1):
        kept = tuple(item for item in size.precisions if item is REFERENCE or item in quantized[:count])
        fewer.append((f"--precisions {','.join(item.value for item in kept)}", replace(size, precisions=kept)))
    return fewer


Resource = tuple[str, Callable[[Estimate], int], Mapping[str, int]]
"""Name, what an estimate says of it, and the parts of that."""


def _require(size: BuildSize, resource: Resource, have: int, ways: Iterable[tuple[str, BuildSize]]) -> None:
    what, measure, parts = resource
    need = measure(estimate(size))
    if need <= have:
        return
    fitting: Sequence[str] = [
        f"{way} would fit ({size_text(less)})" for way, other in ways if (less := measure(estimate(other))) <= have
    ]
    listed = ", ".join(f"{name} {size_text(count)}" for name, count in parts.items())
    otherwise = f"it needs {size_text(need - have)} more"
    raise BuildError(
        f"this build needs about {size_text(need)} of {what} ({listed}) and {size_text(have)} is free; "
        f"{fitting[0] if fitting else otherwise}"
    )
