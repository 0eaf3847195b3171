"""What an engine is: named arrays in, named arrays out. What a host is: the engines of a bundle on a device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engines.loop import Loop
    from engines.manifest import EngineEntry

Arrays = Mapping[str, np.ndarray]


class Engine(Protocol):
    """A loaded model that runs on some device.

    `run` takes host arrays by input name (dtypes as in the manifest, any batch size) and returns new
    host arrays by output name, owned by the caller. An engine is not thread-safe.
    """

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """One inference.

        Raises:
            BackendError: an input is missing, of the wrong dtype or shape, or the backend failed.
        """
        ...


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
