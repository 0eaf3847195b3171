"""Draws scenes as pictures: shaded shapes with soft edges and shadows on uneven backgrounds.

Written once for numpy and torch: `draw` takes the array module, so that training renders on a GPU what tests render
on the CPU. What captions do not name (jitter, gradients, ripples) is drawn at random by `place`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmpdiff_export.demo.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, SIZES, Scene

JITTER = 3.0
"""Largest distance of an object's centre from its cell's centre, in pixels along each axis."""

_OBJECTS = 2


def cell_centre(position: str) -> tuple[float, float]:
    """Returns (x, y) of a grid cell's centre, in pixels from the top left."""
    row, column = divmod(POSITIONS.index(position), 3)
    return (column + 0.5) * IMAGE_SIZE / 3, (row + 0.5) * IMAGE_SIZE / 3


def place(scenes: Sequence[Scene], seed: int) -> dict[str, np.ndarray]:
    """Turns scenes into the numbers that `draw` needs, with everything unnamed drawn at random.

    Args:
        scenes: n scenes with size, position and background named.
        seed: Same seed, same numbers.

    Returns:
        float32 arrays, each with leading length n: `centre` [n, 2, 2] as (x, y) and `radius` [n, 2] in pixels,
        `shape` [n, 2, 5] one-hot over `SHAPES` and zero for an absent object, `colour` [n, 2, 3], `background`
        [n, 3], `slope` [n, 2], `ripple` [n, 4].

    Raises:
        ValueError: If a scene leaves its background, a size or a position open.
    """
    rng = np.random.default_rng(seed)
    n = len(scenes)
    shape = np.zeros((n, _OBJECTS, len(SHAPES)))
    centre, radius = np.zeros((n, _OBJECTS, 2)), np.ones((n, _OBJECTS))
    colour, background = np.zeros((n, _OBJECTS, 3)), np.zeros((n, 3))
    for i, scene in enumerate(scenes):
        if scene.background is None:
            raise ValueError(f"{scene} cannot be drawn: it names no background; expected one of {list(BACKGROUNDS)}")
        background[i] = BACKGROUNDS[scene.background]
        for k, o in enumerate(scene.objects):
            if o.size is None or o.position is None:
                raise ValueError(f"{o} cannot be drawn: expected a size of {list(SIZES)} and a position")
            shape[i, k, SHAPES.index(o.shape)] = 1
            centre[i, k], radius[i, k], colour[i, k] = cell_centre(o.position), SIZES[o.size], COLOURS[o.colour]
    arrays = {
        "centre": centre + rng.uniform(-JITTER, JITTER, centre.shape),
        "radius": radius * rng.uniform(0.95, 1.05, radius.shape),
        "shape": shape,
        "colour": colour,
        "background": background,
        "slope": rng.uniform(-0.06, 0.06, (n, 2)),
        "ripple": np.stack(
            [rng.uniform(low, high, n) for low, high in ((-0.05, 0.05), (-0.05, 0.05), (0, 6.3), (0, 0.03))], axis=1
        ),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def distances(dx: Any, dy: Any, radius: Any, xp: Any) -> list[Any]:
    """Returns the signed distances to the outline of each of `SHAPES` in turn, negative inside.

    Args:
        dx: Distance to the right of the shape's centre; broadcasts with `dy` and `radius`, in the same unit.
        dy: Distance below it.
        radius: The shape's radius.
        xp: The array module: numpy or torch.
    """
    length = xp.sqrt(dx * dx + dy * dy)
    wide, tall = xp.abs(dx), xp.abs(dy)
    return [
        length - radius,
        xp.maximum(wide, tall) - 0.88 * radius,
        xp.maximum(dy - 0.8 * radius, (1.75 * wide - dy - 0.95 * radius) / 2.016),
        (wide + tall - 1.05 * radius) / 1.414,
        xp.abs(length - 0.72 * radius) - 0.28 * radius,
    ]


def _sigmoid(x: Any, xp: Any) -> Any:
    return 1 / (1 + xp.exp(-xp.clip(x, -30.0, 30.0)))


def draw(arrays: dict[str, Any], xp: Any = np, side: int = IMAGE_SIZE) -> Any:
    """Draws pictures.

    Args:
        arrays: What `place` returns, as arrays of `xp`, on one device.
        xp: The array module: numpy or torch.
        side: Pixels along each axis; the scene is the same, its outlines are as sharp as the pixels allow.

    Returns:
        New array [n, 3, side, side], float32, sRGB in [0, 1], on the device of `arrays`.
    """
    pixel = IMAGE_SIZE / side
    x = xp.asarray(pixel * (np.arange(side, dtype=np.float32) + 0.5), device=arrays["centre"].device)[None, None, :]
    y = x.reshape(1, side, 1)
    picture = _background(arrays, x / IMAGE_SIZE, y / IMAGE_SIZE, xp)
    for k in range(_OBJECTS):
        centre, radius = arrays["centre"][:, k], arrays["radius"][:, k, None, None]
        kind = arrays["shape"][:, k]
        dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]

        shadow = 0.35 * _sigmoid(-_outline(dx - 5, dy - 7, radius, kind, xp) / 4, xp)
        picture = picture * (1 - shadow[:, None])

        distance = _outline(dx, dy, radius, kind, xp)
        depth = xp.clip(-distance / (0.45 * radius), 0.0, 1.0)
        light = 0.78 + 0.24 * depth * (2 - depth) - 0.10 * (dx + dy) / radius
        gleam = 0.22 * xp.exp(-((dx + 0.38 * radius) ** 2 + (dy + 0.38 * radius) ** 2) / (0.05 * radius**2))
        colour = arrays["colour"][:, k, :, None, None]
        shaded = xp.clip(colour * light[:, None] + gleam[:, None], 0.0, 1.0)
        cover = _sigmoid(-distance / (0.7 * pixel), xp)[:, None]
        picture = picture * (1 - cover) + shaded * cover
    return xp.clip(picture, 0.0, 1.0)


def _background(arrays: dict[str, Any], x: Any, y: Any, xp: Any) -> Any:
    """Base colour with a slope, a slow ripple and darker corners; x and y run from 0 to 1."""
    slope, ripple = arrays["slope"][:, :, None, None], arrays["ripple"][:, :, None, None]
    wave = ripple[:, 3] * xp.sin(IMAGE_SIZE * (ripple[:, 0] * x + ripple[:, 1] * y) + ripple[:, 2])
    level = slope[:, 0] * (2 * x - 1) + slope[:, 1] * (2 * y - 1) + wave
    corners = 1 - 0.35 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    return (arrays["background"][:, :, None, None] + level[:, None]) * corners[:, None]


def _outline(dx: Any, dy: Any, radius: Any, kind: Any, xp: Any) -> Any:
    """Signed distance [n, H, W] to each picture's own shape; far outside where there is none."""
    chosen = sum(kind[:, s, None, None] * d for s, d in enumerate(distances(dx, dy, radius, xp)))
    return chosen + 1e4 * (1 - kind.sum(1))[:, None, None]
