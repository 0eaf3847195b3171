"""Host memory: what is available, and the peak of a process with its children."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.children import start, wait_for

from tmpdiff_export import memory
from tmpdiff_export.memory import PeakMemory, host_available_bytes, size_text

MIB = 1 << 20


def test_available_memory_minds_the_control_group(tmp_path: Path) -> None:
    assert host_available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       99 kB\nMemAvailable:    1000 kB\n")
    assert host_available_bytes(tmp_path) == 1000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("4096\n")
    (group / "memory.max").write_text("max\n")
    assert host_available_bytes(tmp_path) == 1000 * 1024
    (group / "memory.max").write_text("8192\n")
    assert host_available_bytes(tmp_path) == 4096
    (group / "memory.stat").write_text("anon 96\ninactive_file 1000\nactive_file 500\nfile 3000\n")
    assert host_available_bytes(tmp_path) == 5596, "the file cache gives way"


def test_the_peak_is_kept() -> None:
    peak = PeakMemory()
    before = peak.bytes()
    block = bytearray(300 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    during = peak.bytes()
    del block
    assert before is not None
    assert during is not None
    assert peak.bytes() >= during >= before
    assert during > 300 * MIB


def test_children_and_theirs_count() -> None:
    program = "block = b'x' * (200 << 20); print(flush=True); input()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    peak = PeakMemory()
    with start([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        own = memory._status("self")
        assert own is not None
        wait_for(lambda: peak.bytes() > own[1] + 200 * MIB, child)
        child.stdin.write(b"\n")
        child.stdin.close()
        child.wait()
    assert peak.bytes() > own[1] + 200 * MIB


def test_without_proc_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert PeakMemory().bytes() is None


def test_sizes_in_words() -> None:
    assert [size_text(count) for count in (31_240_000_000, 123_000_000, 4_100_000, 0)] == [
        "31.2 GB",
        "0.1 GB",
        "4.1 MB",
        "0.0 MB",
    ]
