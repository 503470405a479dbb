"""The words: what a tree is made of (see docs/glossary.md).

Entries, stats and rows are named tuples: they are made by the hundred thousand, and a frozen dataclass takes three
times as long to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

MODE_BITS = 0o7777
DEFAULT_FILE_MODE = 0o644
DEFAULT_DIR_MODE = 0o755


class Kind(StrEnum):
    """What an entry is. Devices, sockets and fifos are never distributed."""

    FILE = "file"
    DIR = "dir"
    SYMLINK = "symlink"


class Entry(NamedTuple):
    """One path's state.

    :ivar mode: permission bits, 0..0o7777; 0o777 for symlinks.
    :ivar mtime_ns: modification time, nanoseconds since the epoch, may be negative.
    :ivar size: bytes of content; 0 unless a file.
    :ivar digest: BLAKE3-256 of the content in lower-case hex (64 characters); "" for dirs and symlinks, and for a
        file of which only another client's metadata is known.
    :ivar sha256: SHA-256 of the content in lower-case hex; "" where not known (a publisher's scan).
    :ivar target: link text of a symlink.
    """

    kind: Kind
    mode: int
    mtime_ns: int
    size: int = 0
    digest: str = ""
    sha256: str = ""
    target: str = ""

    def same_content(self, other: Entry) -> bool:
        """Tell whether both have the same kind and content, whatever their modes and times."""
        if self.kind is not other.kind:
            return False
        if self.kind is Kind.SYMLINK:
            return self.target == other.target
        if self.kind is Kind.DIR:
            return True
        if self.size != other.size:
            return False
        if self.digest and other.digest:
            return self.digest == other.digest
        return bool(self.sha256) and self.sha256 == other.sha256

    def same_meta(self, other: Entry) -> bool:
        """Tell whether both have the same mode and time (a symlink has no mode of its own)."""
        return self.mtime_ns == other.mtime_ns and (self.kind is Kind.SYMLINK or self.mode == other.mode)

    def same(self, other: Entry) -> bool:
        """Tell whether nothing distinguishes the two on disk."""
        return self.same_content(other) and self.same_meta(other)


class Stat(NamedTuple):
    """The stat fields that make a quick check possible (see the index)."""

    size: int
    mtime_ns: int
    ctime_ns: int
    ino: int
    dev: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One path's failure, for the log and ``syncd status``; the rest of the folder goes on.

    :ivar path: relative POSIX path as it is on disk or in the bucket (undecodable bytes as surrogates); whoever shows
        it passes it through :func:`syncd.paths.printable`; "" for the whole folder.
    :ivar code: a stable snake_case word, for example ``unreadable``.
    :ivar text: one line for a person.
    """

    path: str
    code: str
    text: str
