"""Manifests of versions before 6, of one setting, and before 5, where an engine has one weight file or null."""

from __future__ import annotations

from typing import Any, Final

_ONE_SETTING: Final = 5  # the last such version
_ONE_WEIGHT_FILE: Final = 4  # the last such version
_COMPONENTS = ("text_encoder", "vae_decoder")


def current_form(data: Any) -> Any:
    """A manifest's JSON data in the form of version 6, whatever its version; what is no manifest stays as it is."""
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or not 1 <= version <= _ONE_SETTING:
        return data
    result = {**data, "version": _ONE_SETTING + 1, "settings_sha256": ""}
    if version <= _ONE_WEIGHT_FILE:
        result |= {key: _with_weights(data[key]) for key in _COMPONENTS if key in data}
        if isinstance(data.get("denoisers"), dict):
            result["denoisers"] = {name: _with_weights(entry) for name, entry in data["denoisers"].items()}
    result |= {key: [result[key]] for key in _COMPONENTS if key in data}
    if isinstance(result.get("denoisers"), dict):
        result["denoisers"] = {name: [entry] for name, entry in result["denoisers"].items()}
    if "text" in result:
        result["texts"] = [result.pop("text"), *_listed(result.pop("further_texts", []))]
    sampling, sampler = result.pop("sampling", None), result.pop("sampler", None)
    if isinstance(sampling, dict) and sampler is not None:
        result["settings"] = [{**sampling, "sampler": sampler}]
    return result


def _with_weights(entry: Any) -> Any:
    if not isinstance(entry, dict) or "weights" not in entry:
        return entry
    return {**entry, "weights": [] if entry["weights"] is None else [entry["weights"]]}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
