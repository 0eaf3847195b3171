"""Every form that a tokenizer is published in: read as its fast form is, or refused with what it needs."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import BuildError
from tmpdiff_export.pipelines.load import open_pipeline
from tmpdiff_export.pipelines.texts import SourceText
from tmpdiff_export.pipelines.tokenizer_files import require_tokenizer_files
from tools.acceptance.odd_prompts import ODD_PROMPTS
from tools.acceptance.small_text import gemma_tokenizer
from tools.acceptance.text_pipelines import TEXT_PIPELINES

PROMPTS = list(ODD_PROMPTS.values())
Change = Callable[[Path], None]
UNKNOWN, CONTROL, DEFINED, BYTE = 2, 3, 4, 6  # kinds of sentencepiece's pieces; 1 is a normal one


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("pipelines") / name
            TEXT_PIPELINES[name]().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture
def copy(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / name, copy_function=shutil.copy))


def text_of(folder: Path) -> SourceText:
    return open_pipeline(folder).texts[0]


def tokenizer_class(folder: Path, name: str, **config: Any) -> None:
    """Makes a pipeline's tokenizer one of another class, without files."""
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **config}))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", name]}))


def vocabulary_and_merges(folder: Path) -> None:
    """As the first CLIP pipelines were published."""
    path = folder / "tokenizer" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    path.unlink()
    path.with_name("vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    path.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def write_sentencepiece(path: Path, pieces: list[tuple[str, float, int]], **trainer: Any) -> None:
    """A sentencepiece model of these pieces, (text, score, kind)."""
    pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    for key, value in trainer.items():
        setattr(model.trainer_spec, key, value)
    model.normalizer_spec.name = "identity"
    path.write_bytes(model.SerializeToString())


def t5_pieces(folder: Path) -> None:
    """`spiece.model` in the place of tokenizer.json, with the same pieces."""
    path = folder / "tokenizer" / "tokenizer.json"
    kinds = {"<pad>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN}
    vocab = json.loads(path.read_text())["model"]["vocab"]
    path.unlink()
    write_sentencepiece(
        path.with_name("spiece.model"),
        [(text, score, kinds.get(text, 1)) for text, score in vocab],
        model_type=1, unk_id=2, pad_id=0, eos_id=1, bos_id=-1,
    )  # fmt: skip


def test_a_vocabulary_with_merges_is_read_as_the_fast_form(
    folders: Callable[[str], Path], copy: Callable[[str], Path]
) -> None:
    expected, folder = text_of(folders("sd")), copy("sd")
    vocabulary_and_merges(folder)
    found = text_of(folder)
    found.require_same_reading(PROMPTS)
    np.testing.assert_array_equal(found.tokens(PROMPTS).input_ids, expected.tokens(PROMPTS).input_ids)


@pytest.mark.parametrize("configured", [True, False])
def test_t5s_pieces_are_read_as_the_fast_form(
    configured: bool, folders: Callable[[str], Path], copy: Callable[[str], Path]
) -> None:
    expected, folder = text_of(folders("pixart")), copy("pixart")
    t5_pieces(folder)
    if not configured:
        (folder / "tokenizer" / "tokenizer_config.json").unlink()
    found = text_of(folder)
    found.require_same_reading(PROMPTS)
    assert found.max_tokens == (expected.max_tokens if configured else 300)  # the call's, where there is no own
    length = expected.max_tokens - 1  # where a longer text is cut there is no end yet
    ids, same = (text.tokens(PROMPTS).input_ids[:, :length] for text in (found, expected))
    np.testing.assert_array_equal(ids, same)


def test_gemmas_pieces_are_read_as_the_fast_form(copy: Callable[[str], Path]) -> None:
    folder, original = copy("pixart"), gemma_tokenizer()
    tokenizer_class(folder, "GemmaTokenizer", model_max_length=120, add_bos_token=True, add_eos_token=False)
    special = {"<unk>": UNKNOWN, "<mask>": DEFINED} | dict.fromkeys(("<pad>", "<eos>", "<bos>"), CONTROL)
    ordered = sorted(original.get_vocab(), key=original.get_vocab().__getitem__)
    kinds = [special.get(text, BYTE if re.fullmatch("<0x..>", text) else 1) for text in ordered]
    write_sentencepiece(
        folder / "tokenizer" / "tokenizer.model",
        [(text, -float(rank), kind) for rank, (text, kind) in enumerate(zip(ordered, kinds, strict=True))],
        model_type=2, unk_id=3, pad_id=0, eos_id=1, bos_id=2, byte_fallback=True,
    )  # fmt: skip
    found = text_of(folder)
    found.require_same_reading(PROMPTS)
    assert found.entry.padding_side == "left"
    lower = [prompt.lower().strip() for prompt in PROMPTS]
    expected = original(lower, padding="max_length", max_length=120, truncation=True)
    np.testing.assert_array_equal(found.tokens(PROMPTS).input_ids, expected["input_ids"])


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model"])
def test_a_file_of_tiktoken_is_read(name: str, copy: Callable[[str], Path]) -> None:
    pytest.importorskip("tiktoken")
    folder = copy("pixart")
    tokenizer_class(folder, "PreTrainedTokenizerFast", model_max_length=120, pad_token="!")
    ranks = [*(bytes([code]) for code in range(256)), b"re", b"red"]
    lines = [f"{base64.b64encode(text).decode()} {rank}" for rank, text in enumerate(ranks)]
    (folder / "tokenizer" / name).write_text("\n".join(lines))
    found = text_of(folder)
    found.require_same_reading(PROMPTS)
    assert found.tokens(["a red"]).input_ids[0, :4].tolist() == [97, 32, 257, 33]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "sd",
            lambda path: (path / "tokenizer.json").unlink(),
            "expected tokenizer.json, or vocab.json and merges.txt",
        ),
        (
            "pixart",
            lambda path: (path / "tokenizer.json").unlink(),
            "expected tokenizer.json, or spiece.model: copy it",
        ),
        ("pixart", shutil.rmtree, "holds no vocabulary"),
    ],
)
def test_a_tokenizer_without_a_vocabulary_is_refused(
    name: str, change: Change, reason: str, copy: Callable[[str], Path]
) -> None:
    """Transformers makes an empty one, whose every word is unknown."""
    folder = copy(name)
    change(folder / "tokenizer")
    with pytest.raises(
        BuildError, match=rf"tokenizer holds no vocabulary; expected tokenizer\.json|{reason}"
    ) as caught:
        open_pipeline(folder)
    assert reason in str(caught.value)


