"""Held descriptors: the only way into a directory tree that others may write too.

Rules kept here:
 * nothing below the root is ever named by more than one component at a time: every directory is opened from its
   parent's descriptor with O_NOFOLLOW | O_DIRECTORY, so a symlink planted or swapped in leads nowhere;
 * only directories and regular files are opened, the latter with O_NONBLOCK; the rest is looked at with lstat;
 * descriptors are kept for the components of one path only (at most ``MAX_HELD`` of them) and never beyond one
   operation of the caller.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog
from blake3 import blake3

from syncd.errors import BadName, DiskProblem, FileChanged
from syncd.model import Kind, Problem, Stat
from syncd.paths import check_path, is_private, is_usable, parent, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

log = structlog.get_logger()

MAX_HELD = 64
"""Descriptors kept along one path: a path may have 1,400 components, a process often only 1,024 descriptors."""

BLOCK = 1024 * 1024
"""Bytes read at a time."""

_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
_NO_ACL = {errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS}

_HINTS = {
    errno.ENOSPC: "free some space, or inodes (df -i); the work goes on by itself then",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the filesystem is mounted read-only",
    errno.EMFILE: "raise the limit of open files (LimitNOFILE)",
    errno.ENFILE: "the system's table of open files is full",
    errno.EACCES: "check owner and mode",
    errno.EPERM: "check owner and attributes",
    errno.EIO: "the disk reports errors, see the kernel's log",
}


class PathRefused(DiskProblem):
    """One path cannot be worked on; the others can.

    :ivar code: the code of the :class:`syncd.model.Problem` that this becomes.
    :ivar at: the path (perhaps an ancestor) that is not as it must be.
    """

    def __init__(self, code: str, text: str, *, at: str) -> None:
        super().__init__(text)
        self.code = code
        self.at = at


@dataclass(frozen=True, slots=True)
class Disk:
    """What is on disk at a path now.

    :ivar kind: ``None`` for what is never distributed (fifos, sockets, devices).
    :ivar mode: permission bits.
    :ivar target: link text of a symlink.
    :ivar uid, gid: whom it belongs to; -1: not known.
    """

    kind: Kind | None
    mode: int
    stat: Stat
    target: str = ""
    uid: int = -1
    gid: int = -1


def disk_problem(exc: OSError, what: str) -> DiskProblem:
    """Word an OSError: what was tried, the system's sentence and the errno's name."""
    number = exc.errno or 0
    name = errno.errorcode.get(number, str(number))
    return DiskProblem(f"{what}: {os.strerror(number)} [{name}]", hint=_HINTS.get(number, ""))


def is_unreadable(error: DiskProblem) -> bool:
    """Tell whether the disk has lost what was to be read: content to be had elsewhere need not come from there."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO


