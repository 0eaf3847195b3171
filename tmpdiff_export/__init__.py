"""TMPDiff export: build quantized engines of a diffusion pipeline and calibrate which step runs at which.

`build`, `attach` and `detach` import torch and diffusers when they are first used.
"""

from __future__ import annotations

from typing import Any

from engines.version import VERSION as __version__

__all__ = ["BuildOptions", "__version__", "attach", "build", "detach"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from tmpdiff_export.bundling.bundle import build

        return build
    if name == "BuildOptions":
        from tmpdiff_export.bundling.options import BuildOptions

        return BuildOptions
    if name in ("attach", "detach"):
        from tmpdiff_export.drop_in import attach as diffusers_attach

        return getattr(diffusers_attach, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
