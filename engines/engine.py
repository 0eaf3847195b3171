"""What an engine is: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

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
