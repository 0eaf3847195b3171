"""Torch packages on the current GPU: the engines of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engines.backends.cuda.gpu import Gpu, current_gpu
from engines.backends.cuda.host import CudaHost, is_denoiser
from engines.backends.torch.device_weights import DeviceWeights
from engines.backends.torch.library import torch
from engines.backends.torch.package import package_of
from engines.backends.torch.plan import TorchPlan, require_runnable
from engines.backends.torch.runner import Runner, load_package
from engines.backends.torch.weights import weights_of
from engines.errors import BackendError
from engines.manifest import EngineEntry


def usable_gpu() -> Gpu:
    """The current GPU, which torch can use.

    Raises:
        BackendError: there is none, or torch cannot use it.
    """
    gpu = current_gpu()
    if not torch.cuda.is_available():
        raise BackendError(
            f"the GPU {gpu.name} is there, but torch {torch.__version__} cannot use it; install a CUDA build of torch"
        )
    return gpu


def torch_host(*, resident_engines: int | None = None) -> CudaHost:
    """An empty host for the packages of one bundle; see `CudaHost`.

    Raises:
        BackendError: there is no GPU, or torch cannot use it.
        ValueError: the limit is below 1.
    """
    torch.cuda.set_device(usable_gpu().index)
    weights = DeviceWeights()

    def release() -> None:
        weights.clear()
        _release_workspaces()

    return CudaHost(
        require_runnable, _loader(weights, resident_engines), resident_engines=resident_engines, release=release
    )


def _loader(weights: DeviceWeights, resident_engines: int | None) -> Callable[[str, EngineEntry, Path], TorchPlan]:
    """Brings engines into device memory."""
    runners: dict[str, Runner] = {}
    graphs = torch.cuda.graph_pool_handle()
    device = torch.cuda.current_device()

    def load(name: str, entry: EngineEntry, path: Path) -> TorchPlan:
        torch.cuda.set_device(device)  # the calling thread may be another one
        if name not in runners:
            runners[name] = load_package(name, package_of(name, entry), path, device)
        returning = resident_engines is not None and is_denoiser(entry)
        owned = weights.take(name, weights_of(name, path, entry), returning=returning)
        return TorchPlan(name, entry, runners[name], owned, graphs)

    return load


def _release_workspaces() -> None:
    """Frees cuBLAS's workspaces: torch keeps one for every stream that it has seen, also when the stream is gone."""
    torch._C._cuda_clearCublasWorkspaces()
