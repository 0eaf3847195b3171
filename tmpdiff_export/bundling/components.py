"""What a bundle has beside the denoiser: tokenizers, text encoder, VAE decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engines.errors import BuildError
from engines.files import atomic_write_text
from engines.manifest import LATENTS, TextEntry
from engines.text import text_inputs
from tmpdiff_export.bundling.exported import ExportedModel, export_folded, with_larger_batch
from tmpdiff_export.onnx_graphs.export import ExportInput
from tmpdiff_export.pipelines.families.components import VaeDecoder
from tmpdiff_export.pipelines.load import SourcePipeline
from tmpdiff_export.targets.accuracy import AccuracyCheck
from tmpdiff_export.targets.target import file_entry

TEXT_ENCODER = "text_encoder"
VAE_DECODER = "vae_decoder"

_IMAGE = "image"
_CHECK_PROMPTS = 3


def write_tokenizers(source: SourcePipeline, bundle: Path) -> list[TextEntry]:
    """Writes `tokenizer.json`, `tokenizer_2.json` and so on.

    Args:
        source: the pipeline.
        bundle: bundle folder in the making.

    Returns:
        Their manifest entries, in the order of the text encoders.

    Raises:
        BuildError: a tokenizer has no form that the runtime reads.
    """
    texts = []
    for position, text in enumerate(source.texts):
        path = bundle / (f"tokenizer_{position + 1}.json" if position else "tokenizer.json")
        try:
            atomic_write_text(path, text.tokenizer.backend_tokenizer.to_str())
        except AttributeError:
            raise BuildError(
                f"{text.part.tokenizer} {type(text.tokenizer).__name__} has no `tokenizers` form; load the pipeline "
                "with a fast tokenizer"
            ) from None
        texts.append(
            TextEntry(
                tokenizer=file_entry(bundle, path),
                max_tokens=text.max_tokens,
                pad_token_id=int(text.tokenizer.pad_token_id),
                lowercase=source.family.lowercase,
            )
        )
    return texts


def export_text_encoder(source: SourcePipeline, prompts: Sequence[str], scratch: Path) -> ExportedModel:
    """All text encoders as one model, checked on the tokens that the pipeline's own tokenizers give.

    Args:
        source: the pipeline.
        prompts: the first of them are for the check, and an empty one.
        scratch: folder for the exporter's files.

    Raises:
        BuildError: the exporter does not support a text encoder.
    """
    family = source.family
    module = family.wrap_text(source.pipe, source.height, source.width).eval()
    written = [*prompts[:_CHECK_PROMPTS], ""]
    read = [prompt.lower().strip() if family.lowercase else prompt for prompt in written]
    arrays: dict[str, torch.Tensor] = {}
    for position, text in enumerate(source.texts):
        tokens = text.tokenizer(
            read, padding="max_length", max_length=text.max_tokens, truncation=True, return_tensors="pt"
        )
        ids, mask = text_inputs(position)
        arrays[ids] = tokens.input_ids
        if text.part.masked:
            arrays[mask] = tokens.attention_mask
    batch = tuple(arrays.values())
    single = tuple(tensor[:1] for tensor in batch)
    inputs = [ExportInput(name, tensor, {0: "batch"}) for name, tensor in arrays.items()]
    graph = export_folded(module, inputs, family.text_outputs, scratch, half=False)
    check = AccuracyCheck.of(module, tuple(arrays), next(iter(family.text_outputs)), [batch, single])
    return ExportedModel(module, graph, check, batch_per_picture=2, half=False)


def export_vae_decoder(source: SourcePipeline, latents: torch.Tensor, scratch: Path) -> ExportedModel:
    """The VAE decoder, from latents [B, C, h, w] to pictures.

    Args:
        source: the pipeline.
        latents: one sample close to a clean picture, float32 [1, C, h, w], for the check.
        scratch: folder for the exporter's files.

    Raises:
        BuildError: the exporter does not support the decoder.
    """
    module = VaeDecoder(source.pipe.vae).eval()
    inputs = [ExportInput(LATENTS, latents, {0: "batch"})]
    graph = export_folded(module, inputs, {_IMAGE: {0: "batch"}}, scratch, half=False)
    check = AccuracyCheck.of(module, [LATENTS], _IMAGE, with_larger_batch([(latents,)]))
    return ExportedModel(module, graph, check, batch_per_picture=1, half=False)
