"""Which backend a build is for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from engines.backends import BACKENDS, require_backend
from engines.errors import BackendError
from engines.precision import Precision
from tmpdiff_export.cpu_target import CpuTarget
from tmpdiff_export.engine_build import Target
from tmpdiff_export.plan_settings import PlanSettings

AUTO = "auto"
BACKEND_CHOICES = (AUTO, *BACKENDS)


def resolve_backend(backend: str) -> str:
    """The backend a build is for; "auto" is TensorRT where its builder and a GPU are, ONNX Runtime elsewhere.

    Raises:
        BackendError: unknown, not built by this release, or not installed.
    """
    if backend == AUTO:
        return "tensorrt" if _tensorrt_can_build() else "onnxruntime"
    if backend == "torch":
        raise BackendError(f"backend 'torch' is not part of this release; choose from {', '.join(BACKEND_CHOICES)}")
    require_backend(backend)
    if backend == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        raise BackendError(
            "building plans needs the full tensorrt package, only tensorrt_lean is installed, which runs them; "
            "pip install tensorrt"
        )
    return backend


def open_target(
    backend: str, settings: PlanSettings, precisions: Sequence[Precision], progress: Callable[[str, int, int], None]
) -> Target:
    """The target of a resolved backend.

    Args:
        backend: from `resolve_backend`.
        settings: of TensorRT plans; other backends refuse any that were changed.
        precisions: the denoiser engines that will be made.
        progress: called with (stage, done, total) by targets whose engines take long to make.

    Raises:
        BackendError: no device to build on, a precision that it cannot have, or settings that the backend
            does not have.
    """
    if backend == "tensorrt":
        from tmpdiff_export.tensorrt_target import TensorRtTarget

        return TensorRtTarget(settings, precisions, progress)
    settings.require_unset(backend)
    if backend == "tensorrt-rtx":
        from tmpdiff_export.rtx_target import RtxTarget

        return RtxTarget()
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
