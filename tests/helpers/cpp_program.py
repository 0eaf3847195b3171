"""The C++ program that runs packages without Python, compiled for the CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

from helpers.paths import ROOT


def compile_program(program: Path, *operators: str) -> None:
    """Compiles run_package.cpp, with the sources in tools/cpp of the operators that packages may call."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    sources = [str(ROOT / "tools" / "cpp" / name) for name in ("run_package.cpp", *operators)]
    folders = [f"-I{path}" for path in include_paths()]
    libraries = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = ["g++", "-std=c++20", "-O0", abi, *folders, *sources, "-o", str(program), *libraries]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
