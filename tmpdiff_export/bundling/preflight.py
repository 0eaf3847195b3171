"""What a build needs and can be asked for before any work: modules, a compiler, folders to write to."""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import MANIFEST_NAME
from engines.errors import BackendError, BuildError, TmpDiffError, first_line
from engines.files import reason, require_replaceable

_EXPORT = "pip install '.[export]'"
# Imported for real: a build loads them anyway, and only so does a module that one of them misses show.
_ALWAYS = (
    "numpy",
    "pydantic",
    "tokenizers",
    "torch",
    "safetensors.torch",
    "ml_dtypes",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "accelerate",
    "transformers",
    "diffusers",
)
_BACKENDS = {
    "onnxruntime": (),
    "torch": ("torch._inductor.compile_fx", "torch._inductor.package"),
    "tensorrt": ("tensorrt", "cuda.bindings.runtime", "polygraphy.backend.trt"),
    "tensorrt-rtx": ("onnxruntime_ep_nv_tensorrt_rtx",),
}
_CUDA = {
    "onnxruntime": ("cuda.bindings.runtime",),
    "torch": ("cuda.bindings.runtime", "triton", "torch.utils.cpp_extension"),
}
_PACKAGES = {
    "cuda": "cuda-bindings",
    "cudnn": "nvidia-cudnn-frontend",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
}
"""Where the name to install is another than the module's."""


@dataclass(frozen=True)
class Needs:
    """What of a build decides which modules it loads.

    Attributes:
        backend: resolved.
        device: what the engines are for, "cpu" or "cuda".
        fp8_attention: whether any engine has its attention in FP8.
    """

    backend: str
    device: str
    fp8_attention: bool = False


def require_modules(needs: Needs) -> None:
    """Imports all that any stage of a build imports, and looks for the compilers that it starts.

    Raises:
        BuildError: a module cannot be imported; names it and what to install. Or there is no compiler.
    """
    names = [*_ALWAYS, *_BACKENDS[needs.backend]]
    if needs.device == "cuda":
        names += _CUDA.get(needs.backend, ())
        if needs.fp8_attention:
            names.append("cudnn")
    for name in names:
        _import(name)
    if needs.backend == "torch":
        _require_compilers(needs.device)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else None
        top, own = (missing or name).partition(".")[0], name.partition(".")[0]
        package = _PACKAGES.get(top, top)
        if missing is None:
            raise BuildError(
                f"building needs the module {name}, which cannot be imported ({first_line(error)}); pip install "
                f"--force-reinstall {package}"
            ) from error
        which = "is not installed" if top == own else f"cannot be imported without the module {missing}"
        raise BuildError(
            f"building needs the module {name}, which {which}; pip install {package}, or the package with its extra: {_EXPORT}"
        ) from error
    except Exception as error:  # whatever somebody else's module may raise
        raise BuildError(
            f"building needs the module {name}, which cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from error


def compiler_processes(backend: str, device: str) -> int:
    """How many processes torch starts to compile a GPU's kernels: one for each core, 32 at most, unless the user says."""
    if backend != "torch" or device == "cpu":
        return 0
    asked = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "")
    return int(asked) if asked.isdigit() else min(32, len(os.sched_getaffinity(0)))


def _require_compilers(device: str) -> None:
    """Finds what torch's compiler, and for a GPU Triton, will start.

    Raises:
        BuildError: there is none, or Python's headers are missing.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        asked = os.environ.get("CXX", "g++")
        raise BuildError(
            f"backend 'torch' needs a C++ compiler, and {asked!r} does not run; install g++, or name another in CXX"
        ) from error
    if device != "cuda":
        return
    named = os.environ.get("CC")
    if shutil.which(named) is None if named else not any(map(shutil.which, ("clang", "gcc"))):
        raise BuildError(
            f"Triton needs a C compiler, and {named or 'gcc'!r} is not there; install gcc, or name another in CC"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise BuildError(
            f"Triton compiles against Python's headers, and {headers} has no Python.h; install python3-dev"
        )


def require_folders(out: Path, onnx_dir: Path | None, *, force: bool) -> None:
    """Refuses folders that could not be written after the work, or should not be replaced; nothing is left in them.

    Args:
        out: bundle folder to make.
        onnx_dir: where ONNX files are kept, None for nowhere.
        force: whether an existing bundle may be replaced.

    Raises:
        TmpDiffError: naming the folder.
    """
    require_replaceable(out, replace=force)
    if force and out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).exists():
        raise TmpDiffError(
            f"output folder {out} is no bundle (it holds no {MANIFEST_NAME}); --force replaces bundles only"
        )
    target = Path(os.path.abspath(out))
    _require_writable("output folder", out, target.parent, f".{target.name}.")
    if onnx_dir is None:
        return
    if onnx_dir.exists() and not onnx_dir.is_dir():
        raise TmpDiffError(f"--onnx-dir {onnx_dir} is a file; name a folder")
    if Path(os.path.realpath(onnx_dir)).is_relative_to(os.path.realpath(out)):
        raise TmpDiffError(f"--onnx-dir {onnx_dir} is inside the bundle {out}; name a folder beside it")
    _require_writable("--onnx-dir", onnx_dir, Path(os.path.abspath(onnx_dir)))


def require_apart(pipeline: Path, out: Path, onnx_dir: Path | None) -> None:
    """Refuses folders that the build would remove at its end with what it was made from, or what it was asked to keep.

    Args:
        pipeline: that is built.
        out: bundle folder to make.
        onnx_dir: where ONNX files are kept, None for nowhere.

    Raises:
        TmpDiffError: the pipeline is inside the bundle, or the ONNX files would be among the stages.
    """
    if Path(os.path.realpath(pipeline)).is_relative_to(os.path.realpath(out)):
        raise TmpDiffError(f"pipeline {pipeline} is inside the bundle {out}, which would be replaced; move one of them")
    if onnx_dir is not None and Path(os.path.realpath(onnx_dir)).is_relative_to(os.path.realpath(stages_folder(out))):
        raise TmpDiffError(f"--onnx-dir {onnx_dir} is among the stages of the build; name a folder beside the bundle")


def stages_folder(out: Path) -> Path:
    """Where the stages of a build lie: a hidden folder beside the bundle."""
    target = Path(os.path.abspath(out))
    return target.parent / f".{target.name}.stages"


def existing_folder(path: Path) -> Path:
    """The path itself, or the nearest above it that exists."""
    absolute = Path(os.path.abspath(path))
    return next(folder for folder in (absolute, *absolute.parents) if os.path.lexists(folder))


def _require_writable(what: str, path: Path, folder: Path, prefix: str = ".tmpdiff-") -> None:
    """Makes a folder, where it can be made, and takes it away; its name is as long as that of `staged_folder`'s."""
    if path.is_symlink() and not path.exists():
        raise TmpDiffError(f"{what} {path} is a link to {os.readlink(path)}, which does not exist; name a folder")
    above = existing_folder(folder)
    if not above.is_dir():
        raise TmpDiffError(f"{what} {path} cannot be made: {above} is no folder; name another")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=above))
    except OSError as error:
        raise TmpDiffError(f"{what} {path} cannot be written: {above}: {reason(error)}; name another") from error


def device_of(backend: str, device: str | None) -> str:
    """What engines are for, "cpu" or "cuda", where `device` was asked for.

    Raises:
        BackendError: there is no such backend.
    """
    if backend not in _BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; this release has {', '.join(_BACKENDS)}")
    return device or ("cpu" if backend == "onnxruntime" else "cuda")
