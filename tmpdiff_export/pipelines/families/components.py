"""Text encoders, shared by families: export wrappers, and which are refused."""

from __future__ import annotations

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


class PlainTextEncoder(torch.nn.Module):
    """A CLIP text encoder as input_ids -> hidden states; its causal mask stands in for a padding mask."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, L] -> [B, L, D]."""
        return self.encoder(input_ids, return_dict=False)[0]


class SdxlTextEncoder(torch.nn.Module):
    """SDXL's two CLIP text encoders, as (input_ids) -> (both hidden states, pooled text, time ids).

    Both read the same tokens; only the padding may differ. As in the pipeline, hidden states are those before the last
    layer, and the prompt of no words stands for none: zeros, if the pipeline is configured so. The time ids (original
    size, crop, target size) are those of an uncropped picture of the engine's size, the pipeline's default.
    """

    def __init__(
        self,
        first: torch.nn.Module,
        second: torch.nn.Module,
        *,
        end_token_id: int,
        second_pad_token_id: int,
        zero_empty: bool,
        size: tuple[int, int],
    ) -> None:
        """size: height and width in pixels."""
        super().__init__()
        self.first = first
        self.second = second
        self.end_token_id = end_token_id
        self.second_pad_token_id = second_pad_token_id
        self.zero_empty = zero_empty
        self.register_buffer("time_ids", torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int64 [B, L] -> [B, L, D1 + D2], [B, P] and [B, 6]."""
        ends = (input_ids == self.end_token_id).long()
        padding = (ends.cumsum(dim=1) - ends) > 0
        second_ids = torch.where(padding, torch.full_like(input_ids, self.second_pad_token_id), input_ids)
        (first, _), (second, output) = clip_states(self.first, input_ids), clip_states(self.second, second_ids)
        hidden = torch.cat([first, second], dim=-1)
        pooled = output.text_embeds
        if self.zero_empty:
            words = (1 - ends[:, 1:2]).to(hidden.dtype)  # 0 where the end comes right after the start
            hidden, pooled = hidden * words[:, :, None], pooled * words
        return hidden, pooled, self.time_ids.expand(input_ids.shape[0], -1)


class ClipT5TextEncoder(torch.nn.Module):
    """SD3's text encoders: two CLIP ones side by side, then T5, or zeros in its place.

    As in the pipeline, hidden states of CLIP are those before the last layer, filled up with zeros to the width of
    T5's, and T5 sees the padding as text.
    """

    def __init__(
        self,
        first: torch.nn.Module,
        second: torch.nn.Module,
        third: torch.nn.Module | None,
        *,
        width: int,
        max_sequence_length: int,
    ) -> None:
        """third: T5; width: of the denoiser's text; max_sequence_length: how many zeros stand for T5's tokens."""
        super().__init__()
        self.first = first
        self.second = second
        self.third = third
        self.width = width
        self.max_sequence_length = max_sequence_length

    def forward(
        self, input_ids: torch.Tensor, input_ids_2: torch.Tensor, input_ids_3: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B, L], [B, L] and, with T5, [B, L3] -> [B, L + L3, `width`] and [B, P1 + P2]."""
        states, outputs = zip(clip_states(self.first, input_ids), clip_states(self.second, input_ids_2), strict=True)
        clip = torch.cat(states, dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        channels = self.width - clip.shape[-1]
        if self.third is None:
            return torch.nn.functional.pad(clip, (0, channels, 0, self.max_sequence_length)), pooled
        t5 = t5_states(self.third, input_ids_3)
        return torch.cat([torch.nn.functional.pad(clip, (0, channels)), t5], dim=1), pooled


class PooledT5TextEncoder(torch.nn.Module):
    """FLUX.1's text encoders: of CLIP the pooled state, of T5 (which sees the padding as text) all of them."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B, L] and [B, L2] -> [B, L2, D] and [B, P]."""
        return t5_states(self.second, input_ids_2), self.first(input_ids).pooler_output


def clip_states(encoder: torch.nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """int64 [B, L] -> hidden states before the last layer, [B, L, D], and all that the encoder returns.

    They are not asked of transformers: what it records (seen in 5.17 and 5.23) it looks up in a table that only the
    process has that made the model, and no worker of a build.
    """
    last = [part for part in encoder.modules() if type(part).__name__ == "CLIPEncoderLayer"][-1]
    seen: list[torch.Tensor] = []

    def see(_: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(positional[0] if positional else named["hidden_states"])

    hook = last.register_forward_pre_hook(see, with_kwargs=True)
    try:
        output = encoder(input_ids)
    finally:
        hook.remove()
    return seen[0], output


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


def t5_refusal(encoder: torch.nn.Module) -> str | None:
    """Why an encoder is not exported as a T5 encoder, or None if it is."""
    name = type(encoder).__name__
    return None if name == "T5EncoderModel" else f"its text encoder is a {name}, not a T5EncoderModel"
