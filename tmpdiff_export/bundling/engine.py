"""An engine from its prepared form to its place in the bundle: made in a stage, compared with torch, the best kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.documents import FileEntry
from engines.errors import BuildError
from engines.manifest import EngineEntry
from engines.precision import REFERENCE, Precision
from tmpdiff_export.bundling.site import Site
from tmpdiff_export.bundling.stage_files import link
from tmpdiff_export.bundling.stage_record import Kept
from tmpdiff_export.quantization.sixteen_bit import NO_RECIPE
from tmpdiff_export.targets.target import PreparedEngine

# Text encoder and VAE decoder run once per picture, in FP32 math from FP16 weights.
COMPONENT_FLOOR_DB = 40.0
NARROW_WEIGHTS = "int8-weights"
"""Recipe of a text encoder whose linear layers are stored as INT8 codes."""
# INT8 per output channel: 28 to 40 dB with random Gemma-2, T5 and CLIP encoders of 2 to 26 layers; a wrong scale gives less
# than 10.
NARROW_WEIGHTS_FLOOR_DB = 20.0
ENGINES = "engines"


@dataclass(frozen=True)
class StoredFile:
    """A weight file that is written.

    Attributes:
        path: where it lies, in a stage.
        entry: of the bundle's manifest.
    """

    path: Path
    entry: FileEntry

    @classmethod
    def of(cls, kept: Kept, name: str) -> StoredFile:
        """A file of a stage, which will be `engines/<name>` in the bundle."""
        entry = kept.files[name]
        return cls(kept.folder / name, entry.model_copy(update={"path": f"{ENGINES}/{name}"}))


@dataclass(frozen=True)
class EngineName:
    """An engine and one way to make it.

    Attributes:
        engine: its name, stem of its files.
        variant: of the recipe.
    """

    engine: str
    variant: str = NO_RECIPE


@dataclass(frozen=True)
class BuiltEngine:
    """A finished engine.

    Attributes:
        entry: its manifest entry.
        files: what belongs into the bundle, by path in it.
    """

    entry: EngineEntry
    files: dict[str, Path]


@dataclass(frozen=True, eq=False)
class Trial:
    """One way to make an engine, in the making.

    Attributes:
        made: its manifest entry.
        keep: keeps the stage when it is there, at the first call.
        price_db: what it has to be better by for the bytes that it takes more than others.
    """

    made: Future[EngineEntry]
    keep: Callable[[], BuiltEngine]
    price_db: float = 0.0


def start_trial(
    site: Site, name: EngineName, prepared: PreparedEngine, weights: Sequence[StoredFile], key: dict[str, Any]
) -> Trial:
    """Starts an engine, or finds it among the stages.

    Args:
        site: the build.
        name: of the engine.
        prepared: from the target.
        weights: all files that it reads.
        key: what shapes the engine beside its weights and the target.
    """
    stage = f"engine-{name.engine}-{name.variant}"
    entries = [file.entry.model_dump(mode="json") for file in weights]
    whole = site.key(**key, target=site.target.key, weights=entries)
    inputs = {file.entry.path: file.path for file in weights}

    def built(kept: Kept) -> BuiltEngine:
        entry = EngineEntry.model_validate(kept.result)
        return BuiltEngine(entry, {**inputs, **{path: kept.folder / path for path in kept.files}})

    found = site.stages.find(stage, whole)
    if found is not None:
        made: Future[EngineEntry] = Future()
        made.set_result(EngineEntry.model_validate(found.result))
        return Trial(made, lambda: built(found))
    site.report(f"make engine {name.engine}" + ("" if name.variant == NO_RECIPE else f" ({name.variant})"), 0, 1)
    folder = site.stages.begin(stage, whole)
    (folder / ENGINES).mkdir()
    for file in weights:
        link(file.path, folder / file.entry.path)
    made = site.start(name.engine, prepared.task(folder, [file.entry for file in weights]))

    @functools.cache
    def keep() -> BuiltEngine:
        entry = made.result()
        for path in inputs:
            (folder / path).unlink()
        return built(site.stages.finish(folder, stage, whole, entry.model_dump(mode="json")))

    if made.done():
        keep()
    return Trial(made, keep)


@dataclass(frozen=True, eq=False)
class StartedEngine:
    """An engine in the making.

    Attributes:
        name: of the engine.
        trials: of every recipe variant, in the order of the recipe.
    """

    name: str
    trials: Sequence[Trial]

    def ready(self) -> bool:
        """Whether every variant is made, so that `finish` need not wait; keeps those that are.

        Raises:
            TmpDiffError: a variant failed; what making it raised.
        """
        made = [trial for trial in self.trials if trial.made.done()]
        for trial in made:
            trial.keep()
        return len(made) == len(self.trials)

    @property
    def pending(self) -> list[Future[EngineEntry]]:
        """What is not made yet."""
        return [trial.made for trial in self.trials if not trial.made.done()]

    def finish(self) -> BuiltEngine:
        """Waits for the variants and returns the best one for its price; to be called once.

        Raises:
            BuildError: it is below its SQNR floor, or what making a variant raised.
        """
        worth = [trial.keep().entry.sqnr_db - trial.price_db for trial in self.trials]
        best = self.trials[worth.index(max(worth))].keep()  # the first of equals
        require_floor(self.name, best.entry)
        return best


def require_floor(name: str, entry: EngineEntry) -> None:
    """Refuses an engine that is less accurate than its precision can be.

    Raises:
        BuildError: naming the measured SQNR and the floor.
    """
    if not entry.sqnr_db >= entry.sqnr_floor_db:
        quantized = name.partition(".")[0] in {precision.value for precision in Precision} - {REFERENCE.value}
        narrow = "leave out --text-encoder-weights" if entry.recipe == NARROW_WEIGHTS else ""
        fix = narrow or (
            "leave this precision out of --precisions, or give more varied --prompts"
            if quantized
            else "the model loses too much on this backend; build with another --backend"
        )
        raise BuildError(
            f"{name}: the built engine has an SQNR of {entry.sqnr_db:.1f} dB against FP32 torch on real inputs, "
            f"its floor is {entry.sqnr_floor_db:.1f} dB; {fix}"
        )
