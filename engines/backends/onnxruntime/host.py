"""Sessions of the CUDA execution provider on the current GPU: the engines of a bundle."""

from __future__ import annotations

from pathlib import Path

from engines.backends.cuda.host import CudaHost
from engines.backends.onnx_references import require_listed
from engines.backends.onnxruntime.plan import LastSizes, OrtPlan, Place, require_runnable
from engines.backends.onnxruntime.provider import require_provider
from engines.manifest import EngineEntry


def onnxruntime_cuda_host(*, resident_engines: int | None = None, optimized: Path | None = None) -> CudaHost:
    """An empty host for the graphs of one bundle; see `CudaHost`.

    An engine that comes back under a limit on resident engines is read and optimized again, which takes longer than its
    copy to the device; and ONNX Runtime waits for the device when it starts the provider, so that a load overlaps only
    the steps that were enqueued before it.

    Args:
        resident_engines: see `CudaHost`.
        optimized: where each session writes its graph as it runs it, for a host of one engine; None not to.

    Raises:
        BackendError: there is no GPU, or the installed ONNX Runtime cannot use one.
        ValueError: the limit is below 1.
    """
    gpu = require_provider()
    last_sizes: LastSizes = {}

    checked: set[str] = set()

    def load(name: str, entry: EngineEntry, path: Path) -> OrtPlan:
        if name not in checked:  # not each time that it comes back
            require_listed(name, path, entry)
            checked.add(name)
        return OrtPlan(name, entry, path, Place(gpu.index, host.stream, last_sizes, optimized))

    host = CudaHost(require_runnable, load, resident_engines=resident_engines)
    return host
