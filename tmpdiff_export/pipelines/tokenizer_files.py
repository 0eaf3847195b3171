"""The files of a pipeline's tokenizers: whether there are any, and what transformers needs to convert them.

Where a folder lacks them, transformers makes an empty tokenizer and says nothing; where a library is missing, it names
another one.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

from engines.errors import BuildError, first_line
from tmpdiff_export.pipelines.folder import is_entry

_TAKEN_BY_ANY: Final = ("tokenizer.model", "tiktoken.model", "tekken.json")  # whatever the tokenizer's class says
_SENTENCEPIECE: Final = {"sentencepiece": "sentencepiece.sentencepiece_model_pb2", "protobuf": "google.protobuf"}
_TIKTOKEN: Final = {"tiktoken": "tiktoken"}


def require_tokenizer_files(folder: Path, index: dict[str, Any]) -> None:
    """Refuses tokenizers without a vocabulary, and those whose conversion needs a library that is not installed.

    Args:
        folder: the pipeline's folder.
        index: its `model_index.json`.

    Raises:
        BuildError: names the files or the library.
        OSError: a folder cannot be read.
    """
    for name, entry in index.items():
        if is_entry(entry) and entry[0] == "transformers":
            kind = getattr(importlib.import_module("transformers"), str(entry[1]), None)
            if names := getattr(kind, "vocab_files_names", None):
                _require_files(folder / name, {key: value for key, value in names.items() if key != "tokenizer_file"})


def _require_files(folder: Path, own: dict[str, str]) -> None:
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if any(file.startswith("tokenizer.") and file.endswith(".json") for file in present):
        return
    taken: list[str] = [file for file in _TAKEN_BY_ANY if file in present]
    if not taken and own and present.issuperset(own.values()):
        taken = list(own.values())
    if not taken:
        named = f", or {' and '.join(own.values())}" if own else ""
        raise BuildError(
            f"{folder} holds no vocabulary; expected tokenizer.json{named}: copy it from the pipeline as it was published"
        )
    for file in taken:
        if file.endswith(".model"):
            _require_libraries(folder / file)


def _require_libraries(model: Path) -> None:
    with model.open("rb") as file:
        is_protobuf = file.read(1) == b"\n"  # a message's first field; tiktoken's files are lines of base64
    libraries = _SENTENCEPIECE if is_protobuf else _TIKTOKEN
    for library, module in libraries.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise BuildError(
                f"{model} has to be converted, for which the module {library} is missing ({first_line(error)}); "
                f"pip install {' '.join(libraries)}"
            ) from error
        except Exception as error:  # protobuf raises its own classes where the versions of the two do not fit
            raise BuildError(
                f"{model} has to be converted, and the module {library} does not load: {first_line(error)}; "
                f"pip install --upgrade {' '.join(libraries)}"
            ) from error
