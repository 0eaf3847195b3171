"""Child processes that tests send signals to, and waiting for what they do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil


class Child(subprocess.Popen[Any]):
    """A child that is killed where its block is left."""

    def __exit__(self, *error: Any) -> None:
        self.kill()
        super().__exit__(*error)


def start(words: list[Any], **options: Any) -> Child:
    """A child with SIGINT, SIGTERM and SIGHUP at their defaults.

    Started by nohup, or in the background of a shell without job control, the suite inherits ignored signals, and so
    would its children.

    Args:
        words: the command; made strings.
        options: of `subprocess.Popen`.
    """
    return Child(["env", "--default-signal=INT,TERM,HUP", *map(str, words)], **options)


def wait_for(condition: Callable[[], Any], child: Child | None = None) -> None:
    """Returns once the condition holds; the test fails once the child has ended without.

    There is no other limit than pytest's on every test, so that a busy machine fails none.
    """
    while not condition():
        ended = child is not None and child.poll() is not None
        assert not ended or condition(), f"the child has ended: {child.communicate()}"  # type: ignore[union-attr]
        time.sleep(0.02)


def cpu_seconds(child: Child) -> float:
    """What a child and its own children have computed; a busy machine does not lengthen it."""
    process = psutil.Process(child.pid)
    times = [item.cpu_times() for item in (process, *process.children(recursive=True))]
    return sum(item.user + item.system for item in times)
