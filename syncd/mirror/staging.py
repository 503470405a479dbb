"""Staging: verified content under private names on the mirror's own filesystem.

Rules kept here:
 * a staged name is new (O_EXCL), private (mode 0600 in a directory of mode 0700) and never reused: its absence later
   means that it was renamed into place;
 * what is verified is the staged file read back, not the stream that went in;
 * mode and mtime are set before the file is visible anywhere, by descriptor, whatever the umask;
 * a failure leaves no staged file behind; a crash leaves one that :meth:`Stage.sweep` removes.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog
from blake3 import blake3

from syncd.crashpoints import crash_point
from syncd.errors import BadName, DiskProblem, FileChanged, ObjectCorrupt, SyncdError
from syncd.mirror.owner import Owner
from syncd.mirror.root import BLOCK, change_owner, disk_problem, hash_fd
from syncd.model import MODE_BITS, Kind
from syncd.paths import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from syncd.model import Entry

log = structlog.get_logger()

STAGED_NAME = re.compile(r"[0-9a-f]{8}-[0-9a-f]{1,12}")
PART_NAME = re.compile(r"part-([0-9a-f]{64})")
"""A large content that is being assembled; named for its digest, so that an interrupted run is gone on with."""

_REOPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def finish_meta(fd: int, entry: Entry, owner: tuple[int, int] | None) -> None:
    """Set owner, mode and mtime of a staged file: it is never visible with other ones."""
    change_owner(fd, os.fstat(fd), owner)
    mode = entry.mode & MODE_BITS
    os.fchmod(fd, mode)  # write(2) drops set-id bits, so this comes after the last one
    try:
        os.utime(fd, ns=(time.time_ns(), entry.mtime_ns))
    except OverflowError:
        raise ObjectCorrupt(f"modification time {entry.mtime_ns} ns is out of range") from None
    if mode & _SPECIAL_BITS and stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        log.warning("mode_bits_refused", mode=f"{mode:04o}")  # the kernel drops a setgid bit of a foreign group


class Stage:
    """The staging directory, by descriptor. Names it hands out start with an id of this run.

    :param owner: user and group id that staged content gets, -1: as it is; ``None``: whoever runs this.
    :ivar belongs: the same as a judgement on what is there.
    """

    def __init__(self, fd: int, owner: tuple[int, int] | None = None) -> None:
        self.fd = fd
        self.owner = owner
        self.belongs = Owner(owner)
        self.run = secrets.token_hex(4)
        self._numbers = itertools.count()

    def new_name(self) -> str:
        """Return a name that was never used; safe from any thread."""
        return f"{self.run}-{next(self._numbers):x}"

    def create(self) -> tuple[str, int]:
        """Create an empty private file; return its name and a read-write descriptor."""
        name = self.new_name()
        return name, os.open(name, CREATE, 0o600, dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Remove a staged name; one that is gone is fine.

        :raises OSError: the disk refused.
        """
        if STAGED_NAME.fullmatch(name) is None and PART_NAME.fullmatch(name) is None:
            raise BadName(f"{printable(name)!r} is not a staged name")
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return

    def add_bytes(self, entry: Entry, data: bytes) -> str:
        """Stage one small file: write, read back, mode, mtime.

        :raises ObjectCorrupt: the content is not what the entry announces.
        :raises DiskProblem: the disk refused, or gave back something else than was written.
        """
        if len(data) != entry.size:
            raise ObjectCorrupt(f"content has {len(data)} bytes, its metadata says {entry.size}")
        if entry.digest and blake3(data).hexdigest() != entry.digest:
            raise ObjectCorrupt("content does not match its BLAKE3 digest")

        def fill(fd: int) -> None:
            _write_all(fd, data)
            # one byte more than expected: a file longer than what was written is as wrong as a shorter one
            if os.pread(fd, len(data) + 1, 0) != data:
                raise misread()

        return self._add(fill, entry, "cannot stage content")

    def add_copy(self, source: int, entry: Entry, what: str) -> str:
        """Stage a copy of an open file of ``entry.size`` bytes, shared with it where the filesystem can (reflink).

        :raises FileChanged: the source does not hold the content that ``entry`` names.
        :raises DiskProblem: the disk refused.
        """

        def fill(fd: int) -> None:
            if os.fstat(source).st_size != entry.size:
                raise FileChanged(f"{printable(what)} has another size by now")
            copy_bytes(source, fd, entry.size)
            digest, sha256, size = hash_fd(fd, sha256=not entry.digest)
            if size != entry.size or not holds(entry, digest, sha256):
                raise FileChanged(f"{printable(what)} does not hold the expected content")

        return self._add(fill, entry, f"cannot copy {printable(what)}")

    def refit(self, name: str, entry: Entry, *, reread: bool) -> bool:
        """Make staged content of an earlier round fit an entry of the same content: owner, mode, mtime.

        :param reread: another run staged it: its content is read and compared, too.
        :returns: ``False``: it is not there, or is not that content; then it is removed.
        :raises DiskProblem: the disk refused.
        """
        if STAGED_NAME.fullmatch(name) is None:
            return False
        try:
            fd = os.open(name, _REOPEN, dir_fd=self.fd)
        except (FileNotFoundError, PermissionError):
            fd = -1
        except OSError as exc:
            raise disk_problem(exc, "cannot open staged content") from exc
        try:
            if fd >= 0 and self._fits(fd, entry, reread=reread):
                return True
            self.remove(name)
        except OSError as exc:
            raise disk_problem(exc, "cannot read staged content") from exc
        finally:
            if fd >= 0:
                os.close(fd)
        return False

    def _fits(self, fd: int, entry: Entry, *, reread: bool) -> bool:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_size != entry.size:
            return False
        if self.belongs.is_foreign(found.st_uid):  # staged for an owner who is not that any more
            return False
        if reread and hash_fd(fd)[0] != entry.digest:
            return False
        if reread or stat.S_IMODE(found.st_mode) != entry.mode & MODE_BITS or found.st_mtime_ns != entry.mtime_ns:
            finish_meta(fd, entry, self.owner)
        return True

    def open_staged(self, name: str) -> int:
        """Open staged content for reading.

        :raises FileNotFoundError: it is gone. :raises OSError: the disk refused.
        """
        return os.open(name, _REOPEN, dir_fd=self.fd)

    def _add(self, fill: Callable[[int], None], entry: Entry, failure: str) -> str:
        """Make a staged file in one go; whatever goes wrong, nothing of it stays."""
        try:
            name, fd = self.create()
            try:
                crash_point("stage_write")
                fill(fd)
                finish_meta(fd, entry, self.owner)
            except BaseException:
                self.give_up(name)
                raise
            finally:
                os.close(fd)
        except OSError as exc:
            raise disk_problem(exc, failure) from exc
        crash_point("stage_finished")
        return name

    def add_symlink(self, entry: Entry) -> str:
        """Stage a symlink.

        :raises BadName, ObjectCorrupt, DiskProblem: see :func:`make_symlink`.
        """
        name = self.new_name()
        make_symlink(self.fd, name, entry, self.owner)
        return name

    def sweep(self, keep: Container[str], *, own: bool) -> int:
        """Remove staged content that nothing refers to; return how many names.

        :param keep: names that a journal refers to.
        :param own: also what this process staged.
        :raises DiskProblem: the disk refused.
        """
        swept = 0
        try:
            for name in os.listdir(self.fd):  # noqa: PTH208 - a descriptor, not a path
                if name in keep or (not own and name.startswith(self.run)):
                    continue
                try:
                    os.unlink(name, dir_fd=self.fd)
                    swept += 1
                except IsADirectoryError:
                    log.warning("foreign_directory_in_stage", name=printable(name))
                except FileNotFoundError:
                    continue
        except OSError as exc:
            raise disk_problem(exc, "cannot sweep the staging directory") from exc
        return swept

    def sweep_linked(self) -> int:
        """Remove staged content that has another name, in a release that is published; return how many names.

        :raises DiskProblem: the disk refused.
        """
        swept = 0
        try:
            with os.scandir(self.fd) as found:
                for item in found:
                    if STAGED_NAME.fullmatch(item.name) and item.stat(follow_symlinks=False).st_nlink > 1:
                        self.remove(item.name)
                        swept += 1
        except OSError as exc:
            raise disk_problem(exc, "cannot sweep the staging directory") from exc
        return swept

    def give_up(self, name: str) -> None:
        """Remove a staged file while another error is on its way, which must not be hidden by a second one."""
        try:
            self.remove(name)
        except OSError as exc:
            log.warning("staged_file_left", name=name, error=str(exc))  # swept at the next start


