"""Small tokenizers of the classes that published pipelines have, made without a download."""

from __future__ import annotations

from typing import Any

import torch


def clip_tokenizer(pad_token: str = "<|endoftext|>", **options: Any) -> Any:
    """A CLIPTokenizer of single bytes and the word "red", 77 tokens long unless `options` say otherwise."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[("r", "e"), ("re", "d</w>")],
        pad_token=pad_token,
        **{"model_max_length": 77, **options},
    )


def t5_tokenizer(max_tokens: int, **options: Any) -> Any:
    """A T5TokenizerFast of single ASCII letters and the word "red"."""
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), ("\u2581red", -3.0)]
    letters = [(chr(code), -4.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0, model_max_length=max_tokens, **options)


def gemma_tokenizer(**options: Any) -> Any:
    """A GemmaTokenizer of single ASCII letters, bytes and the word "red", which pads on the left unless told."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*special, *(f"<0x{code:02X}>" for code in range(256)), "\u2581", *letters, "re", "red"]
    vocab = {token: number for number, token in enumerate(tokens)}
    options = {"add_bos_token": True, "add_eos_token": False, **options}
    return GemmaTokenizer(vocab=vocab, merges=[("r", "e"), ("re", "d")], **options)


class SecondLastHidden(torch.nn.Module):
    """A small CLIP text encoder as SD3 uses it: ids int64 [B, N] -> its last but one hidden state."""

    def __init__(self) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.inner = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
            )
        ).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.inner(ids, output_hidden_states=True).hidden_states[-2]
        return hidden
