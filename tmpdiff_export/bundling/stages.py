"""Finished pieces of a build, kept beside its target: a build that was killed goes on from them.

`.NAME.stages/` holds a folder `STAGE-DIGEST/` per finished stage, with its files and `stage.json`: the key of all that
shapes the stage, its result, and size and hash of every file. What is unfinished lies in hidden folders beside them.
The whole belongs to one process at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.documents import canonical_json
from engines.errors import TmpDiffError, first_line
from engines.files import fsync_folder, fsync_tree, sha256_bytes
from tmpdiff_export.bundling.leftovers import LOCK, PARTIAL, clear_leftovers, discard, locked, remove_tree
from tmpdiff_export.bundling.preflight import stages_folder
from tmpdiff_export.bundling.stage_files import entries
from tmpdiff_export.bundling.stage_record import Kept, read_stage, record_stage
from tmpdiff_export.memory import size_text

CACHE = "compiler-cache"

Note = Callable[[str], None]
"""Called with a line for the user."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]*")
_FOLDER = re.compile(rf"({_NAME.pattern})-[0-9a-f]{{16}}")


class Stages:
    """The stages of one build; from `open_stages`.

    There is one stage of a name: made again with another key, it takes the place of the older one.
    """

    def __init__(self, folder: Path, note: Note) -> None:
        self.folder = folder
        self._note = note
        self._used: set[Path] = set()

    def find(self, name: str, key: Any) -> Kept | None:
        """The finished stage of a name and a key; None where there is none.

        Size and hash of its files are checked. One that is damaged is noted and removed.

        Args:
            name: of the stage, of lower case letters, digits and "_.+-".
            key: JSON data of all that shapes it.
        """
        folder = self._place(name, key)
        if not os.path.lexists(folder):
            return None
        try:
            kept = read_stage(folder, name, key)
        except (TmpDiffError, OSError) as error:
            self._note(f"stage {name} is damaged, and made anew: {first_line(error)}")
            discard(folder)
            return None
        self._used.add(folder)
        return kept

    def begin(self, name: str, key: Any) -> Path:
        """An empty folder for the files of a stage; what does not come to `finish` is removed in the end."""
        prefix = f".{self._place(name, key).name}."
        return Path(tempfile.mkdtemp(prefix=prefix, suffix=PARTIAL, dir=self.folder))

    def finish(self, path: Path, name: str, key: Any, result: Any) -> Kept:
        """Keeps a stage: when this returns, a loss of power does not take it away.

        Args:
            path: from `begin`, with its files; nobody writes to them any more.
            name: as for `begin`.
            key: as for `begin`.
            result: JSON data.

        Raises:
            ValueError: the result is no JSON data, or a file is called `stage.json`.
            TmpDiffError: something in the folder is no plain file.
            OSError: the disk is full.
        """
        folder = self._place(name, key)
        kept = record_stage(path, name, key, result)
        fsync_tree(path)
        if os.path.lexists(folder):
            discard(folder)
        os.rename(path, folder)
        fsync_folder(self.folder)
        for other in self._finished():
            if other != folder and _stage_of(other) == name:
                discard(other)
        self._used.add(folder)
        return replace(kept, folder=folder)

    def keep(self, name: str, key: Any, make: Callable[[Path], Any]) -> Kept:
        """The stage as `find` has it, or made now.

        Args:
            name: as for `find`.
            key: as for `find`.
            make: writes its files into an empty folder and returns its result, JSON data.
        """
        found = self.find(name, key)
        if found is not None:
            return found
        path = self.begin(name, key)
        try:
            return self.finish(path, name, key, make(path))
        except BaseException:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            raise

    @property
    def cache(self) -> Path:
        """A folder for what a compiler may use again, made where it is missing; it goes when the stages go."""
        folder = self.folder / CACHE
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    @property
    def used_bytes(self) -> int:
        """What the finished stages take on the disk."""
        return sum(
            status.st_size
            for folder in self._finished()
            for _, status in entries(folder)
            if stat.S_ISREG(status.st_mode)
        )

    def described(self) -> str:
        """How many there are, their size and place, "5 finished stages, 31.2 GB, in PATH"; empty without any."""
        count = len(self._finished())
        stages = "1 finished stage" if count == 1 else f"{count} finished stages"
        return f"{stages}, {size_text(self.used_bytes)}, in {self.folder}" if count else ""

    def drop_unused(self) -> None:
        """Removes the stages that nothing has asked for since they were opened, as those of other options."""
        for folder in self._finished():
            if folder not in self._used:
                discard(folder)

    def remove(self) -> None:
        """Removes all stages and their folder; what else somebody has put there stays."""
        for folder in self._finished():
            discard(folder)
        self._clear_partial()
        if os.path.lexists(self.folder / CACHE):
            discard(self.folder / CACHE)
        (self.folder / LOCK).unlink(missing_ok=True)  # held until the very end; see `leftovers.locked`
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _clear_partial(self) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith(".") and path.name.endswith(PARTIAL):
                remove_tree(path)

    def _finished(self) -> list[Path]:
        """In the order of their names; whether they are whole is not checked."""
        return sorted(path for path in self.folder.iterdir() if _FOLDER.fullmatch(path.name))

    def _place(self, name: str, key: Any) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"stage name {name!r} is not of lower case letters, digits and _.+-")
        return self.folder / f"{name}-{sha256_bytes(canonical_json(key))[:16]}"


@contextlib.contextmanager
def open_stages(target: Path, note: Note, *, restart: bool = False, keep: bool = False) -> Iterator[Stages]:
    """The stages of a build, for the length of a block; to be opened before `staged_folder` of the same target.

    When the block succeeds they are removed. When it fails they stay, for the next build to the same target. What dead
    builds have left beside the target is removed first.

    Args:
        target: the bundle folder that is built; its parents are made.
        note: called with a line for the user: what was found, what is damaged, what stays.
        restart: begins without the stages that are there.
        keep: the stages that were used stay after success as well.

    Raises:
        TmpDiffError: another build to the same target is running, or something else has the name of the folder.
    """
    target = Path(os.path.abspath(target))
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    folder = stages_folder(target)
    try:
        with locked(folder):
            stages = Stages(folder, note)
            try:
                clear_leftovers(target, note)
                stages._clear_partial()
                if restart:
                    for old in (*stages._finished(), *folder.glob(CACHE)):
                        discard(old)
                if found := stages.described():
                    note(f"going on with {found}; --restart begins anew")
                yield stages
            except BaseException:
                stages._clear_partial()
                if left := stages.described():
                    note(f"kept for the next run of the same command: {left}")
                else:
                    stages.remove()
                raise
            if not keep:
                stages.remove()
                return
            stages._clear_partial()
            stages.drop_unused()
            if left := stages.described():
                note(f"kept: {left}")
    finally:
        for parent in made:  # those that are still empty
            with contextlib.suppress(OSError):
                parent.rmdir()


def _stage_of(folder: Path) -> str:
    return folder.name.rpartition("-")[0]