def test_half_of_a_vocabulary_is_none(copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    vocabulary_and_merges(folder)
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(BuildError, match="tokenizer holds no vocabulary"):
        open_pipeline(folder)


@pytest.mark.parametrize(
    ("content", "missing", "libraries"),
    [
        (b"\n\x0b\n\x05<pad>", "sentencepiece", "sentencepiece protobuf"),
        (b"IQ== 0\n", "tiktoken", "tiktoken"),
    ],
)
def test_a_missing_library_is_named(
    content: bytes, missing: str, libraries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2" / "spiece.model").write_bytes(content)
    with pytest.raises(BuildError) as caught:
        require_tokenizer_files(tmp_path, {"tokenizer_2": ["transformers", "T5TokenizerFast"], "vae": [None, None]})
    text = str(caught.value)
    assert f"spiece.model has to be converted, for which the module {missing} is missing" in text
    assert text.endswith(f"pip install {libraries}")
    assert "\n" not in text


def test_a_length_beyond_the_text_encoders_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    vocabulary_and_merges(folder)
    (folder / "tokenizer" / "tokenizer_config.json").unlink()  # and with it the length
    with pytest.raises(
        BuildError, match=r"CLIPTokenizer has model_max_length 1e\+30, and its text encoder takes at most 77"
    ):
        open_pipeline(folder)


def test_a_tokenizer_without_padding_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("pixart")
    path = folder / "tokenizer" / "tokenizer.json"
    data = path.read_text()
    tokenizer_class(folder, "PreTrainedTokenizerFast", model_max_length=120)
    path.write_text(data)
    with pytest.raises(BuildError, match="has no padding token; name its pad_token in tokenizer_config"):
        open_pipeline(folder)


def test_a_fast_form_that_reads_differently_is_refused(folders: Callable[[str], Path]) -> None:
    text = text_of(folders("sd"))
    text.tokenizer.add_tokens(["square"])  # after its fast form was taken
    text.require_same_reading(["a red circle"])
    with pytest.raises(
        BuildError, match=r"tokenizer CLIPTokenizer: the tokenizer's fast form reads 'a square' differently"
    ):
        text.require_same_reading(["a square"])
