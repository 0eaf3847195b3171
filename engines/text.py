"""Prompts to token ids with the `tokenizers` library, and prompt files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import BackendError, BundleError, PromptError, first_line, shortened
from engines.text_entry import Reading, TextEntry

SECTION = re.compile(r"\[(\w+)\]")
SECTIONS = ("calibration", "validation")
NEGATIVE = "negative_"
"""Before the name of a text encoder output that only negative prompts have."""


@dataclass(frozen=True)
class Tokens:
    """Token ids and mask of N prompts, both int64 [N, L]; the mask is 1 on real tokens."""

    input_ids: np.ndarray
    attention_mask: np.ndarray

    def inputs(self, position: int) -> dict[str, np.ndarray]:
        """The arrays by the names that the text encoder engine has for them.

        Args:
            position: of the text entry in the manifest, from 0.
        """
        ids, mask = text_inputs(position)
        return {ids: self.input_ids, mask: self.attention_mask}

    def followed_by(self, other: Tokens) -> Tokens:
        """Both in one batch, [N1 + N2, L]."""
        return Tokens(
            np.concatenate([self.input_ids, other.input_ids]),
            np.concatenate([self.attention_mask, other.attention_mask]),
        )


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


def written_text(tokenizer: Any, prompt: str, entry: TextEntry, reading: Reading) -> str:
    """What the tokenizer is given for a prompt: lower-cased, stripped, framed and expanded where the pipeline does so."""
    text = f"{reading.prefix}{prompt.lower().strip() if entry.lowercase else prompt}{reading.suffix}"
    if entry.expansions:
        tokenizer.no_truncation()
        for token in dict.fromkeys(tokenizer.encode(text, add_special_tokens=False).tokens):
            text = text.replace(token, entry.expansions.get(token, token))
    return text


def encode_texts(
    tokenizer: Any, prompts: Sequence[str], entry: TextEntry, reading: Reading, length: int, width: int
) -> Tokens:
    """Token ids of prompts as the pipeline makes them: cut to `length + reading.extra_tokens` and padded to it.

    Special tokens stay when a prompt is cut.

    Args:
        tokenizer: from `load_tokenizer`; its truncation is set.
        prompts: as the user wrote them.
        entry: how the text encoder reads.
        reading: its reading of this kind of prompt, positive or negative.
        length: the text length.
        width: length of the result, L; what is missing is padding on the right, whatever the padding side.

    Raises:
        PromptError: no prompts.
        BundleError: the special tokens alone are more than the length.
    """
    if not prompts:
        raise PromptError("no prompt given; pass at least one")
    size = length + reading.extra_tokens
    ids = np.full((len(prompts), width), entry.pad_token_id, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        found = _encoded(tokenizer, prompt, entry, reading, size).ids
        if len(found) > size:
            raise BundleError(
                f"text length {length} leaves no room for the {tokenizer.num_special_tokens_to_add(False)} special tokens "
                f"of {entry.tokenizer.path}; use a longer one"
            )
        start = size - len(found) if entry.padding_side == "left" else 0
        ids[row, start : start + len(found)] = found
        mask[row, start : start + len(found)] = 1
    return Tokens(ids, mask)


def kept_positions(reading: Reading, length: int) -> np.ndarray:
    """Which positions of the text encoder's outputs the denoiser gets, int64 [length]; see `Reading`."""
    head, size = min(reading.head, length), length + reading.extra_tokens
    return np.concatenate([np.arange(head), np.arange(size - (length - head), size)])


def kept_text(outputs: Mapping[str, np.ndarray], size: int, entry: TextEntry, length: int) -> dict[str, np.ndarray]:
    """Outputs of a text encoder without the positions that what stands around prompts took.

    Args:
        outputs: each [N + M, ...]: N prompts, then M negative ones.
        size: N.
        entry: how the text encoder reads.
        length: the text length.

    Returns:
        Arrays by the same names; those with a text axis are [N + M, length, ...].
    """
    if not entry.extra_tokens:
        return dict(outputs)
    positions = [kept_positions(entry.positive, length), kept_positions(entry.negative, length)]

    def kept(values: np.ndarray) -> np.ndarray:
        if values.ndim < 2 or values.shape[1] != length + entry.extra_tokens:
            return values
        return np.concatenate([values[:size, positions[0]], values[size:, positions[1]]])

    return {name: kept(values) for name, values in outputs.items()}


def cut_words(tokenizer: Any, prompt: str, entry: TextEntry, reading: Reading, length: int) -> str:
    """What `encode_texts` cuts of a prompt, as it is written there (lower-cased where the pipeline does); "" for nothing."""
    kept = _words(_encoded(tokenizer, prompt, entry, reading, length + reading.extra_tokens))
    whole = _words(_encoded(tokenizer, prompt, entry, reading, None))
    cut = whole[len(kept) :] if entry.truncation_side == "right" else whole[: len(whole) - len(kept)]
    if not cut:
        return ""
    text = written_text(tokenizer, prompt, entry, reading)
    return text[min(start for start, _ in cut) : max(end for _, end in cut)].strip()


def guided_text(outputs: Mapping[str, np.ndarray], size: int, *, zeros: bool) -> dict[str, np.ndarray]:
    """The denoiser's text inputs with classifier-free guidance, the negative prompts' half first.

    Args:
        outputs: of the text encoder, each [N + M, ...]: N prompts, then M negative ones, one for all or N. Where there is
            an output `negative_...`, the negative prompts have that one.
        size: N.
        zeros: whether zeros stand for the negative prompts.

    Returns:
        Arrays [2 N, ...] by denoiser input name, owned by the caller.
    """
    result = {}
    for name, values in outputs.items():
        if name.startswith(NEGATIVE):
            continue
        half = outputs.get(f"{NEGATIVE}{name}", values)[size:]
        half = np.zeros_like(values[:size]) if zeros else np.broadcast_to(half, values[:size].shape)
        result[name] = np.concatenate([half, values[:size]])
    return result


def _encoded(tokenizer: Any, prompt: str, entry: TextEntry, reading: Reading, size: int | None) -> Any:
    """A `tokenizers.Encoding`, cut to `size` tokens unless that is None."""
    text = written_text(tokenizer, prompt, entry, reading)
    if size is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(size, direction=entry.truncation_side)
    return tokenizer.encode(text)


def _words(encoding: Any) -> list[tuple[int, int]]:
    """Where in the text its tokens stand, without those that the tokenizer has put around them."""
    marks = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [offset for offset, special in marks if not special]


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
        raise PromptError(f"prompt file {path} repeats {shortened(repeated)!r}; validation needs prompts of its own")
    if loose:
        raise PromptError(
            f"prompt file {path} has {shortened(loose[0])!r} before its first section; head the prompts to calibrate with by a "
            "line [calibration], and others to judge schedules by with a line [validation]"
        )
    for name in SECTIONS:
        if not sections.get(name):
            raise PromptError(f"prompt file {path} has no prompts under [{name}]")
    return PromptFile(tuple(sections["calibration"]), tuple(sections["validation"]))
