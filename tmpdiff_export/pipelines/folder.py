"""The files of a pipeline folder, looked through before a library of others does: what no library should have to stumble over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engines.errors import BuildError
from tmpdiff_export.weights.source import folder_json, variants

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
LARGEST_SCHEDULER_NUMBER = 10**6
"""No whole number of a scheduler's configuration is larger; some become the length of a table."""

_LIBRARIES = ("diffusers", "transformers")


def read_index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` holds; the files beside it can be read, and what it names is of the libraries that are.

    Raises:
        BuildError: the folder is no pipeline, holds pipes or devices, or its index names something else.
    """
    index = folder / INDEX
    if not folder.is_dir():
        raise BuildError(f"pipeline folder {folder} does not exist; pass a folder written by save_pretrained()")
    try:
        _require_plain(folder)
        data = folder_json(index)
    except FileNotFoundError:
        raise BuildError(f"folder {folder} is no diffusers pipeline: it holds no {INDEX}") from None
    except OSError as error:
        raise BuildError(f"{error.filename or index} cannot be read: {error.strerror or error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("_class_name"), str):
        raise BuildError(f"{index} names no pipeline class; pass a folder written by save_pretrained()")
    for name, entry in data.items():
        if isinstance(entry, list) and entry != [None, None]:
            _require_entry(folder, name, entry)
    return data


def is_entry(entry: Any) -> bool:
    """Whether an entry of `model_index.json` is [library, class] of diffusers or transformers."""
    return isinstance(entry, list) and len(entry) == 2 and entry[0] in _LIBRARIES


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a component.

    Raises:
        BuildError: it cannot be read, or is no JSON object.
    """
    try:
        data = folder_json(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror or error}; save the pipeline again") from error
    if not isinstance(data, dict):
        raise BuildError(f"{path} holds a JSON {type(data).__name__}, expected an object; save the pipeline again")
    return data


def require_variant(folder: Path, names: list[str], variant: str | None) -> None:
    """Refuses a variant that no model of a pipeline has; those that lack it are taken without, as diffusers does.

    Args:
        folder: the pipeline's.
        names: its models.
        variant: that was asked for, None for none.

    Raises:
        BuildError: lists the variants that are there.
    """
    if variant is None:
        return
    try:
        found = {item for name in names for item in variants(folder / name)}
    except OSError as error:
        raise BuildError(
            f"{error.filename} cannot be read: {error.strerror or error}; save the pipeline again"
        ) from error
    if variant not in found:
        listed = ", ".join(sorted(item for item in found if item is not None))
        raise BuildError(
            f"pipeline {folder} holds no weights of the variant {variant!r}; it has {listed or 'none'}"
            + (" and weights without a variant: leave --variant out" if None in found else "")
        )


def require_few_parts(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuses a configuration of more layers than there are tensors; they would be made one by one, for hours.

    Args:
        path: of the configuration.
        config: what it holds.
        tensors: in the weight files beside it.

    Raises:
        BuildError: names the number.
    """
    for key, value in config.items():
        if "layers" in key or "blocks" in key:
            for number in _numbers(value):
                if number > tensors:
                    raise BuildError(
                        f"{path} has {key} {number}, and the weights beside it are {tensors} tensors; save the pipeline again"
                    )


def require_scheduler(folder: Path, data: Mapping[str, Any]) -> None:
    """Refuses a scheduler's configuration that is none, or whose numbers would be the length of endless tables.

    Args:
        folder: the pipeline's.
        data: its `model_index.json`.

    Raises:
        BuildError: names the file, and the number.
    """
    if not is_entry(data.get("scheduler")):
        raise BuildError(f"{folder / INDEX} names no scheduler; pass a folder written by save_pretrained()")
    path = folder / "scheduler" / SCHEDULER_CONFIG
    for key, value in read_config(path).items():
        for number in _numbers(value):
            if abs(number) > LARGEST_SCHEDULER_NUMBER:
                raise BuildError(
                    f"{path} has {key} {number}, expected at most {LARGEST_SCHEDULER_NUMBER}; save the pipeline again"
                )


def _require_plain(folder: Path) -> None:
    """Refuses pipes and devices among the files of a pipeline, which diffusers would wait for.

    Raises:
        BuildError: names one.
        OSError: a folder cannot be read.
    """
    for path in (*folder.iterdir(), *(path for part in folder.iterdir() if part.is_dir() for path in part.iterdir())):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise BuildError(f"{path} is no plain file; pass a folder written by save_pretrained()")


def _require_entry(folder: Path, name: str, entry: list[Any]) -> None:
    """Refuses what diffusers would import and run whatever module it is; its own pipelines' modules are left to it."""
    if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise BuildError(f"{folder / INDEX} has {name} {entry!r}, expected [library, class]; save the pipeline again")
    if entry[0] not in _LIBRARIES and not _is_pipeline_module(entry[0]):
        raise BuildError(
            f"{folder / INDEX} takes its {name} from the module {entry[0]!r}, expected one of {', '.join(_LIBRARIES)}; "
            "code of others is not run"
        )


def _is_pipeline_module(name: str) -> bool:
    """Whether diffusers has a folder of pipelines of this name, which may hold models of their own."""
    import diffusers

    return name.isidentifier() and (Path(diffusers.__file__).parent / "pipelines" / name / "__init__.py").is_file()


def _numbers(value: Any) -> Iterator[int]:
    """Whole numbers in a value, lists of lists included."""
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int):
        yield value
