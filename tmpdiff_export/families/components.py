"""Export wrappers of text encoders and VAE decoders, shared by families."""

from __future__ import annotations

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
        first = self.first(input_ids, output_hidden_states=True)
        second = self.second(second_ids, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = second.text_embeds
        if self.zero_empty:
            words = (1 - ends[:, 1:2]).to(hidden.dtype)  # 0 where the end comes right after the start
            hidden, pooled = hidden * words[:, :, None], pooled * words
        return hidden, pooled, self.time_ids.expand(input_ids.shape[0], -1)


class VaeDecoder(torch.nn.Module):
    """`AutoencoderKL.decode` from scaled latents to pictures in 0..1 (before clamping)."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.factor = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, 3, H, W]."""
        image = self.vae.decode(latents / self.factor + self.shift, return_dict=False)[0]
        return image / 2 + 0.5
