"""Devices that torch computes on while a bundle is built."""

from __future__ import annotations

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


def on(batch: Batch, device: str) -> Batch:
    """The tensors of a batch on a device."""
    return tuple(item.to(device) for item in batch)
