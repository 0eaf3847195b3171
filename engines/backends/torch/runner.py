"""A package as a function, and calls of any batch size, made of calls of the one that it is compiled for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from engines.backends.torch.library import torch
from engines.errors import BackendError, first_line

Runner = Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], list[torch.Tensor]]
"""A loaded package: (weights in the order of their names, inputs) -> outputs."""


_ALIGNMENT = 16


def load_runner(name: str, path: Path, device: int | None) -> Runner:
    """Loads a package.

    Args:
        name: for messages.
        path: the package, whose hash has been checked: it holds machine code, which runs.
        device: CUDA device index, None for the CPU.

    Raises:
        BackendError: torch refuses it.
    """
    try:
        # The loader of the C++ interface itself. `aoti_load_package`, which wraps it, imports the compiler for that
        # (seconds), and reads the tree of inputs anew at every call. Single-threaded: it then makes no events of its
        # own, which a stream capture would not allow.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1 if device is None else device)
    except Exception as error:  # torch gives no narrower promise
        raise BackendError(
            f"torch {torch.__version__} cannot load engine {name} ({path.name}): {first_line(error)}; "
            "copy the bundle again, or build it on this host"
        ) from error
    return lambda weights, inputs: loader.boxed_run([*weights, *inputs])


def run_in_pieces(
    runner: Runner,
    weights: tuple[torch.Tensor, ...],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    batch: int,
) -> None:
    """Fills `outputs`, all tensors [N, ...], from calls of `batch` rows; the last rows are repeated to fill one up."""
    rows = len(inputs[0])
    for begin in range(0, rows, batch):
        end = min(begin + batch, rows)
        piece = tuple(_filled(item[begin:end], batch) for item in inputs)
        for output, result in zip(outputs, runner(weights, piece), strict=True):
            output[begin:end].copy_(result[: end - begin])


def _filled(rows: torch.Tensor, batch: int) -> torch.Tensor:
    missing = batch - len(rows)
    if missing:
        return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
    # A package wants what an allocation of its own would give it, and says so at every call.
    return rows if rows.data_ptr() % _ALIGNMENT == 0 else rows.clone()
