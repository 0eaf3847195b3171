"""The part of TMPDiff export that runs in a product: bundle, schedule, sampler, engines, runtime.

Imports numpy, pydantic and the standard library only; a backend imports its library when an
engine is loaded. Never imports torch, diffusers or transformers.
"""

from engines.bundle import Bundle
from engines.errors import TmpDiffError
from engines.runtime import DenoiseRuntime
from engines.schedule import Schedule

__all__ = ["Bundle", "DenoiseRuntime", "Schedule", "TmpDiffError"]
