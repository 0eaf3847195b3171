"""Whether the weights in a component's folder are those of its class and configuration, by name and shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engines.errors import BuildError
from tmpdiff_export.weights.files import Place
from tmpdiff_export.weights.source import SourceWeights

LARGEST_BUFFERS = 1 << 30
"""Bytes of what a module computes when it is made, and does not store; those of published ones take megabytes."""

_LORA = re.compile(r"(^|[._])lora_|(^|\.)base_layer(\.|$)")
_POSITIONS = re.compile(r"(^|\.)position_ids$")  # stored by older versions of the libraries, and computed since


@dataclass(frozen=True)
class Differences:
    """How weights differ from what a model expects; what its library ignores is not among it.

    Attributes:
        missing: names of tensors that are not stored; the library would draw them at random.
        unexpected: names that are stored and belong nowhere.
        mismatched: name, stored shape, expected shape.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, loading: Mapping[str, Iterable[Any]]) -> Differences:
        """What `from_pretrained(output_loading_info=True)` returns besides the model."""
        return cls(
            tuple(sorted(loading["missing_keys"])),
            tuple(sorted(name for name in loading["unexpected_keys"] if not _POSITIONS.search(name))),
            tuple(sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in loading["mismatched_keys"])),
        )


def require_fused(weights: SourceWeights) -> None:
    """Refuses the weights of a LoRA that is not fused into its model.

    Raises:
        BuildError: says how to fuse it.
    """
    names = sorted(filter(_LORA.search, weights.places))
    if names:
        raise BuildError(
            f"weights in {weights.folder} hold a LoRA that is not fused: {_listed(names)}; fuse it with pipe.fuse_lora(); "
            "pipe.unload_lora_weights(); pipe.save_pretrained(...)"
        )


def require_keys(weights: SourceWeights, kind: str, found: Differences) -> None:
    """Refuses weights that are not all of a model, or not only of it.

    Args:
        weights: of the component.
        kind: class name of the model.
        found: from `diffusers_differences`, `transformers_differences` or loading.

    Raises:
        BuildError: says how many differ, and names the first.
    """
    parts = []
    if found.mismatched:
        name, shape, wanted = found.mismatched[0]
        others = f", then {_listed([item[0] for item in found.mismatched[1:]])}" if found.mismatched[1:] else ""
        parts.append(
            f"{len(found.mismatched)} of another shape ({name} {list(shape)}, expected {list(wanted)}{others})"
        )
    if found.missing:
        parts.append(f"{len(found.missing)} missing ({_listed(found.missing)})")
    if found.unexpected:
        parts.append(f"{len(found.unexpected)} unexpected ({_listed(found.unexpected)})")
    if parts:
        raise BuildError(
            f"tensors in {weights.folder} are not those of {kind} with its config.json: {', '.join(parts)}; save the pipeline "
            "again with the model that the weights are of"
        )


def diffusers_differences(kind: Any, config: Mapping[str, Any], weights: SourceWeights) -> Differences:
    """How stored weights differ from those of a diffusers model; nothing of either is in memory.

    Args:
        kind: its class.
        config: what `kind.load_config` returns.
        weights: of its folder.

    Raises:
        BuildError: the model would compute more than `LARGEST_BUFFERS` when it is made.
    """
    with torch.device("meta"):
        model = kind.from_config(config)
    _require_small_buffers(model, weights)
    expected = model.state_dict()
    stored = dict(weights.places)
    model._fix_state_dict_keys_on_load(stored)  # names of older releases
    ignored = [*(kind._keys_to_ignore_on_load_unexpected or ()), _POSITIONS.pattern]
    buffers = {name for name, _ in model.named_buffers()}
    return Differences(
        tuple(sorted(set(expected) - set(stored))),
        tuple(
            sorted(
                name
                for name in set(stored) - set(expected) - buffers
                if not any(re.search(pattern, name) for pattern in ignored)
            )
        ),
        tuple(
            (name, place.shape, tuple(expected[name].shape))
            for name, place in sorted(stored.items())
            if name in expected and place.shape != expected[name].shape
        ),
    )


def transformers_differences(kind: Any, config: Any, weights: SourceWeights) -> Differences:
    """The same for a model of transformers, which is asked to load tensors that have shapes only.

    So its rules count: tied tensors, prefixes of base models, names of older releases, names that it ignores.

    Args:
        kind: its class.
        config: its configuration.
        weights: of its folder.

    Raises:
        BuildError: the model would compute more than `LARGEST_BUFFERS` when it is made.
    """
    with torch.device("meta"):
        _require_small_buffers(kind(config), weights)
    stored = {name: _without_numbers(place) for name, place in weights.places.items()}
    _, loading = kind.from_pretrained(
        None,
        config=config,
        state_dict=stored,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return Differences.of(loading)


def _require_small_buffers(model: torch.nn.Module, weights: SourceWeights) -> None:
    stored = model.state_dict()
    computed = sum(item.nbytes for name, item in model.named_buffers() if name not in stored)
    if computed > LARGEST_BUFFERS:
        raise BuildError(
            f"{weights.folder / 'config.json'} asks for {computed / 2**30:.0f} GiB of tables that are computed when "
            f"{type(model).__name__} is made, expected {LARGEST_BUFFERS >> 30} at most; check its sizes"
        )


def _without_numbers(place: Place) -> torch.Tensor:
    return torch.empty(place.shape, dtype=place.dtype, device="meta")


def _listed(names: Iterable[str], limit: int = 3) -> str:
    shown = list(names)
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")
