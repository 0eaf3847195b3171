"""Reads shapes, colours and positions from the pixels of a picture, and compares them with its caption.

It knows nothing of how the picture was made: a picture is segmented by its distance from the background in CIELAB
(scikit-image), and every connected region is named by its median colour, its centroid and the overlap of its outline
with the five shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from skimage.color import rgb2lab
from skimage.measure import label, regionprops
from skimage.morphology import erosion, footprint_rectangle
from skimage.transform import resize

from tmpdiff_export.demo.drawing import cell_centre, distances
from tmpdiff_export.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    parse_caption,
)  # fmt: skip

_FOREGROUND_DELTA_E = 26.0
"""CIELAB distance from the background above which a pixel belongs to an object; shadows stay below it."""
_SMALLEST_AREA = 150
_OFF_CELL = IMAGE_SIZE / 9
"""Centroids farther than this from every cell's centre, in pixels, stand in no cell."""
_TEMPLATE = 32


@dataclass(frozen=True)
class Reading:
    """What a picture shows; an object in no cell has position None, a colour like none has colour "unknown"."""

    objects: tuple[SceneObject, ...]
    background: str


@dataclass(frozen=True)
class Verdict:
    """Which promises of a caption its picture keeps, each for all named objects together.

    A picture that shows more or fewer objects than the caption names keeps none of the first four.
    """

    colour: bool
    position: bool
    shape: bool
    size: bool
    background: bool

    @property
    def colour_and_position(self) -> bool:
        """Whether every named object was found with its colour at its position."""
        return self.colour and self.position


def read_picture(picture: np.ndarray) -> Reading:
    """Reads the objects of a picture.

    Args:
        picture: [256, 256, 3], uint8 sRGB.

    Returns:
        The objects, largest first, and the background's name.

    Raises:
        ValueError: If `picture` has another shape or dtype.
    """
    if picture.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or picture.dtype != np.uint8:
        raise ValueError(
            f"picture is {picture.dtype} {list(picture.shape)}; expected uint8 [{IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )
    lab = rgb2lab(picture)
    ground = np.median(lab.reshape(-1, 3), axis=0)
    regions = regionprops(label(np.linalg.norm(lab - ground, axis=2) > _FOREGROUND_DELTA_E))
    regions = sorted((r for r in regions if r.area >= _SMALLEST_AREA), key=lambda r: -r.area)
    return Reading(tuple(_name(region, lab) for region in regions), _nearest(ground, BACKGROUNDS))


def judge(reading: Reading, caption: str | Scene) -> Verdict:
    """Compares a reading with what a caption promises.

    Args:
        reading: What the picture shows.
        caption: A caption of the grammar, or its scene.

    Returns:
        The verdict under the pairing of named and seen objects that agrees best; what the caption leaves open
        counts as right.
    """
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    background = scene.background in (None, reading.background)
    if len(reading.objects) != len(scene.objects):
        return Verdict(False, False, False, False, background)
    fields = ("colour", "position", "shape", "size")
    candidates = [
        {
            field: all(getattr(o, field) in (None, getattr(s, field)) for o, s in zip(scene.objects, seen, strict=True))
            for field in fields
        }
        for seen in permutations(reading.objects)
    ]
    return Verdict(**max(candidates, key=lambda kept: sum(kept.values())), background=background)


def score(pictures: Iterable[np.ndarray], captions: Iterable[str]) -> dict[str, float]:
    """Returns the fraction of pictures that keep each promise of `Verdict`, by its field's name."""
    verdicts = [judge(read_picture(p), c) for p, c in zip(pictures, captions, strict=True)]
    fields = ("colour_and_position", "colour", "position", "shape", "size", "background")
    return {field: float(np.mean([getattr(v, field) for v in verdicts])) for field in fields}


def _name(region: Any, lab: np.ndarray) -> SceneObject:
    top, left, bottom, right = region.bbox
    core = erosion(np.pad(region.image, 1), footprint_rectangle((5, 5)))[1:-1, 1:-1]
    core = core if core.any() else region.image
    colour = np.median(lab[top:bottom, left:right][core], axis=0)
    cells = {p: np.subtract((region.centroid[1], region.centroid[0]), cell_centre(p)) for p in POSITIONS}
    position = min(cells, key=lambda p: float(np.linalg.norm(cells[p])))
    outline = resize(region.image.astype(float), (_TEMPLATE, _TEMPLATE), anti_aliasing=False) > 0.5
    overlaps = {s: (outline & t).sum() / (outline | t).sum() for s, t in _templates().items()}
    radius = max(bottom - top, right - left) / 2
    return SceneObject(
        colour=_nearest(colour, COLOURS, limit=45.0),
        shape=max(overlaps, key=lambda s: float(overlaps[s])),
        size=min(SIZES, key=lambda s: abs(SIZES[s] - radius)),
        position=position if np.linalg.norm(cells[position]) <= _OFF_CELL else None,
    )


def _nearest(colour: np.ndarray, names: dict[str, tuple[float, float, float]], limit: float = np.inf) -> str:
    """The name nearest to a CIELAB colour, or "unknown"; lightness counts for less, as shading changes it."""
    gaps = {n: float(np.linalg.norm((rgb2lab([[rgb]])[0, 0] - colour) * (0.6, 1, 1))) for n, rgb in names.items()}
    name = min(gaps, key=lambda n: gaps[n])
    return name if gaps[name] <= limit else "unknown"


@cache
def _templates() -> dict[str, np.ndarray]:
    """Masks [32, 32] of the shapes, each stretched to fill its bounding box, as `_name` stretches regions."""
    axis = np.linspace(-1.3, 1.3, 257)
    masks = [d < 0 for d in distances(axis[None, :], axis[:, None], 1.0, np)]
    boxes = [m[np.ix_(m.any(1), m.any(0))].astype(float) for m in masks]
    return {s: resize(b, (_TEMPLATE, _TEMPLATE)) > 0.5 for s, b in zip(SHAPES, boxes, strict=True)}
