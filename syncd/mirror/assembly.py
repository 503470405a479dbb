"""A large content put together from chunks: written at offsets in any order, read back and verified in order.

Rules kept here:
 * the file is named for the content's digest until it is complete, so that the next run goes on with it; what is in
   it from before counts only where a chunk's own digest says so;
 * what is verified is the file read back, up to its end, not what went in;
 * it becomes staged content (a name that is never reused) by one rename, with owner, mode and mtime set before.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blake3 import blake3

from syncd.crashpoints import crash_point
from syncd.errors import DiskProblem, ObjectCorrupt
from syncd.mirror.root import BLOCK, disk_problem
from syncd.mirror.staging import finish_meta

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.mirror.staging import Stage
    from syncd.model import Entry

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Assembly:
    """One large file that is being staged. Blocking.

    Writing, and reading back what is written, may go on in two threads; closing waits for both.

    :ivar found: bytes that an earlier run left in it.
    :raises DiskProblem: the disk refused.
    """

    def __init__(self, stage: Stage, entry: Entry) -> None:
        self._stage = stage
        self._entry = entry
        self._name = f"part-{entry.digest}"
        self._hash = blake3()
        self._hashed = 0
        self._lock = threading.Lock()
        self._users = 0
        self._closing = False
        try:
            self._fd = os.open(self._name, _OPEN, 0o600, dir_fd=stage.fd)
            os.fchmod(self._fd, 0o600)
            self.found = os.fstat(self._fd).st_size
            if self.found > entry.size:
                os.ftruncate(self._fd, entry.size)
                self.found = entry.size
        except OSError as exc:
            raise disk_problem(exc, "cannot stage content") from exc

    def holds(self, at: int, length: int, digest: str) -> bool:
        """Tell whether an earlier run left this chunk at its place."""
        if at + length > self.found:
            return False
        try:
            with self._open() as fd:
                return blake3(os.pread(fd, length, at)).hexdigest() == digest
        except OSError as exc:
            raise disk_problem(exc, "cannot read staged content") from exc

    def write(self, at: int, data: bytes) -> None:
        """Write a chunk at its offset.

        :raises DiskProblem: the disk refused; what is there stays for the next try.
        """
        crash_point("stage_write")
        view = memoryview(data)
        try:
            with self._open() as fd:
                while view:
                    done = os.pwrite(fd, view, at)
                    view, at = view[done:], at + done
        except OSError as exc:
            raise disk_problem(exc, "cannot stage content") from exc

    def advance(self, to: int) -> None:
        """Read back and hash what is complete from the beginning up to ``to``.

        :raises DiskProblem: the disk refused.
        """
        buffer = bytearray(BLOCK)
        view = memoryview(buffer)
        try:
            with self._open() as fd:
                while self._hashed < to:
                    count = os.preadv(fd, [view[: min(BLOCK, to - self._hashed)]], self._hashed)
                    if count == 0:
                        return  # shorter than it must be: finish() tells
                    self._hash.update(view[:count])
                    self._hashed += count
        except OSError as exc:
            raise disk_problem(exc, "cannot read staged content back") from exc

    def finish(self) -> str:
        """Verify the whole, set owner, mode and mtime; return the staged name.

        :raises ObjectCorrupt: the content is not what the entry announces; the file is removed.
        :raises DiskProblem: the disk refused.
        """
        entry = self._entry
        self.advance(entry.size)
        try:
            with self._open() as fd:
                if os.fstat(fd).st_size != entry.size or self._hash.hexdigest() != entry.digest:
                    self._stage.give_up(self._name)
                    raise ObjectCorrupt("content put together from its chunks does not match its BLAKE3 digest")
                finish_meta(fd, entry, self._stage.owner)
                name = self._stage.new_name()
                os.rename(self._name, name, src_dir_fd=self._stage.fd, dst_dir_fd=self._stage.fd)
        except OSError as exc:
            raise disk_problem(exc, "cannot finish staged content") from exc
        self.close()
        crash_point("stage_finished")
        return name

    def close(self) -> None:
        """Let go of the file as soon as nobody works on it; it stays for the next try."""
        with self._lock:
            self._closing = True
            self._close_unused()

    @contextmanager
    def _open(self) -> Iterator[int]:
        """Hold the descriptor: a number that is closed may be another file's the next moment."""
        with self._lock:
            if self._closing:
                raise DiskProblem("the staged file was given up")
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                self._close_unused()

    def _close_unused(self) -> None:
        if self._closing and not self._users and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
