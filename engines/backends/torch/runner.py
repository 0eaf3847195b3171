"""A package as a function, and calls of any batch size, made of calls of the one that it is compiled for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from engines.backends.torch.library import torch
from engines.errors import BackendError, first_line
from engines.package_entry import PackageEntry

Runner = Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], list[torch.Tensor]]
"""A loaded package: (weights in the order of their names, inputs) -> outputs."""


_ALIGNMENT = 16


def load_package(name: str, package: PackageEntry, path: Path, device: int | None) -> Runner:
    """Loads the package of an engine, or the packages that it is made of.

    Args:
        name: for messages.
        package: from the manifest.
        path: the engine file, further packages beside it; their hashes have been checked: they hold machine code, which
            runs.
        device: CUDA device index, None for the CPU.

    Raises:
        BackendError: torch refuses one.
    """
    files = [path, *(path.with_name(PurePosixPath(file.path).name) for file in package.blocks)]
    runners = [load_runner(name, file, device) for file in files]
    return _of_calls(runners, package) if package.calls else runners[0]


def _of_calls(runners: Sequence[Runner], package: PackageEntry) -> Runner:
    """Calls of packages, one after the other, as one package. A value is given back after the last call that takes it."""
    last = {value: number for number, call in enumerate(package.calls) for value in call.inputs}
    kept = set(package.results)
    most = max((end for call in package.calls for _, end in call.weights), default=0)
    done = [
        [value for value in set(call.inputs) if last[value] == number and value not in kept]
        for number, call in enumerate(package.calls)
    ]

    def run(weights: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        if most > len(weights):
            raise BackendError(
                f"a package takes weight {most - 1}, its engine's files hold {len(weights)}; build the bundle again"
            )
        values: list[torch.Tensor | None] = list(inputs)
        for call, unneeded in zip(package.calls, done, strict=True):
            own = tuple(item for begin, end in call.weights for item in weights[begin:end])
            taken = tuple(_aligned(item) for value in call.inputs if (item := values[value]) is not None)
            returned = runners[call.package](own, taken)
            if len(returned) != call.outputs:
                raise BackendError(
                    f"a package returns {len(returned)} values, the manifest says {call.outputs}; build the bundle again"
                )
            values += returned
            for value in unneeded:
                values[value] = None
        return [item for value in package.results if (item := values[value]) is not None]

    return run


def load_runner(name: str, path: Path, device: int | None) -> Runner:
    """Loads one package; see `load_package`."""
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
    return _aligned(rows)


def _aligned(item: torch.Tensor) -> torch.Tensor:
    """A package wants what an allocation of its own would give it, and says so at every call."""
    return item if item.data_ptr() % _ALIGNMENT == 0 else item.clone()
