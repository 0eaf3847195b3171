"""Manifests of earlier versions.

Before version 5 an engine has one weight file or null in place of a list of them. Up to version 5 a plan with one
optimization profile has it in `profile`, in place of a list of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

_ONE_WEIGHT_FILE: Final = 4  # the last such versions
_ONE_PROFILE: Final = 5

_Engine = dict[str, Any]


def current_form(data: Any) -> Any:
    """A manifest's JSON data as the present version has it, whatever its version; what is no manifest stays as it is."""
    return _with_engines(data, _current_engine)


def form_of_its_version(data: dict[str, Any]) -> dict[str, Any]:
    """The opposite, so that an old manifest is written, and hashed, as it was read."""
    result: dict[str, Any] = _with_engines(data, _old_engine)
    return result


def _current_engine(entry: _Engine, version: int) -> _Engine:
    result = dict(entry)
    if version <= _ONE_WEIGHT_FILE and "weights" in entry:
        result["weights"] = [] if entry["weights"] is None else [entry["weights"]]
    plan = entry.get("plan")
    if isinstance(plan, dict) and "profile" in plan:
        result["plan"] = {"profiles": [plan["profile"]], **_without(plan, "profile")}
    return result


def _old_engine(entry: _Engine, version: int) -> _Engine:
    result = dict(entry)
    if version <= _ONE_WEIGHT_FILE and "weights" in entry:
        result["weights"] = entry["weights"][0] if entry["weights"] else None
    plan = entry.get("plan")
    if plan is not None and len(plan["profiles"]) == 1:
        result["plan"] = {"profile": plan["profiles"][0], **_without(plan, "profiles")}
    return result


def _with_engines(data: Any, change: Callable[[_Engine, int], _Engine]) -> Any:
    """An old manifest's data with every engine changed; a newer one's as it is."""
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version > _ONE_PROFILE:
        return data

    def changed(entry: Any) -> Any:
        return change(entry, version) if isinstance(entry, dict) else entry

    result = {key: changed(value) if key in ("text_encoder", "vae_decoder") else value for key, value in data.items()}
    if isinstance(data.get("denoisers"), dict):
        result["denoisers"] = {name: changed(entry) for name, entry in data["denoisers"].items()}
    return result


def _without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != key}
