"""Where a build works: what it builds from and for, and the stages that are kept."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
from engines.files import sha256_bytes, sha256_file
from engines.version import VERSION
from tmpdiff_export.bundling.options import BuildOptions
from tmpdiff_export.bundling.stages import Stages
from tmpdiff_export.pipelines.load import SourcePipeline
from tmpdiff_export.pipelines.settings import Setting
from tmpdiff_export.targets.target import Start, Target

Progress = Callable[[str, int, int], None]
_SETTINGS = (".json", ".txt", ".model")
_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "numpy")


@dataclass(frozen=True, eq=False)
class Site:
    """One build.

    Attributes:
        source: the pipeline.
        settings: what the bundle will have, the default one first.
        target: what engines are built for.
        options: what was asked.
        stages: what is finished.
        start: begins the making of an engine.
        report: called with a stage name, units done and units in all.
        tell: called with a line for the user.
    """

    source: SourcePipeline
    settings: tuple[Setting, ...]
    target: Target
    options: BuildOptions
    stages: Stages
    start: Start
    report: Progress
    tell: Callable[[str], None]

    def key(self, **more: Any) -> dict[str, Any]:
        """The key of a stage: the code that makes it, and what else shapes it."""
        return {"code": code_digest(), "libraries": versions(), **more}

    @property
    def setting(self) -> Setting:
        """The default one, whose runs give the ranges."""
        return self.settings[0]

    @functools.cached_property
    def shapes(self) -> tuple[Setting, ...]:
        """The first setting of every picture size and text length."""
        return tuple({setting.shape: setting for setting in reversed(self.settings)}.values())[::-1]

    @functools.cached_property
    def denoiser_sha256(self) -> str:
        """Hash of the denoiser's files."""
        return self.source.weights.sha256()

    @functools.cached_property
    def models_sha256(self) -> dict[str, str]:
        """Hash of the files of every other model, by name."""
        return {name: self.source.stored(name).sha256() for name in self.source.other_models}

    @functools.cached_property
    def settings_sha256(self) -> str:
        """Hash of what is no weights: scheduler, tokenizers, configurations."""
        folder = self.source.folder
        parts = [folder, *(folder / name for name in self.source.pipe.components if (folder / name).is_dir())]
        found = (path for part in parts for path in part.iterdir())  # `rglob` would not look into linked folders
        files = sorted(path for path in found if path.suffix in _SETTINGS and path.is_file())
        lines = "".join(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n" for path in files)
        return sha256_bytes(lines.encode())

    @property
    def pipeline_sha256(self) -> list[str]:
        """Hashes of everything in the pipeline."""
        return [self.settings_sha256, self.denoiser_sha256, *self.models_sha256.values()]


@functools.cache
def versions() -> dict[str, str]:
    """Of the libraries whose code shapes what every build makes."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


@functools.cache
def code_digest() -> str:
    """Hash of this project's own modules: stages of other code are not gone on from."""
    roots = Path(engines.__path__[0]), Path(__file__).parents[1]
    files = {f"{root.name}/{path.relative_to(root).as_posix()}": path for root in roots for path in root.rglob("*.py")}
    lines = "".join(f"{name} {sha256_file(path)}\n" for name, path in sorted(files.items()))
    return sha256_bytes(f"{VERSION}\n{lines}".encode())
