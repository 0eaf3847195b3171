"""The tactic timings of earlier builds, kept in one file per TensorRT version and GPU.

Polygraphy can load and save timing caches too, but fails on a corrupt file, where only time is lost.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from engines.backends.cuda.gpu import Gpu
from engines.backends.tensorrt.bindings import trt
from engines.backends.tensorrt.messages import LOG
from engines.backends.tensorrt.plan_store import locked
from engines.files import atomic_write_bytes


def timing_cache_path(folder: Path, version: str, gpu: Gpu) -> Path:
    """The file for this TensorRT version and GPU in `folder`; TensorRT itself refuses timings of another."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu.name).strip("-")
    return folder / f"timing-{version}-{name}-{gpu.architecture}.cache"


def load_timing_cache(path: Path, config: trt.IBuilderConfig) -> str | None:
    """Adds the timings in `path` to those of `config`, which has a timing cache already.

    Returns:
        What to warn of: the file cannot be used, the build starts without it. None if all is well, or
        there is no file yet.
    """
    try:
        with locked(path):
            return _merge(path, config)
    except OSError as error:
        return f"timing cache {path} cannot be used ({error.strerror}); building without it"


def save_timing_cache(path: Path, config: trt.IBuilderConfig) -> str | None:
    """Writes the timings of `config` to `path`, together with what others have written there meanwhile.

    Returns:
        What to warn of: the file could not be written. Timings are never worth failing a build for.
    """
    try:
        with locked(path):
            _merge(path, config)  # a file that cannot be read was warned of when loading, and is replaced
            if (cache := config.get_timing_cache()) is not None:
                atomic_write_bytes(path, memoryview(cache.serialize()))
    except OSError as error:
        return f"timing cache {path} cannot be written ({error.strerror}); the next build takes as long as this one"
    return None


def _merge(path: Path, config: trt.IBuilderConfig) -> str | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    before = len(LOG.errors), len(LOG.warnings)
    found, cache = None, config.get_timing_cache()
    with contextlib.suppress(TypeError, RuntimeError, ValueError):  # what pybind makes of a null or an exception
        found = config.create_timing_cache(data)
    merged = found is not None and cache is not None and cache.combine(found, False)
    # TensorRT may also give an empty cache and warn "Failed to deserialize timing cache". Nothing of this is the
    # build's.
    words = [*LOG.errors[before[0] :], *LOG.warnings[before[1] :]]
    del LOG.errors[before[0] :], LOG.warnings[before[1] :]
    if merged and not words:
        return None
    why = " | ".join(words) or "refused"
    return f"timing cache {path} is corrupt or of another TensorRT or GPU ({why}); starting a fresh one"
