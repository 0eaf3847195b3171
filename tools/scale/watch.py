"""Runs a command and watches what it takes: memory of its process tree, device memory, seconds of its stages."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 0.1
"""Between two looks at the memory."""
NOTE_SECONDS = 5.0
_KINDS = ("RssAnon", "RssFile", "RssShmem")
_MOST = "VmHWM"
_LINE = re.compile(r"^(\d+) s: (.*), \d+ of \d+, (\d+) s in it")


@dataclass
class Peaks:
    """The most that was seen at any moment, in bytes; shared pages count once per process.

    Attributes:
        total: anonymous, file and shared memory together, resident.
        anonymous: of it, what no file stands behind.
        file: of it, what a file stands behind.
        one_process: of the process that took most, by the kernel's own count (VmHWM), which misses no moment. Not
            `ru_maxrss`: that of a child is at least what this process had when it made it.
        device: device memory of all processes on the GPU, above what was taken before; None without a GPU.
    """

    total: int = 0
    anonymous: int = 0
    file: int = 0
    one_process: int = 0
    device: int | None = None

    def look(self, root: int, proc: Path = Path("/proc")) -> None:
        """Looks at the process `root` and its descendants."""
        sums = dict.fromkeys(_KINDS, 0)
        for process in tree(root, proc):
            found = resident(process, proc)
            self.one_process = max(self.one_process, found.pop(_MOST, 0))
            for kind, size in found.items():
                sums[kind] += size
        self.total = max(self.total, sum(sums.values()))
        self.anonymous = max(self.anonymous, sums["RssAnon"])
        self.file = max(self.file, sums["RssFile"])


def tree(root: int, proc: Path = Path("/proc")) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [root]
    while left:
        process = left.pop()
        found.append(process)
        left += children.get(process, [])
    return found


def resident(process: int, proc: Path = Path("/proc")) -> dict[str, int]:
    """Resident bytes of a process by kind, and the most it had; none of one that has ended."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in (proc / str(process) / "status").read_text().splitlines())
        return {words[0][:-1]: int(words[1]) << 10 for words in lines if words and words[0][:-1] in (*_KINDS, _MOST)}
    return {}


@dataclass
class Attempt:
    """A command that was started.

    Attributes:
        command: its words.
        seconds: wall time.
        peaks: of memory.
        stages: seconds by stage, as far as its progress tells.
        status: its exit status; None while it runs, or when this tool was killed before it ended.
        output: what it wrote to stdout.
        errors: the end of what it wrote to stderr.
    """

    command: list[str]
    seconds: float = 0.0
    peaks: Peaks = field(default_factory=Peaks)
    stages: dict[str, float] = field(default_factory=dict)
    status: int | None = None
    output: str = ""
    errors: str = ""

    def data(self) -> dict[str, Any]:
        """For the result file."""
        failed = self.status not in (None, 0)
        return {
            "seconds": self.seconds,
            "status": self.status,
            "peak_bytes": dict(vars(self.peaks)),
            "stages_s": self.stages,
            **({"errors": self.errors.splitlines()[-12:]} if failed else {}),
        }


def watched(
    words: Sequence[str], note: Callable[[Attempt], None], seconds_limit: float | None = None, gpu: bool = False
) -> Attempt:
    """Runs a command to its end.

    Args:
        words: of the command.
        note: called every few seconds, and at the end.
        seconds_limit: after so many it is asked to end (SIGTERM), and a minute later killed.
        gpu: whether to look at the device's memory as well.
    """
    attempt = Attempt(list(words))
    begun = noted = time.perf_counter()
    # A group of its own, so that whatever it has started ends with it.
    process = subprocess.Popen(
        list(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines: list[str] = []
    output: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=lambda: output.extend(iter(process.stdout.readline, ""))),  # type: ignore[union-attr]
        threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, ""))),  # type: ignore[union-attr]
    ]
    for reader in readers:
        reader.start()
    with device_memory() if gpu else contextlib.nullcontext() as device:
        while True:
            ended, status = os.waitpid(process.pid, os.WNOHANG)
            attempt.seconds = time.perf_counter() - begun
            if ended:
                process.returncode = attempt.status = os.waitstatus_to_exitcode(status)
                break
            attempt.peaks.look(process.pid)
            if seconds_limit is not None and attempt.seconds > seconds_limit:
                kill = attempt.seconds > seconds_limit + 60.0
                os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
                seconds_limit = None if kill else max(seconds_limit, attempt.seconds + 1.0)
            if time.perf_counter() - noted > NOTE_SECONDS:
                noted = time.perf_counter()
                attempt.stages = stages_of(lines, attempt.seconds)
                attempt.peaks.device = None if device is None else device()
                note(attempt)
            time.sleep(SECONDS)
        attempt.peaks.device = None if device is None else device()
    for reader in readers:
        reader.join()
    attempt.stages = stages_of(lines, attempt.seconds)
    attempt.output, attempt.errors = "".join(output), "".join(line for line in lines if not _LINE.match(line))
    note(attempt)
    return attempt


def stages_of(lines: Iterable[str], seconds: float) -> dict[str, float]:
    """Seconds by stage, in their order, from lines of progress; up to `seconds` for the last one."""
    begins: list[tuple[float, str]] = []
    for line in lines:
        match = _LINE.match(line)
        if match and (not begins or begins[-1][1] != match[2]):
            begins.append((float(match[1]) - float(match[3]), match[2]))
    found: dict[str, float] = {}
    for (begin, stage), (end, _) in itertools.pairwise([*begins, (seconds, "")]):
        found[stage] = found.get(stage, 0.0) + max(end - begin, 0.0)
    return found


@contextlib.contextmanager
def device_memory() -> Iterator[Callable[[], int | None]]:
    """A function that says how much device memory was taken at most since the block began, above what was then."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"  # the one that commands use
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}", "-lms", "200"]
    seen: list[int] = []
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield lambda: None
        return

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit():
                seen.append(int(line) << 20)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield lambda: max(seen) - seen[0] if seen else None
    finally:
        process.terminate()
        process.wait()
        thread.join()
