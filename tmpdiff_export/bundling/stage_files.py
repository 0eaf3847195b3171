"""Plain files of a folder: looked through, hashed several at a time, put elsewhere without copying."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from engines.errors import TmpDiffError
from engines.files import sha256_file, side_by_side

# The file system has no hard links, not for this file, or not to there.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


def link(source: Path, target: Path) -> None:
    """Puts a file of a stage into another folder, which is made; copies it only where there are no hard links.

    Raises:
        FileExistsError: there is such a file already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "xb") as written:
        shutil.copyfileobj(read, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())


def plain_files(folder: Path) -> dict[str, int]:
    """Sizes of all files below a folder, by path in POSIX form.

    Raises:
        TmpDiffError: there is a link, device, pipe or socket.
    """
    sizes = {}
    for path, status in entries(folder):
        if stat.S_ISREG(status.st_mode):
            sizes[path.relative_to(folder).as_posix()] = status.st_size
        elif not stat.S_ISDIR(status.st_mode):
            raise TmpDiffError(f"{path} is no plain file")
    return sizes


def entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All that is below a folder, links not followed; nothing where it is a link or a file itself."""
    pending = [folder] if folder.is_dir() and not folder.is_symlink() else []
    while pending:
        for entry in os.scandir(pending.pop()):
            yield (path := Path(entry.path)), entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)


def hashes(folder: Path, names: Mapping[str, int]) -> dict[str, str]:
    """SHA-256 by path, of several files at once."""
    largest_first = sorted(names, key=lambda name: -names[name])
    found = side_by_side([folder / name for name in largest_first], sha256_file)
    return dict(zip(largest_first, found, strict=True))
