"""Host memory: what is available, and the most that this process has taken so far. Linux's files are read."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_ROOT = Path("/")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE_BYTES = 1 << 20


def size_text(count: int) -> str:
    """A number of bytes for a message, "31.2 GB" or "4.1 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def host_available_bytes(root: Path = _ROOT) -> int | None:
    """Host memory this process may still take: the system's, or its control group's if that is less.

    Args:
        root: where `proc` and `sys` are found.

    Returns:
        Bytes, or None where Linux's files are not there.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
    group = root / "sys/fs/cgroup"
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    if limit == "max":
        return available
    left = max(int(limit) - max(int(used) - _cached_bytes(group), 0), 0)
    return left if available is None else min(available, left)


def _cached_bytes(group: Path) -> int:
    """Of a group's memory, the file cache, which gives way: files that were just written or read count as used."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))


def return_large_blocks() -> None:
    """Has memory that is freed in large blocks go back to the system at once, for the rest of the process.

    Left alone, glibc raises the size from which it does so to that of the largest block that was freed: after a layer's
    weights, those of all further layers come from a heap with gaps. Elsewhere than with glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(parameter, _LARGE_BYTES)


class PeakMemory:
    """The most memory of this process and its children together, as far as it was looked at."""

    def __init__(self) -> None:
        self._most = 0

    def bytes(self) -> int | None:
        """Looks now. The peak of this process alone is exact, that of its children is of the moments of looking.

        Returns:
            Bytes, or None where Linux's files are not there.
        """
        own = _status("self")
        if own is None:
            return None
        peak, resident = own
        children = sum((_status(pid) or (0, 0))[1] for pid in _descendants(str(os.getpid())))
        self._most = max(self._most, peak, resident + children)
        return self._most


def _status(pid: str) -> tuple[int, int] | None:
    """Peak and present resident memory of a process; None where it has gone."""
    try:
        lines = (_ROOT / "proc" / pid / "status").read_text().splitlines()
    except OSError:
        return None
    fields = {line.partition(":")[0]: line.partition(":")[2] for line in lines}
    peak, resident = (int(fields.get(name, "0").split()[0]) << 10 for name in ("VmHWM", "VmRSS"))
    return peak, resident


def _descendants(pid: str) -> list[str]:
    """Its children, and theirs; a zombie has no memory and does not matter."""
    found: list[str] = []
    pending = [pid]
    while pending:
        for task in (_ROOT / "proc" / pending.pop() / "task").glob("*/children"):
            try:
                children = task.read_text().split()
            except OSError:  # the thread has ended
                continue
            found += children
            pending += children
    return found
