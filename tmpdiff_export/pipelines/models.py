"""The models of a pipeline folder: their classes, made without memory for weights, or loaded."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from engines.errors import BuildError, first_line
from tmpdiff_export.weights.source import SourceWeights, folder_json
from tmpdiff_export.weights.streamed import hollow


def is_model(entry: Any) -> bool:
    """Whether an entry of `model_index.json`, [library, class], stands for a torch module."""
    return (
        _is_pair(entry)
        and isinstance(kind := getattr(importlib.import_module(entry[0]), str(entry[1]), None), type)
        and issubclass(kind, torch.nn.Module)
    )


def require_classes(index: dict[str, Any]) -> None:
    """Refuses a pipeline of which diffusers or transformers has a class only in name: what it needs is not installed.

    Args:
        index: `model_index.json`.

    Raises:
        BuildError: names the class and the modules.
    """
    for library, name in [("diffusers", index["_class_name"]), *(item for item in index.values() if _is_pair(item))]:
        found = getattr(importlib.import_module(library), str(name), None)
        if lacking := list(vars(found).get("_backends", ())) if isinstance(found, type) else []:
            raise BuildError(
                f"{name} of {library} needs the modules {', '.join(lacking)}, of which one is not installed; "
                f"pip install {' '.join(lacking)}"
            )


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")


def hollow_model(folder: Path, name: str, entry: list[str]) -> torch.nn.Module:
    """A model without weights, float32 on the CPU, in evaluation mode; see `weights.streamed.hollow`.

    Args:
        folder: the pipeline's folder.
        name: the pipeline's attribute, which is the model's folder in it.
        entry: [library, class] of `model_index.json`.

    Raises:
        BuildError: its files hold quantized weights, which cannot be quantized once more.
    """
    kind: Any = getattr(importlib.import_module(entry[0]), entry[1])
    try:
        data = folder_json(folder / name / "config.json")
    except OSError as error:
        raise BuildError(
            f"{folder / name / 'config.json'} cannot be read: {error.strerror or error}; save the pipeline again"
        ) from error
    if not isinstance(data, dict):
        raise BuildError(
            f"{folder / name / 'config.json'} holds a JSON {type(data).__name__}, expected an object; save the pipeline again"
        )
    if data.get("quantization_config"):
        raise BuildError(
            f"{name} of {folder} is quantized already ({kind.__name__}); build from the pipeline as it was published in 16 bit"
        )
    tensors = len(SourceWeights.open(folder / name).places)
    for key, value in data.items():  # they would be made one by one, for hours
        if "layers" in key and isinstance(value, int) and value > tensors:
            raise BuildError(
                f"{folder / name / 'config.json'} has {key} {value}, and the weights beside it are {tensors} tensors; save the "
                "pipeline again"
            )
    with init_empty_weights(include_buffers=False):  # buffers are computed, and few
        if entry[0] == "diffusers":
            model: torch.nn.Module = kind.from_config(kind.load_config(folder / name, local_files_only=True))
        else:
            model = kind(kind.config_class.from_pretrained(folder / name, local_files_only=True))
    hollow(model)
    if entry[0] == "transformers":
        model.tie_weights()  # which were untied when they were put on "meta"
    return model.eval()


def hollow_pipeline(folder: Path, index: dict[str, Any], absent: Sequence[str]) -> Any:
    """The diffusers pipeline in a folder, its models as `hollow_model` makes them.

    Args:
        folder: the pipeline's folder.
        index: its `model_index.json`.
        absent: components that it lacks; diffusers wants to be told of them.

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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models = {name: hollow_model(folder, name, entry) for name, entry in index.items() if is_model(entry)}
            pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **models, **dict.fromkeys(absent))
    except BuildError:
        raise
    except Exception as error:  # diffusers and transformers raise many classes for a broken folder
        raise BuildError(f"pipeline {folder} cannot be loaded: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded_model(pipe: Any, folder: Path, name: str, dtype: torch.dtype | None) -> torch.nn.Module:
    """A model of a pipeline with its weights, on the CPU, in evaluation mode.

    Args:
        pipe: the pipeline, whose own model of this name says the class.
        folder: its folder.
        name: the pipeline's attribute.
        dtype: None for the one that most numbers of its files have.

    Raises:
        BuildError: it cannot be loaded.
    """
    kind: Any = type(getattr(pipe, name))
    own = SourceWeights.open(folder / name).dtype
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: torch.nn.Module
            model, loading = kind.from_pretrained(
                folder / name,
                local_files_only=True,
                torch_dtype=own if dtype is None else dtype,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers and transformers raise many classes for a broken folder
        raise BuildError(f"{name} of {folder} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # both libraries would draw them at random
        raise BuildError(
            f"weights in {folder / name} lack {len(missing)} tensors of {kind.__name__}, first {missing[0]}; save the pipeline "
            "again"
        )
    return model.eval().requires_grad_(False)
