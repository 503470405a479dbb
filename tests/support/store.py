"""Two stores behind one harness: what the contract suite and the fault tests do behind syncd's back."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import nats
from blake3 import blake3

from syncd.store import lanes as lanes_module
from syncd.store.address import ConnectionOptions
from syncd.store.base import BadMeta, ObjectInfo, ObjectMeta, SmallPut, Stored
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection
from syncd.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import pytest
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from syncd.store.base import Bucket
    from syncd.store.bucket import NatsBucket

DEADLINE = 20.0

TWO_ACCOUNTS = """
accounts {
  SYNC { jetstream: enabled
    users: [ { user: admin, password: pw }
      { user: publisher, password: pw, permissions: {
          publish: { allow: ["$O.B.C.*", "$O.B.M.*", "$JS.API.STREAM.INFO.OBJ_B", "$JS.API.DIRECT.GET.OBJ_B"] }
          subscribe: { allow: ["_INBOX_publisher.>"] } } }
      { user: reader, password: pw, permissions: {
          publish: { allow: ["$JS.API.STREAM.INFO.OBJ_B", "$JS.API.DIRECT.GET.OBJ_B"] }
          subscribe: { allow: ["_INBOX_reader.>"] } } } ]
    exports: [
      { service: "$JS.API.DIRECT.GET.OBJ_B", response: stream, accounts: [FLEET] }
      { service: "$JS.API.STREAM.INFO.OBJ_B", accounts: [FLEET] }
      { stream: "syncd.B.meta.>", accounts: [FLEET] } ] }
  FLEET {
    users: [ { user: host, password: pw, permissions: {
        publish: { allow: ["$JS.API.DIRECT.GET.OBJ_B", "syncd.B.info"] }
        subscribe: { allow: ["_INBOX_host.>", "syncd.B.meta.>"] } } } ]
    imports: [
      { service: { account: SYNC, subject: "$JS.API.DIRECT.GET.OBJ_B" } }
      { service: { account: SYNC, subject: "$JS.API.STREAM.INFO.OBJ_B" }, to: "syncd.B.info" }
      { stream: { account: SYNC, subject: "syncd.B.meta.>" } } ] }
}
"""
"""Rights of a publisher and of a reader on bucket B, and a host in an account without JetStream."""


class BytesSource:
    """Content in memory, handed out in pieces of at most ``step`` bytes."""

    def __init__(self, data: bytes, step: int = 1 << 30) -> None:
        self.data = data
        self.at = 0
        self.step = step

    def read(self, size: int) -> bytes:
        piece = self.data[self.at : self.at + min(size, self.step)]
        self.at += len(piece)
        return piece


class BytesSink:
    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.parts.append(data)

    @property
    def data(self) -> bytes:
        return b"".join(self.parts)


def content(size: int, salt: int = 0) -> bytes:
    """Incompressible bytes that differ everywhere and from salt to salt."""
    return hashlib.shake_256(f"{salt}:{size}".encode()).digest(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(data: bytes) -> tuple[str, str]:
    return blake3(data).hexdigest(), sha256(data)


async def put(bucket: Bucket, name: str, data: bytes, expected: int | None = None) -> tuple[int, Stored]:
    stored = await bucket.upload(BytesSource(data))
    return await bucket.put_meta(ObjectMeta(name), stored, expected_seq=expected), stored


async def get(bucket: Bucket, name: str) -> bytes:
    info = await bucket.get_info(name)
    assert info is not None
    sink = BytesSink()
    await bucket.download(info, sink)
    return sink.data


async def listing(bucket: Bucket, after: int = 0) -> list[ObjectInfo | BadMeta]:
    return [item async for page in bucket.changes(after) for item in page.items]


async def names(bucket: Bucket, after: int = 0) -> list[str]:
    items = await listing(bucket, after)
    return [item.name for item in items if isinstance(item, ObjectInfo) and not item.deleted]


def small(name: str, data: bytes | None, *, stored: Stored | None = None, expected: int | None = None) -> SmallPut:
    return SmallPut(ObjectMeta(name), data, stored, expected)


def raw_meta(name: str, data: bytes, nuid: str, **changes: Any) -> bytes:
    """A metadata message as another client might write it."""
    fields: dict[str, Any] = {
        "name": name,
        "bucket": "other",
        "nuid": nuid,
        "size": len(data),
        "mtime": "0001-01-01T00:00:00Z",
        "chunks": 1,
        "digest": "SHA-256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode(),
        "options": {"max_chunk_size": 131072},
    }
    return json.dumps(fields | changes).encode()


class Kit:
    """One store, and the hand of somebody else in it."""

    kind: str
    store: Any

    async def inject_meta(self, bucket: str, token: str, payload: bytes, headers: dict[str, str] | None = None) -> int:
        raise NotImplementedError

    async def inject_chunks(self, bucket: str, nuid: str, chunks: Sequence[bytes]) -> None:
        raise NotImplementedError

    async def delete_bucket(self, bucket: str) -> None:
        raise NotImplementedError


class MemoryKit(Kit):
    kind = "memory"

    def __init__(self) -> None:
        self.store = MemoryStore()

    async def inject_meta(self, bucket: str, token: str, payload: bytes, headers: dict[str, str] | None = None) -> int:
        return self.store.write_raw_meta(bucket, token, payload, headers)

    async def inject_chunks(self, bucket: str, nuid: str, chunks: Sequence[bytes]) -> None:
        self.store.write_raw_chunks(bucket, nuid, chunks)

    async def delete_bucket(self, bucket: str) -> None:
        self.store.delete_bucket(bucket)


class LiveKit(Kit):
    kind = "live"

    def __init__(self, conn: Connection, other: Client) -> None:
        self.conn = conn
        self.store = NatsStore(conn)
        self.other = other

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> int:
        answer = json.loads((await self.other.request(subject, payload, timeout=5, headers=headers)).data)
        assert "error" not in answer, answer
        return int(answer["seq"])

    async def api(self, subject: str, request: Any = None) -> dict[str, Any]:
        payload = b"" if request is None else json.dumps(request).encode()
        answer: dict[str, Any] = json.loads((await self.other.request(f"$JS.API.{subject}", payload, timeout=5)).data)
        assert "error" not in answer, answer
        return answer

    async def inject_meta(self, bucket: str, token: str, payload: bytes, headers: dict[str, str] | None = None) -> int:
        return await self.publish(f"$O.{bucket}.M.{token}", payload, {"Nats-Rollup": "sub", **(headers or {})})

    async def inject_chunks(self, bucket: str, nuid: str, chunks: Sequence[bytes]) -> None:
        await self.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.C.{nuid}"})
        for chunk in chunks:
            await self.publish(f"$O.{bucket}.C.{nuid}", chunk)

    async def delete_bucket(self, bucket: str) -> None:
        await self.api(f"STREAM.DELETE.OBJ_{bucket}")


def as_user(name: str) -> dict[str, Any]:
    return {"user": name, "password": "pw", "inbox_prefix": f"_INBOX_{name}"}


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Connection]:
    conn = Connection(ConnectionOptions(servers=(url,), name="test", **options))
    await conn.start(10)
    try:
        yield conn
    finally:
        await conn.close()


@asynccontextmanager
async def raw_client(url: str, **options: Any) -> AsyncIterator[Client]:
    client = await nats.connect(url, **options)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def live_kit(url: str) -> AsyncIterator[LiveKit]:
    async with connected(url) as conn, raw_client(url) as other:
        yield LiveKit(conn, other)


def lose_answers(monkeypatch: pytest.MonkeyPatch, bucket: NatsBucket, count: int) -> list[Msg]:
    """Drop the next acknowledgements, as a connection that breaks at the wrong moment does."""
    transport = bucket._transport
    original = transport._on_ack
    lost: list[Msg] = []

    def on_ack(out: Any, message: Msg) -> None:
        if len(lost) < count:
            lost.append(message)
        else:
            original(out, message)

    monkeypatch.setattr(transport, "_on_ack", on_ack)
    monkeypatch.setattr(lanes_module, "SLOW_RESEND_SECONDS", 0.5)
    transport.writing.limit = 4 * 1024 * 1024  # several messages under way from the first on
    return lost


def tasks_named(part: str) -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if part in task.get_name()]
