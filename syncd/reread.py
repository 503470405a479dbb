"""Reading again, slowly and for ever, what nobody has a reason to doubt: what the disk spoils by itself is found so.

Rules kept here:
 * a slice reads so many bytes and no more; a large file takes several, and nothing is held open between them;
 * a file counts only if it was the one that the index knows from its first byte to its last: kind, size, times, inode.
   What is not is the quick check's business;
 * what the page cache holds is dropped before and after: the disk is asked, not the cache, and reading everything shall
   not push out what others need;
 * nothing is changed but the remembered position.
"""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from syncd.errors import DiskProblem, FileChanged
from syncd.mirror.root import same_stat, to_stat
from syncd.model import Entry, Kind
from syncd.paths import printable, sort_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.index import Index, LocalRow
    from syncd.mirror import Mirror

BLOCK: Final = 1024 * 1024
"""Bytes read at a time; a multiple of a page."""
FILE_COST: Final = 16 * 1024
"""What a file costs at least: looking for it is work, too."""
ROW_COST: Final = 256
POSITION: Final = "audit"
"""The index's note of the path that was read last."""

ROT: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EREMOTEIO})
"""The disk cannot give back what was written."""
_OF_THE_PROCESS: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_NOT_FOR_US: Final = {errno.EACCES, errno.EPERM}
"""Published with a mode that keeps its owner from reading: no fault, and nothing to be known."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A file that reads otherwise than its row says although its stat fields are as they were.

    :ivar have: what was read; ``None``: it cannot be read, and ``error`` is why (an errno).
    """

    row: LocalRow
    have: LocalRow | None
    error: int = 0

    @property
    def is_rot(self) -> bool:
        """Whether the content is lost; otherwise it is merely out of our reach."""
        return not self.error or self.error in ROT


@dataclass(slots=True)
class Audited:
    """What one slice did.

    :ivar cost: bytes of the budget that are used up, see :data:`FILE_COST`.
    :ivar sound: paths whose content is what it should be.
    :ivar changed: paths that are not the file any more that the index knows.
    :ivar wrapped: the mirror's end was reached; the next slice begins at its beginning.
    """

    cost: int = 0
    sound: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    wrapped: bool = False

    @property
    def found(self) -> set[str]:
        """The paths that the next check must look at."""
        return {*self.changed, *(finding.row.path for finding in self.findings)}


class _File:
    """A file in the middle of being read."""

    def __init__(self, row: LocalRow) -> None:
        self.row = row
        self.offset = 0
        self._strong = blake3() if row.entry.digest else None
        self._standard = None if row.entry.digest else hashlib.sha256()

    def feed(self, data: memoryview) -> None:
        """Take the bytes that follow."""
        self.offset += len(data)
        if self._strong is not None:
            self._strong.update(data)
        if self._standard is not None:
            self._standard.update(data)

    def result(self) -> LocalRow:
        """Return the row with what was read in the place of what was expected."""
        digest = "" if self._strong is None else self._strong.hexdigest()
        sha256 = "" if self._standard is None else self._standard.hexdigest()
        return self.row._replace(entry=self.row.entry._replace(size=self.offset, digest=digest, sha256=sha256))


class Reread:
    """Goes round a mirror's files in the order of their paths. Blocking, confined to the folder's thread."""

    def __init__(self, mirror: Mirror, index: Index) -> None:
        self._mirror = mirror
        self._index = index
        self._rows: Iterator[LocalRow] | None = None
        self._file: _File | None = None
        self._read_to = self._noted = ""

    def go(self, budget: int) -> Audited:
        """Read on for so many bytes, from where the last slice stopped; the position outlives a restart.

        :raises DiskProblem: the index failed.
        """
        done = Audited()
        if self._rows is None:
            self._read_to = self._noted = self._index.note(POSITION)
            self._rows = _after(self._read_to, self._index.iter_local())
        while done.cost < budget:
            if self._file is None:
                row = next(self._rows, None)
                if row is None:
                    self._rows = None
                    self._read_to = ""
                    done.wrapped = True
                    break
                done.cost += ROW_COST
                if row.entry.kind is not Kind.FILE or not (row.entry.digest or row.entry.sha256):
                    continue
                done.cost += max(0, FILE_COST - row.entry.size)
                self._file = _File(row)
            self._read_on(self._file, budget, done)
        if self._read_to != self._noted:
            self._noted = self._read_to
            self._index.set_note(POSITION, self._noted)
        return done

    def _read_on(self, file: _File, budget: int, done: Audited) -> None:
        """Read a file as far as the budget goes, and judge it at its end."""
        row = file.row
        try:
            if not self._read_blocks(file, budget, done):
                return
        except FileChanged:
            done.changed.append(row.path)
        except OSError as exc:
            number = exc.errno or errno.EIO
            if number in _OF_THE_PROCESS:
                done.cost = max(done.cost, budget)  # the next slice tries again
                return
            if number not in _NOT_FOR_US:
                done.findings.append(Finding(row, None, number))
        else:
            have = file.result()
            if have.entry == comparable(row.entry):
                done.sound.append(row.path)
            else:
                done.findings.append(Finding(row, have))
        self._file = None
        self._read_to = row.path

    def _read_blocks(self, file: _File, budget: int, done: Audited) -> bool:
        """Read up to the end of the file or of the budget; return whether it was the file's.

        :raises FileChanged: it is not the file any more that the index knows.
        :raises OSError: the disk refused.
        """
        row = file.row
        try:
            fd = self._mirror.open_source(row.path)
        except DiskProblem as error:
            raise error.__cause__ if isinstance(error.__cause__, OSError) else error from None
        try:
            _check_same(fd, row)
            buffer = memoryview(bytearray(min(BLOCK, row.entry.size - file.offset + 1)))
            while done.cost < budget:
                start = file.offset
                os.posix_fadvise(fd, start, len(buffer), os.POSIX_FADV_DONTNEED)
                count = os.preadv(fd, [buffer], start)
                os.posix_fadvise(fd, start, count, os.POSIX_FADV_DONTNEED)
                if count == 0:
                    _check_same(fd, row)
                    return True
                file.feed(buffer[:count])
                done.cost += count
        finally:
            os.close(fd)
        return False


def comparable(entry: Entry) -> Entry:
    """Return an entry with the one digest that it is compared by."""
    return entry._replace(sha256="") if entry.digest else entry


def _after(path: str, rows: Iterator[LocalRow]) -> Iterator[LocalRow]:
    key = sort_key(path)
    return (row for row in rows if sort_key(row.path) > key) if path else rows


def _check_same(fd: int, row: LocalRow) -> None:
    """Refuse a file that the quick check would refuse.

    :raises FileChanged: it is another one, or was written.
    """
    if not same_stat(to_stat(os.fstat(fd)), row.stat):
        raise FileChanged(f"{printable(row.path)} is not as the index has it")
