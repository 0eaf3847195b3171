"""What the text encoders of a pipeline read: tokenizer, length, padding and rules of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.loaders import TextualInversionLoaderMixin

from engines.documents import FileEntry
from engines.errors import BuildError
from engines.files import sha256_bytes
from engines.text import Tokens, encode_texts, load_tokenizer, written_text
from engines.text_entry import TextEntry
from tmpdiff_export.pipelines.families.family import Family, Text, max_sequence_length

# Beside a build's own prompts: what tokenizers read differently, if they do.
_ODD_TEXTS = (
    "",
    " ",
    "  It's  2 RED rings,\tn\u00e4he!  ",
    "!",
    "\U0001f600",
    "\u7ea2\u5706 \u043a\u0440\u0443\u0433",
    "a red ring " * 200,
)


@dataclass(frozen=True)
class SourceText:
    """What one of the text encoders reads.

    Attributes:
        tokenizer: the transformers tokenizer.
        part: how the family describes it.
        json: the tokenizer in the form that the runtime reads.
        entry: what the manifest says of it.
    """

    tokenizer: Any
    part: Text
    json: str
    entry: TextEntry

    @property
    def max_tokens(self) -> int:
        """Length that prompts are padded to, unless a setting has another one."""
        return self.entry.max_tokens

    def tokens(self, prompts: Sequence[str], text_length: int | None = None) -> Tokens:
        """Token ids of prompts, int64 [N, L], as the runtime makes them.

        Args:
            prompts: as a user writes them.
            text_length: of a setting, None for `max_tokens`; it counts where the length may vary. L is as much and what
                a template adds.
        """
        entry, tokenizer = self.entry, load_tokenizer(self.json.encode())
        length = entry.length(text_length)
        return encode_texts(tokenizer, prompts, entry, entry.positive, length, length + entry.extra_tokens)

    def require_same_reading(self, prompts: Sequence[str]) -> None:
        """Holds the runtime's reading to the tokenizer that the pipeline has.

        Args:
            prompts: of the build; odd ones are added.

        Raises:
            BuildError: names a text that is read differently.
        """
        special = " ".join(["red", *map(str, self.tokenizer.all_special_tokens)])
        texts = [*prompts, *_ODD_TEXTS, special]
        ours, plain = self.tokens(texts), load_tokenizer(self.json.encode())
        reading = self.entry.positive
        size = self.max_tokens + reading.extra_tokens
        theirs = self.tokenizer(
            [written_text(plain, text, self.entry, reading) for text in texts],
            padding="max_length", max_length=size, truncation=True, padding_side=self.entry.padding_side,
            return_attention_mask=True,
        )  # fmt: skip
        for row, text in enumerate(texts):
            found = (ours.input_ids[row, :size], ours.attention_mask[row, :size])
            expected = (theirs["input_ids"][row], theirs["attention_mask"][row])
            if not all(map(np.array_equal, found, expected)):
                raise BuildError(
                    f"{self.part.tokenizer} {type(self.tokenizer).__name__}: the tokenizer's fast form reads {text[:60]!r} "
                    "differently from the tokenizer itself; save the pipeline with a tokenizer that transformers loads from "
                    "tokenizer.json"
                )


def source_texts(pipe: Any, family: Family) -> tuple[SourceText, ...]:
    """What the text encoders of a pipeline read, in order.

    Raises:
        BuildError: a tokenizer has no form that the runtime reads, no padding token, or no length that fits its encoder.
    """
    present = [part for part in family.texts if getattr(pipe, part.tokenizer) is not None]
    return tuple(_source_text(pipe, family, part, position) for position, part in enumerate(present))


def _source_text(pipe: Any, family: Family, part: Text, position: int) -> SourceText:
    tokenizer = getattr(pipe, part.tokenizer)
    subject = f"{part.tokenizer} {type(tokenizer).__name__}"
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise BuildError(
            f"{subject} has no form that the `tokenizers` library reads; save the pipeline with a fast tokenizer, one that "
            "has a tokenizer.json"
        )
    if tokenizer.pad_token_id is None:
        raise BuildError(f"{subject} has no padding token; name its pad_token in tokenizer_config.json")
    length = _text_length(pipe, part)
    positive, negative = part.readings(pipe)
    width = length + max(positive.extra_tokens, negative.extra_tokens)
    encoder = getattr(pipe, part.tokenizer.replace("tokenizer", "text_encoder"))
    positions = getattr(encoder.config, "max_position_embeddings", width)
    if width > positions:
        around = f" beside {width - length} of what stands around prompts" if width > length else ""
        raise BuildError(
            f"{subject} has model_max_length {length:g}{around}, and its text encoder takes at most {positions} tokens; set "
            f"model_max_length in tokenizer_config.json"
        )
    plain = load_tokenizer(tokenizer.backend_tokenizer.to_str().encode())  # without what calls have set on the original
    json = plain.to_str()
    entry = TextEntry(
        tokenizer=FileEntry(
            path=f"tokenizer_{position + 1}.json" if position else "tokenizer.json",
            sha256=sha256_bytes(json.encode()),
            bytes=len(json.encode()),
        ),
        max_tokens=length,
        pad_token_id=int(tokenizer.pad_token_id),
        lowercase=family.lowercase,
        padding_side=part.padding_side or tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        expansions=_expansions(tokenizer) if isinstance(pipe, TextualInversionLoaderMixin) else {},
        variable=part.whole_sequence,
        positive=positive,
        negative=negative,
    )
    return SourceText(tokenizer, part, json, entry)


def _text_length(pipe: Any, part: Text) -> int:
    """The length that the pipeline pads to for one of its text encoders."""
    own = int(getattr(pipe, part.length_of or part.tokenizer).model_max_length)
    if not part.whole_sequence:
        return own
    asked = max_sequence_length(pipe)
    return min(own, asked) if part.masked else asked  # padding that is masked changes nothing, and takes time


def _expansions(tokenizer: Any) -> dict[str, str]:
    """What `TextualInversionLoaderMixin.maybe_convert_prompt` puts in the place of a token of several vectors."""
    added = tokenizer.added_tokens_encoder
    found = {}
    for token in added:
        names = [token]
        while f"{token}_{len(names)}" in added:
            names.append(f"{token}_{len(names)}")
        if len(names) > 1:
            found[token] = " ".join(names)
    return found
