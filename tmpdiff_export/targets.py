"""Which backend a build is for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch

from engines.backends import BACKENDS, require_backend
from engines.errors import BackendError
from engines.precision import REFERENCE, Precision
from tmpdiff_export.cpu_target import CpuTarget
from tmpdiff_export.engine_build import Target
from tmpdiff_export.plan_settings import PlanSettings

AUTO = "auto"
BACKEND_CHOICES = (AUTO, *BACKENDS)


def resolve_backend(backend: str) -> str:
    """The backend a build is for; "auto" is TensorRT where its builder and a GPU are, torch where it sees a GPU, ONNX Runtime elsewhere.

    Raises:
        BackendError: unknown, not built by this release, or not installed.
    """
    if backend == AUTO:
        return "tensorrt" if _tensorrt_can_build() else "torch" if torch.cuda.is_available() else "onnxruntime"
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


def open_target(
    backend: str,
    settings: PlanSettings,
    precisions: Sequence[Precision],
    progress: Callable[[str, int, int], None],
    device: str | None = None,
) -> Target:
    """The target of a resolved backend.

    Args:
        backend: from `resolve_backend`.
        settings: of TensorRT plans; other backends refuse any that were changed.
        precisions: the denoiser engines that will be made.
        progress: called with (stage, done, total) by targets whose engines take long to make.
        device: "cuda" or "cpu", for the torch backend (None: the GPU) and for ONNX Runtime (None: the CPU); other
            backends refuse it.

    Raises:
        BackendError: no device to build on, a precision that it cannot have, or settings that the backend
            does not have.
    """
    if backend not in ("torch", "onnxruntime") and device is not None:
        raise BackendError(f"--device is for the backends torch and onnxruntime; {backend!r} has no choice of device")
    if backend == "torch":
        from tmpdiff_export.torch_target import TorchTarget

        settings.require_unset(backend, allowed=("--batch",))
        return TorchTarget(device or "cuda", settings.batch.opt, precisions)
    if backend == "tensorrt":
        from tmpdiff_export.tensorrt_target import TensorRtTarget

        return TensorRtTarget(settings, precisions, progress)
    settings.require_unset(backend)
    if backend == "tensorrt-rtx":
        from tmpdiff_export.rtx_target import RtxTarget

        return RtxTarget()
    if device == "cuda":
        from tmpdiff_export.onnx_cuda_target import OnnxCudaTarget

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
