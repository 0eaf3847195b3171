"""What the manifest says of a torch package, checked against the torch that is installed."""

from __future__ import annotations

from pathlib import PurePosixPath

from engines.backends.torch.library import VERSION, require_cudnn
from engines.errors import BackendError
from engines.manifest import EngineEntry
from engines.package_entry import PackageEntry


def package_of(name: str, entry: EngineEntry) -> PackageEntry:
    """What the manifest says of a package, after checking that this torch can load it; its operators are there then.

    Raises:
        BackendError: the entry describes no package, it was compiled by another minor version of torch, or it calls an
            operator whose library is not installed.
    """
    if entry.package is None or not entry.weights:
        raise BackendError(f"engine {name}: the manifest does not describe its torch package; build the bundle again")
    for file in entry.files():
        if PurePosixPath(file.path).parent == PurePosixPath(entry.file.path).parent:
            continue
        raise BackendError(
            f"engine {name}: its file {file.path} lies in another folder than {entry.file.path}, expected the same; "
            "build the bundle again"
        )
    if _minor(entry.backend_version) != _minor(VERSION):
        raise BackendError(
            f"engine {name} was compiled by torch {entry.backend_version}, installed is {VERSION}; install torch "
            f"{_minor(entry.backend_version)}, or build the bundle again: compiled packages belong to one minor version"
        )
    if "attention_fp8" in entry.package.operators:
        import engines.backends.torch.attention  # noqa: F401  (registers the operator; others need no cuDNN)

        if entry.device != "cpu":
            require_cudnn()
    return entry.package


def _minor(version: str) -> str:
    """Major and minor of a version such as "2.11.0+cu130"."""
    return ".".join(version.split(".")[:2])
