"""Picture files: what they are called, whether they can be written, and writing them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import TmpDiffError
from engines.files import atomic_write_bytes, reason

if TYPE_CHECKING:
    import numpy as np

PNG = ".png"


def output_paths(out: Path, count: int) -> list[Path]:
    """One path per picture: `out` itself, or with "-0", "-1", ... before its extension."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(count)]


def write_pictures(paths: Sequence[Path], pictures: np.ndarray) -> None:
    """Writes PNG files, each atomically and only after all are encoded.

    Args:
        paths: N files.
        pictures: uint8 [N, H, W, 3].

    Raises:
        TmpDiffError: a file cannot be written.
    """
    from PIL import Image

    encoded = []
    for picture in pictures:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, format="PNG")
        encoded.append(stream.getvalue())
    for path, data in zip(paths, encoded, strict=True):
        try:
            atomic_write_bytes(path, data)
        except OSError as error:
            raise TmpDiffError(f"picture {path} cannot be written: {reason(error)}") from error
