"""Text encoders, shared by families: export wrappers, and which are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class MaskedTextEncoder(torch.nn.Module):
    """A T5 encoder as (input_ids, attention_mask) -> (hidden states, the mask as floats)."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both int64 [B, L] -> [B, L, D] and [B, L]."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return hidden, attention_mask.to(hidden.dtype)


class CausalTextEncoder(torch.nn.Module):
    """A Gemma-2 decoder as (input_ids, attention_mask) -> (hidden states, the mask as floats).

    Its causal masks, which transformers makes with functions that cannot be traced, are made here: of layers that attend
    to all tokens before, and of those that attend to a window of them.
    """

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.window = int(encoder.config.sliding_window)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both int64 [B, L] -> [B, L, D] and [B, L]."""
        dtype = torch.float32  # that of the attention, whatever type the weights are stored in
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        behind = places[:, None] - places
        real = attention_mask[:, None, None].bool()
        before = (behind >= 0) & real
        masks = {
            name: torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
            for name, seen in (
                ("full_attention", before),
                ("sliding_attention", before & (behind < self.window)),
            )
        }
        hidden = self.encoder(
            input_ids, attention_mask=masks, position_ids=places[None], use_cache=False, return_dict=False
        )[0]
        return hidden, attention_mask.to(hidden.dtype)


class PlainTextEncoder(torch.nn.Module):
    """A CLIP text encoder as input_ids -> hidden states; its causal mask stands in for a padding mask."""

    def __init__(self, encoder: torch.nn.Module, clip_skip: int | None = None) -> None:
        """clip_skip: how many of the last layers prompts skip, negative ones excepted."""
        super().__init__()
        self.encoder = encoder
        self.clip_skip = clip_skip

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """int64 [B, L] -> [B, L, D]; with a clip skip two of them, for prompts and for negative ones."""
        if not self.clip_skip:
            return self.encoder(input_ids, return_dict=False)[0]
        (states,), output = clip_states(self.encoder, input_ids, [self.clip_skip])
        norm = getattr(self.encoder, "text_model", self.encoder).final_layer_norm
        return norm(states), output.last_hidden_state


class SdxlTextEncoder(torch.nn.Module):
    """SDXL's two CLIP text encoders, as (input_ids, input_ids_2) -> (both hidden states, pooled text).

    As in the pipeline, hidden states are those before the last layer, or further back by the clip skip.
    """

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module, clip_skip: int | None = None) -> None:
        """clip_skip: see `PlainTextEncoder`."""
        super().__init__()
        self.first = first
        self.second = second
        self.clip_skip = clip_skip

    def forward(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Both int64 [B, L] -> [B, L, D1 + D2], [B, P] and, with a clip skip, [B, L, D1 + D2] for negative prompts."""
        states, outputs = joined_states((self.first, self.second), (input_ids, input_ids_2), self.clip_skip)
        pooled = next(output.text_embeds for output in outputs if hasattr(output, "text_embeds"))
        return (states[0], pooled, *states[1:])


