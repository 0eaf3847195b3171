"""The models of a pipeline folder: their classes, made without memory for weights, or loaded."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from engines.errors import BuildError
from tmpdiff_export.pipelines.folder import CONFIG, is_entry, read_config, require_few_parts
from tmpdiff_export.pipelines.keys import (
    Differences,
    diffusers_differences,
    require_fused,
    require_keys,
    transformers_differences,
)
from tmpdiff_export.weights.source import SourceWeights
from tmpdiff_export.weights.streamed import hollow


def is_model(entry: Any) -> bool:
    """Whether an entry of `model_index.json`, [library, class], stands for a torch module."""
    return (
        is_entry(entry)
        and isinstance(kind := getattr(importlib.import_module(entry[0]), str(entry[1]), None), type)
        and issubclass(kind, torch.nn.Module)
    )


def require_classes(index: dict[str, Any]) -> None:
    """Refuses a pipeline of which diffusers or transformers has a class only in name: what it needs is not installed.

    Args:
        index: `model_index.json`.

    Raises:
        BuildError: names the class, and the modules or why it cannot be imported.
    """
    for library, name in [("diffusers", index["_class_name"]), *(item for item in index.values() if is_entry(item))]:
        try:
            found = getattr(importlib.import_module(library), str(name), None)
        except Exception as error:  # whatever a module that they import raises; what is missing is said last
            raise BuildError(f"{name} of {library} cannot be imported: {' '.join(str(error).split())}") from error
        if lacking := list(vars(found).get("_backends", ())) if isinstance(found, type) else []:
            raise BuildError(
                f"{name} of {library} needs the modules {', '.join(lacking)}, of which one is not installed; "
                f"pip install {' '.join(lacking)}"
            )


def hollow_model(folder: Path, entry: list[str], variant: str | None) -> torch.nn.Module:
    """A model without weights, float32 on the CPU, in evaluation mode; see `weights.streamed.hollow`.

    Its weights are held to it by the headers of their files, before anything large is made.

    Args:
        folder: the model's folder.
        entry: [library, class] of `model_index.json`.
        variant: of the weights, as for `SourceWeights.open`.

    Raises:
        BuildError: the files hold quantized weights, which cannot be quantized once more, a LoRA that is not fused, or
            the weights of another model.
    """
    kind: Any = getattr(importlib.import_module(entry[0]), entry[1])
    data = read_config(folder / CONFIG)
    if data.get("quantization_config"):
        raise BuildError(
            f"{folder} is quantized already ({kind.__name__}); build from the pipeline as it was published in 16 bit"
        )
    weights = SourceWeights.open(folder, variant)
    require_few_parts(folder / CONFIG, data, len(weights.places))
    require_fused(weights)
    if entry[0] == "diffusers":
        config = kind.load_config(folder, local_files_only=True)
        require_keys(weights, kind.__name__, diffusers_differences(kind, config, weights))
    else:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        require_keys(weights, kind.__name__, transformers_differences(kind, config, weights))
    with init_empty_weights(include_buffers=False):  # buffers are computed, and few
        model: torch.nn.Module = kind.from_config(config) if entry[0] == "diffusers" else kind(config)
    hollow(model)
    if entry[0] == "transformers":
        model.tie_weights()  # which were untied when they were put on "meta"
    weights.require_numbers(model)
    return model.eval()


def hollow_pipeline(folder: Path, index: dict[str, Any], absent: Sequence[str], variant: str | None) -> Any:
    """The diffusers pipeline in a folder, its models as `hollow_model` makes them.

    Args:
        folder: the pipeline's folder.
        index: its `model_index.json`.
        absent: components that it lacks; diffusers wants to be told of them.
        variant: of the weights, as for `SourceWeights.open`.

    Raises:
        BuildError: it cannot be loaded.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    components: dict[str, Any] = dict.fromkeys(absent)
    for name, entry in index.items():
        if is_entry(entry):
            with _naming(folder / name):
                components[name] = (
                    hollow_model(folder / name, entry, variant)
                    if is_model(entry)
                    else _small_part(folder / name, entry)
                )
    with _naming(folder):
        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _small_part(folder: Path, entry: list[str]) -> Any:
    """A scheduler, tokenizer or the like.

    Raises:
        BuildError: a tokenizer without its vocabulary, which transformers makes nevertheless.
    """
    part: Any = getattr(importlib.import_module(entry[0]), entry[1]).from_pretrained(folder, local_files_only=True)
    if hasattr(part, "get_vocab") and not set(part.get_vocab()) - set(part.get_added_vocab()):
        raise BuildError(
            f"{folder} holds no vocabulary for {entry[1]}, only special tokens; save the pipeline again with its tokenizer"
        )
    return part


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says which part of a pipeline diffusers or transformers raised one of their many errors for, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BuildError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as which the tokenizers library raises its panics
        said = (str(error).strip() or "no reason given").splitlines()[0]
        raise BuildError(f"{path} cannot be loaded: {type(error).__name__}: {said}; save the pipeline again") from error


def loaded_model(kind: Any, folder: Path, variant: str | None, dtype: torch.dtype | None) -> torch.nn.Module:
    """A model of a pipeline with its weights, on the CPU, in evaluation mode.

    Args:
        kind: its class.
        folder: its folder.
        variant: of the weights, as for `SourceWeights.open`.
        dtype: None for the one that most numbers of its files have.

    Raises:
        BuildError: it cannot be loaded, or its weights are not those of its class.
    """
    weights = SourceWeights.open(folder, variant)
    with _naming(folder):
        model: torch.nn.Module
        model, loading = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=weights.variant,
            torch_dtype=weights.dtype if dtype is None else dtype,
            output_loading_info=True,
        )
    require_keys(weights, kind.__name__, Differences.of(loading))
    return model.eval().requires_grad_(False)
