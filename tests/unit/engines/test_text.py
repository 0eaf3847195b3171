"""Reading of prompts: what is cut, what is kept, templates, and what pipelines with a template read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.documents import FileEntry
from engines.errors import BundleError, PromptError
from engines.text import cut_words, encode_texts, guided_text, kept_positions, load_tokenizer
from engines.text_entry import Reading, TextEntry
from tools.acceptance.odd_prompts import ODD_PROMPTS
from tools.acceptance.small_text import clip_tokenizer, gemma_tokenizer, t5_tokenizer

FILE = FileEntry(path="tokenizer.json", sha256="0" * 64, bytes=1)
PLAIN = Reading()
INSTRUCTION = ["Given a prompt, write a better one:", "- a cat -> A red cat", "User Prompt: "]


def entry_of(tokenizer: Any, **changes: Any) -> TextEntry:
    """The entry of a transformers tokenizer."""
    known = {"max_tokens": 8, "lowercase": False, "padding_side": tokenizer.padding_side}
    return TextEntry(tokenizer=FILE, pad_token_id=tokenizer.pad_token_id, **{**known, **changes})


def loaded(tokenizer: Any) -> Any:
    return load_tokenizer(tokenizer.backend_tokenizer.to_str().encode())


@pytest.mark.parametrize("make", [clip_tokenizer, lambda: t5_tokenizer(8)])
@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("red red", ""),
        ("red red red red red red", ""),
        ("RED " * 6 + " Red,  RED!", "Red,  RED!"),
        ("red " * 6 + "   ", ""),
        ("", ""),
    ],
)
def test_what_is_cut_is_named_as_it_was_written(make: Any, prompt: str, cut: str) -> None:
    tokenizer = make()
    lower = "\u2581" in tokenizer.get_vocab()  # T5's, which has one special token and knows small letters only
    entry, length = entry_of(tokenizer, lowercase=lower), 7 if lower else 8
    assert cut_words(loaded(tokenizer), prompt, entry, PLAIN, length) == (cut.lower() if lower else cut)


def test_what_is_cut_on_the_left_is_named_too() -> None:
    tokenizer = clip_tokenizer()
    entry = entry_of(tokenizer, truncation_side="left")
    assert cut_words(loaded(tokenizer), "a b red red red red red red", entry, PLAIN, 8) == "a b"


def test_special_tokens_that_a_prompt_spells_out_are_its_own() -> None:
    tokenizer = clip_tokenizer()
    found = cut_words(loaded(tokenizer), "red " * 6 + "<|endoftext|> red", entry_of(tokenizer), PLAIN, 8)
    assert found == "<|endoftext|> red"


def test_no_prompts_and_no_room_for_any_are_refused() -> None:
    clip = clip_tokenizer()
    with pytest.raises(BundleError, match=r"text length 1 leaves no room for the 2 special tokens of tokenizer\.json"):
        encode_texts(loaded(clip), ["red"], entry_of(clip), PLAIN, 1, 1)
    with pytest.raises(PromptError, match="no prompt given"):
        encode_texts(loaded(clip), [], entry_of(clip), PLAIN, 8, 8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_an_engine_takes_beyond_a_text_is_masked_padding_on_the_right(side: str) -> None:
    tokenizer = clip_tokenizer()
    entry = entry_of(tokenizer, padding_side=side)
    tokens = encode_texts(loaded(tokenizer), ["red", "red " * 9], entry, PLAIN, 8, 11)
    short = [0] * 5 + [1] * 3 if side == "left" else [1] * 3 + [0] * 5
    assert tokens.attention_mask.tolist() == [[*short, 0, 0, 0], [*([1] * 8), 0, 0, 0]]
    assert (tokens.input_ids[tokens.attention_mask == 0] == tokenizer.pad_token_id).all()


def test_a_template_stands_around_the_prompt() -> None:
    tokenizer = clip_tokenizer()
    reading = Reading(prefix="USER: ", suffix=" red", extra_tokens=7)
    tokens = encode_texts(loaded(tokenizer), [" A Ring "], entry_of(tokenizer, lowercase=True), reading, 13, 20)
    expected = tokenizer("USER: a ring red", padding="max_length", max_length=20)
    assert tokens.input_ids.tolist() == [expected["input_ids"]]
    assert kept_positions(reading, 13).tolist() == list(range(7, 20))


def sana_pipeline(tokenizer: Any) -> Any:
    """A SanaPipeline that has a tokenizer, and a text encoder that returns the token ids."""
    import torch
    from diffusers import SanaPipeline

    class Ids(torch.nn.Module):
        dtype = torch.float32

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (input_ids[..., None],)

    pipe = object.__new__(SanaPipeline)
    pipe.__dict__ |= {"tokenizer": tokenizer, "text_encoder": Ids(), "_internal_dict": {}}
    return pipe


@pytest.mark.parametrize("instruction", [INSTRUCTION, None])
def test_sanas_reading_of_gemmas_tokens_can_be_said(instruction: list[str] | None) -> None:
    tokenizer, length = gemma_tokenizer(), 30
    pipe = sana_pipeline(tokenizer)
    prompts = [*ODD_PROMPTS.values()]
    ids, mask, negative_ids, negative_mask = pipe.encode_prompt(
        prompts,
        negative_prompt=prompts,
        device="cpu",
        max_sequence_length=length,
        complex_human_instruction=instruction,
    )
    assert ids.shape == (len(prompts), length, 1)
    positive = PLAIN
    if instruction:
        prefix = "\n".join(instruction)
        positive = Reading(prefix=prefix, extra_tokens=len(tokenizer.encode(prefix)) - 2, head=1)
        assert positive.extra_tokens > length
    entry = entry_of(tokenizer, lowercase=True, padding_side="right", positive=positive)
    width = length + positive.extra_tokens
    for reading, expected, expected_mask in (
        (positive, ids, mask), (PLAIN, negative_ids, negative_mask),
    ):  # fmt: skip
        tokens = encode_texts(loaded(tokenizer), prompts, entry, reading, length, width)
        assert tokens.input_ids.shape == (len(prompts), width)
        kept = kept_positions(reading, length)
        np.testing.assert_array_equal(tokens.input_ids[:, kept], expected[..., 0].numpy())
        np.testing.assert_array_equal(tokens.attention_mask[:, kept], expected_mask.numpy())


def test_both_halves_of_a_guided_batch() -> None:
    rows = np.arange(3, dtype=np.float32)[:, None]
    outputs = {"text": rows, "pooled": 10 + rows, "negative_text": 20 + rows}
    found = guided_text(outputs, 2, zeros=False)
    assert {name: values[:, 0].tolist() for name, values in found.items()} == {
        "text": [22, 22, 0, 1], "pooled": [12, 12, 10, 11],
    }  # fmt: skip
    absent = guided_text(outputs, 2, zeros=True)
    assert {name: values[:, 0].tolist() for name, values in absent.items()} == {
        "text": [0, 0, 0, 1], "pooled": [0, 0, 10, 11],
    }  # fmt: skip
    each = guided_text({"text": np.arange(4)[:, None]}, 2, zeros=False)
    assert each["text"][:, 0].tolist() == [2, 3, 0, 1]
