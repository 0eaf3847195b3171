"""The TensorRT Python bindings, full or lean; the one place that imports them for running plans.

    from engines.backends.tensorrt.bindings import trt

The full package is preferred where both are installed; it runs every plan that the lean one runs.
"""

from __future__ import annotations

from engines.errors import BackendError, first_line

__all__ = ("INSTALL", "LEAN", "LIBRARIES", "OLDEST", "VERSION", "require_supported", "trt", "version_tuple")

LIBRARIES = ("tensorrt", "tensorrt_lean")
INSTALL = "pip install tensorrt (or tensorrt_lean to run version-compatible plans only) and cuda-bindings"

try:
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise
        import tensorrt_lean as trt  # type: ignore[no-redef, unused-ignore]  # used where both have type stubs
except ModuleNotFoundError as error:
    raise BackendError(
        f"backend 'tensorrt' needs the module {' or '.join(LIBRARIES)}, which is not installed; {INSTALL}"
    ) from error
except (ImportError, OSError) as error:
    raise BackendError(
        f"TensorRT is installed but cannot be loaded: {first_line(error)}; reinstall tensorrt and its libs"
    ) from error

VERSION: str = trt.__version__
LEAN: bool = not hasattr(trt, "Builder")
OLDEST = (10, 13)


def version_tuple() -> tuple[int, int]:
    """Major and minor of `VERSION`, which is such as "10.16.1.11"."""
    major, minor = VERSION.split(".")[:2]
    return int(major), int(minor)


def require_supported() -> None:
    """Refuses a TensorRT this code was not written for.

    Raises:
        BackendError: older than `OLDEST`.
    """
    if version_tuple() < OLDEST:
        raise BackendError(
            f"TensorRT {VERSION} is installed; this release needs {OLDEST[0]}.{OLDEST[1]} or newer; upgrade the tensorrt package"
        )