class ClipT5TextEncoder(torch.nn.Module):
    """SD3's text encoders: two CLIP ones side by side, then T5, or zeros in its place.

    As in the pipeline, hidden states of CLIP are those before the last layer (or further back by the clip skip), filled
    up with zeros to the width of T5's, and T5 sees the padding as text.
    """

    def __init__(
        self,
        first: torch.nn.Module,
        second: torch.nn.Module,
        third: torch.nn.Module | None,
        *,
        width: int,
        max_sequence_length: int,
        clip_skip: int | None = None,
    ) -> None:
        """third: T5; width: of the denoiser's text; max_sequence_length: how many zeros stand for T5's tokens."""
        super().__init__()
        self.first = first
        self.second = second
        self.third = third
        self.width = width
        self.max_sequence_length = max_sequence_length
        self.clip_skip = clip_skip

    def forward(
        self, input_ids: torch.Tensor, input_ids_2: torch.Tensor, input_ids_3: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """int64 [B, L], [B, L] and, with T5, [B, L3] -> [B, L + L3, `width`] and [B, P1 + P2].

        With a clip skip another [B, L + L3, `width`] follows, for negative prompts.
        """
        states, outputs = joined_states((self.first, self.second), (input_ids, input_ids_2), self.clip_skip)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        t5 = None if self.third is None else t5_states(self.third, input_ids_3)
        hidden = [self._with_t5(clip, t5) for clip in states]
        return (hidden[0], pooled, *hidden[1:])

    def _with_t5(self, clip: torch.Tensor, t5: torch.Tensor | None) -> torch.Tensor:
        channels = self.width - clip.shape[-1]
        if t5 is None:
            return torch.nn.functional.pad(clip, (0, channels, 0, self.max_sequence_length))
        return torch.cat([torch.nn.functional.pad(clip, (0, channels)), t5], dim=1)


class PooledT5TextEncoder(torch.nn.Module):
    """FLUX.1's text encoders: of CLIP the pooled state, of T5 (which sees the padding as text) all of them."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B, L] and [B, L2] -> [B, L2, D] and [B, P]."""
        return t5_states(self.second, input_ids_2), self.first(input_ids).pooler_output


def joined_states(
    encoders: Sequence[torch.nn.Module], texts: Sequence[torch.Tensor], clip_skip: int | None
) -> tuple[list[torch.Tensor], list[Any]]:
    """Hidden states of several CLIP text encoders side by side, for prompts and, with a clip skip, for negative ones.

    Args:
        encoders: CLIP text encoders.
        texts: what each reads, int64 [B, L].
        clip_skip: how many layers prompts skip besides the last one; negative prompts skip that only.

    Returns:
        One or two [B, L, D1 + D2 + ...], and what the encoders return.
    """
    left_out = [1 + clip_skip, 1] if clip_skip else [1]
    found = [clip_states(encoder, ids, left_out) for encoder, ids in zip(encoders, texts, strict=True)]
    states = [torch.cat(parts, dim=-1) for parts in zip(*(states for states, _ in found), strict=True)]
    return states, [output for _, output in found]


def clip_states(
    encoder: torch.nn.Module, input_ids: torch.Tensor, left_out: Sequence[int]
) -> tuple[list[torch.Tensor], Any]:
    """int64 [B, L] -> hidden states without the last 1, 2, ... layers, each [B, L, D], and all that the encoder returns.

    They are not asked of transformers: what it records (seen in 5.17 and 5.23) it looks up in a table that only the
    process has that made the model, and no worker of a build.
    """
    layers = [part for part in encoder.modules() if type(part).__name__ == "CLIPEncoderLayer"]
    seen: dict[int, torch.Tensor] = {}

    def watch(count: int) -> Any:
        def see(_: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[count] = positional[0] if positional else named["hidden_states"]

        return layers[-count].register_forward_pre_hook(see, with_kwargs=True)

    hooks = [watch(count) for count in dict.fromkeys(left_out)]
    try:
        output = encoder(input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[count] for count in left_out], output


def t5_states(encoder: torch.nn.Module, input_ids: torch.Tensor | None) -> torch.Tensor:
    """int64 [B, L] -> [B, L, D], with attention to every token, as without a mask."""
    mask = torch.ones_like(input_ids)  # passed, because the one that the encoder makes has the traced batch size
    return encoder(input_ids, attention_mask=mask, return_dict=False)[0]


def clip_refusal(encoder: torch.nn.Module) -> str | None:
    """Why an encoder is not exported as a CLIP text encoder, or None if it is."""
    name = type(encoder).__name__
    if not name.startswith("CLIPTextModel") or getattr(encoder.config, "use_attention_mask", False):
        return f"its text encoder is a {name}, not a CLIPTextModel that takes token ids only"
    return None


def projection_refusal(encoder: torch.nn.Module) -> str | None:
    """Why a CLIP text encoder gives no pooled text of the projected kind, or None if it does."""
    name = type(encoder).__name__
    return None if name == "CLIPTextModelWithProjection" else f"its text encoder is a {name}, which has no projection"


def t5_refusal(encoder: torch.nn.Module) -> str | None:
    """Why an encoder is not exported as a T5 encoder, or None if it is."""
    name = type(encoder).__name__
    return None if name == "T5EncoderModel" else f"its text encoder is a {name}, not a T5EncoderModel"


def gemma_refusal(encoder: torch.nn.Module) -> str | None:
    """Why an encoder is not exported as a Gemma-2 decoder, or None if it is."""
    name = type(encoder).__name__
    if name == "Gemma2ForCausalLM":
        return "its text encoder is a Gemma2ForCausalLM, which returns logits; save the pipeline with its Gemma2Model"
    return None if name == "Gemma2Model" else f"its text encoder is a {name}, not a Gemma2Model"


def layers_of(*encoders: torch.nn.Module) -> int:
    """Number of layers of the CLIP text encoder that has the fewest."""
    return min(int(encoder.config.num_hidden_layers) for encoder in encoders)
