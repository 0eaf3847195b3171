"""The part of TMPDiff export that runs in a product: bundle, schedule, sampler, engines, runtime.

Imports numpy, pydantic and the standard library only; a backend imports its library when an
engine is loaded. Never imports torch, diffusers or transformers. The names below are imported when
they are first used, so that a command line that needs none of them starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from engines.errors import TmpDiffError
    from engines.runtime import DenoiseRuntime
    from engines.schedule import Schedule

__all__ = ["Bundle", "DenoiseRuntime", "Schedule", "TmpDiffError"]

_MODULES = {
    "Bundle": "engines.bundle",
    "DenoiseRuntime": "engines.runtime",
    "Schedule": "engines.schedule",
    "TmpDiffError": "engines.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
