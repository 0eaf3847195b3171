"""Which backend a build is for: its name, what it refuses, and its target."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engines.backends.table import BACKENDS, require_backend
from engines.errors import BackendError
from engines.precision import Precision
from tmpdiff_export.targets.tensorrt.settings import PlanSettings
from tmpdiff_export.targets.torch.settings import PackageSettings

if TYPE_CHECKING:  # they import torch: what is refused here is refused without
    from tmpdiff_export.targets.target import Start, Target

AUTO = "auto"
BACKEND_CHOICES = (AUTO, *BACKENDS)


def resolve_backend(backend: str) -> str:
    """The backend a build is for.

    "auto" is TensorRT where its builder and a GPU are, torch where it sees a GPU, ONNX Runtime elsewhere.

    Raises:
        BackendError: unknown, not built by this release, or not installed.
    """
    if backend == AUTO:
        if _tensorrt_can_build():
            return "tensorrt"
        import torch

        return "torch" if torch.cuda.is_available() else "onnxruntime"
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}, expected one of {', '.join(BACKEND_CHOICES)}")
    require_backend(backend)
    if backend == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        raise BackendError(
            "building plans needs the full tensorrt package, only tensorrt_lean is installed, which runs them; "
            "pip install tensorrt"
        )
    return backend


def require_own_settings(
    backend: str,
    device: str | None,
    packages: PackageSettings,
    plans: PlanSettings,
    text_encoder_weights: str | None = None,
) -> None:
    """Refuses settings of other backends.

    Args:
        backend: from `resolve_backend`.
        device: "cuda" or "cpu", for the backends torch and onnxruntime; None where nothing was asked.
        packages: for the torch backend.
        plans: for the tensorrt backend, but for the batch, which torch packages have too.
        text_encoder_weights: for the backends torch and onnxruntime; None where nothing was asked.

    Raises:
        BackendError: naming what was given and whom it is for.
    """
    if backend != "torch":
        packages.require_unset(backend)
    if backend != "tensorrt":
        plans.require_unset(backend, allowed=("--batch",) if backend == "torch" else ())
    if backend not in ("torch", "onnxruntime") and device is not None:
        raise BackendError(f"--device is for the backends torch and onnxruntime; {backend!r} has no choice of device")
    if backend not in ("torch", "onnxruntime") and text_encoder_weights is not None:
        raise BackendError(
            f"--text-encoder-weights is for the backends torch and onnxruntime; {backend!r} has text encoders in 16 bit, "
            "leave it out"
        )


def open_target(
    backend: str,
    device: str | None,
    packages: PackageSettings,
    plans: PlanSettings,
    precisions: Sequence[Precision],
    progress: Callable[[str, int, int], None],
) -> Target:
    """The target of a resolved backend.

    Args:
        backend: from `resolve_backend`.
        device: "cuda" or "cpu", for the torch backend (None: the GPU) and for ONNX Runtime (None: the CPU).
        packages: of the torch backend.
        plans: of the tensorrt backend; its batch is also torch's.
        precisions: the denoiser engines that will be made.
        progress: called with (stage, done, total) by targets whose engines take long to make.

    Raises:
        BackendError: no device to build on, or a precision that it cannot have.
    """
    if backend == "torch":
        from tmpdiff_export.targets.torch.target import TorchTarget

        return TorchTarget(device or "cuda", plans.batch.opt, precisions, packages)
    if backend == "tensorrt":
        from tmpdiff_export.targets.tensorrt.target import TensorRtTarget

        return TensorRtTarget(plans, precisions, progress)
    if backend == "tensorrt-rtx":
        from tmpdiff_export.targets.onnxruntime.tensorrt_rtx import RtxTarget

        return RtxTarget()
    if device == "cuda":
        from tmpdiff_export.targets.onnxruntime.cuda import OnnxCudaTarget

        return OnnxCudaTarget(precisions)
    from tmpdiff_export.targets.onnxruntime.cpu import CpuTarget

    return CpuTarget()


@contextmanager
def open_start(target: Target, workers: int) -> Iterator[Start]:
    """How the engines of a build are started, for the length of a block.

    Args:
        target: from `open_target`.
        workers: of `PackageSettings`; with 1, engines are made in this process.

    Raises:
        BuildError: a worker died.
    """
    if workers == 1:
        from tmpdiff_export.targets.target import at_once

        yield at_once
        return
    from engines.backends.cuda.gpu import visible_gpus
    from tmpdiff_export.targets.torch.target import TorchTarget
    from tmpdiff_export.targets.torch.workers import open_build_workers

    assert isinstance(target, TorchTarget)  # no other has workers
    with open_build_workers(workers, None if target.device == "cpu" else visible_gpus()) as pool:
        yield pool.submit


def _tensorrt_can_build() -> bool:
    try:
        require_backend("tensorrt")
        if importlib.util.find_spec("tensorrt") is None:
            return False
        from engines.backends.cuda.gpu import current_gpu

        current_gpu()
    except BackendError:
        return False
    return True
