"""TensorRT's build phases as calls of a plain callback, and Ctrl-C that ends a build cleanly."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from engines.backends.tensorrt.bindings import trt

# (stage, steps done, steps in all): stages nest as "Building engine > Compiling graph".
ProgressCallback = Callable[[str, int, int], None]


class BuildProgress(trt.IProgressMonitor):
    """Hands every completed step to a callback.

    TensorRT calls it from its threads, through code that no exception may pass. What the callback
    raises is kept, the build told to stop, and the exception raised by `raise_stopped` afterwards.
    """

    def __init__(self, callback: ProgressCallback | None) -> None:
        trt.IProgressMonitor.__init__(self)
        self._callback = callback
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str, int]] = {}  # phase -> (stage, steps)
        self._stopped: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT."""
        with self._lock:
            parent, _ = self._phases.get(parent_phase or "", ("", 0))
            self._phases[phase_name] = (f"{parent} > {phase_name}" if parent else phase_name, num_steps)
        self._report(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by TensorRT; False ends the build."""
        return self._report(phase_name, step + 1)

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT, also when steps were skipped."""
        with self._lock:
            self._phases.pop(phase_name, None)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it, Ctrl-C ends the build at the next step instead of raising wherever Python code runs.

        The logger's `log` is such a place, and an exception from there would end the process.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are handled in the main thread only
            return
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def raise_stopped(self) -> None:
        """Raises what stopped the build, if anything did."""
        if self._stopped is not None:
            raise self._stopped

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._stopped = self._stopped or KeyboardInterrupt()

    def _report(self, phase_name: str, done: int) -> bool:
        with self._lock:
            stage, steps = self._phases.get(phase_name, (phase_name, done))
            if self._callback is not None and self._stopped is None:
                try:
                    self._callback(stage, done, steps)
                except BaseException as error:
                    self._stopped = error
            return self._stopped is None
