"""What a manifest says of a text encoder's reading: how a prompt becomes token ids, and which of them count."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engines.documents import Document, FileEntry


class Reading(Document):
    """How one kind of prompt, positive or negative, is put before the text encoder.

    It is cut at, and padded to, `text length + extra_tokens` tokens. Of the text encoder's outputs, the first `head` and
    the last `text length - head` of these positions are kept, so that the denoiser gets `text length` of them.

    Attributes:
        prefix: stands before the prompt (an instruction, or the head of a chat template).
        suffix: stands behind it.
        extra_tokens: how many positions are dropped after encoding.
        head: how many of the first positions are kept all the same.
    """

    prefix: str = ""
    suffix: str = ""
    extra_tokens: int = Field(default=0, ge=0)
    head: int = Field(default=0, ge=0)


class TextEntry(Document):
    """How a prompt becomes token ids for one of the text encoders that the text encoder engine is made of.

    Attributes:
        tokenizer: file for the `tokenizers` library.
        max_tokens: the text length, unless a setting has its own and `variable` is true.
        pad_token_id: id of the padding token.
        lowercase: whether prompts are lower-cased and stripped first, as PixArt and Sana pipelines do.
        padding_side: where the padding goes.
        truncation_side: where a prompt that is too long is cut.
        expansions: what stands in the place of a token that a prompt names (textual inversion with several vectors).
        variable: whether a setting may have another text length.
        positive: of prompts.
        negative: of negative prompts.
    """

    tokenizer: FileEntry
    max_tokens: int = Field(ge=1)
    pad_token_id: int = Field(ge=0, lt=1 << 31)
    lowercase: bool
    padding_side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"
    expansions: dict[str, str] = Field(default_factory=dict)
    variable: bool = False
    positive: Reading = Reading()
    negative: Reading = Reading()

    @property
    def extra_tokens(self) -> int:
        """How many positions the text encoder engine has beside the text length."""
        return max(self.positive.extra_tokens, self.negative.extra_tokens)

    def length(self, text_length: int | None) -> int:
        """The text length in a setting of `text_length`, which counts where it may vary."""
        return text_length if self.variable and text_length is not None else self.max_tokens
