"""Blocks of transformers for the `torch` backend whose norms, modulations and residuals are one kernel each."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

from tmpdiff_export.targets.torch.activations import Codes
from tmpdiff_export.targets.torch.flux import RotaryProcessor
from tmpdiff_export.targets.torch.kernels.norms import Modulation, add_norm_modulated, norm_modulated
from tmpdiff_export.targets.torch.layers import makes_codes

# Of the tables that the linear layers of diffusers' norms make: shift, scale and gate of attention, then those of the
# feed-forward network, then those of SD3.5's second attention.
_ATTENTION, _NETWORK, _SECOND = (0, 1, 2), (3, 4, 5), (6, 7, 8)

Pair = tuple[torch.Tensor, torch.Tensor]


class NormedFluxBlock(FluxTransformerBlock):
    """FLUX.1's double block."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Pair | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Pair:
        """As the block it replaces."""
        image_table, text_table = (_table(norm, temb) for norm in (self.norm1, self.norm1_context))
        attention = self.attn
        image, text = attention(
            hidden_states=_normed(self.norm1.norm, hidden_states, image_table, _ATTENTION, readers_of(attention)),
            encoder_hidden_states=_normed(
                self.norm1_context.norm, encoder_hidden_states, text_table, _ATTENTION, _added_readers(attention)
            ),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = _network(self.norm2, self.ff, hidden_states, (image, 2), image_table)
        encoder_hidden_states = _network(
            self.norm2_context, self.ff_context, encoder_hidden_states, (text, 2), text_table
        )
        if encoder_hidden_states.dtype == torch.float16:
            encoder_hidden_states = encoder_hidden_states.clip(-65504, 65504)
        return encoder_hidden_states, hidden_states


class NormedJointBlock(JointTransformerBlock):
    """SD3's block."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """As the block it replaces."""
        more = joint_attention_kwargs or {}
        norm, attention = self.norm1.norm, self.attn
        table = _table(self.norm1, temb)
        text_table = None if self.context_pre_only else _table(self.norm1_context, temb)
        image, text = attention(
            hidden_states=_normed(norm, hidden_states, table, _ATTENTION, readers_of(attention)),
            encoder_hidden_states=self.norm1_context(encoder_hidden_states, temb)
            if text_table is None
            else _normed(
                self.norm1_context.norm, encoder_hidden_states, text_table, _ATTENTION, _added_readers(attention)
            ),
            **more,
        )
        branch = image, _ATTENTION[2]
        if self.use_dual_attention:
            normed = _normed(norm, hidden_states, table, _SECOND, readers_of(self.attn2))
            hidden_states = hidden_states + table[:, _ATTENTION[2], None] * image
            branch = self.attn2(hidden_states=normed, **more), _SECOND[2]
        hidden_states = _network(self.norm2, self.ff, hidden_states, branch, table)
        if text_table is None:
            return None, hidden_states
        branch = text, _ATTENTION[2]
        return _network(self.norm2_context, self.ff_context, encoder_hidden_states, branch, text_table), hidden_states


class NormedSingleTableBlock(BasicTransformerBlock):
    """PixArt's block, whose modulation is a table of its own plus the denoiser's."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As the block it replaces.

        Raises:
            ValueError: there is no timestep, or there are arguments for cross attention.
        """
        if timestep is None or cross_attention_kwargs:
            raise ValueError("expected a timestep, and no arguments for cross attention: PixArt has one, and none")
        table = self.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)
        normed = _normed(self.norm1, hidden_states, table, _ATTENTION, readers_of(self.attn1))
        attended = self.attn1(normed, encoder_hidden_states=None, attention_mask=attention_mask)
        hidden_states = table[:, _ATTENTION[2], None] * attended + hidden_states
        attended = self.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        return _network(self.norm2, self.ff, hidden_states, (attended, None), table)


class NormedZeroSingle(AdaLayerNormZeroSingle):
    """The norm of FLUX.1's single block; with `readers`, of codes for these layers."""

    readers: tuple[torch.nn.Module, ...]  # in a tuple, they are no parts of this layer

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None, before: torch.Tensor | None = None) -> Pair:
        """As the norm it replaces; of tokens `before` and those of `x`, where there are such."""
        assert emb is not None
        table = _table(self, emb)
        change = Modulation(table, *_ATTENTION[:2])
        return norm_modulated(x, change, self.norm.eps, codes_for(self.readers), before), table[:, _ATTENTION[2]]


