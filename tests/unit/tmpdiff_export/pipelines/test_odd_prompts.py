"""What text encoders are given and return, over a table of odd prompts: `encode_prompt` of diffusers is the judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stored_graphs import save_stored

from engines.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engines.errors import BuildError
from engines.text import encode_texts, guided_text, kept_text, load_tokenizer, text_inputs
from tmpdiff_export.onnx_graphs.export import ExportInput, export_graph
from tmpdiff_export.pipelines.families.family import Family, require_clip_skip, with_clip_skip
from tmpdiff_export.pipelines.families.table import family_of
from tmpdiff_export.pipelines.texts import source_texts
from tools.acceptance.odd_prompts import NEGATIVES, ODD_PROMPTS
from tools.acceptance.text_pipelines import TEXT_PIPELINES, clip_encoder

TOLERANCE = 1e-5
MASKED_PIPELINES = {"PixArtAlphaPipeline", "SanaPipeline"}
CLIP_SKIPS = {"sd": (1, 3), "sdxl": (1, 2), "sd3": (1, 2)}


@pytest.fixture(scope="module")
def pipelines() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def pipeline(name: str) -> Any:
        if name not in made:
            made[name] = TEXT_PIPELINES[name]()
        return made[name]

    return pipeline


def ours(pipe: Any, prompts: list[str], negative: str | None, clip_skip: int | None = None) -> dict[str, np.ndarray]:
    """As the runtime: tokens, the wrapper in place of the text encoder engine, both halves of the guided batch."""
    _, family = family_of(pipe)
    arrays = {}
    for position, text in enumerate(source_texts(pipe, family)):
        tokenizer, entry, length = load_tokenizer(text.json.encode()), text.entry, text.max_tokens
        width = length + max(entry.positive.extra_tokens, entry.negative.extra_tokens)
        both = encode_texts(tokenizer, prompts, entry, entry.positive, length, width).followed_by(
            encode_texts(tokenizer, [negative or ""], entry, entry.negative, length, width)
        )
        ids, mask = text_inputs(position)
        arrays[ids] = both.input_ids
        if text.part.masked:
            arrays[mask] = both.attention_mask
    with torch.inference_mode():
        found = family.wrap_text(pipe, clip_skip)(*map(torch.from_numpy, arrays.values()))
    found = (found,) if isinstance(found, torch.Tensor) else found
    names = with_clip_skip(family.text_outputs, clip_skip)
    outputs = {name: tensor.numpy() for name, tensor in zip(names, found, strict=True)}
    outputs = kept_text(outputs, len(prompts), entry, length)
    return guided_text(outputs, len(prompts), zeros=negative is None and family.zero_absent_negative(pipe))


def theirs(pipe: Any, prompts: list[str], negative: str | None, **more: Any) -> dict[str, np.ndarray]:
    """The same of `encode_prompt`."""
    _, family = family_of(pipe)
    lengths = {text.max_tokens for text in source_texts(pipe, family) if text.part.whole_sequence}
    options = {"max_sequence_length": lengths.pop()} if lengths else {}
    with torch.inference_mode():
        if "FluxPipeline" in family.pipelines:  # guided by a second call, or not at all
            halves = [pipe.encode_prompt(texts, **options)[:2] for texts in ([negative or ""] * len(prompts), prompts)]
            found = [torch.cat(pair).numpy() for pair in zip(*halves, strict=True)]
            return dict(zip(("encoder_hidden_states", "pooled_projections"), found, strict=True))
        negatives = None if negative is None else [negative] * len(prompts)
        if MASKED_PIPELINES & set(family.pipelines):
            negatives = negative or ""  # the call's own default
        if "SanaPipeline" in family.pipelines:
            more["complex_human_instruction"] = default_of(pipe, "complex_human_instruction")
        if "StableDiffusion3Pipeline" in family.pipelines:
            more |= {"prompt_2": None, "prompt_3": None}
        found = pipe.encode_prompt(
            prompt=prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
            negative_prompt=negatives, **options, **more,
        )  # fmt: skip
    if MASKED_PIPELINES & set(family.pipelines):
        text, mask, negative_text, negative_mask = found
        pairs = {"encoder_hidden_states": (negative_text, text), "encoder_attention_mask": (negative_mask, mask)}
    else:
        pairs = {"encoder_hidden_states": (found[1], found[0])}
        for name in set(family.text_outputs) - set(pairs):
            pairs[name] = (found[3], found[2])
    return {name: torch.cat(pair).float().numpy() for name, pair in pairs.items()}


def default_of(pipe: Any, name: str) -> Any:
    """Of an argument of the pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_they_are_read_as_the_pipeline_reads_them(name: str, negative: str, pipelines: Callable[[str], Any]) -> None:
    pipe = pipelines(name)
    prompts = list(ODD_PROMPTS.values()) if negative == "absent" else list(ODD_PROMPTS.values())[:4]
    found, expected = ours(pipe, prompts, NEGATIVES[negative]), theirs(pipe, prompts, NEGATIVES[negative])
    if name.startswith("sana"):  # padding whose window is all padding attends to everything, as long as that is
        for arrays in (found, expected):
            arrays["encoder_hidden_states"] = (
                arrays["encoder_hidden_states"] * arrays["encoder_attention_mask"][..., None]
            )
    assert_close(found, expected)
    assert np.abs(found["encoder_hidden_states"][len(prompts) :]).max() > 0.1


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_the_build_holds_the_fast_form_to_the_tokenizer(name: str, pipelines: Callable[[str], Any]) -> None:
    pipe = pipelines(name)
    _, family = family_of(pipe)
    for text in source_texts(pipe, family):
        text.require_same_reading(list(ODD_PROMPTS.values()))


