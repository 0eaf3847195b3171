"""The demo's world: captions that parse back, a held-out rule that training obeys, and a reader that sees mistakes."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from tmpdiff_export.demo.drawing import draw, place
from tmpdiff_export.demo.readback import Verdict, judge, read_picture, score
from tmpdiff_export.demo.scenes import (
    HELD_OUT_PAIRS,
    Scene,
    SceneObject,
    held_out_captions,
    is_held_out,
    leave_open,
    parse_caption,
    random_scene,
    training_captions,
    write_caption,
)


def pictures_of(scenes: list[Scene], seed: int = 0) -> np.ndarray:
    drawn = draw(place(scenes, seed))
    return (255 * drawn.transpose(0, 2, 3, 1)).round().astype(np.uint8)


RED_AND_BLUE = Scene(
    (SceneObject("red", "circle", "large", "top left"), SceneObject("blue", "square", "small", "center")), "dark"
)


def test_captions_of_any_wording_parse_back() -> None:
    rng = random.Random(0)
    for i in range(500):
        named = leave_open(random_scene(rng, 1 + i % 2), rng)
        parsed = parse_caption(write_caption(named, rng))
        assert parsed.background == named.background
        assert sorted(map(repr, parsed.objects)) == sorted(map(repr, named.objects))


@pytest.mark.parametrize(
    "caption",
    ["", "a red cat", "a circle", "a red circle in the attic", "a red circle and a red circle and a red ring"],
)
def test_a_caption_outside_the_grammar_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        parse_caption(caption)


def test_training_never_sees_a_held_out_scene_or_pair() -> None:
    drawn = training_captions(3000, 2, seed=5)
    assert not any(is_held_out(scene) for scene, _ in drawn)
    seen = {caption for _, captions in drawn for caption in captions}
    for kind in ("plain", "composed", "unusual"):
        held_out = held_out_captions(kind, 60, seed=2)
        assert len(set(held_out)) == 60
        assert all(is_held_out(parse_caption(caption)) for caption in held_out)
        assert seen.isdisjoint(held_out)
    pairs = {(o.colour, o.shape) for _, captions in drawn for c in captions for o in parse_caption(c).objects}
    assert len(pairs) == 36
    assert pairs.isdisjoint(HELD_OUT_PAIRS)


def test_the_same_seed_gives_the_same_scenes_and_pictures() -> None:
    assert training_captions(50, 3, seed=1) == training_captions(50, 3, seed=1)
    assert training_captions(50, 3, seed=1) != training_captions(50, 3, seed=2)
    assert np.array_equal(pictures_of([RED_AND_BLUE], 4), pictures_of([RED_AND_BLUE], 4))
    assert not np.array_equal(pictures_of([RED_AND_BLUE], 4), pictures_of([RED_AND_BLUE], 5))


def test_numpy_and_torch_draw_the_same_picture() -> None:
    torch = pytest.importorskip("torch")
    arrays = place([RED_AND_BLUE, Scene(RED_AND_BLUE.objects[:1], "gray")], 3)
    by_torch = draw({name: torch.from_numpy(array) for name, array in arrays.items()}, torch)
    np.testing.assert_allclose(by_torch.numpy(), draw(arrays), atol=1e-4)


def test_the_reader_reads_drawn_scenes() -> None:
    rng = random.Random(3)
    scenes = [random_scene(rng, 1 + i % 2) for i in range(60)]
    captions = [write_caption(scene, rng) for scene in scenes]
    assert set(score(list(pictures_of(scenes)), captions).values()) == {1.0}


@pytest.mark.parametrize(
    ("planted", "wrong"),
    [
        ({"colour": "green"}, "colour"),
        ({"colour": "purple"}, "colour"),
        ({"position": "right"}, "position"),
        ({"shape": "diamond"}, "shape"),
        ({"size": "large"}, "size"),
    ],
)
def test_the_reader_catches_one_wrong_attribute(planted: dict[str, str], wrong: str) -> None:
    first, second = RED_AND_BLUE.objects
    scene = Scene((first, replace(second, **planted)), "dark")
    verdict = judge(read_picture(pictures_of([scene])[0]), write_caption(RED_AND_BLUE))
    assert not getattr(verdict, wrong)
    others = {"colour", "position", "shape", "size", "background"} - {wrong}
    assert all(getattr(verdict, name) for name in others)
    assert verdict.colour_and_position == (wrong not in ("colour", "position"))


def test_the_reader_catches_attributes_swapped_between_objects() -> None:
    first, second = RED_AND_BLUE.objects
    swapped = Scene((replace(first, colour=second.colour), replace(second, colour=first.colour)), "dark")
    assert not judge(read_picture(pictures_of([swapped])[0]), RED_AND_BLUE).colour_and_position


@pytest.mark.parametrize(
    "objects", [RED_AND_BLUE.objects[:1], (), (RED_AND_BLUE.objects[0], SceneObject("blue", "ring", "small", "top"))]
)
def test_the_reader_catches_a_missing_or_misplaced_object(objects: tuple[SceneObject, ...]) -> None:
    picture = pictures_of([Scene(objects, "dark")])[0]
    assert not judge(read_picture(picture), RED_AND_BLUE).colour_and_position


def test_the_reader_catches_an_object_too_many() -> None:
    picture = pictures_of([RED_AND_BLUE])[0]
    verdict = judge(read_picture(picture), "a large red circle in the top left on a dark background")
    assert verdict == Verdict(colour=False, position=False, shape=False, size=False, background=True)


def test_the_reader_sees_an_object_between_two_cells_in_neither() -> None:
    arrays = place([Scene(RED_AND_BLUE.objects[:1], "dark")], 0)
    arrays["centre"][0, 0] = (85, 43)
    picture = (255 * draw(arrays)[0].transpose(1, 2, 0)).round().astype(np.uint8)
    assert [o.position for o in read_picture(picture).objects] == [None]


def test_the_reader_names_a_wrong_background() -> None:
    picture = pictures_of([replace(RED_AND_BLUE, background="gray")])[0]
    assert not judge(read_picture(picture), RED_AND_BLUE).background


def test_noise_is_no_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert not judge(read_picture(noise), RED_AND_BLUE).colour_and_position


def test_a_picture_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        read_picture(np.zeros((256, 256, 3)))
