"""A denoiser compiled ahead of time as `build` does it: an AOTInductor package with its weights beside it."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engines.backends.torch.runner import Runner, load_runner
from engines.backends.torch.weights import Weights, in_order
from tmpdiff_export.targets.torch.compile import EngineModule, compile_package
from tmpdiff_export.weights.files import write_tensors
from tmpdiff_export.weights.streamed import on_meta
from tools.gpu_bench.models import Inputs
from tools.gpu_bench.step import map_tensors, tensors_of


class Packaged(torch.nn.Module):
    """A loaded package, called as the denoiser it was made of; its weights are its own."""

    def __init__(self, runner: Runner, weights: tuple[torch.Tensor, ...], block: torch.Tensor) -> None:
        super().__init__()
        self._runner, self._weights = runner, weights
        self.register_buffer("block", block)  # that the weights lie in; counted as a module's tensors are

    def forward(self, *, return_dict: bool, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """As diffusers' denoisers, which give a tuple without `return_dict`."""
        return tuple(self._runner(self._weights, tuple(tensors_of(inputs))))


class _Positional(torch.nn.Module):
    """A denoiser whose inputs come one after the other, in the order of `tensors_of`."""

    def __init__(self, denoiser: torch.nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._form = map_tensors(inputs, lambda item: None)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        left = iter(tensors)
        output: torch.Tensor = self.denoiser(**_filled(self._form, left), return_dict=False)[0]
        return output


def _filled(form: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(form, dict):
        return {key: _filled(value, tensors) for key, value in form.items()}
    return next(tensors) if form is None else form


@contextmanager
def packaged(
    name: str, module: torch.nn.Module, inputs: Inputs, dtype: torch.dtype
) -> Iterator[tuple[Packaged, dict[str, Any]]]:
    """Compiles, writes and loads a package; its files are gone after the block.

    Args:
        name: for messages.
        module: the lowered denoiser, on the device that the package is for.
        inputs: examples on that device.
        dtype: of its activations.

    Yields:
        The loaded package, and `store_s`, `compile_s`, `load_s`, `package_bytes`, `weights_file_bytes`.

    Raises:
        BuildError: torch cannot export or compile it.
        BackendError: torch cannot load it.
    """
    tensors = tensors_of(inputs)
    device = tensors[0].device
    with tempfile.TemporaryDirectory(prefix="tmpdiff-package-") as folder:
        package, weights = Path(folder) / f"{name}.pt2", Path(folder) / f"{name}.safetensors"
        times = [time.perf_counter()]
        whole = _Positional(module, inputs)
        empty = EngineModule(on_meta(whole), dtype, [True] * len(tensors)).eval()
        state = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
        write_tensors(weights, {name: state[name] for name in empty.tensors})
        times.append(time.perf_counter())
        compile_package(empty, device.type, tensors, package)
        times.append(time.perf_counter())
        runner = load_runner(name, package, device.index if device.type == "cuda" else None)
        stored = Weights(weights)
        block = torch.empty(stored.size_bytes, dtype=torch.uint8, device=device)
        loaded = Packaged(runner, in_order([stored.fill(block)]), block)
        times.append(time.perf_counter())
        spans = [end - begin for begin, end in itertools.pairwise(times)]
        made = dict(zip(("store_s", "compile_s", "load_s"), spans, strict=True))
        yield (
            loaded,
            {**made, "package_bytes": package.stat().st_size, "weights_file_bytes": weights.stat().st_size},
        )
