"""A large content put together from chunks: written at offsets in any order, read back and verified in order.

Rules kept here:
 * the file is named for the content's digest until it is complete, so that the next run goes on with it; what is in
   it from before counts only where a chunk's own digest says so;
 * what is verified is the file read back, up to its end, not what went in;
 * it becomes staged content (a name that is never reused) by one rename, with owner, mode and mtime set before.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from blake3 import blake3

from syncd.crashpoints import crash_point
from syncd.errors import ObjectCorrupt
from syncd.mirror.root import BLOCK, disk_problem
from syncd.mirror.staging import finish_meta

if TYPE_CHECKING:
    from syncd.mirror.staging import Stage
    from syncd.model import Entry

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Assembly:
    """One large file that is being staged. Blocking; one thread at a time, any thread.

    :ivar found: bytes that an earlier run left in it.
    :raises DiskProblem: the disk refused.
    """

    def __init__(self, stage: Stage, entry: Entry) -> None:
        self._stage = stage
        self._entry = entry
        self._name = f"part-{entry.digest}"
        self._hash = blake3()
        self._hashed = 0
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
            return blake3(os.pread(self._fd, length, at)).hexdigest() == digest
        except OSError as exc:
            raise disk_problem(exc, "cannot read staged content") from exc

    def write(self, at: int, data: bytes) -> None:
        """Write a chunk at its offset.

        :raises DiskProblem: the disk refused; what is there stays for the next try.
        """
        crash_point("stage_write")
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(self._fd, view, at)
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
            while self._hashed < to:
                count = os.preadv(self._fd, [view[: min(BLOCK, to - self._hashed)]], self._hashed)
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
            if os.fstat(self._fd).st_size != entry.size or self._hash.hexdigest() != entry.digest:
                self._stage.give_up(self._name)
                raise ObjectCorrupt("content put together from its chunks does not match its BLAKE3 digest")
            finish_meta(self._fd, entry, self._stage.owner)
            name = self._stage.new_name()
            os.rename(self._name, name, src_dir_fd=self._stage.fd, dst_dir_fd=self._stage.fd)
        except OSError as exc:
            raise disk_problem(exc, "cannot finish staged content") from exc
        self.close()
        crash_point("stage_finished")
        return name

    def close(self) -> None:
        """Let go of the file; it stays for the next try."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
