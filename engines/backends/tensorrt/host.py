"""Plans on the current GPU: the engines of a bundle, or one plan alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engines.backends.cuda.engine import DeviceEngine
from engines.backends.cuda.gpu import current_gpu
from engines.backends.cuda.host import CudaHost
from engines.backends.cuda.memory import SharedMemory, Stream
from engines.backends.tensorrt.plan import Plan, require_runnable
from engines.manifest import EngineEntry


def tensorrt_host(*, resident_engines: int | None = None) -> CudaHost:
    """An empty host for the plans of one bundle; see `CudaHost`.

    Raises:
        BackendError: there is no GPU, or its driver is too old.
        ValueError: the limit is below 1.
    """
    return CudaHost(require_runnable, _load, resident_engines=resident_engines)


@contextmanager
def open_engine(
    path: Path, *, version_compatible: bool, weight_streaming: bool = False
) -> Iterator[tuple[DeviceEngine, Plan]]:
    """A plan file outside a bundle, loaded onto the current GPU for the time of the block.

    Args:
        path: a plan from a trusted source: see `Plan`.
        version_compatible: whether it was built so.
        weight_streaming: whether its weights may stay in host memory.

    Raises:
        BackendError: there is no GPU, or TensorRT refuses the plan.
    """
    current_gpu()
    with ExitStack() as owned:
        stream = Stream()
        owned.callback(stream.close)
        memory = SharedMemory(stream)
        owned.callback(memory.close)
        plan = Plan(path.name, path, version_compatible=version_compatible, weight_streaming=weight_streaming)
        owned.callback(plan.close)
        owned.callback(stream.rest)
        yield DeviceEngine(lambda: plan, memory, stream), plan


def _load(name: str, entry: EngineEntry, path: Path) -> Plan:
    assert entry.plan is not None  # `require_runnable` has checked
    return Plan(
        name,
        path,
        version_compatible=entry.plan.version_compatible,
        weight_streaming=entry.plan.weight_streaming,
    )
