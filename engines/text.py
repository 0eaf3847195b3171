"""Prompts to token ids with the `tokenizers` library, and prompt files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import BackendError, BundleError, PromptError, first_line
from engines.text_entry import TextEntry

SECTION = re.compile(r"\[(\w+)\]")
SECTIONS = ("calibration", "validation")


@dataclass(frozen=True)
class Tokens:
    """Token ids and mask of N prompts, both int64 [N, max_tokens]; the mask is 1 on real tokens."""

    input_ids: np.ndarray
    attention_mask: np.ndarray

    def inputs(self, position: int) -> dict[str, np.ndarray]:
        """The arrays by the names that the text encoder engine has for them.

        Args:
            position: of the text entry in the manifest, from 0.
        """
        ids, mask = text_inputs(position)
        return {ids: self.input_ids, mask: self.attention_mask}


def text_inputs(position: int) -> tuple[str, str]:
    """Names of a text encoder engine's inputs, token ids and mask, for the text at a position from 0."""
    suffix = f"_{position + 1}" if position else ""
    return f"input_ids{suffix}", f"attention_mask{suffix}"


def load_tokenizer(data: bytes) -> Any:
    """A `tokenizers.Tokenizer` from the content of its JSON file.

    Raises:
        BackendError: the `tokenizers` library is not installed.
        BundleError: the file is no tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BackendError(
            "prompts need the module tokenizers, which is not installed; pip install tokenizers"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"tokenizer file is not readable: {first_line(error)}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode_prompts(tokenizer: Any, prompts: Sequence[str], text: TextEntry) -> Tokens:
    """Token ids of prompts, padded to the bundle's length.

    Raises:
        PromptError: no prompts, or one with more tokens than the text encoder takes.
    """
    if not prompts:
        raise PromptError("no prompt given; pass at least one")
    ids = np.full((len(prompts), text.max_tokens), text.pad_token_id, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        encoded = tokenizer.encode(prompt.lower().strip() if text.lowercase else prompt).ids
        if len(encoded) > text.max_tokens:
            raise PromptError(
                f"prompt {_shorten(prompt)!r} has {len(encoded)} tokens, this bundle takes at most {text.max_tokens}; "
                "shorten it"
            )
        ids[row, : len(encoded)] = encoded
        mask[row, : len(encoded)] = 1
    return Tokens(ids, mask)


@dataclass(frozen=True)
class PromptFile:
    """Prompts for calibration and, disjoint from them, for validation."""

    calibration: tuple[str, ...]
    validation: tuple[str, ...]


def read_prompts(path: Path) -> PromptFile:
    """Reads a prompt file: UTF-8, one prompt a line, `#` starts a comment line.

    Lines `[calibration]` and `[validation]` head the two sections.

    Raises:
        PromptError: the file is missing, empty, not text, has an unknown section, a prompt outside its sections or
            twice, or leaves a section without prompts.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise PromptError(f"prompt file {path} does not exist") from None
    except UnicodeDecodeError:
        raise PromptError(f"prompt file {path} is not UTF-8 text") from None
    except OSError as error:
        raise PromptError(f"prompt file {path} cannot be read: {error.strerror}") from error
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    loose: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        heading = SECTION.fullmatch(line)
        if heading:
            if heading[1] not in SECTIONS:
                raise PromptError(f"{path}:{number}: unknown section {line}; use [calibration] and [validation]")
            current = sections.setdefault(heading[1], [])
        else:
            (loose if current is None else current).append(line)
    prompts = loose + [prompt for section in sections.values() for prompt in section]
    if not prompts:
        raise PromptError(f"prompt file {path} holds no prompts; write one per line")
    repeated = next((prompt for prompt in prompts if prompts.count(prompt) > 1), None)
    if repeated is not None:
        raise PromptError(f"prompt file {path} repeats {_shorten(repeated)!r}; validation needs prompts of its own")
    if loose:
        raise PromptError(
            f"prompt file {path} has {_shorten(loose[0])!r} before its first section; head the prompts to calibrate with by a "
            "line [calibration], and others to judge schedules by with a line [validation]"
        )
    for name in SECTIONS:
        if not sections.get(name):
            raise PromptError(f"prompt file {path} has no prompts under [{name}]")
    return PromptFile(tuple(sections["calibration"]), tuple(sections["validation"]))


def _shorten(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
