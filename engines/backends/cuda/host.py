"""The engines of a bundle on one GPU: shared memory, one stream, and a loop that swaps engines on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from cuda.bindings import runtime
from numpy.typing import NDArray

from engines.backends.cuda.device_loop import DeviceLoop
from engines.backends.cuda.engine import DeviceEngine
from engines.backends.cuda.gpu import Gpu, cuda, current_gpu
from engines.backends.cuda.kernels import Kernels
from engines.backends.cuda.memory import Event, SharedMemory, Stream
from engines.backends.cuda.plan import DeviceContext, DevicePlan
from engines.backends.cuda.residency import Load, plan_loads
from engines.backends.cuda.resident_plans import ResidentPlans
from engines.errors import BackendError
from engines.loop import Loop, host_loop
from engines.manifest import LATENTS, MODEL_OUTPUT, TIMESTEP, EngineEntry
from engines.reuse import engines_of

Check = Callable[[str, EngineEntry, Gpu], None]
LoadPlan = Callable[[str, EngineEntry, Path], DevicePlan]


class CudaHost:
    """See `engines.host.EngineHost`.

    All engines bind the same device buffers (one per tensor name and dtype) and the same scratch memory, as
    large as the largest need of the shapes in use. Denoiser engines, which are those that take latents and a
    timestep and return a model output, count against the limit on resident engines; others stay once loaded.
    """

    def __init__(
        self,
        require_runnable: Check,
        load: LoadPlan,
        *,
        resident_engines: int | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens the current CUDA device.

        Args:
            require_runnable: refuses, before anything is loaded, an engine that cannot run on this GPU.
            load: brings an engine into the memory of the current device.
            resident_engines: denoiser engines in device memory at once, at least 1; None for all. Where a loop
                uses more, the next one is loaded while earlier steps still run (with a limit of 1: while none do).
            release: frees what the backend keeps for the stream; called once, when no engine is left.

        Raises:
            BackendError: there is no GPU, or its driver is too old.
            ValueError: the limit is below 1.
        """
        if resident_engines is not None and resident_engines < 1:
            raise ValueError(f"resident_engines is {resident_engines}, expected 1 at least")
        self._require_runnable, self._load_plan = require_runnable, load
        self._limit = resident_engines
        self._gpu = current_gpu()
        self._files: dict[str, tuple[EngineEntry, Path]] = {}
        self._others: dict[str, DevicePlan] = {}
        self._events: list[Event] = []
        self._closed = False
        with ExitStack() as owned:  # closed in the reverse order
            self._stream = Stream()
            owned.callback(self._stream.close)
            owned.callback(release)
            self._memory = SharedMemory(self._stream)
            owned.callback(self._memory.close)
            self._kernels = Kernels()
            owned.callback(self._kernels.close)
            owned.callback(self._close_events)
            owned.callback(self._close_others)
            self._residents = ResidentPlans(self._limit, self._gpu.index, self._load)
            owned.callback(self._residents.close)
            owned.callback(self._stream.rest)
            self._owned = owned.pop_all()

    @property
    def stream(self) -> Stream:
        """Where all engines run; owned by the host. For backends that have to know it when they load an engine."""
        return self._stream

    @property
    def notes(self) -> dict[str, str]:
        """Why an engine runs without a CUDA graph, by name, for those loaded engines that do."""
        plans = self._residents.plans | self._others
        return {name: plan.note for name, plan in plans.items() if plan.note is not None}

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the denoiser engines in device memory, the one used last at the end."""
        return tuple(self._residents.plans)

    def add(self, name: str, entry: EngineEntry, path: Path) -> None:
        """See `EngineHost.add`.

        Raises:
            BackendError: the engine cannot run on this GPU or with the installed libraries.
            ValueError: the name is taken.
        """
        if name in self._files:
            raise ValueError(f"an engine {name!r} was added before")
        self._require_runnable(name, entry, self._gpu)
        self._files[name] = (entry, path)

    def engine(self, name: str) -> DeviceEngine:
        """See `EngineHost.engine`; a denoiser that had to give way is loaded again when it runs."""
        self._plan(name)
        return DeviceEngine(lambda: self._plan(name), self._memory, self._stream)

    def denoise(self, loop: Loop) -> NDArray[np.float32]:
        """See `EngineHost.denoise`.

        Nothing waits for the device before the end of the loop, unless the loop uses more engines than may be
        resident. `loop.on_step` is called after the end, with the seconds that the device took for each step
        (by CUDA events; waiting for an engine to load counts to the step that needs it).

        Raises:
            BackendError: an engine is not known, does not take the shapes, or failed; memory ran out.
        """
        self._begin()
        if loop.guidance_rescale:  # needs the spread of a whole output in each step, which the kernels do not have
            return host_loop(loop, self.engine)
        for name in engines_of(loop.precisions):
            self._entry(name)
        try:
            latents = self._denoise(loop)
        except BaseException:
            self._stream.rest()
            self._residents.settle()
            raise
        if loop.on_step is not None:
            for step_index, name in enumerate(loop.precisions):
                begin, end = self._events[step_index : step_index + 2]
                loop.on_step(step_index, name, end.seconds_since(begin))
        return latents

    def close(self) -> None:
        """See `EngineHost.close`; may be called twice."""
        self._closed = True
        runtime.cudaSetDevice(self._gpu.index)  # backends free on the current device
        self._owned.close()

    def _denoise(self, loop: Loop) -> NDArray[np.float32]:
        names = engines_of(loop.precisions)
        engines = [name if name in names else None for name in loop.precisions]
        residents = self._residents
        held = tuple(residents.plans)
        limit = self._limit or len({*names, *held})
        loads = plan_loads(engines, limit, held)
        self._start(loads, -1, None)
        # Where no load has to wait for a step, all are waited for before the loop; else each when it is needed.
        fits = all(load.after_step < 0 for load in loads)
        ready = [name for name in names if fits or name in residents.plans]
        device = DeviceLoop(
            loop, [(name, self._entry(name)) for name in names], self._kernels, self._memory, self._stream
        )
        prepared: dict[str, tuple[DevicePlan, DeviceContext]] = {}
        for name in ready:
            plan = residents.wait(name)
            prepared[name] = plan, device.prepare(plan)
        while len(self._events) <= len(loop.precisions):
            self._events.append(Event())
        self._events[0].record(self._stream)
        for step_index, engine in enumerate(engines):
            if engine is None:
                device.reuse(step_index)
            else:
                if engine not in prepared:
                    plan = residents.wait(engine)
                    prepared[engine] = plan, device.prepare(plan)
                device.step(step_index, *prepared[engine])
            self._events[step_index + 1].record(self._stream)
            for load in self._start(loads, step_index, self._events[step_index + 1]):
                prepared.pop(load.evicts or "", None)
        return device.result()

    def _start(self, loads: tuple[Load, ...], step_index: int, idle: Event | None) -> list[Load]:
        """Starts the loads that may begin behind a step."""
        started = [load for load in loads if load.after_step == step_index]
        for load in started:
            self._residents.start(load, idle)
        return started

    def _begin(self) -> None:
        if self._closed:
            raise BackendError("the engines were closed; open the bundle again")
        cuda(runtime.cudaSetDevice(self._gpu.index))  # the calling thread may be another one

    def _entry(self, name: str) -> EngineEntry:
        if name not in self._files:
            raise BackendError(f"no engine {name!r} was added; there are {', '.join(self._files) or 'none'}")
        return self._files[name][0]

    def _plan(self, name: str) -> DevicePlan:
        """A plan outside a loop, loaded if need be."""
        self._begin()
        if is_denoiser(self._entry(name)):
            return self._residents.get(name)
        if name not in self._others:
            self._others[name] = self._load(name)
        return self._others[name]

    def _load(self, name: str) -> DevicePlan:
        return self._load_plan(name, *self._files[name])

    def _close_events(self) -> None:
        for event in self._events:
            event.close()
        self._events.clear()

    def _close_others(self) -> None:
        for plan in self._others.values():
            plan.close()
        self._others.clear()


def is_denoiser(entry: EngineEntry) -> bool:
    """Whether an engine is one of those that a loop exchanges."""
    names = {spec.name for spec in (*entry.inputs, *entry.outputs)}
    return {LATENTS, TIMESTEP, MODEL_OUTPUT} <= names