def to_stat(found: os.stat_result) -> Stat:
    """Keep the fields of the quick check."""
    return Stat(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def without_ctime(stat: Stat) -> Stat:
    """Return a stat whose ctime says nothing (0): making or removing another hard link changes that time."""
    return stat._replace(ctime_ns=0)


def same_stat(found: Stat, assumed: Stat | None) -> bool:
    """Tell whether a path is as it was.

    Device numbers change when a machine starts again, so they do not count; neither does a ctime of 0, see
    :func:`without_ctime`.
    """
    return (
        assumed is not None
        and found.size == assumed.size
        and found.mtime_ns == assumed.mtime_ns
        and (found.ctime_ns == assumed.ctime_ns or 0 in {found.ctime_ns, assumed.ctime_ns})
        and found.ino == assumed.ino
    )


def kind_of(mode: int) -> Kind | None:
    """Return the kind of an ``st_mode``."""
    if stat.S_ISREG(mode):
        return Kind.FILE
    if stat.S_ISDIR(mode):
        return Kind.DIR
    return Kind.SYMLINK if stat.S_ISLNK(mode) else None


def lstat_at(dir_fd: int, name: str) -> os.stat_result | None:
    """Return the lstat of one name in an open directory; ``None``: nothing there."""
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def hash_fd(fd: int, *, sha256: bool = False) -> tuple[str, str, int]:
    """Read a file from its beginning to its end; return (BLAKE3 hex, SHA-256 hex or "", bytes read)."""
    strong, standard, offset = blake3(), hashlib.sha256(), 0
    buffer = bytearray(min(BLOCK, os.fstat(fd).st_size + 1))  # clearing a block takes longer than a small file
    view = memoryview(buffer)
    while count := os.preadv(fd, [buffer], offset):
        strong.update(view[:count])
        if sha256:
            standard.update(view[:count])
        offset += count
    return strong.hexdigest(), standard.hexdigest() if sha256 else "", offset


def change_owner(fd: int, found: os.stat_result, owner: tuple[int, int] | None) -> None:
    """Give an open file or directory to a user and group (-1: as it is), before its mode: chown drops set-id bits.

    :raises OSError: the kernel refuses; only root (CAP_CHOWN) may give files away.
    """
    if owner is None:
        return
    uid, gid = owner
    if uid in {-1, found.st_uid} and gid in {-1, found.st_gid}:
        return
    try:
        os.fchown(fd, uid, gid)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
        os.chown(f"/proc/self/fd/{fd}", uid, gid)  # opened with O_PATH


def drop_acls(fd: int) -> None:
    """Remove the ACLs that whoever made an open directory may have put there: fchmod(2) leaves them in force.

    :raises OSError: the kernel refuses; that the filesystem knows none is fine.
    """
    for name in _ACLS:
        try:
            try:
                os.removexattr(fd, name)
            except OSError as exc:
                if exc.errno != errno.EBADF:
                    raise
                os.removexattr(f"/proc/self/fd/{fd}", name)  # opened with O_PATH
        except OSError as exc:
            if exc.errno not in _NO_ACL:
                raise


def change_mode(fd: int, mode: int) -> None:
    """Do fchmod(2), also on a descriptor opened with O_PATH (for what we own but may not read)."""
    try:
        os.fchmod(fd, mode)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
        os.chmod(f"/proc/self/fd/{fd}", mode)  # noqa: PTH101 - a descriptor, not a path


def change_mtime(fd: int, found: os.stat_result, mtime_ns: int) -> None:
    """Set the modification time by descriptor and leave the access time as it was."""
    times = (found.st_atime_ns, mtime_ns)
    try:
        os.utime(fd, ns=times)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
        os.utime(f"/proc/self/fd/{fd}", ns=times)


def split(path: str) -> tuple[str, str]:
    """Return (parent path, last component) of a path that may be used below a root.

    :raises BadName: for everything :func:`syncd.paths.check_path` refuses.
    """
    check_path(path)
    return parent(path), path.rpartition("/")[2]


class Dirs:
    """A stack of open directories along one path: consecutive sorted paths share most of it.

    The descriptors handed out are borrowed: valid until the next call.

    RACE: a directory that somebody moves away while we hold it still takes our write. The write lands in that very
    directory, wherever its new parent is, and never in what was put in its place.
    """

    def __init__(self, root_fd: int, *, one_filesystem: bool) -> None:
        self._root = root_fd
        self._dev = os.fstat(root_fd).st_dev if one_filesystem else None
        self._names: list[str] = []
        self._fds: list[int] = []  # -1: given up to MAX_HELD, reached again from the root

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give all descriptors back; the stack can be used again."""
        self._trim(0)

    def forget(self, path: str) -> None:
        """Drop what is held at or below a path that is about to be replaced."""
        names = path.split("/")
        if self._names[: len(names)] == names:
            self._trim(len(names) - 1)

    def open(self, path: str) -> int:
        """Return a descriptor of the directory at ``path`` ("" is the root).

        It may be an O_PATH descriptor where the directory is not readable for us.

        :raises PathRefused: a component is a symlink, no directory or on another filesystem.
        :raises OSError: ENOENT, EACCES, EMFILE ...
        """
        names = path.split("/") if path else []
        common = 0
        for held, wanted in zip(self._names, names, strict=False):
            if held != wanted:
                break
            common += 1
        self._trim(common)
        while self._fds and self._fds[-1] < 0:
            self._trim(len(self._fds) - 1)
        for name in names[len(self._names) :]:
            self._enter(name)
        return self._fds[-1] if self._fds else self._root

    def _enter(self, name: str) -> None:
        above = self._fds[-1] if self._fds else self._root
        fd = self._open_child(above, name)
        if self._dev is not None and os.fstat(fd).st_dev != self._dev:
            os.close(fd)
            at = "/".join([*self._names, name])
            raise PathRefused("other_filesystem", f"{printable(at)} is on another filesystem", at=at)
        self._names.append(name)
        self._fds.append(fd)
        if len(self._fds) > MAX_HELD:  # the innermost are kept: they are asked for next, on the way back up also
            outer = self._fds[-1 - MAX_HELD]
            if outer >= 0:
                os.close(outer)
                self._fds[-1 - MAX_HELD] = -1

    def _open_child(self, above: int, name: str) -> int:
        try:
            return os.open(name, _OPEN_DIR, dir_fd=above)
        except PermissionError:
            return os.open(name, _OPEN_DIR | os.O_PATH, dir_fd=above)
        except OSError as exc:
            if exc.errno not in {errno.ENOTDIR, errno.ELOOP}:
                raise
            at = "/".join([*self._names, name])
            found = lstat_at(above, name)
            link = found is not None and stat.S_ISLNK(found.st_mode)
            code, what = ("parent_is_symlink", "a symlink") if link else ("parent_not_directory", "not a directory")
            raise PathRefused(code, f"{printable(at)} is {what} where a directory is expected", at=at) from exc

    def _trim(self, length: int) -> None:
        for fd in self._fds[length:]:
            if fd >= 0:
                os.close(fd)
        del self._fds[length:]
        del self._names[length:]


def open_regular(dir_fd: int, name: str) -> int:
    """Open a regular file for reading; nothing else is ever opened.

    :raises FileNotFoundError: nothing there, or no regular file.
    """
    found = lstat_at(dir_fd, name)
    if found is None or not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    # RACE: swapped between lstat and open: O_NOFOLLOW refuses a symlink, O_NONBLOCK does not wait for a fifo's writer
    try:
        fd = os.open(name, _OPEN_FILE, dir_fd=dir_fd)
    except OSError as exc:
        if exc.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from exc
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return fd


class View:
    """Looking at a tree without changing anything: no lock is taken, nothing is created. Blocking.

    :ivar fd: of its top directory; -1: closed.
    :param ctime: ``False``: every stat that is given out has no ctime, see :func:`without_ctime`.
    """

    def __init__(self, root: Path, fd: int, *, ctime: bool = True) -> None:
        self.root = root
        self.fd = fd
        self._ctime = ctime

    @classmethod
    def open(cls, root: Path) -> View:
        """Hold the root directory.

        :raises DiskProblem: missing, not a directory or not readable.
        """
        return cls(root, open_root(root))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the root."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def look(self, path: str) -> Disk | None:
        """Return what is at ``path`` now; ``None``: nothing, or an ancestor is no directory.

        :raises BadName: the path must not be used.
        :raises DiskProblem: the disk does not tell.
        """
        above, name = split(path)
        try:
            with Dirs(self.fd, one_filesystem=False) as dirs:
                return self._disk(dirs.open(above), name)
        except (FileNotFoundError, PathRefused):
            return None
        except OSError as exc:
            raise disk_problem(exc, f"cannot look at {printable(path)}") from exc

    def look_all(self, paths: Iterable[str]) -> Iterator[tuple[str, Disk | None]]:
        """Look at many paths; fast where they are in component order.

        What the disk does not tell, and paths that must not be used, are left out.
        """
        with Dirs(self.fd, one_filesystem=False) as dirs:
            for path in paths:
                try:
                    above, name = split(path)
                    yield path, self._disk(dirs.open(above), name)
                except (FileNotFoundError, PathRefused):
                    yield path, None
                except (OSError, BadName):
                    continue

    def holds_private(self, path: str) -> bool:
        """Tell whether a directory holds what is syncd's own: it is another mirror, or like one.

        :raises BadName: the path must not be used.
        :raises DiskProblem: the disk does not tell.
        """
        check_path(path)
        try:
            with Dirs(self.fd, one_filesystem=False) as dirs:
                return any(map(is_private, os.listdir(dirs.open(path))))  # noqa: PTH208 - a descriptor, not a path
        except (FileNotFoundError, PathRefused):
            return False
        except OSError as exc:
            raise disk_problem(exc, f"cannot list {printable(path)}") from exc

    def read_digests(self, path: str, *, sha256: bool = True) -> tuple[str, str, Stat]:
        """Read a regular file between two equal stats; return (BLAKE3 hex, SHA-256 hex, its stat).

        :param sha256: ``False``: leave the SHA-256 out, it is "" then.
        :raises FileChanged: it changed meanwhile, or there is no regular file (any more).
        :raises DiskProblem: it cannot be read.
        """
        fd = self.open_source(path)
        try:
            before = to_stat(os.fstat(fd))
            strong, standard, size = hash_fd(fd, sha256=sha256)
            after = to_stat(os.fstat(fd))
        except OSError as exc:
            raise disk_problem(exc, f"cannot read {printable(path)}") from exc
        finally:
            os.close(fd)
        if before != after or size != before.size:
            raise FileChanged(f"{printable(path)} changed while it was read")
        return strong, standard, after if self._ctime else without_ctime(after)

    def open_source(self, path: str) -> int:
        """Open a file to read parts of it.

        :raises FileChanged: no regular file is there.
        :raises DiskProblem: the disk refused.
        """
        above, name = split(path)
        try:
            with Dirs(self.fd, one_filesystem=False) as dirs:
                return open_regular(dirs.open(above), name)
        except (FileNotFoundError, PathRefused):
            raise _gone(path) from None
        except OSError as exc:
            raise disk_problem(exc, f"cannot open {printable(path)}") from exc

    def walk(self, on_problem: Callable[[Problem], None] | None = None) -> Iterator[tuple[str, Disk]]:
        """Yield everything below the root but any ``.syncd``, in component order, never following a symlink.

        Memory is bounded by the names of the directories along one path. A directory that cannot be read yields
        itself and nothing below; a name that cannot be a path (not UTF-8, too long) is left out; both are told to
        ``on_problem``, or logged where nobody is to be told. What vanishes during the walk is left out.
        """

        def tell(path: str, code: str, text: str) -> None:
            if on_problem is None:
                log.warning("mirror_walk_problem", path=path, code=code, text=text)
            else:
                on_problem(Problem(path, code, text))

        with Dirs(self.fd, one_filesystem=False) as dirs:
            frames = [("", self._names(dirs, "", tell))]
            while frames:
                above, names = frames[-1]
                if not names:
                    frames.pop()
                    continue
                path = f"{above}/{names[-1]}" if above else names[-1]
                try:
                    disk = self._disk(dirs.open(above), names.pop())
                except (FileNotFoundError, PathRefused):
                    continue
                except OSError as exc:
                    tell(path, "unreadable", str(disk_problem(exc, "cannot look at it")))
                    continue
                if disk is None:
                    continue
                yield path, disk
                if disk.kind is Kind.DIR:
                    frames.append((path, self._names(dirs, path, tell)))

    def _disk(self, dir_fd: int, name: str) -> Disk | None:
        found = lstat_at(dir_fd, name)
        if found is None:
            return None
        kind = kind_of(found.st_mode)
        target = ""
        if kind is Kind.SYMLINK:
            try:
                target = os.readlink(name, dir_fd=dir_fd)
            except FileNotFoundError:
                return None
            except OSError as exc:
                if exc.errno != errno.EINVAL:  # RACE: no symlink any more; the next look tells
                    raise
                return None
        known = to_stat(found)
        known = known if self._ctime else without_ctime(known)
        return Disk(kind, stat.S_IMODE(found.st_mode), known, target, found.st_uid, found.st_gid)

    @staticmethod
    def _names(dirs: Dirs, path: str, tell: Callable[[str, str, str], None]) -> list[str]:
        """Return a directory's usable names, last first."""
        try:
            found = os.listdir(dirs.open(path))  # noqa: PTH208 - a descriptor, not a path
        except (FileNotFoundError, PathRefused):
            return []
        except OSError as exc:
            tell(path, "unreadable_dir", str(disk_problem(exc, "cannot list it")))
            return []
        names = []
        for name in found:
            child = f"{path}/{name}" if path else name
            if is_private(name):
                continue
            try:
                check_path(child)
            except BadName as exc:
                tell(child, "bad_name", str(exc))
            else:
                names.append(name)
        names.sort(reverse=True)  # of valid UTF-8: code point order is byte order
        return names


class NoTree(View):
    """A tree that is not there (yet): nothing is in it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, -1)

    def look(self, path: str) -> Disk | None:
        """See :meth:`View.look`."""
        split(path)
        return None

    def look_all(self, paths: Iterable[str]) -> Iterator[tuple[str, Disk | None]]:
        """See :meth:`View.look_all`."""
        for path in filter(is_usable, paths):
            yield path, None

    def holds_private(self, path: str) -> bool:
        """See :meth:`View.holds_private`."""
        check_path(path)
        return False

    def open_source(self, path: str) -> int:
        """See :meth:`View.open_source`."""
        split(path)
        raise _gone(path)

    def walk(self, on_problem: Callable[[Problem], None] | None = None) -> Iterator[tuple[str, Disk]]:  # noqa: ARG002
        """See :meth:`View.walk`."""
        return iter(())


def _gone(path: str) -> FileChanged:
    return FileChanged(f"{printable(path)} is not a regular file (any more)")


def open_root(root: Path) -> int:
    """Open a root directory (itself perhaps reached through a symlink: the configuration named it).

    :raises DiskProblem: missing, not a directory or not readable.
    """
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise disk_problem(exc, f"cannot open the directory {printable(str(root))}") from exc
