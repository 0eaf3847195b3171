"""Drawn scenes: their grammar, their captions, and which of them training never sees.

A scene is one or two coloured shapes on the cells of a 3 x 3 grid, on one of four backgrounds. Every scene has
captions, and every caption can be parsed back into what it promises, so that a picture made from a caption can be
judged from its pixels (`tmpdiff_export.demo.readback`). Needs the standard library only.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, replace

IMAGE_SIZE = 256
"""Height and width of every picture, in pixels."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.97, 0.88, 0.12),
    "green": (0.12, 0.66, 0.18),
    "cyan": (0.12, 0.80, 0.86),
    "blue": (0.12, 0.28, 0.95),
    "purple": (0.62, 0.16, 0.84),
    "white": (0.93, 0.93, 0.93),
}
"""Colour names and their sRGB values in [0, 1]."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "ring")

SIZES: dict[str, float] = {"small": 22.0, "large": 36.0}
"""Size names and the radius they stand for, in pixels."""

POSITIONS: tuple[str, ...] = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""The cells of the grid in row-major order: cell k has row k // 3 and column k % 3."""

BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "dark": (0.07, 0.07, 0.10),
    "gray": (0.37, 0.37, 0.38),
    "brown": (0.29, 0.20, 0.13),
    "teal": (0.10, 0.25, 0.27),
}
"""Background names and their sRGB values in [0, 1]."""

HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {("purple", "triangle"), ("cyan", "ring"), ("orange", "diamond"), ("white", "square")}
)
"""Colour and shape pairs that no training scene contains: the unusual combinations."""

_HELD_OUT_ONE_IN = 8
_SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
_OPENINGS = ("", "", "", "a picture of ", "an image of ")
_JOINTS = (" and ", " and ", ", ", " with ")


