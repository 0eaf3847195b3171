"""Float32 torch on another device for a while: a GPU runs in seconds what takes a CPU minutes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engines.errors import BackendError

CPU = "cpu"
Batch = tuple[torch.Tensor, ...]


def require_device(device: str) -> None:
    """Checks that torch can use a device.

    Raises:
        BackendError: it is a GPU, and torch finds none.
    """
    if device != CPU and not torch.cuda.is_available():
        raise BackendError(
            f"--range-device {device} is asked for, and torch {torch.__version__} finds no GPU; leave it out, or install a CUDA "
            "build of torch"
        )


@contextmanager
def placed(module: Any, device: str) -> Iterator[None]:
    """Has a module, or a whole diffusers pipeline, on a device for the length of a block; then it is on the CPU again.

    Products are of full float32 there, as on the CPU.
    """
    if device == CPU:
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        _move(module, device)
        yield
    finally:
        _move(module, CPU)
        torch.cuda.empty_cache()
        torch.backends.cudnn.allow_tf32 = before


def _move(module: Any, device: str) -> None:
    """Moves weights so that they stay ordinary tensors: in inference mode, `to` makes some that no export takes."""
    with torch.inference_mode(False):
        module.to(device)


def on(batch: Batch, device: str) -> Batch:
    """The tensors of a batch on a device."""
    return tuple(item.to(device) for item in batch)