def make_symlink(dir_fd: int, name: str, entry: Entry, owner: tuple[int, int] | None) -> None:
    """Make a symlink with its owner and time; whatever goes wrong, nothing of it stays.

    :raises BadName: no filesystem can hold this link text.
    :raises ObjectCorrupt: no filesystem can hold this time.
    :raises DiskProblem: the disk refused.
    """
    try:
        os.symlink(entry.target, name, dir_fd=dir_fd)
        try:
            if owner is not None:
                os.chown(name, *owner, dir_fd=dir_fd, follow_symlinks=False)
            os.utime(name, ns=(time.time_ns(), entry.mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
        except BaseException:
            with suppress(OSError):  # swept at the next start
                os.unlink(name, dir_fd=dir_fd)
            raise
    except OverflowError:
        raise ObjectCorrupt(f"modification time {entry.mtime_ns} ns is out of range") from None
    except ValueError as exc:  # a NUL byte
        raise BadName("link text holds a NUL byte or is not text") from exc
    except OSError as exc:
        if not entry.target or exc.errno == errno.ENAMETOOLONG:
            raise BadName("link text is empty or too long") from exc
        raise disk_problem(exc, "cannot make a symlink") from exc


def misread() -> DiskProblem:
    """Return what to raise where a disk gives back something else than was written."""
    return DiskProblem("a staged file does not read back as it was written", hint="check the disk")


def holds(entry: Entry, digest: str, sha256: str) -> bool:
    """Tell whether content with these digests is an entry's; without any digest known it is."""
    if entry.digest:
        return digest == entry.digest
    return not entry.sha256 or sha256 == entry.sha256


def copy_bytes(source: int, target: int, size: int) -> None:
    """Copy ``size`` bytes from the beginning; less where the source ends before."""
    done = 0
    try:
        while done < size:
            count = os.copy_file_range(source, target, size - done, offset_src=done, offset_dst=done)
            if count == 0:
                break
            done += count
    except OSError as exc:
        if exc.errno not in _NO_COPY_RANGE:
            raise
    os.lseek(target, done, os.SEEK_SET)
    while done < size:
        data = os.pread(source, min(BLOCK, size - done), done)
        if not data:
            return
        _write_all(target, data)
        done += len(data)


class Staged:
    """A file that is being staged; a :class:`syncd.store.base.Sink`. One thread at a time, any thread. Blocking."""

    def __init__(self, stage: Stage, entry: Entry) -> None:
        if entry.kind is not Kind.FILE:
            raise ValueError(f"a {entry.kind} has no content")
        self._stage = stage
        self._entry = entry
        self._size = 0
        self._hash = blake3()
        try:
            self._name, self._fd = stage.create()
        except OSError as exc:
            raise disk_problem(exc, "cannot stage content") from exc

    def write(self, data: bytes) -> None:
        """Append all of ``data``.

        :raises ObjectCorrupt: more than the entry announces (an endless object must not fill the disk).
        :raises DiskProblem: the disk refused; what was staged is removed.
        """
        crash_point("stage_write")
        self._size += len(data)
        if self._size > self._entry.size:
            self.discard()
            raise ObjectCorrupt(f"content is longer than the {self._entry.size} bytes that its metadata says")
        self._hash.update(data)
        try:
            _write_all(self._fd, data)
        except OSError as exc:
            self.discard()
            raise disk_problem(exc, "cannot stage content") from exc

    def finish(self) -> str:
        """Read back, compare, set mode and mtime; return the staged name.

        :raises ObjectCorrupt: the content is not what the entry announces.
        :raises DiskProblem: the disk refused, or gave back something else than was written.
        """
        try:
            self._verify()
            finish_meta(self._fd, self._entry, self._stage.owner)
        except OSError as exc:
            self.discard()
            raise disk_problem(exc, "cannot finish staged content") from exc
        except SyncdError:
            self.discard()
            raise
        os.close(self._fd)
        self._fd = -1
        crash_point("stage_finished")
        return self._name

    def _verify(self) -> None:
        entry = self._entry
        if self._size != entry.size:
            raise ObjectCorrupt(f"content has {self._size} bytes, its metadata says {entry.size}")
        written = self._hash.hexdigest()
        digest, _, size = hash_fd(self._fd)
        if (digest, size) != (written, self._size):
            raise misread()
        if entry.digest and digest != entry.digest:
            raise ObjectCorrupt("content does not match its BLAKE3 digest")

    def discard(self) -> None:
        """Remove what was staged; nothing happens after finish() or a second time."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self._stage.give_up(self._name)


def stage_many(stage: Stage, items: Sequence[tuple[Entry, bytes]]) -> list[str | Exception]:
    """Stage many small files; a failure belongs to its item."""
    results: list[str | Exception] = []
    for entry, data in items:
        try:
            results.append(stage.add_bytes(entry, data))
        except SyncdError as exc:
            results.append(exc)
    return results