@dataclass(frozen=True, order=True)
class SceneObject:
    """One shape of a scene; `size` and `position` are None where a caption leaves them open."""

    colour: str
    shape: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption promises: its objects, and the background, or None where it is left open."""

    objects: tuple[SceneObject, ...]
    background: str | None = None


def has_held_out_pair(scene: Scene) -> bool:
    """Whether a colour and shape pair of the scene is one that training never sees."""
    return any((o.colour, o.shape) in HELD_OUT_PAIRS for o in scene.objects)


def is_held_out(scene: Scene) -> bool:
    """Whether training must not see the scene, under any caption and on any background.

    One scene in eight is held out, by the CRC-32 of its objects in canonical order, and so is every scene with a pair
    of `HELD_OUT_PAIRS`.
    """
    key = "|".join(f"{o.size} {o.colour} {o.shape} {o.position}" for o in sorted(scene.objects))
    return has_held_out_pair(scene) or zlib.crc32(key.encode()) % _HELD_OUT_ONE_IN == 0


def random_scene(rng: random.Random, object_count: int) -> Scene:
    """Draws a scene with every attribute named; its objects stand in different cells.

    Args:
        rng: Source of the draw.
        object_count: 1 or 2.

    Returns:
        The scene, held out or not.

    Raises:
        ValueError: If `object_count` is neither 1 nor 2.
    """
    if object_count not in (1, 2):
        raise ValueError(f"object_count is {object_count}; a scene has 1 or 2 objects")
    objects = tuple(
        SceneObject(rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(SIZES)), position)
        for position in rng.sample(POSITIONS, object_count)
    )
    return Scene(objects, rng.choice(list(BACKGROUNDS)))


def random_training_scene(rng: random.Random) -> Scene:
    """Draws a scene that is not held out; two scenes of three have two objects."""
    while True:
        scene = random_scene(rng, 1 if rng.random() < 1 / 3 else 2)
        if not is_held_out(scene):
            return scene


def leave_open(scene: Scene, rng: random.Random) -> Scene:
    """Drops some attributes, as a caption does that does not name everything."""
    objects = tuple(
        replace(
            o,
            size=None if rng.random() < 0.25 else o.size,
            position=None if rng.random() < 0.1 else o.position,
        )
        for o in scene.objects
    )
    return Scene(objects, None if rng.random() < 0.4 else scene.background)


def write_caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Writes a scene as a caption that `parse_caption` reads back.

    Args:
        scene: What to name; attributes that are None stay unnamed.
        rng: Varies wording and the order of the objects; None gives the canonical wording.

    Returns:
        The caption, lower case.
    """

    def choose(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else rng.choice(options)

    def describe(o: SceneObject) -> str:
        words = " ".join(w for w in (choose(_SIZE_WORDS[o.size]) if o.size else "", o.colour, o.shape) if w)
        noun = ("an " if words[0] in "aeiou" else "a ") + words
        if o.position is None:
            return noun
        place = choose(("center", "middle")) if o.position == "center" else o.position
        return f"{noun} {choose(('in the', 'at the'))} {place}"

    objects = list(scene.objects)
    if rng is not None:
        rng.shuffle(objects)
    text = choose(_OPENINGS) + choose(_JOINTS).join(describe(o) for o in objects)
    if scene.background is None:
        return text
    return text + choose((" on a {}", " on a {}", ", {}")).format(f"{scene.background} background")


_OBJECT = re.compile(
    rf"an? (?:(?P<size>small|tiny|large|big) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
    r"(?: (?:in|at|on) the (?P<position>(?:top|bottom)(?: left| right)?|left|right|center|middle))?"
)
_BACKGROUND = re.compile(rf"(?:,| on an?) (?P<background>{'|'.join(BACKGROUNDS)}) background$")


def parse_caption(caption: str) -> Scene:
    """Reads what a caption promises.

    Args:
        caption: A sentence of the grammar that `write_caption` writes.

    Returns:
        The scene, with None for what the caption leaves open.

    Raises:
        ValueError: If the caption is no sentence of the grammar.
    """
    text = re.sub(r"^(?:a picture of|an image of) ", "", " ".join(caption.lower().split()))
    background = _BACKGROUND.search(text)
    body = text[: background.start()] if background else text
    objects = []
    for part in re.split(r", | and | with ", body):
        found = _OBJECT.fullmatch(part)
        if found is None:
            raise ValueError(
                f"caption {caption!r}: {part!r} names no object; expected for example "
                f"'a large red circle in the top left' with a colour of {', '.join(COLOURS)} and a shape of "
                f"{', '.join(SHAPES)}"
            )
        size, position = found["size"], found["position"]
        size = {"tiny": "small", "big": "large"}.get(size, size)
        position = "center" if position == "middle" else position
        objects.append(SceneObject(found["colour"], found["shape"], size, position))
    if len(objects) > 2:
        raise ValueError(f"caption {caption!r} names {len(objects)} objects; a scene has 1 or 2")
    return Scene(tuple(objects), background["background"] if background else None)


def vocabulary() -> list[str]:
    """Returns every word and mark that a caption can contain, sorted."""
    words = {"a", "an", "picture", "image", "of", "and", "with", ",", "in", "at", "on", "the", "middle", "background"}
    words.update(COLOURS, SHAPES, BACKGROUNDS, *_SIZE_WORDS.values())
    words.update(word for position in POSITIONS for word in position.split())
    return sorted(words)


def training_captions(count: int, captions_per_scene: int, seed: int) -> list[tuple[Scene, list[str]]]:
    """Draws training scenes, each with captions of varied wording and completeness.

    Args:
        count: Number of scenes.
        captions_per_scene: Captions written for each.
        seed: Same seed, same scenes and captions.

    Returns:
        `count` pairs of a scene and its captions; no scene is held out.
    """
    rng = random.Random(seed)
    scenes = (random_training_scene(rng) for _ in range(count))
    return [(s, [write_caption(leave_open(s, rng), rng) for _ in range(captions_per_scene)]) for s in scenes]


def held_out_captions(kind: str, count: int, seed: int) -> list[str]:
    """Draws captions whose scenes training never sees, all with different objects.

    Args:
        kind: "plain" (one object), "composed" (two objects) or "unusual" (one or two objects, at least one of them
            a pair of `HELD_OUT_PAIRS`); only "unusual" captions contain such pairs.
        count: Number of captions.
        seed: Same seed, same captions.

    Returns:
        Captions that name position and size of every object; about two in three name the background.

    Raises:
        ValueError: If `kind` is none of the three, or there are not `count` such scenes.
    """
    if kind not in ("plain", "composed", "unusual"):
        raise ValueError(f"prompt kind {kind!r} is unknown; choose plain, composed or unusual")
    rng = random.Random(f"{kind} {seed}")
    captions: dict[tuple[SceneObject, ...], str] = {}
    for _ in range(1000 * count):
        if len(captions) == count:
            return list(captions.values())
        scene = random_scene(rng, {"plain": 1, "composed": 2, "unusual": rng.choice((1, 2))}[kind])
        if is_held_out(scene) and has_held_out_pair(scene) == (kind == "unusual"):
            named = scene if rng.random() < 2 / 3 else Scene(scene.objects)
            captions.setdefault(tuple(sorted(scene.objects)), write_caption(named, rng))
    raise ValueError(f"count is {count}, but only {len(captions)} held-out {kind} scenes were found; ask for fewer")
