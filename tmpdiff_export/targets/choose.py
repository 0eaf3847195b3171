"""Which backend a build is for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from engines.backends.table import BACKENDS, require_backend
from engines.errors import BackendError
from engines.precision import REFERENCE, Precision
from tmpdiff_export.targets.onnxruntime.cpu import CpuTarget
from tmpdiff_export.targets.target import Start, Target, at_once
from tmpdiff_export.targets.tensorrt.settings import PlanSettings

AUTO = "auto"
BACKEND_CHOICES = (AUTO, *BACKENDS)


def resolve_backend(backend: str) -> str:
    """The backend a build is for; "auto" is TensorRT where its builder and a GPU are, torch where it sees a GPU, ONNX Runtime elsewhere.

    Raises:
        BackendError: unknown, not built by this release, or not installed.
    """
    if backend == AUTO:
        return "tensorrt" if _tensorrt_can_build() else "torch" if torch.cuda.is_available() else "onnxruntime"
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}, expected one of {', '.join(BACKEND_CHOICES)}")
    require_backend(backend)
    if backend == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        raise BackendError(
            "building plans needs the full tensorrt package, only tensorrt_lean is installed, which runs them; "
            "pip install tensorrt"
        )
    return backend


def require_shareable(backend: str, shared: Precision | None, precisions: Sequence[Precision]) -> None:
    """Refuses to make the reference of the stored weights of a precision where that cannot be done.

    Raises:
        BackendError: another backend than torch, or a precision that is not built, or the reference itself.
    """
    if shared is None:
        return
    if backend != "torch":
        raise BackendError(
            f"--share-weights is for packages of the torch backend; engines of {backend!r} hold their own"
        )
    choices = [precision for precision in precisions if precision is not REFERENCE]
    if shared not in choices:
        raise BackendError(
            f"--share-weights names {shared.value}, expected a quantized precision that is built: "
            f"{', '.join(item.value for item in choices) or 'none is'}"
        )


def require_fp8_attention(backend: str, asked: Sequence[Precision], precisions: Sequence[Precision]) -> None:
    """Refuses attention in FP8 where a build cannot have it.

    Raises:
        BackendError: another backend than torch, or a precision that is not built, or the reference.
    """
    if not asked:
        return
    if backend != "torch":
        raise BackendError(
            f"--fp8-attention is for packages of the torch backend; engines of {backend!r} have 16-bit attention"
        )
    choices = [precision for precision in precisions if precision is not REFERENCE]
    if other := [item for item in asked if item not in choices]:
        raise BackendError(
            f"--fp8-attention names {other[0].value}, expected quantized precisions that are built: "
            f"{', '.join(item.value for item in choices) or 'none is'}"
        )


def require_buildable_by(backend: str, workers: int) -> None:
    """Refuses worker processes that a build cannot have.

    Raises:
        BackendError: fewer than 1, or more than 1 for another backend than torch.
    """
    if workers < 1:
        raise BackendError(f"workers is {workers}, expected 1 or more")
    if workers > 1 and backend != "torch":
        raise BackendError(
            f"--workers is for packages of the torch backend; engines of {backend!r} are built in one process"
        )


@contextmanager
def open_start(target: Target, workers: int) -> Iterator[Start]:
    """How the engines of a build are started, for the length of a block.

    Args:
        target: from `open_target`.
        workers: as checked by `require_buildable_by`; with 1, engines are made in this process.

    Raises:
        BuildError: a worker died.
    """
    if workers == 1:
        yield at_once(target)
        return
    from engines.backends.cuda.gpu import visible_gpus
    from tmpdiff_export.targets.torch.target import TorchTarget
    from tmpdiff_export.targets.torch.workers import open_build_workers

    assert isinstance(target, TorchTarget)
    torch_target = target
    with open_build_workers(workers, None if target.device == "cpu" else visible_gpus()) as pool:
        yield lambda job, folder: pool.submit(job.name, torch_target.prepare(job, folder))


def open_target(
    backend: str,
    settings: PlanSettings,
    precisions: Sequence[Precision],
    progress: Callable[[str, int, int], None],
    device: str | None = None,
    *,
    fp8_attention: bool = False,
) -> Target:
    """The target of a resolved backend.

    Args:
        backend: from `resolve_backend`.
        settings: of TensorRT plans; other backends refuse any that were changed.
        precisions: the denoiser engines that will be made.
        progress: called with (stage, done, total) by targets whose engines take long to make.
        device: "cuda" or "cpu", for the torch backend (None: the GPU) and for ONNX Runtime (None: the CPU); other
            backends refuse it.
        fp8_attention: whether any of them has its attention in FP8; for the torch backend only.

    Raises:
        BackendError: no device to build on, a precision that it cannot have, or settings that the backend
            does not have.
    """
    if backend not in ("torch", "onnxruntime") and device is not None:
        raise BackendError(f"--device is for the backends torch and onnxruntime; {backend!r} has no choice of device")
    if backend == "torch":
        from tmpdiff_export.targets.torch.target import TorchTarget

        settings.require_unset(backend, allowed=("--batch",))
        return TorchTarget(device or "cuda", settings.batch.opt, precisions, fp8_attention=fp8_attention)
    if backend == "tensorrt":
        from tmpdiff_export.targets.tensorrt.target import TensorRtTarget

        return TensorRtTarget(settings, precisions, progress)
    settings.require_unset(backend)
    if backend == "tensorrt-rtx":
        from tmpdiff_export.targets.onnxruntime.tensorrt_rtx import RtxTarget

        return RtxTarget()
    if device == "cuda":
        from tmpdiff_export.targets.onnxruntime.cuda import OnnxCudaTarget

        return OnnxCudaTarget(precisions)
    return CpuTarget()


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
