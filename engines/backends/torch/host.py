"""Torch packages on the current GPU: the engines of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

from engines.backends.cuda.gpu import Gpu, current_gpu
from engines.backends.cuda.host import CudaHost
from engines.backends.torch.library import torch
from engines.backends.torch.package import package_of
from engines.backends.torch.plan import OwnedWeights, TorchPlan, require_runnable
from engines.backends.torch.runner import Runner, load_package
from engines.backends.torch.weights import Weights, weights_path
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
    return CudaHost(
        require_runnable, _loader(resident_engines), resident_engines=resident_engines, release=_release_workspaces
    )


def _loader(resident_engines: int | None) -> Callable[[str, EngineEntry, Path], TorchPlan]:
    """Brings engines into device memory.

    Where not all may be resident, an engine comes back at the rate of the link: its weights stay in page-locked host
    memory, and go to a block of device memory that another engine has left, so that nothing is allocated or freed
    while steps run.
    """
    runners: dict[str, Runner] = {}
    kept: dict[Path, tuple[Weights, torch.Tensor]] = {}
    resident: WeakValueDictionary[Path, OwnedWeights] = WeakValueDictionary()
    free: list[torch.Tensor] = []
    graphs = torch.cuda.graph_pool_handle()
    device = torch.cuda.current_device()

    def upload(path: Path) -> OwnedWeights:
        if resident_engines is None:
            weights = Weights(path)
            block = torch.empty(weights.size_bytes, dtype=torch.uint8, device="cuda")
            return OwnedWeights(weights.fill(block), block, None)
        if path not in kept:
            weights = Weights(path)
            kept[path] = weights, torch.empty(weights.size_bytes, dtype=torch.uint8, pin_memory=True)
            weights.fill(kept[path][1])
        weights, pinned = kept[path]
        block = _block(free, weights.size_bytes)
        block[: weights.size_bytes].copy_(pinned, non_blocking=True)
        return OwnedWeights(weights.tensors(block), block, free)

    def load(name: str, entry: EngineEntry, path: Path) -> TorchPlan:
        torch.cuda.set_device(device)  # the calling thread may be another one
        if name not in runners:
            runners[name] = load_package(name, package_of(name, entry), path, device)
        file = weights_path(path, entry)
        held = resident.get(file)
        if held is not None and held.tensors:
            return TorchPlan(name, entry, runners[name], held.share(), graphs)
        stream = torch.cuda.Stream()  # of its own: steps may be running on the loop's
        try:
            with torch.cuda.stream(stream):
                weights = resident[file] = upload(file)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"cannot allocate {entry.bytes} bytes of GPU memory for the weights of engine {name}; limit the resident "
                "engines, or end other processes on the GPU"
            ) from error
        stream.synchronize()
        return TorchPlan(name, entry, runners[name], weights, graphs)

    return load


def _release_workspaces() -> None:
    """Frees cuBLAS's workspaces: torch keeps one for every stream that it has seen, also when the stream is gone."""
    torch._C._cuda_clearCublasWorkspaces()


def _block(free: list[torch.Tensor], size_bytes: int) -> torch.Tensor:
    """Device memory of `size_bytes` at least: the smallest free block that is large enough, or a new one."""
    fitting = [block for block in free if block.numel() >= size_bytes]
    if not fitting:
        free.clear()  # too small for anything that is to come back; a new one takes their place
        return torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    block = min(fitting, key=torch.Tensor.numel)
    free[:] = [item for item in free if item is not block]
    return block