@pytest.mark.parametrize(("name", "clip_skip"), [(name, skip) for name, skips in CLIP_SKIPS.items() for skip in skips])
def test_clip_skip_is_the_pipelines(
    name: str, clip_skip: int, pipelines: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipelines(name)
    if name == "sd" and not hasattr(pipe.text_encoder, "text_model"):  # where diffusers looks for the final norm
        monkeypatch.setattr(type(pipe.text_encoder), "text_model", property(lambda self: self), raising=False)
    prompts = ["a red ring", ""]
    for negative in (None, "a blue square"):
        found = ours(pipe, prompts, negative, clip_skip)
        assert_close(found, theirs(pipe, prompts, negative, clip_skip=clip_skip))
        assert_close(ours(pipe, prompts, negative, 0), ours(pipe, prompts, negative))
        changed = np.abs(found["encoder_hidden_states"] - ours(pipe, prompts, negative)["encoder_hidden_states"])
        assert changed[len(prompts) :].max() > 1e-2
        assert changed[: len(prompts)].max() == 0


@pytest.mark.parametrize("name", CLIP_SKIPS)
def test_a_clip_skip_is_exported(name: str, pipelines: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = pipelines(name)
    _, family = family_of(pipe)
    texts = [torch.from_numpy(text.tokens(["a red ring", ""]).input_ids) for text in source_texts(pipe, family)]
    inputs = [ExportInput(text_inputs(place)[0], ids, {0: "batch"}) for place, ids in enumerate(texts)]
    module, outputs = family.wrap_text(pipe, 1), with_clip_skip(family.text_outputs, 1)
    path = save_stored(export_graph(module, inputs, outputs, half=False), tmp_path / "text.onnx", module)
    found = OnnxRuntimeEngine(path).run({item.name: item.example[:1].numpy() for item in inputs})
    with torch.inference_mode():
        expected = module(*(item.example[:1] for item in inputs))
    assert list(found) == list(outputs)
    for name, tensor in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found[name], tensor.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "sdxl",
            {"tokenizer_2": 64},
            "its two tokenizers have model_max_length 77 and 64, and texts of one length are",
        ),
        ("sdxl", {"text_encoder_2": None}, "its text encoder is a CLIPTextModel, which has no projection"),
        ("sd3", {"text_encoder": None}, "its text encoder is a CLIPTextModel, which has no projection"),
    ],
)
def test_text_encoders_that_the_pipeline_cannot_join_are_refused(name: str, changes: dict, reason: str) -> None:
    pipe = TEXT_PIPELINES[name]()
    for part, length in changes.items():
        if length is None:
            setattr(pipe, part, clip_encoder(pipe.tokenizer, 48))
        else:
            getattr(pipe, part).model_max_length = length
    with pytest.raises(BuildError, match=f"this {type(pipe).__name__} cannot be built: {reason}"):
        family_of(pipe)


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_a_clip_skip_that_the_pipeline_does_not_take_is_refused(name: str, pipelines: Callable[[str], Any]) -> None:
    pipe = pipelines(name)
    family: Family = family_of(pipe)[1]
    require_clip_skip(family, pipe, None)
    kind = name.partition("-")[0]
    if kind not in CLIP_SKIPS:
        with pytest.raises(BuildError, match=r"clip skip 1 would have no effect: \w+Pipeline has none; leave it out"):
            require_clip_skip(family, pipe, 1)
        return
    deepest = CLIP_SKIPS[kind][-1]
    for taken in (0, 1, deepest):
        require_clip_skip(family, pipe, taken)
    for refused in (-1, deepest + 1):
        with pytest.raises(BuildError, match=f"clip skip {refused} is out of range: .* allow 0 to {deepest}"):
            require_clip_skip(family, pipe, refused)
