"""The denoiser plans in device memory: at most so many, exchanged by a worker thread while the loop goes on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cuda.bindings import runtime

from engines.backends.cuda.gpu import cuda
from engines.backends.cuda.memory import Event
from engines.backends.cuda.plan import DevicePlan
from engines.backends.cuda.residency import Load


class ResidentPlans:
    """Plans by name, the one used last at the end."""

    def __init__(self, limit: int | None, device: int, load: Callable[[str], DevicePlan]) -> None:
        """
        Args:
            limit: most plans resident at once, None for no limit.
            device: CUDA device index, for the worker thread.
            load: loads a plan by name, on the current device.
        """
        self._limit = limit
        self._device = device
        self._load = load
        self._plans: OrderedDict[str, DevicePlan] = OrderedDict()
        self._pending: dict[str, Future[DevicePlan]] = {}
        self._retired: list[DevicePlan] = []  # gave way, but are not closed yet
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-load")

    @property
    def plans(self) -> dict[str, DevicePlan]:
        """The plans that are resident, by name, the one used last at the end."""
        return dict(self._plans)

    def get(self, name: str) -> DevicePlan:
        """A plan outside a loop: loaded if it is not resident; the one used longest ago gives way. Nothing may run.

        Raises:
            BackendError: it cannot be loaded.
        """
        if name not in self._plans:
            while self._limit is not None and len(self._plans) >= self._limit:
                self._plans.popitem(last=False)[1].close()
            self._plans[name] = self._load(name)
        self._plans.move_to_end(name)
        return self._plans[name]

    def start(self, load: Load, idle: Event | None) -> None:
        """Begins an exchange in the worker thread; exchanges happen one after the other.

        Args:
            load: what to load and what gives way.
            idle: behind the last work of the plan that gives way; None if it has none.
        """
        victim = None if load.evicts is None else self._plans.pop(load.evicts)
        if victim is not None:
            self._retired.append(victim)
        self._pending[load.engine] = self._worker.submit(self._exchange, load.engine, victim, idle)

    def wait(self, name: str) -> DevicePlan:
        """A plan that is resident or being loaded.

        Raises:
            BackendError: loading it failed.
        """
        if name in self._pending:
            self._plans[name] = self._pending[name].result()
            del self._pending[name]
        self._plans.move_to_end(name)
        return self._plans[name]

    def settle(self) -> None:
        """Ends all exchanges after a failure that is being reported; theirs are not. Nothing may run."""
        for name, pending in self._pending.items():
            if not pending.cancel() and pending.exception() is None:
                self._plans[name] = pending.result()
        self._pending.clear()
        for plan in self._retired:
            plan.close()
        self._retired.clear()

    def close(self) -> None:
        """Frees all plans; their work must have finished."""
        self.settle()
        self._worker.shutdown()
        for plan in self._plans.values():
            plan.close()
        self._plans.clear()

    def _exchange(self, name: str, victim: DevicePlan | None, idle: Event | None) -> DevicePlan:
        """Runs in the worker thread, whose current device is the first one until it is set."""
        cuda(runtime.cudaSetDevice(self._device))
        if victim is not None:
            if idle is not None:
                idle.wait()
            self._retired.remove(victim)
            victim.close()
        return self._load(name)
