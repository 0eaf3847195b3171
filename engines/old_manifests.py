"""Manifests of versions before 5, where an engine has one weight file or null in place of a list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

_ONE_WEIGHT_FILE: Final = 4  # the last such version


def current_form(data: Any) -> Any:
    """A manifest's JSON data with lists of weight files, whatever its version; what is no manifest stays as it is."""
    return _with_weights(data, lambda given: [] if given is None else [given])


def form_of_its_version(data: dict[str, Any]) -> dict[str, Any]:
    """The opposite, so that an old manifest is written, and hashed, as it was read."""
    result: dict[str, Any] = _with_weights(data, lambda given: given[0] if given else None)
    return result


def _with_weights(data: Any, change: Callable[[Any], Any]) -> Any:
    """An old manifest's data with the weights of every engine changed that has such a field; a newer one as it is."""
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version > _ONE_WEIGHT_FILE:
        return data

    def changed(entry: Any) -> Any:
        if not isinstance(entry, dict) or "weights" not in entry:
            return entry
        return {**entry, "weights": change(entry["weights"])}

    result = {key: changed(value) if key in ("text_encoder", "vae_decoder") else value for key, value in data.items()}
    if isinstance(data.get("denoisers"), dict):
        result["denoisers"] = {name: changed(entry) for name, entry in data["denoisers"].items()}
    return result
