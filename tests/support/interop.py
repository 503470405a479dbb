"""A folder between syncd and another client: one bucket, a source, a mirror, nats-py beside them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from typing import TYPE_CHECKING, Any, Literal

import nats
from nats.js.errors import NotFoundError

from syncd.outlet import PublishOptions, PushResult
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.status import FolderState, FolderStatus, StatusKeeper
from syncd.store.address import ConnectionOptions
from syncd.store.base import CHUNK_SIZE, hex_to_digest
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection
from syncd.subscriber import PullResult, SubscribeOptions, Subscriber

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
    from pathlib import Path

    from nats.js import JetStreamContext
    from nats.js.object_store import ObjectStore

    from tests.support.server import NatsServer

SECONDS = 10.0
"""For everything that must come: nats-py's get, list and watch can wait for ever."""
HANG_SECONDS = 2.0
"""For what is known never to come; where it does come, it takes milliseconds."""
PROMPT_SECONDS = 5.0
"""For a change to reach a mirror by a hint. The timer would take a minute."""

SIZES = {
    "empty": 0,
    "one byte": 1,
    "chunk less one": CHUNK_SIZE - 1,
    "chunk": CHUNK_SIZE,
    "chunk and one": CHUNK_SIZE + 1,
    "three chunks less one": 3 * CHUNK_SIZE - 1,
    "three chunks": 3 * CHUNK_SIZE,
    "three chunks and one": 3 * CHUNK_SIZE + 1,
    "three megabytes": 3 * 1024 * 1024,
}
NAMES = [
    "plain.txt",
    "two words.txt",
    " leading and trailing ",
    "star*",
    "greater>than",
    "*",
    ">",
    "100%",
    "%2e%2e",
    "...",
    ".hidden",
    "a.b.c.d",
    "-dash",
    "~tilde?&=+_",
    "tab\there",
    "new\nline",
    "back\\slash",
    "quo\"te'$(x)`y`",
    "a/very/deep/path/of/ten/levels/or/so/down/file",
    "with space/in directory/x y",
    "n" * 255,
]
"""Names in ASCII, which every client writes alike."""
BEYOND_ASCII = ["café.txt", "ファイル/名前", "emoji 🎉", "e\u0301 decomposed", "ünïcödé dir/ß"]


