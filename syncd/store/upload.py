"""One upload: blocks are read and hashed in a thread while the block before is on its way.

Rules kept here:
 * chunks are sent in order, and stored in order, or the upload fails: readers take them in the order of sequences;
 * memory holds two blocks, and what the transport's window has not had acknowledged.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from syncd.errors import StoreTimeout
from syncd.store.base import CHUNK_SIZE, EMPTY, Source, Stored
from syncd.store.content import Hashes, in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from syncd.store.lanes import Outgoing
    from syncd.store.transport import Transport

UPLOAD_BLOCK: Final = 16 * CHUNK_SIZE


class Upload:
    """Sends one source under one nuid.

    :param subject: the chunk subject; ``lane``: its stream.
    :param progress: called with the bytes of every acknowledged chunk.
    :ivar doubled: a chunk was sent twice; whether it is stored twice must be checked.
    """

    def __init__(
        self,
        transport: Transport,
        nuid: str,
        *,
        subject: str,
        lane: str,
        source: Source,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.subject = subject
        self.chunks = 0
        self.doubled = False
        self._transport = transport
        self._nuid = nuid
        self._lane = lane
        self._source = source
        self._progress = progress
        self._hashes = Hashes()
        self._flying: deque[Outgoing] = deque()
        self._reading: asyncio.Task[bytes] | None = None
        self._size = 0
        self._last_seq = 0

    async def run(self) -> Stored:
        """Send everything; returns when everything is acknowledged.

        :raises StoreTimeout: also where chunks were stored out of order, while the stream changed its leader.
        """
        self._read_on()
        while True:
            assert self._reading is not None
            block = await self._reading
            self._reading = None
            if not block:
                break
            self._read_on()
            for start in range(0, len(block), CHUNK_SIZE):
                await self._send(block[start : start + CHUNK_SIZE])
        while self._flying:
            await self._land()
        if not self.chunks:
            return EMPTY
        sha256, digest = self._hashes.sha256.hexdigest(), self._hashes.blake3.hexdigest()
        return Stored(self._nuid, self.chunks, self._size, digest, sha256)

    async def abandon(self) -> None:
        """Forget what is under way and wait for the reading thread."""
        while self._flying:
            self._transport.forget(self._flying.popleft())
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def _read_on(self) -> None:
        self._reading = asyncio.create_task(in_thread(lambda: self._hashes.read(self._source, UPLOAD_BLOCK)))

    async def _send(self, chunk: bytes) -> None:
        headers = {"Nats-Msg-Id": f"{self._nuid}.{self.chunks}"}
        self.chunks += 1
        self._flying.append(await self._transport.publish(self.subject, chunk, headers, lane=self._lane))
        self._size += len(chunk)
        while self._flying and self._flying[0].acked.done():
            await self._land()

    async def _land(self) -> None:
        out = self._flying[0]
        seq = await out.acked
        self._flying.popleft()
        self.doubled = self.doubled or out.sends > 1
        if seq <= self._last_seq:
            raise StoreTimeout("chunks were stored out of order while the stream changed its leader")
        self._last_seq = seq
        if self._progress is not None:
            self._progress(len(out.payload))
