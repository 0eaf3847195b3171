"""Manifests of earlier versions.

Up to version 5 there is one setting, one engine of a kind, and a plan's one optimization profile in `profile`. Before
version 5 an engine has one weight file or null in place of a list of them.
"""

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
    result |= {key: [_current_engine(data[key], version)] for key in _COMPONENTS if key in data}
    if isinstance(data.get("denoisers"), dict):
        result["denoisers"] = {name: [_current_engine(entry, version)] for name, entry in data["denoisers"].items()}
    if "text" in data:
        further = result.pop("further_texts", [])
        result["texts"] = [result.pop("text"), *(further if isinstance(further, list) else [further])]
    sampling, sampler = result.pop("sampling", None), result.pop("sampler", None)
    if isinstance(sampling, dict) and sampler is not None:
        result["settings"] = [{**sampling, "sampler": sampler}]
    return result


def _current_engine(entry: Any, version: int) -> Any:
    if not isinstance(entry, dict):
        return entry
    result = dict(entry)
    if version <= _ONE_WEIGHT_FILE and "weights" in entry:
        result["weights"] = [] if entry["weights"] is None else [entry["weights"]]
    plan = entry.get("plan")
    if isinstance(plan, dict) and "profile" in plan:
        result["plan"] = {
            **{key: value for key, value in plan.items() if key != "profile"},
            "profiles": [plan["profile"]],
        }
    return result
