"""TensorRT's logger, kept so that its words reach the user's error message."""

from __future__ import annotations

from engines.backends.tensorrt.bindings import trt
from engines.errors import BackendError

_KEPT = 64


class MessageLog(trt.ILogger):
    """Collects errors and warnings; of the one in this process, `LOG`, everything is made.

    TensorRT reports most failures by returning None or False and logging why, and some (a Runtime
    without a usable GPU) by logging only: after each call that can fail so, look at `errors`.
    """

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any of its threads; must not raise."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            target = self.errors
        elif severity == trt.ILogger.Severity.WARNING:
            target = self.warnings
        else:
            return
        if len(target) < _KEPT:
            target.append(" ".join(msg.split()))

    def clear(self) -> None:
        """Forgets what was said so far."""
        self.errors.clear()
        self.warnings.clear()

    def words(self) -> str:
        """The errors so far in one line, the first first, and forgets them; "" if there are none."""
        words = " | ".join(dict.fromkeys(self.errors))
        self.errors.clear()
        return words

    def fail(self, what: str, how: str) -> BackendError:
        """The error to raise: what failed, TensorRT's words, and how to fix it."""
        return BackendError(f"{what}: {self.words() or 'TensorRT gave no reason'}; {how}")

    def check(self, what: str, how: str) -> None:
        """Raises if an error was logged since the last look.

        Raises:
            BackendError: with TensorRT's words.
        """
        if self.errors:
            raise self.fail(what, how)


LOG = MessageLog()
"""TensorRT goes on using the first logger it was given, also for objects made with another: so there is one."""
