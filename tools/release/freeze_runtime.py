"""Freezes `tmpdiff-runtime` with the ONNX Runtime CPU backend into one executable (PyInstaller).

    python tools/release/freeze_runtime.py --out build/runtime

The executable runs where no Python is installed; of the host it takes glibc (at least as new as here)
and libz. It unpacks itself into a folder below TMPDIR (or /tmp) at every start, so what it holds is kept
small: of the installed packages only `KEPT` goes in, without the parts in `LEFT_OUT`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = "tmpdiff-runtime"
ROOT = Path(__file__).resolve().parents[2]
GOAL_MB = 90.0
GOAL_START_SECONDS = 1.0
STARTS = 7

KEPT = {
    "PIL",
    "annotated_types",
    "engines",
    "numpy",
    "onnxruntime",
    "pydantic",
    "pydantic_core",
    "tokenizers",
    "typing_extensions",
    "typing_inspection",
}
# Of the standard library: user interfaces, network, compression, databases, tests. Of Pillow: everything but
# PNG; it skips plugins that are not there. Of the others: their tools.
LEFT_OUT = """
_bz2 _curses _lzma _sqlite3 _ssl asyncio bz2 curses doctest ftplib lib2to3 lzma multiprocessing pdb pydoc pydoc_data
pyexpat readline sqlite3 ssl tkinter unittest xml xmlrpc
PIL.AvifImagePlugin PIL.BmpImagePlugin PIL.GifImagePlugin PIL.ImageFont PIL.ImageQt PIL.ImageShow PIL.ImageTk
PIL.JpegImagePlugin PIL.PpmImagePlugin PIL.WebPImagePlugin PIL._avif PIL._imagingcms PIL._imagingft PIL._imagingtk
PIL._webp
numpy.ctypeslib numpy.f2py numpy.fft numpy.ma numpy.polynomial numpy.testing
onnxruntime.backend onnxruntime.datasets onnxruntime.quantization onnxruntime.tools onnxruntime.training
onnxruntime.transformers
pydantic.deprecated pydantic.mypy pydantic.v1
tokenizers.tools tokenizers.trainers
"""

# What is compressed inside the executable. Measured on 2 busy cores, everything compressed: 40 MB, 0.66 s of
# CPU time to start; extension modules as they are: 79 MB, 0.45 s; nothing compressed: 113 MB, 0.31 s.
COMPRESSED = {"BINARY": True, "DATA": True, "ZIPFILE": True, "EXTENSION": False}

SPEC = """
from freeze_runtime import stripped

analysis = Analysis([{entry!r}], pathex=[{root!r}], excludes={excludes!r}, optimize=2)
analysis.binaries = [(name, stripped(name, source, {work!r}), kind) for name, source, kind in analysis.binaries]
EXE(
    PYZ(analysis.pure), analysis.scripts, analysis.binaries, analysis.datas,
    name={name!r}, cdict={compressed!r}, upx=False, console=True,
)
"""


def main() -> int:
    """Returns 0 when the executable was made, whether or not it meets the goals."""
    parser = argparse.ArgumentParser(description="Freezes tmpdiff-runtime into one executable.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"folder to put {PROGRAM} into")
    executable = freeze(parser.parse_args().out)
    size_mb = executable.stat().st_size / 1e6
    seconds, cpu_seconds = start_seconds(executable)
    print(f"executable: {executable}")
    print(f"size: {size_mb:.1f} MB (goal {GOAL_MB:.0f} MB: {_verdict(size_mb, GOAL_MB)})")
    print(
        f"start-up: {seconds:.2f} s, median of {STARTS} warm runs of --version, {cpu_seconds:.2f} s of it CPU time "
        f"(goal {GOAL_START_SECONDS:.0f} s: {_verdict(seconds, GOAL_START_SECONDS)})"
    )
    return 0


def freeze(out: Path) -> Path:
    """Builds the executable in a scratch folder and moves it into `out`.

    Returns:
        The path of the executable.

    Raises:
        SystemExit: PyInstaller failed, or what it made does not start; its log is on stderr.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".freeze.", dir=out) as scratch:
        work = Path(scratch).resolve()
        spec = work / "runtime.spec"
        spec.write_text(
            SPEC.format(
                entry=str(ROOT / "engines" / "__main__.py"),
                root=str(ROOT),
                excludes=sorted({*LEFT_OUT.split(), *foreign_packages()}),
                work=str(work),
                name=PROGRAM,
                compressed=COMPRESSED,
            )
        )
        folders = ["--distpath", str(work / "dist"), "--workpath", str(work / "build")]
        _checked(
            [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN", *folders, str(spec)],
            {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYINSTALLER_CONFIG_DIR": str(work / "cache")},
        )
        made = work / "dist" / PROGRAM
        _checked([str(made), "--version"], {})
        executable = out / PROGRAM
        os.replace(made, executable)
    return executable


def start_seconds(executable: Path) -> tuple[float, float]:
    """What a start costs: `executable --version` in an empty environment, from start to end, after a warm-up run.

    Returns:
        Median seconds on the clock and median seconds of CPU time.
    """
    times, cpu_times = [], []
    for _ in range(STARTS + 1):
        begin, cpu_begin = time.perf_counter(), _children_cpu_seconds()
        subprocess.run([str(executable.resolve()), "--version"], env={}, check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
        cpu_times.append(_children_cpu_seconds() - cpu_begin)
    return statistics.median(times[1:]), statistics.median(cpu_times[1:])


def stripped(name: str, source: str, work: str) -> str:
    """The path of a copy of a library without symbols, or `source` where that cannot be had.

    Libraries that a wheel carries in `<package>.libs` were relinked by auditwheel; `strip` makes some of
    them unloadable, so they stay as they are.
    """
    tool = shutil.which("strip")
    if tool is None or Path(name).parts[0].endswith(".libs"):
        return source
    target = Path(work, "stripped", name)
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([tool, "--strip-unneeded", "-o", str(target), source], capture_output=True, check=False)
    return str(target) if done.returncode == 0 else source


def foreign_packages() -> set[str]:
    """Top-level modules of every installed distribution that the runtime does not use."""
    return {name for name in importlib.metadata.packages_distributions() if name.isidentifier()} - KEPT


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _checked(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stdout + done.stderr)
        raise SystemExit(
            f"freezing failed: {Path(command[0]).name} left with status {done.returncode}; its log is above"
        )


def _verdict(value: float, goal: float) -> str:
    return "met" if value <= goal else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
