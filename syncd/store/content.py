"""Content on its way: chunks, digests, and the checks of what arrives. No word of the server.

Rules kept here:
 * every byte is hashed in the thread that reads or writes it, never in the event loop;
 * what does not match its metadata is refused before it is written, but for the digest, which is known last;
 * a thread that uses a file or a sink is waited for, also on cancellation.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, TypeVar

from blake3 import blake3

from syncd.errors import ObjectCorrupt, ObjectGone
from syncd.store.base import EMPTY, ObjectInfo, Sink, Source, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")


class Hashes:
    """Both digests of content that passes through. Blocking; used from one thread at a time."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.blake3 = blake3()

    def read(self, source: Source, size: int) -> bytes:
        """Read a full block, or what is left of it."""
        parts: list[bytes] = []
        while size > 0:
            data = source.read(size)
            if not data:
                break
            parts.append(data)
            size -= len(data)
        block = parts[0] if len(parts) == 1 else b"".join(parts)
        self.sha256.update(block)
        self.blake3.update(block)
        return block

    def pass_on(self, page: Iterable[bytes], sink: Sink) -> None:
        """Hash and write a page of chunks."""
        for data in page:
            self.sha256.update(data)
            self.blake3.update(data)
            sink.write(data)


class Meter:
    """Counts chunks against what the metadata says, before any of them is written."""

    def __init__(self, info: ObjectInfo) -> None:
        self._info = info
        self.chunks = 0
        self.size = 0
        self.seq = 0

    @property
    def complete(self) -> bool:
        """All chunks are there."""
        return self.chunks == self._info.chunks

    def count(self, page: Sequence[bytes], last_seq: int) -> None:
        """Take one page.

        :raises ObjectGone: a chunk is the empty message that replaces removed ones.
        :raises ObjectCorrupt: more content than the metadata says, or less in as many chunks.
        """
        self.seq = last_seq
        self.chunks += len(page)
        self.size += sum(map(len, page))
        if not all(page):
            raise ObjectGone("its chunks were removed")
        # With no_hdr the server's count of pending messages is not reliable (nats-server 2.15 does not count down).
        if self.size > self._info.size or self.chunks > self._info.chunks:
            raise ObjectCorrupt("it has more content than its metadata says")
        if self.complete and self.size < self._info.size:
            raise ObjectCorrupt(f"it has {self.size} bytes, its metadata says {self._info.size}")


def check_readable(info: ObjectInfo) -> None:
    """Refuse what has no content to read.

    :raises ObjectCorrupt: a tombstone, a link, or metadata without a usable digest.
    """
    if info.deleted or info.link is not None:
        raise ObjectCorrupt("a tombstone or a link has no content")
    if not info.sha256:
        raise ObjectCorrupt("its metadata has no usable SHA-256 digest")


def describe(nuid: str, data: bytes) -> Stored:
    """Describe content of at most one chunk. Blocking: it hashes."""
    if not data:
        return EMPTY
    return Stored(nuid, 1, len(data), blake3(data).hexdigest(), hashlib.sha256(data).hexdigest())


def check_small(info: ObjectInfo, data: bytes) -> None:
    """Check an object that came in one piece. Blocking: it hashes.

    :raises ObjectCorrupt: it is not what its metadata says.
    """
    if len(data) != info.size or hashlib.sha256(data).hexdigest() != info.sha256:
        raise ObjectCorrupt("its content does not match its SHA-256 digest")


async def in_thread(function: Callable[[], T]) -> T:
    """Run blocking work in a thread; on cancellation wait for its end before the cancellation goes on.

    A file must not be closed, nor a staged file discarded, while the thread still uses it.
    """
    work = asyncio.get_running_loop().run_in_executor(None, function)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()
        raise
