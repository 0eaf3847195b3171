"""Atomic writes, hashes, and paths that must stay inside a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from engines.errors import BundleError, TmpDiffError

CHUNK_BYTES = 1 << 20
_AT_ONCE = 8  # files that are hashed

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def reason(error: OSError) -> str:
    """Why the system refused, for a message."""
    if error.errno == errno.ENOSPC:
        return "the disk is full; free some space and try again"
    return error.strerror or str(error)


def sha256_file(path: Path, stop: threading.Event | None = None) -> str:
    """Hex SHA-256 of a file's content, read in chunks; of a part of it once another thread has set `stop`."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while (stop is None or not stop.is_set()) and (count := stream.readinto(chunk)):
            digest.update(chunk[:count])
    return digest.hexdigest()


def side_by_side(items: Iterable[_Item], work: Callable[[_Item, threading.Event], _Result]) -> list[_Result]:
    """What `work`, which reads files, makes of every item, in their order; several at a time, each on a core.

    Args:
        items: taken in this order.
        work: called in threads with an item and an event; once that is set, nobody wants its result.

    Raises:
        BaseException: of the first item that failed, or Ctrl-C; the others are not gone through to their ends.
    """
    from concurrent.futures import ThreadPoolExecutor  # not loaded by commands that only ask

    stop = threading.Event()
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        pending = [pool.submit(work, item, stop) for item in items]
        try:
            return [item.result() for item in pending]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of a byte string."""
    return hashlib.sha256(data).hexdigest()


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Makes a folder durable, with all that is below it; links are not followed."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                fsync_folder(path)  # a file as well
        fsync_folder(Path(parent))


def atomic_write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        OSError: the folder is missing, not writable, or the disk is full; nothing is left behind.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    fsync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` for text, as UTF-8."""
    atomic_write_bytes(path, text.encode())


def require_writable(paths: Sequence[Path]) -> None:
    """Refuses output files of one folder that could not be written after the work.

    Raises:
        TmpDiffError: no such folder, no right to write there, or a folder has the name of a file.
    """
    folder = paths[0].parent
    if not folder.is_dir():
        raise TmpDiffError(f"output folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TmpDiffError(f"output folder {folder} is not writable")
    for path in paths:
        if path.is_dir():
            raise TmpDiffError(f"output {path} is a folder; name a file")


def require_replaceable(target: Path, *, replace: bool) -> None:
    """Refuses a folder that could not be made: cheap, so that commands ask before their long work as well.

    Raises:
        TmpDiffError: `target` exists and `replace` is false, or it is no folder.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not replace:
        what = "folder" if target.is_dir() else "file"
        raise TmpDiffError(f"output {what} {target} already exists; name a new one or pass --force to replace a bundle")
    if target.exists() and not target.is_dir():
        raise TmpDiffError(f"output {target} is a file; name a folder")


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` when the block succeeds, and is on the disk by then.

    On any exception (Ctrl-C and a full disk included) the scratch folder is removed and `target`
    is as it was before.

    Args:
        target: the folder to make.
        replace: whether an existing `target` may be replaced; it is kept until the new one is whole.

    Raises:
        TmpDiffError: `target` exists and `replace` is false, or its parent is not a folder.
    """
    target = Path(os.path.abspath(target))
    require_replaceable(target, replace=replace)
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    os.chmod(scratch, 0o777 & ~_umask())
    try:
        yield scratch
        fsync_tree(scratch)
        if target.exists() and not replace:
            raise TmpDiffError(f"output folder {target} appeared while the work went on; it was left as it is")
        if target.exists():
            retired = scratch.with_suffix(".old")
            os.rename(target, retired)
            try:
                os.rename(scratch, target)
            except BaseException:
                os.rename(retired, target)
                raise
            if retired.is_symlink():  # to a folder elsewhere, which stays
                retired.unlink()
            else:
                shutil.rmtree(retired, ignore_errors=True)
        else:
            os.rename(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise
    fsync_folder(target.parent)


def inside(folder: Path, relative: str) -> Path:
    """The path of `relative` (POSIX form, as written in a manifest) inside `folder`.

    Raises:
        BundleError: the path is absolute, climbs out, is not in normal form, or passes through a link
            that leads out of `folder`.
    """
    pure = PurePosixPath(relative)
    if not relative or pure.is_absolute() or "\\" in relative or "\0" in relative or ".." in pure.parts:
        raise BundleError(f"path {relative!r} leaves the bundle folder {folder}; paths must be relative and inside")
    if str(pure) != relative:  # a file would have two names
        raise BundleError(f"path {relative!r} is not in normal form, expected {str(pure)!r}; build the bundle again")
    path = folder / pure
    root = folder.resolve()
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or a name the system cannot hold
        raise BundleError(f"path {relative!r} cannot be followed in {folder}; use plain files") from error
    if not resolved.is_relative_to(root):
        raise BundleError(f"path {relative!r} leaves the bundle folder {folder} through a link; use plain files")
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
