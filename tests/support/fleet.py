"""A publisher and its subscribers, one round at a time, each in a process of its own (:mod:`tests.support.forks`).

The functions are what those processes do: compose the adapters as the program does, do one round, return plain values.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats

from syncd import cli
from syncd.errors import Unavailable
from syncd.modes import ModePolicy
from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.address import ConnectionOptions
from syncd.store.base import BucketSpec
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trees import TreeReader
from tests.support.reach import reachable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FLEET = "tests.support.fleet:"
"""What the names of these tasks begin with."""
CONNECT_SECONDS = 10.0
OFFLINE_SECONDS = 0.05
"""How long one that is cut off tries."""


@contextlib.asynccontextmanager
async def _store(url: str, seconds: float = CONNECT_SECONDS) -> AsyncIterator[NatsStore]:
    """Connect, or go on without, as a daemon does."""
    connection = Connection(ConnectionOptions(servers=(url,), name="fleet"))
    with contextlib.suppress(Unavailable):
        await connection.start(seconds)
    try:
        yield NatsStore(connection)
    finally:
        await connection.close()


def _keeper(role: Any, folder: str) -> StatusKeeper:
    return StatusKeeper(FolderStatus(role, folder, "/"), clock=time.time, report=lambda _: None)


def _publisher(
    store: NatsStore, folder: str, source: str, index: str, *, layout: Any, keep: int, grace: float
) -> Publisher:
    options = PublishOptions(
        folder,
        Path(source),
        Rules(),
        f"test:{source}",
        layout=layout,
        bucket=BucketSpec(layout=layout),
        max_delete_percent=100.0,
        grace_seconds=grace,
        keep_generations=keep,
        keep_days=0.0,
    )
    return Publisher(options, store, Path(index), status=_keeper("publish", folder))


async def push(
    *,
    url: str,
    folder: str,
    source: str,
    index: str,
    layout: str = "generations",
    keep: int = 0,
    grace: float = 0.0,
    offline: bool = False,
    change_layout: bool = False,
) -> dict[str, Any]:
    """Publish once.

    :param offline: the server cannot be reached.
    """
    async with _store(url, OFFLINE_SECONDS if offline else CONNECT_SECONDS) as store:
        done = await _publisher(store, folder, source, index, layout=layout, keep=keep, grace=grace).push(
            allow_delete=True, change_layout=change_layout
        )
    return {
        "generation": done.generation,
        "root": done.root,
        "committed": done.committed,
        "problems": sorted(problem.path for problem in done.problems),
        "again": sorted(done.again),
    }


async def collect(
    *,
    url: str,
    folder: str,
    source: str,
    index: str,
    layout: str = "generations",
    keep: int = 0,
    grace: float = 0.0,
    offline: bool = False,
) -> dict[str, Any]:
    """Free what nothing kept reaches; the objects layout does so with each push."""
    if layout != "generations":
        return await push(url=url, folder=folder, source=source, index=index, layout=layout, grace=grace)
    async with _store(url, OFFLINE_SECONDS if offline else CONNECT_SECONDS) as store:
        done = await _publisher(store, folder, source, index, layout=layout, keep=keep, grace=grace).collect()
    return {"removed": done.generations_removed, "freed": done.freed_blobs}


async def pull(
    *,
    url: str,
    folder: str,
    mirror: str,
    index: str,
    generation: int = 0,
    offline: bool = False,
    rollout: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Bring a mirror up to its channel, as the start of a daemon does: what was interrupted is finished first.

    :param offline: the server cannot be reached.
    :param rollout: fields of RolloutOptions.
    :param options: those of SubscribeOptions.
    """
    async with _store(url, OFFLINE_SECONDS if offline else CONNECT_SECONDS) as store:
        status = _keeper("subscribe", folder)
        how: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in (rollout or {}).items()
        }
        modes = ModePolicy(read_only=how.get("mode") == "release")  # the default of both modes
        chosen = SubscribeOptions(folder, Path(mirror), Rules(), rollout=RolloutOptions(modes=modes, **how), **options)
        subscriber = Subscriber(chosen, store, Path(index), status=status)
        done = await subscriber.pull(allow_delete=True, generation=generation)
    return {
        "generation": done.generation,
        "root": done.root,
        "exact": status.now.exact,
        "downloaded": done.downloaded_bytes,
        "problems": {problem.path: problem.code for problem in done.problems},
    }


async def channel(*, url: str, folder: str, name: str = "head") -> list[Any]:
    """Number and tree digest of the generation that a channel points at."""
    async with _store(url) as store:
        commit = await TreeReader(store.bucket(folder)).channel(name)
    return [0, ""] if commit is None else [commit.generation.number, commit.generation.root.tree]


async def orphans(*, url: str, folder: str) -> list[str]:
    """What a bucket holds and nothing in it needs."""
    async with _store(url) as store:
        bucket = store.bucket(folder)
        listed = {name async for page in bucket.list_chunks() for name in page}
        return sorted(listed - await reachable(bucket))


async def drop(*, url: str, folder: str) -> None:
    client = await nats.connect(url)
    try:
        await client.jetstream().delete_stream(f"OBJ_{folder}")
    finally:
        await client.close()


def command(*, arguments: list[str]) -> int:
    """One command of the command line; its exit code."""
    return cli.run(arguments)


# -- the network in between --------------------------------------------------------------------------------------------


class Proxy:
    """A TCP proxy of a test's own: what goes through it can be cut, now or after some bytes, and mended."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._left: int | None = None
        self.is_cut = False
        self.was_cut = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """End every connection, and each new one at once."""
        self._call(self._cut())

    def cut_after(self, size: int) -> None:
        """Cut as soon as the server has sent that many bytes; :attr:`was_cut` tells."""
        self.was_cut.clear()
        self._left = size

    def mend(self) -> None:
        self._left = None
        self.is_cut = False

    def close(self) -> None:
        async def closed() -> None:
            await self._cut()
            self._server.close()
            await self._server.wait_closed()
            for _ in range(3):  # turns of the loop in which the transports close their sockets
                await asyncio.sleep(0)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(closed())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _cut(self) -> None:
        self.is_cut = True
        self._left = None
        for writer in self._open:
            writer.transport.abort()
        self.was_cut.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # the server is away
            writer.transport.abort()
            return
        self._open |= {writer, back}
        if self.is_cut:
            writer.transport.abort()
        try:
            await asyncio.gather(self._pump(reader, back, count=False), self._pump(there, writer, count=True))
        finally:
            self._open -= {writer, back}
            for end in (writer, back):
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, count: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                if count and self._left is not None:
                    self._left -= len(data)
                    if self._left <= 0:
                        await self._cut()
                        return
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
