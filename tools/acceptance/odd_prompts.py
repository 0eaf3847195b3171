"""Prompts that are read wrongly first, with negative prompts: what every family is held to diffusers over."""

from __future__ import annotations

from typing import Final

ODD_PROMPTS: Final = {
    "plain": "a red ring",
    "empty": "",
    "blanks": "   ",
    "exclamation": "red! ring !",
    "long": "red " * 300,
    "long word": "r" * 300,
    "emoji": "a \U0001f600\U0001f469\u200d\U0001f680 red ring",
    "clip tokens": "<|startoftext|> red <|endoftext|> ring <|endoftext|>",
    "t5 tokens": "<pad> red </s> ring <unk>",
    "gemma tokens": "<bos> red <eos><pad> ring",
    "upper case": "  A RED  Ring,\t\tleft\n ",
    "accents": "N\u00c4HE, \u0130stanbul, e\u0301",
    "added tokens": "a <ring> and <dot>, <RING>",
    "non-Latin": "\u7ea2\u8272\u5706\u73af, \u043a\u0440\u0430\u0441\u043d\u043e\u0435, \u062d\u0644\u0642\u0629",
}
"""By a name for test ids."""

NEGATIVES: Final[dict[str, str | None]] = {
    "absent": None,
    "empty": "",
    "blanks": "  ",
    "given": "A BLUE square!",
    "long": "blue " * 300,
}
"""Negative prompts; None is what a call without one has."""