def content(size: int, seed: int = 0) -> bytes:
    """Bytes without a period that a wrong order of chunks could hide in."""
    block = b"".join((number * 2_654_435_761 + seed).to_bytes(8, "big") for number in range(size // 8 + 1))
    return block[:size]


def tree_of(names: list[str], salt: str = "") -> dict[str, bytes]:
    return {name: f"{salt}content of {name}".encode() for name in names}


async def within(awaitable: Awaitable[Any], seconds: float = SECONDS) -> Any:
    """Await with a deadline."""
    async with asyncio.timeout(seconds):
        return await awaitable


async def hangs(awaitable: Awaitable[Any]) -> bool:
    """Tell whether a call of a client does not come back."""
    try:
        await within(awaitable, HANG_SECONDS)
    except TimeoutError:
        return True
    return False


def write_tree(root: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read_tree(root: Path) -> dict[str, bytes]:
    """Regular files below ``root`` by relative path, syncd's own aside."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink() and path.relative_to(root).parts[0] != ".syncd"
    }


def keeper(role: Literal["publish", "subscribe"], folder: str) -> StatusKeeper:
    return StatusKeeper(FolderStatus(role, folder, "/"), clock=time.time, report=lambda _: None)


async def _is_announced(store: ObjectStore, name: str, data: bytes | None) -> bool:
    try:
        info = await within(store.get_info(name))
    except NotFoundError:
        return data is None
    if data is None or info.digest != hex_to_digest(hashlib.sha256(data).hexdigest()):
        return False
    try:
        found: bytes = (await within(store.get(name), HANG_SECONDS)).data
    except (TimeoutError, NotFoundError):
        return False
    return found == data


class Interop:
    """syncd's two services on a real server, and nats-py on a connection of its own."""

    def __init__(self, tmp: Path, server: NatsServer, bucket: str, store: NatsStore, js: JetStreamContext) -> None:
        self.tmp = tmp
        self.server = server
        self.bucket = bucket
        self.store = store
        self.js = js
        self.source = tmp / "source"
        self.mirror = tmp / "mirror"
        self.source.mkdir()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, tmp: Path, server: NatsServer, bucket: str) -> AsyncIterator[Interop]:
        connection = Connection(ConnectionOptions((server.url,), "syncd"))
        client = await nats.connect(server.url, name="nats-py", allow_reconnect=False)
        try:
            await connection.start(SECONDS)
            yield cls(tmp, server, bucket, NatsStore(connection), client.jetstream(timeout=SECONDS))
        finally:
            await connection.close()
            await client.close()

    # -- syncd ---------------------------------------------------------------------------------------------------

    def _publisher(self) -> tuple[Publisher, StatusKeeper]:
        status = keeper("publish", self.bucket)
        options = PublishOptions(
            self.bucket, self.source, Rules(), "here:/source", layout="objects", metadata={"team": "web"}
        )
        return Publisher(options, self.store, self.tmp / "publish.db", status=status), status

    async def push(self, files: Mapping[str, bytes] | None = None, **arguments: Any) -> PushResult:
        """Write files into the source and publish it once."""
        write_tree(self.source, files or {})
        publisher, _ = self._publisher()
        return await within(publisher.push(**arguments), 60)

    def _subscriber(self) -> tuple[Subscriber, StatusKeeper]:
        status = keeper("subscribe", self.bucket)
        options = SubscribeOptions(self.bucket, self.mirror, Rules())
        return Subscriber(options, self.store, self.tmp / "mirror.db", status=status), status

    async def pull(self, **arguments: Any) -> PullResult:
        subscriber, _ = self._subscriber()
        return await within(subscriber.pull(**arguments), 60)

    @contextlib.asynccontextmanager
    async def publishing(self) -> AsyncIterator[StatusKeeper]:
        """``Publisher.run`` as a task; entered when the bucket is in sync and hears of other writers."""
        publisher, status = self._publisher()
        async with self._running(publisher.run(), status):
            yield status

    @contextlib.asynccontextmanager
    async def mirroring(self) -> AsyncIterator[StatusKeeper]:
        """``Subscriber.run`` as a task; entered when the mirror is in sync and hears of changes."""
        subscriber, status = self._subscriber()
        async with self._running(subscriber.run(), status):
            yield status

    @contextlib.asynccontextmanager
    async def _running(self, service: Coroutine[Any, Any, None], status: StatusKeeper) -> AsyncIterator[None]:
        task = asyncio.create_task(service)
        try:
            async with asyncio.timeout(SECONDS):
                while status.now.state is not FolderState.IN_SYNC or not await self.listening():
                    assert not task.done(), task.exception()
                    await asyncio.sleep(0.02)
            yield
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def listening(self) -> bool:
        """Tell whether changes are notified: by the stream itself, or to a consumer of metadata."""
        config = (await self.stream()).config
        return config.republish is not None or bool(await self.meta_consumers())

    async def appears(self, files: Mapping[str, bytes | None], seconds: float = PROMPT_SECONDS) -> float:
        """Wait until the mirror holds these contents (``None``: no such path); the seconds it took."""
        began = time.monotonic()
        wrong: dict[str, Any] = {}
        while True:
            wrong = {}
            for name, data in files.items():
                path = self.mirror / name
                found = path.read_bytes() if path.is_file() else None
                if found != data:
                    wrong[name] = None if found is None else found[:40]
            if not wrong:
                return time.monotonic() - began
            assert time.monotonic() - began < seconds, f"not within {seconds} s: {wrong}"
            await asyncio.sleep(0.02)

    # -- the bucket as the server has it ---------------------------------------------------------------------------

    async def stream(self) -> Any:
        return await within(self.js.stream_info(f"OBJ_{self.bucket}"))

    async def meta_consumers(self) -> list[Any]:
        try:
            consumers = await within(self.js.consumers_info(f"OBJ_{self.bucket}"))
        except NotFoundError:
            return []
        return [info for info in consumers if info.config.filter_subject == f"$O.{self.bucket}.M.>"]

    async def announces(self, files: Mapping[str, bytes | None], seconds: float = PROMPT_SECONDS) -> None:
        """Wait until the bucket announces these contents (``None``: no such object) and nats-py reads them."""
        store = await self.other()
        deadline = time.monotonic() + seconds
        for name, data in files.items():
            while not await _is_announced(store, name, data):
                assert time.monotonic() < deadline, f"not within {seconds} s: {name}"
                await asyncio.sleep(0.02)

    async def raw(self, subject: str) -> dict[str, Any]:
        """The newest metadata message on ``$O.<bucket>.M.<subject>`` as parsed JSON."""
        message = await within(self.js.get_last_msg(f"OBJ_{self.bucket}", f"$O.{self.bucket}.M.{subject}"))
        fields: dict[str, Any] = json.loads(message.data)
        return fields

    # -- nats-py -------------------------------------------------------------------------------------------------

    async def create(self, bucket: str = "") -> ObjectStore:
        """A bucket as nats-py makes it."""
        return await within(self.js.create_object_store(bucket or self.bucket))

    async def other(self, bucket: str = "") -> ObjectStore:
        """nats-py's view of a bucket that exists."""
        return await within(self.js.object_store(bucket or self.bucket))
