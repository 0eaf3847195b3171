"""What the words of a caption say of its objects: targets for the pretraining of text encoders."""

from __future__ import annotations

import numpy as np

from tmpdiff_export.demo.scenes import COLOURS, SHAPES


def attribute_targets(tokens: np.ndarray, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Says which object each word of a caption belongs to, and what that object is.

    Args:
        tokens: [n, tokens], token ids of captions.
        ids: The tokenizer's vocabulary.

    Returns:
        `owner` [n, tokens], int64: 0 or 1 for the words that name an object's attributes, else -1; and `targets`
        [n, 2, 4], int64: shape, colour, size (0 small, 1 large) and position of each object, -100 where unnamed.
    """

    def index_in(groups: list[tuple[str, ...]]) -> np.ndarray:
        table = np.full(max(*ids.values(), tokens.max()) + 1, -1)
        for k, words in enumerate(groups):
            table[[ids[w] for w in words]] = k
        return table[tokens]

    shape = index_in([(s,) for s in SHAPES])
    colour = index_in([(c,) for c in COLOURS])
    size = index_in([("small", "tiny"), ("large", "big")])
    place = index_in([("top",), ("bottom",), ("left",), ("right",), ("center", "middle")])
    shapes_before: np.ndarray = np.cumsum(shape >= 0, axis=1) - (shape >= 0)
    named = (shape >= 0) | (colour >= 0) | (size >= 0)
    owner = np.where(named, shapes_before, np.where(place >= 0, shapes_before - 1, -1))

    targets = np.full((len(tokens), 2, 4), -100)
    for k in (0, 1):
        own = owner == k
        for column, words in enumerate((shape, colour, size)):
            value = np.where(own, words, -1).max(axis=1)
            targets[:, k, column] = np.where(value >= 0, value, -100)
        has = [((place == p) & own).any(axis=1) for p in range(5)]
        row = 1 + has[1].astype(int) - has[0]
        targets[:, k, 3] = np.where(np.any(has, axis=0), 3 * row + 1 + has[3].astype(int) - has[2], -100)
    return owner, targets


def last_words(owner: np.ndarray) -> np.ndarray:
    """Keeps the last word of each object in `owner` [n, tokens] and sets the others to -1."""
    kept = np.full_like(owner, -1)
    for k in (0, 1):
        own = owner == k
        after = np.cumsum(own[:, ::-1], axis=1)[:, ::-1] - own
        kept[own & (after == 0)] = k
    return kept
