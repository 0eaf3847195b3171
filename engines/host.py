"""What a host is: the engines of one bundle on a device, and the loop over them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.engine import Engine
from engines.loop import Loop
from engines.manifest import EngineEntry


class EngineHost(Protocol):
    """The engines of one opened bundle on one device, and what they share there.

    Engines are added by name, loaded when first needed, and swapped by name. Not thread-safe.
    """

    def add(self, name: str, entry: EngineEntry, path: Path) -> None:
        """Makes an engine known; loads nothing.

        Args:
            name: a precision for a denoiser, any other name for text encoder and VAE decoder.
            entry: its manifest entry.
            path: its file, whose hash has been checked.
        """
        ...

    def engine(self, name: str) -> Engine:
        """An added engine, loaded at its first use.

        Raises:
            BackendError: the backend refuses the file or the device.
        """
        ...

    def denoise(self, loop: Loop) -> NDArray[np.float32]:
        """Runs a denoising loop over added engines.

        Returns:
            Final latents, float32 [N, C, h, w], owned by the caller.

        Raises:
            BackendError: an engine is not available or failed.
        """
        ...

    def close(self) -> None:
        """Frees what the engines hold on the device; the host and its engines cannot be used after it."""
        ...
