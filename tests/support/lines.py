"""Bad lines: a TCP proxy that delays, trickles, stalls, or swallows everything without a word."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from tests.support.fleet import Proxy

PIECE = 64 * 1024
SLOW_PIECES = 20
"""A line with a rate hands on so many pieces a second."""


class Line(Proxy):
    """What goes through it is as late, and as slow, as a test says; each direction by itself.

    :ivar delay: seconds that everything is on its way.
    :ivar rate: bytes per second and connection; 0: as many as there are.
    :ivar stalled: it stalled by itself, see :meth:`stall_after`.
    :ivar carried: bytes so far, ``up`` to the server and ``down`` from it.
    :param window: bytes that the kernel buffers here in either direction, some; 0: as many as it likes.
    """

    def __init__(self, port: int, *, delay: float = 0.0, rate: int = 0, window: int = 0) -> None:
        self.delay = delay
        self.rate = rate
        self._window = window
        self._going = asyncio.Event()
        self._going.set()
        self._stall_after = 0
        self.stalled = threading.Event()
        self.carried = {"up": 0, "down": 0}
        self._deaf: set[asyncio.StreamWriter] = set()
        super().__init__(port)
        if window:
            self._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)

    def stall(self) -> None:
        """Read nothing any more: who sends finds its buffers full after a while."""
        self._loop.call_soon_threadsafe(self._going.clear)

    def stall_after(self, size: int) -> None:
        """Stall as soon as the server has sent that many bytes."""
        self._stall_after = size

    def resume(self) -> None:
        """End :meth:`stall`."""
        self._loop.call_soon_threadsafe(self._going.set)

    def swallow(self) -> None:
        """Let the connections that are open now take everything and hand on nothing; neither end is told."""

        async def swallowed() -> None:
            self._deaf |= self._open

        self._call(swallowed())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        if self._window:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._window)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._target))
        except OSError:
            sock.close()
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection(sock=sock)
        ends = {writer, back}
        self._open |= ends
        try:
            await asyncio.gather(self._carry(reader, back), self._carry(there, writer, downwards=True))
        finally:
            self._open -= ends
            self._deaf -= ends
            for end in ends:
                end.transport.abort()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, downwards: bool = False
    ) -> None:
        loop = asyncio.get_running_loop()
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, data = await on_its_way.get()
                    await asyncio.sleep(due - loop.time())
                    writer.write(data)
                    await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(self.rate // SLOW_PIECES or PIECE):
                    self.carried["down" if downwards else "up"] += len(data)
                    if downwards and self._stall_after:
                        self._count_down(len(data))
                    await self._going.wait()
                    if writer in self._deaf:
                        continue
                    if self.rate:
                        await asyncio.sleep(len(data) / self.rate)
                    on_its_way.put_nowait((loop.time() + self.delay, data))
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)
            writer.transport.abort()

    def _count_down(self, size: int) -> None:
        self._stall_after -= size
        if self._stall_after <= 0:
            self._stall_after = 0
            self._going.clear()
            self.stalled.set()
