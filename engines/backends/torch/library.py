"""torch and safetensors, imported from here by the whole backend; says what to do where they are missing."""

from __future__ import annotations

from typing import Any

from engines.errors import BackendError

__all__ = ("VERSION", "SafetensorError", "require_cudnn", "safe_open", "torch")

try:
    import torch
    from safetensors import SafetensorError, safe_open
except ModuleNotFoundError as error:
    raise BackendError(
        f"backend 'torch' needs the module {error.name}, which is not installed; pip install torch safetensors"
    ) from error

VERSION: str = torch.__version__


def require_cudnn() -> Any:
    """cuDNN's frontend.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import cudnn
    except ImportError as error:
        raise BackendError(
            "attention in FP8 needs the module cudnn, which is not installed; pip install nvidia-cudnn-frontend"
        ) from error
    return cudnn
