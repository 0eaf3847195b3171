"""Puts the TensorRT Python bindings that the tests check the code against into a folder; needs no GPU.

    python tools/release/fetch_bindings.py --into FOLDER

makes, of what is not there yet,

    FOLDER/<version>/        tensorrt and tensorrt_bindings, without their libraries: the API, nothing can be built
    FOLDER/lean-<version>/   tensorrt_lean with its libraries: a runtime that loads on any x86-64 Linux
    FOLDER/rtx-<version>/    TensorRT for RTX with its libraries: a builder that needs no GPU, behind TensorRT's API
    .../typing/tensorrt/     type stubs of each, made from the docstrings
    FOLDER/stubs/            empty shared libraries that let the bindings load

and prints the names of the folders with TensorRT's own bindings. To look at the API of one version:

    LD_LIBRARY_PATH=FOLDER/stubs PYTHONPATH=FOLDER/<version> python -c 'import tensorrt; help(tensorrt.Builder)'
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FULL_VERSIONS = ("10.13.2.6", "10.16.1.11", "11.4.0.106")
LEAN_VERSION = "11.4.0.106"
RTX_VERSION = "1.7.1.116"

FULL_PACKAGES = ("tensorrt-cu13-bindings",)
LEAN_PACKAGES = ("tensorrt-lean-cu13-bindings", "tensorrt-lean-cu13-libs")
RTX_PACKAGES = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")

STUBS = "stubs"
STUB_LIBRARIES = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": ("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion"),
}
GENERATOR = Path(__file__).with_name("bindings_typing.py")

# As the packages `tensorrt`, `tensorrt_lean` and `tensorrt_rtx` have it, which cannot be installed without their
# libraries.
FRONTEND = "from {0}_bindings import *\nfrom {0}_bindings import __version__\n"


class SetupError(RuntimeError):
    """Something could not be made; the message is one line."""


def main() -> int:
    """Returns 0 when everything is there, 1 when something could not be made."""
    parser = argparse.ArgumentParser(description="Puts the TensorRT Python bindings for the tests into a folder.")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="folder to make them in")
    folder: Path = parser.parse_args().into.resolve()
    try:
        make_all(folder)
    except (SetupError, OSError) as error:
        print(f"fetch_bindings: {error}", file=sys.stderr)
        return 1
    return 0


def make_all(folder: Path) -> None:
    """Makes what is not in `folder` yet; each part is moved into place when it is whole.

    Raises:
        SetupError: a package could not be had, or there is no C compiler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_stub_libraries(folder)
    for name, module, packages, version in [
        *((version, "tensorrt", FULL_PACKAGES, version) for version in FULL_VERSIONS),
        (f"lean-{LEAN_VERSION}", "tensorrt_lean", LEAN_PACKAGES, LEAN_VERSION),
    ]:
        install(folder / name, module, packages, version)
        make_typing(folder, folder / name, f"{module}_bindings")
        print(name)
    install(folder / f"rtx-{RTX_VERSION}", "tensorrt_rtx", RTX_PACKAGES, RTX_VERSION)


def make_stub_libraries(folder: Path) -> None:
    """Builds shared libraries that export what the bindings link to; calling any of it does nothing."""
    if (folder / STUBS).exists():
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SetupError("building the stub libraries needs a C compiler; found neither cc nor gcc; install gcc")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / STUBS
        made.mkdir()
        for library, symbols in STUB_LIBRARIES.items():
            source = Path(work) / f"{library}.c"
            source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
            for major in sorted({version.split(".")[0] for version in FULL_VERSIONS}):
                name = f"lib{library}.so.{major}"
                command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(made / name), str(source)]
                _run(command, f"{compiler} could not build {name}")
        made.rename(folder / STUBS)


def install(place: Path, module: str, packages: tuple[str, ...], version: str) -> None:
    """Installs wheels without what they depend on, and the module that users import."""
    if place.exists():
        return
    with tempfile.TemporaryDirectory(dir=place.parent) as work:
        made = Path(work) / place.name
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        wanted = [f"{package}=={version}" for package in packages]
        _run([*pip, "--only-binary=:all:", "--target", str(made), *wanted], f"cannot install {' '.join(wanted)}")
        (made / module).mkdir()
        (made / module / "__init__.py").write_text(FRONTEND.format(module))
        made.rename(place)


def make_typing(folder: Path, place: Path, module: str) -> None:
    """Writes the type stubs of an installed module; again when the generator has changed since."""
    stubs = place / "typing" / "tensorrt" / "__init__.pyi"
    if stubs.exists() and stubs.stat().st_mtime > GENERATOR.stat().st_mtime:
        return
    text = _run(
        [sys.executable, str(GENERATOR), module],
        f"cannot make the type stubs of {place.name}",
        {"LD_LIBRARY_PATH": str(folder / STUBS), "PYTHONPATH": str(place)},
    )
    stubs.parent.mkdir(parents=True, exist_ok=True)
    partial = stubs.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(stubs)


def _run(command: list[str], failure: str, environment: dict[str, str] | None = None) -> str:
    """Runs a command and returns what it printed.

    Raises:
        SetupError: `failure`, and the last line that the command wrote to stderr.
    """
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise SetupError(f"{failure}: {words[-1] if words else f'exit status {done.returncode}'}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
