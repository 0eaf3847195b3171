"""What belongs to one build at a time beside its target, and what dead builds have left there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from engines.errors import TmpDiffError
from engines.files import fsync_folder, reason

LOCK = "lock"
PARTIAL = ".partial"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder that belongs to this process for the length of a block; it is made where it is missing,
    with its parents.

    The lock goes with the process, however that ends.

    Raises:
        TmpDiffError: another process has it, or something else has its name.
    """
    handle = None
    while handle is None:
        handle = _lock(folder)
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path) -> int | None:
    """The open lock file; None where the folder was removed meanwhile by the build that had it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    path = folder / LOCK
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise TmpDiffError(f"{folder} is no folder, and a build keeps its finished stages there; remove it")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(handle).st_nlink:  # removed by its owner, the last thing that it does
            os.close(handle)
            return None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        return handle
    except BlockingIOError:
        owner = os.pread(handle, 20, 0).decode(errors="replace")
        os.close(handle)
        raise TmpDiffError(
            f"another build to the same place is running: process {owner if owner.isdigit() else 'unknown'} holds {path}; "
            "wait for it, or name another --out"
        ) from None
    except OSError as error:
        os.close(handle)
        raise TmpDiffError(f"{path} cannot be locked: {reason(error)}; name an --out on a local disk") from error


def clear_leftovers(target: Path, note: Callable[[str], None]) -> None:
    """Removes what `engines.files.staged_folder` left beside a target when its process was killed.

    A target that was moved aside, and had no other in its place yet, is put back.

    Args:
        target: absolute; builds to it are locked out.
        note: called with a line for what was found.
    """
    made = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(partial|old)")
    found = [path for path in target.parent.iterdir() if made.fullmatch(path.name)]
    retired = [path for path in found if path.suffix == ".old"]
    if retired and not os.path.lexists(target):
        last = max(retired, key=lambda path: path.lstat().st_mtime_ns)
        os.rename(last, target)
        fsync_folder(target.parent)
        found.remove(last)
        note(f"{target} was put back: a build that was killed while it replaced it had left it as {last.name}")
    for path in found:
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            remove_tree(path)
            note(f"removed {path}, left by a build that was killed")


def discard(folder: Path) -> None:
    """Removes a folder at once: whatever happens on the way, no part of it is found under its name."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    going = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PARTIAL, dir=folder.parent))
    os.rename(folder, going)
    remove_tree(going)


def remove_tree(folder: Path) -> None:
    """Removes a folder and all in it; links are not followed.

    Raises:
        TmpDiffError: the system refuses.
    """
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError) as error:
        why = reason(error) if isinstance(error, OSError) else "folders are nested too deeply"
        raise TmpDiffError(f"{folder} cannot be removed: {why}; remove it by hand") from error
