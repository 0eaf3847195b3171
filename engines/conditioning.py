"""From prompts to what the denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.bundle import Bundle
from engines.errors import BundleError, PromptError
from engines.loaded import TEXT_ENCODER, LoadedEngines
from engines.manifest import GUIDANCE, Manifest
from engines.setting_entry import SettingEntry
from engines.text import cut_words, encode_texts, guided_text, kept_text, load_tokenizer


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is conditioned on, for N prompts.

    Attributes:
        guided: arrays by denoiser input name, each [2 N, ...], the unconditional half first.
        size: N.
        embeds_guidance: whether the denoiser takes the guidance scale as an input.
        cut: (prompt, what no text encoder has read of it) for every prompt or negative prompt that is too long.
    """

    guided: dict[str, np.ndarray]
    size: int
    embeds_guidance: bool = False
    cut: tuple[tuple[str, str], ...] = ()

    def batch(self, guidance_scale: float) -> dict[str, np.ndarray]:
        """The arrays for one denoiser call: [2 N, ...] with classifier-free guidance, [N, ...] without."""
        if guidance_scale > 1.0 and not self.embeds_guidance:
            return self.guided
        arrays = {name: values[self.size :] for name, values in self.guided.items()}
        if self.embeds_guidance:
            arrays[GUIDANCE] = np.full(self.size, guidance_scale, np.float32)
        return arrays

    def select(self, indices: Sequence[int]) -> Conditioning:
        """The conditioning of some of the N prompts, in the order given."""
        rows = [*indices, *(self.size + index for index in indices)]
        guided = {name: values[rows] for name, values in self.guided.items()}
        return Conditioning(guided, len(indices), self.embeds_guidance, self.cut)


class Encoder:
    """The text encoder of a bundle, with its tokenizers, for one setting."""

    def __init__(self, bundle: Bundle, loaded: LoadedEngines, setting: SettingEntry) -> None:
        """Loads nothing."""
        self._bundle, self._loaded, self._setting = bundle, loaded, setting
        self._tokenizers: tuple[object, ...] | None = None

    def preload(self) -> None:
        """Loads the engine."""
        self._loaded.component(TEXT_ENCODER, self._setting)

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str] | str | None) -> Conditioning:
        """See `DenoiseRuntime.encode`."""
        manifest, size = self._bundle.manifest, len(prompts)
        absent = negative_prompts is None
        negatives = _negatives(manifest, size, negative_prompts)
        arrays, cut = self._tokens(prompts, negatives)
        encoder = self._loaded.component(TEXT_ENCODER, self._setting)
        outputs = encoder.run(arrays)
        if len(manifest.texts) == 1:  # several text encoders have nothing around their prompts
            outputs = kept_text(outputs, size, manifest.texts[0], self._length(0))
        guided = guided_text(outputs, size, zeros=absent and manifest.zero_absent_negative)
        for name, row in self._setting.constants.items():
            guided[name] = np.tile(np.array(row, np.float32), (2 * size, 1))
        return Conditioning(guided, size, manifest.embeds_guidance, cut)

    def _tokens(
        self, prompts: Sequence[str], negatives: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], tuple[tuple[str, str], ...]]:
        """Engine inputs for the prompts and then the negative ones, and what was cut of them."""
        manifest = self._bundle.manifest
        if self._tokenizers is None:
            self._tokenizers = tuple(load_tokenizer(self._bundle.read(text.tokenizer)) for text in manifest.texts)
        arrays: dict[str, np.ndarray] = {}
        unread: dict[str, str] = {}
        for position, (tokenizer, text) in enumerate(zip(self._tokenizers, manifest.texts, strict=True)):
            length = self._length(position)
            width = length + text.extra_tokens
            read = encode_texts(tokenizer, prompts, text, text.positive, length, width)
            arrays |= read.followed_by(encode_texts(tokenizer, negatives, text, text.negative, length, width)).inputs(
                position
            )
            for some, reading in ((prompts, text.positive), (negatives, text.negative)):
                for prompt in some:
                    words = cut_words(tokenizer, prompt, text, reading, length)
                    if len(words) <= len(unread.get(prompt, words)):
                        unread[prompt] = words
        wanted = [spec.name for spec in manifest.text_encoder[0].inputs]
        if unknown := [name for name in wanted if name not in arrays]:
            raise BundleError(
                f"the text encoder takes {', '.join(unknown)}; the manifest has {len(manifest.texts)} tokenizers, which "
                f"give {', '.join(arrays)}; build the bundle again"
            )
        return {name: arrays[name] for name in wanted}, tuple(
            (prompt, words) for prompt, words in unread.items() if words
        )

    def _length(self, position: int) -> int:
        """Text length of a text encoder in the setting."""
        return self._bundle.manifest.texts[position].length(self._setting.text_length)


def _negatives(manifest: Manifest, size: int, negative_prompts: Sequence[str] | str | None) -> list[str]:
    """One negative prompt for `size` prompts, or one for each.

    Raises:
        PromptError: another number of them, or any where they have no effect.
    """
    if negative_prompts is None:
        return [""]
    given = [negative_prompts] if isinstance(negative_prompts, str) else list(negative_prompts)
    if any(given) and manifest.embeds_guidance:
        raise PromptError(
            "a negative prompt has no effect on this bundle: its denoiser embeds the guidance scale instead of being "
            "guided by a second prompt; leave it out"
        )
    if len(given) not in (1, size):
        raise PromptError(
            f"{len(given)} negative prompts for {size} prompts; give one for all, or one for each in their order"
        )
    return given[:1] if len(set(given)) == 1 else given
