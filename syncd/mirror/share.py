"""Sharing an unchanged file with another tree: a clone where the filesystem can, else a hard link, else a copy.

Rules kept here:
 * what is shared is the very inode that was compared with what is known of it: a path that is swapped in between
   yields nothing;
 * a hard link takes over owner, mode and time of the inode, so it is made only where those are the wanted ones; the
   inode itself is never changed: its other names may be in a tree that is in use;
 * a copy is read back and compared with the content's digest. A clone and a link hold the very bytes of the source,
   which were verified when it was made, and which nobody may change: where somebody may (the owner that the mirror is
   given to, whoever its mode lets write), a clone is read back, too, and there is no link.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal

from syncd.errors import FileChanged
from syncd.mirror.owner import OTHERS_WRITE
from syncd.mirror.root import hash_fd, lstat_at, open_regular, same_stat, to_stat
from syncd.mirror.staging import CREATE, copy_bytes, finish_meta, holds
from syncd.model import MODE_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.model import Entry, Stat

Share = Literal["auto", "reflink", "hardlink", "copy"]
SHARES: Final[tuple[Share, ...]] = ("auto", "reflink", "hardlink", "copy")

_FICLONE: Final = 0x40049409
_NEVER_CLONES: Final = {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV}
_NO_CLONE: Final = _NEVER_CLONES | {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ETXTBSY}
"""EINVAL: one of the files must not be copied on write (btrfs); EPERM: immutable; EACCES: not readable for us."""
_NO_LINK: Final = {errno.EMLINK, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS}
"""EMLINK: the inode has as many names as it can; EPERM: immutable, fs.protected_hardlinks, or no links at all."""


class Sharer:
    """Puts files of one tree into another on the same filesystem.

    :param how: "auto": clone, else link, else copy; "reflink": clone, else copy; "hardlink": link, else copy.
    :param owner: see :class:`syncd.mirror.staging.Stage`.
    """

    def __init__(self, how: Share, owner: tuple[int, int] | None) -> None:
        if how not in SHARES:
            raise ValueError(f"unknown way to share {how!r}")
        self._clones = how in {"auto", "reflink"}
        self._links = how in {"auto", "hardlink"}
        self._owner = owner

    def share(self, source: tuple[int, str], known: Stat, target: tuple[int, str], entry: Entry) -> None:
        """Make a file of the target's name with the content of the source and the entry's owner, mode and time.

        :param source: directory and name, as ``target``.
        :param known: what the source's stat must be.
        :raises FileChanged: the source is not as it was known.
        :raises OSError: the disk refused; nothing of that name is left.
        """
        found = lstat_at(*source)
        if found is None or not self.knows(found, known):
            raise FileChanged("it is not as it was")
        if found.st_size != entry.size:
            raise FileChanged("it has another size")
        if self._clones and self._clone(source, found, target, entry):
            return
        if self._links and not is_writable(found) and self._fits(found, entry) and _link(source, found, target):
            return
        self._copy(source, found, target, entry)

    @staticmethod
    def knows(found: os.stat_result, known: Stat) -> bool:
        """Tell whether what is found is a regular file and as it was known."""
        return stat.S_ISREG(found.st_mode) and same_stat(to_stat(found), known)

    def _fits(self, found: os.stat_result, entry: Entry) -> bool:
        """Tell whether owner, mode and time are those that are wanted."""
        uid, gid = self._owner or (-1, -1)
        return (
            stat.S_IMODE(found.st_mode) == entry.mode & MODE_BITS
            and found.st_mtime_ns == entry.mtime_ns
            and uid in {-1, found.st_uid}
            and gid in {-1, found.st_gid}
        )

    def _clone(self, source: tuple[int, str], found: os.stat_result, target: tuple[int, str], entry: Entry) -> bool:
        """Share the content's blocks; ``False`` where that is not possible."""
        try:
            with _opened(source) as old, _made(target) as new:
                clone(old, new)
                _check(old, found)
                if is_writable(found):
                    _verify(new, entry)
                finish_meta(new, entry, self._owner)
        except OSError as exc:
            if exc.errno not in _NO_CLONE:
                raise
            self._clones = exc.errno not in _NEVER_CLONES  # that is the filesystem's answer: not asked again
            return False
        return True

    def _copy(self, source: tuple[int, str], found: os.stat_result, target: tuple[int, str], entry: Entry) -> None:
        with _opened(source) as old, _made(target) as new:
            copy_bytes(old, new, entry.size)
            _check(old, found)
            _verify(new, entry)
            finish_meta(new, entry, self._owner)


def is_writable(found: os.stat_result) -> bool:
    """Tell whether anybody else may have written to a file, and set its time back: then its stat says nothing."""
    return found.st_uid != os.geteuid() or bool(found.st_mode & OTHERS_WRITE)


def _verify(fd: int, entry: Entry) -> None:
    """Read a new file back.

    :raises FileChanged: it does not hold the entry's content.
    """
    digest, sha256, size = hash_fd(fd, sha256=not entry.digest)
    if size != entry.size or not holds(entry, digest, sha256):
        raise FileChanged("it does not hold the content that it had")


def clone(source: int, target: int) -> None:
    """Let a new file share all blocks of another one.

    :raises OSError: the filesystem cannot.
    """
    fcntl.ioctl(target, _FICLONE, source)


def _link(source: tuple[int, str], found: os.stat_result, target: tuple[int, str]) -> bool:
    """Make another name of the inode; ``False`` where that is not possible.

    :raises FileChanged: the name led to another inode by then.
    """
    try:
        os.link(source[1], target[1], src_dir_fd=source[0], dst_dir_fd=target[0], follow_symlinks=False)
    except FileNotFoundError:
        raise FileChanged("it is gone") from None
    except OSError as exc:
        if exc.errno not in _NO_LINK:
            raise
        return False
    linked = lstat_at(*target)
    if linked is None or _identity(linked) != _identity(found):
        os.unlink(target[1], dir_fd=target[0])
        raise FileChanged("it was replaced")
    return True


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """Return what a link does not change; the number of an inode is soon another file's."""
    return found.st_ino, found.st_dev, found.st_mode, found.st_size, found.st_mtime_ns


@contextmanager
def _opened(source: tuple[int, str]) -> Iterator[int]:
    """Open a file to be read; :func:`_check` tells afterwards whether it is, and still is, the one looked at."""
    try:
        fd = open_regular(*source)
    except FileNotFoundError:
        raise FileChanged("it is gone") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _check(fd: int, found: os.stat_result) -> None:
    now = os.fstat(fd)
    if (_identity(now), now.st_ctime_ns) != (_identity(found), found.st_ctime_ns):
        raise FileChanged("it was changed or replaced")


@contextmanager
def _made(target: tuple[int, str]) -> Iterator[int]:
    """Make a new file, private until it is complete; gone again where that fails."""
    fd = os.open(target[1], CREATE, 0o600, dir_fd=target[0])
    try:
        yield fd
    except BaseException:
        os.unlink(target[1], dir_fd=target[0])
        raise
    finally:
        os.close(fd)
