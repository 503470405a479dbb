"""Old backups of a bucket, put back: as ``nats stream backup`` and ``restore`` do it, and as a copy of the disk."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import TYPE_CHECKING, Any

from tests.support.store import raw_client

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from tests.support.server import NatsServer

PIECE = 64 * 1024


async def _api(client: Client, subject: str, request: Any = None) -> dict[str, Any]:
    payload = b"" if request is None else json.dumps(request).encode()
    answer: dict[str, Any] = json.loads((await client.request(f"$JS.API.{subject}", payload, timeout=10)).data)
    assert "error" not in answer, answer
    return answer


async def last_seq(url: str, stream: str) -> int:
    """The sequence of a stream's last message."""
    async with raw_client(url) as client:
        return int((await _api(client, f"STREAM.INFO.{stream}"))["state"]["last_seq"])


class StreamBackup:
    """What the server's API hands out and takes back; nats-server 2.15 gives the stream a new time of creation."""

    def __init__(self, url: str, stream: str) -> None:
        self._url = url
        self._stream = stream
        self._about: dict[str, Any] = {}
        self._pieces: list[bytes] = []

    async def take(self) -> None:
        ended = asyncio.get_running_loop().create_future()
        async with raw_client(self._url) as client:

            async def on_piece(message: Msg) -> None:
                if message.data:
                    self._pieces.append(message.data)
                    if message.reply:
                        await client.publish(message.reply)
                elif not ended.done():
                    ended.set_result(None)

            inbox = client.new_inbox()
            await client.subscribe(inbox, cb=on_piece)
            request = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": PIECE}
            self._about = await _api(client, f"STREAM.SNAPSHOT.{self._stream}", request)
            async with asyncio.timeout(20):
                await ended

    async def put_back(self) -> None:
        """Put it in the place of the stream that there is; nobody's connection notices."""
        about = {"config": self._about["config"], "state": self._about["state"]}
        async with raw_client(self._url) as client:
            await _api(client, f"STREAM.DELETE.{self._stream}")
            subject = (await _api(client, f"STREAM.RESTORE.{self._stream}", about))["deliver_subject"]
            for piece in self._pieces:
                await client.request(subject, piece, timeout=10)
            answer = json.loads((await client.request(subject, b"", timeout=10)).data)
            assert "error" not in answer, answer


class DiskBackup:
    """A copy of all that a server stores, made and put back while it is down."""

    def __init__(self, server: NatsServer, directory: Path) -> None:
        self._server = server
        self._copy = directory

    async def take(self) -> None:
        await self._while_down(lambda: shutil.copytree(self._server.store_dir, self._copy))

    async def put_back(self) -> None:
        def replace() -> None:
            shutil.rmtree(self._server.store_dir)
            shutil.copytree(self._copy, self._server.store_dir)

        await self._while_down(replace)

    async def _while_down(self, work: Callable[[], Any]) -> None:
        await self._server.astop()
        await asyncio.to_thread(work)
        await self._server.astart()