def use_norm_kernel(module: torch.nn.Module) -> int:
    """Makes blocks of FLUX.1, SD3 and PixArt those of this module, where they are diffusers' plain ones.

    Returns:
        How many blocks.
    """
    count = 0
    for block in list(module.modules()):
        single: Any = getattr(block, "norm", None)
        if type(single) is AdaLayerNormZeroSingle and hasattr(block, "proj_mlp") and _plain(single.norm):
            single.__class__ = NormedZeroSingle
            single.readers = (*readers_of(block.attn), block.proj_mlp)
        elif type(block) is FluxTransformerBlock and _zero(block) and isinstance(block.attn.processor, RotaryProcessor):
            block.__class__ = NormedFluxBlock  # the same layers under the same names, with another forward
        elif type(block) is JointTransformerBlock and _zero(block) and block._chunk_size is None:
            block.__class__ = NormedJointBlock
        elif type(block) is BasicTransformerBlock and _has_table(block):
            block.__class__ = NormedSingleTableBlock
        else:
            continue
        count += 1
    return count


def _plain(*norms: torch.nn.Module) -> bool:
    return all(type(norm) is torch.nn.LayerNorm and norm.weight is None and norm.bias is None for norm in norms)


def _zero(block: Any) -> bool:
    """Whether a block's norms are those of its kind."""
    last = getattr(block, "context_pre_only", False)
    firsts = (block.norm1,) if last else (block.norm1, block.norm1_context)
    seconds = (block.norm2,) if last else (block.norm2, block.norm2_context)
    kinds = AdaLayerNormZero, SD35AdaLayerNormZeroX
    return all(type(norm) in kinds and getattr(norm, "emb", None) is None for norm in firsts) and _plain(
        *(norm.norm for norm in firsts), *seconds
    )


def _has_table(block: Any) -> bool:
    return (
        block.norm_type == "ada_norm_single"
        and block.pos_embed is None
        and block.attn2 is not None
        and not block.only_cross_attention
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and _plain(block.norm1, block.norm2)
    )


def readers_of(attention: Any) -> tuple[torch.nn.Module, ...]:
    """The layers that read the input of self-attention."""
    return attention.to_q, attention.to_k, attention.to_v


def readers_of_network(network: Any) -> tuple[torch.nn.Module, ...]:
    """The layer, alone, that reads the input of a feed-forward network."""
    return (getattr(network.net[0], "proj", network.net[0]),)


def _added_readers(attention: Any) -> tuple[torch.nn.Module, ...]:
    return attention.add_q_proj, attention.add_k_proj, attention.add_v_proj


def _table(norm: Any, emb: torch.Tensor) -> torch.Tensor:
    """The modulation [B, N, C] that one of diffusers' norms makes."""
    made: torch.Tensor = norm.linear(norm.silu(emb))
    return made.reshape(made.shape[0], -1, norm.norm.normalized_shape[0])


def codes_for(readers: tuple[torch.nn.Module, ...]) -> Codes | None:
    """The codes that all these layers take of one input, if they do."""
    first = readers[0]
    if not makes_codes(first):
        return None
    first = first.leading
    if not all(makes_codes(layer) and layer.leading is first for layer in readers):
        return None
    return Codes(first.codes.dtype, first.input_scale, first.smoothing)


def _normed(
    norm: torch.nn.LayerNorm,
    data: torch.Tensor,
    table: torch.Tensor,
    rows: tuple[int, int, int],
    readers: tuple[torch.nn.Module, ...],
) -> torch.Tensor:
    return norm_modulated(data, Modulation(table, rows[0], rows[1]), norm.eps, codes_for(readers))


def _network(
    norm: torch.nn.LayerNorm,
    network: Any,
    data: torch.Tensor,
    branch: tuple[torch.Tensor, int | None],
    table: torch.Tensor,
) -> torch.Tensor:
    """Adds a branch, with its gate of the table, and then what the feed-forward network makes of the sum."""
    shift, scale, gate = _NETWORK
    added, gated = branch
    normed, total = add_norm_modulated(
        data, added, Modulation(table, shift, scale, gated), norm.eps, codes_for(readers_of_network(network))
    )
    return total + table[:, gate, None] * network(normed)
