"""Compiles the sampler kernels to the PTX that is shipped; needs NVRTC, but no GPU and no CUDA toolkit.

    pip install --target build/nvrtc nvidia-cuda-nvrtc-cu12==12.0.140
    python tools/release/compile_kernels.py build/nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12

An old NVRTC on purpose: PTX of a newer one is refused by drivers that are older than it.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path

from engines.files import atomic_write_text, sha256_file

ARCHITECTURE = "compute_75"  # the oldest that TensorRT 10.13 and later run on; drivers compile it for newer ones
FOLDER = Path(__file__).resolve().parents[2] / "engines" / "backends" / "cuda"


class Nvrtc:
    """The few NVRTC calls that are needed, through its C interface."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def version(self) -> str:
        """For example "12.0"."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, name: str, options: list[str]) -> str:
        """PTX of a CUDA C source.

        Raises:
            SystemExit: the source has errors; the compiler's words.
        """
        program = ctypes.c_void_p()
        self._check(
            self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        )
        try:
            values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), values)
            log = self._text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            if status:
                raise SystemExit(f"{name} does not compile:\n{log}")
            return self._text(program, "nvrtcGetPTXSize", "nvrtcGetPTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, size_call: str, text_call: str) -> str:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, size_call)(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, text_call)(program, buffer))
        return buffer.value.decode()

    def _check(self, status: int) -> None:
        if status:
            raise SystemExit(f"NVRTC failed: {self._library.nvrtcGetErrorString(status).decode()}")


def main(arguments: list[str]) -> None:
    """Writes kernels.ptx beside kernels.cu; its first line names the source's hash."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("nvrtc", type=Path, help="libnvrtc.so of a CUDA 12 wheel")
    source = FOLDER / "kernels.cu"
    nvrtc = Nvrtc(parser.parse_args(arguments).nvrtc)
    ptx = nvrtc.compile(source.read_text(), source.name, [f"--gpu-architecture={ARCHITECTURE}", "--fmad=false"])
    body = "\n".join(line.rstrip() for line in ptx.strip().splitlines())
    target = FOLDER / "kernels.ptx"
    atomic_write_text(
        target, f"// kernels.cu sha256 {sha256_file(source)}, NVRTC {nvrtc.version()}, {ARCHITECTURE}\n{body}\n"
    )
    print(f"wrote {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
