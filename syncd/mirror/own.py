"""Directories that are syncd's own: made or recognised without trusting anybody, and removed with all they hold.

Rules kept here:
 * a directory that others could have prepared for us is refused, not mended;
 * removal never follows a symlink, never leaves the filesystem, and opens up only what it removes.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import DiskProblem, SyncdError
from syncd.mirror.root import Dirs, change_mode, disk_problem
from syncd.paths import parent, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = structlog.get_logger()

PRIVATE_MODE: Final = 0o700
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_U_RWX: Final = stat.S_IRWXU


def open_own(above: int, name: str, root: Path, mode: int = PRIVATE_MODE) -> int:
    """Make or open one of our own directories, and refuse one that others could have prepared for us (L5).

    :param above: descriptor of the directory that holds it.
    :param mode: a private one gets it whatever it had; a public one only when it is made.
    :raises DiskProblem: a symlink, not a directory, of another owner, writable by others, on another filesystem.
    """
    where = f"{printable(name)!r} in the mirror {printable(str(root))}"
    made = False
    try:
        with suppress(FileExistsError):  # what is there is looked at below
            os.mkdir(name, PRIVATE_MODE, dir_fd=above)
            made = True
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except OSError as exc:
        if exc.errno in {errno.ENOTDIR, errno.ELOOP}:
            raise DiskProblem(f"{where} is a symlink or no directory", hint="remove it") from exc
        raise disk_problem(exc, f"cannot make or open {where}") from exc
    with ExitStack() as undo:
        undo.callback(os.close, fd)
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise DiskProblem(f"{where} belongs to uid {found.st_uid}", hint="remove it, or run as that user")
        if found.st_dev != os.fstat(above).st_dev:
            raise DiskProblem(f"{where} is on another filesystem", hint="unmount it")
        if found.st_mode & _OTHERS_WRITE:
            raise DiskProblem(
                f"{where} is writable by others", hint=f"look what is in it, then chmod {mode:04o} or remove it"
            )
        if stat.S_IMODE(found.st_mode) != mode and (made or mode == PRIVATE_MODE):
            try:
                os.fchmod(fd, mode)
            except OSError as exc:
                raise disk_problem(exc, f"cannot make {where} private") from exc
        undo.pop_all()
    return fd


def remove_tree(above: int, name: str, *, stop: Callable[[], bool] = lambda: False) -> bool:
    """Remove a directory of ours and everything in it; nothing is there: fine.

    Memory is bounded by the names of the directories along one path.

    :param stop: asked before each removal; once it says so, the rest stays.
    :returns: ``False``: stopped.
    :raises PathRefused: a filesystem is mounted in it; that, and what leads to it, stays.
    :raises OSError: the disk refused.
    """
    with Dirs(above, one_filesystem=True) as dirs:
        try:
            frames = [(name, _names(dirs, name))]
        except FileNotFoundError:
            return True
        while frames:
            if stop():
                return False
            path, names = frames[-1]
            if not names:
                frames.pop()
                dirs.forget(path)
                os.rmdir(path.rpartition("/")[2], dir_fd=dirs.open(parent(path)))
                continue
            child = names.pop()
            try:
                os.unlink(child, dir_fd=dirs.open(path))
            except FileNotFoundError:
                continue
            except IsADirectoryError:
                below = f"{path}/{child}"
                frames.append((below, _names(dirs, below)))
            crash_point("release_removing")
    return True


def _names(dirs: Dirs, path: str) -> list[str]:
    """Return a directory's names, after giving ourselves the right to read and change it."""
    fd = dirs.open(path)
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & _U_RWX != _U_RWX:
        change_mode(fd, mode | _U_RWX)
        dirs.forget(path)  # what was held may be an O_PATH descriptor
        fd = dirs.open(path)
    return os.listdir(fd)  # noqa: PTH208 - a descriptor, not a path


def quietly(remove: Callable[[], None]) -> None:
    """Clean up while an error is on its way, which must not be hidden by a second one; the next start sweeps."""
    try:
        remove()
    except SyncdError as exc:
        log.warning("unfinished_tree_left", error=str(exc))
