"""The store's honest twin in memory, for tests of the services and for nothing else.

It keeps a stream of messages per bucket, encoded and decoded by the same :mod:`syncd.store.wire` as the live one,
and passes the same contract suite. Rules kept here:
 * a call suspends at least once, as one that crosses a network does;
 * faults are ordered explicitly (:class:`Faults`), nothing is random.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from blake3 import blake3

from syncd.errors import (
    BucketNotFound,
    BucketSealed,
    ObjectCorrupt,
    ObjectGone,
    StoreFull,
    StoreRejected,
    StoreTimeout,
    SyncdError,
    WriteConflict,
)
from syncd.nodes import FORMAT
from syncd.store import wire
from syncd.store.base import (
    CHUNK_SIZE,
    EMPTY,
    NUID_PREFIX,
    BadMeta,
    BlobSink,
    BucketSpec,
    BucketState,
    Hints,
    Link,
    ObjectInfo,
    ObjectMeta,
    Page,
    PutResult,
    Sink,
    SmallPut,
    Source,
    Store,
    Stored,
)
from syncd.store.codec import decode
from syncd.store.content import check_readable, check_small, describe
from syncd.store.generation import encode_commit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

PAGE = 500
BLOB_PAGE = 64
REMOVED_SECONDS = 1.0
"""How long the empty message stays that replaces a removed blob."""


class Faults:
    """What goes wrong, by order of a test.

    :ivar lose_hints: hints are not delivered (reconnects and the timer still wake).
    :ivar reorder: ``download_many`` yields in reverse order, and each hint comes twice.
    :ivar silence_seconds: how long a stalled call waits before it gives up with StoreTimeout.
    """

    def __init__(self) -> None:
        self.lose_hints = False
        self.reorder = False
        self.silence_seconds = 5.0
        self._open = asyncio.Event()
        self._open.set()
        self._failures: list[tuple[str, Exception]] = []
        self.calls: list[str] = []

    def stall(self) -> None:
        """Let every call hang from now on, as with a frozen server."""
        self._open.clear()

    def resume(self) -> None:
        """End :meth:`stall`."""
        self._open.set()

    def fail(self, call: str, error: Exception, times: int = 1) -> None:
        """Let the next calls of a method (``"*"``: of any) raise ``error`` before they do anything.

        ``upload`` and ``download`` can also fail in the middle: ``"upload_chunk"``, ``"download_chunk"``; blobs on
        their way up one by one, ``"put_blob"``, and on their way down by pages, ``"get_blobs"``.
        """
        self._failures.extend([(call, error)] * times)

    async def gate(self, call: str) -> None:
        """Suspend once, stall and fail as ordered."""
        self.calls.append(call)
        await asyncio.sleep(0)
        if not self._open.is_set():
            try:
                async with asyncio.timeout(self.silence_seconds):
                    await self._open.wait()
            except TimeoutError:
                raise StoreTimeout("the server does not answer") from None
        for index, (name, error) in enumerate(self._failures):
            if name in {call, "*"}:
                del self._failures[index]
                raise error


@dataclass(frozen=True, slots=True)
class _Message:
    seq: int
    time_ns: int
    payload: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class _Stream:
    """One bucket's stream: the newest message per metadata subject, all messages per chunk subject."""

    def __init__(self, spec: BucketSpec, created: str) -> None:
        self.spec = spec
        self.created = created
        self.last_seq = 0
        self.sealed = False
        self.publisher = ""
        self.metas: dict[str, _Message] = {}
        self.chunks: dict[str, list[_Message]] = {}
        self.layout = spec.layout
        self.removed: dict[str, float] = {}

    def sweep(self) -> None:
        """Forget removed blobs whose time has come."""
        now = time.monotonic()
        for digest in [digest for digest, at in self.removed.items() if at <= now]:
            del self.removed[digest]
            self.chunks.pop(digest, None)

    def size(self) -> int:
        metas = sum(len(message.payload) for message in self.metas.values())
        return metas + sum(len(message.payload) for chunks in self.chunks.values() for message in chunks)

    def store(self, payload: bytes, headers: Mapping[str, str] | None = None) -> _Message:
        self.check_room(len(payload))
        self.last_seq += 1
        return _Message(self.last_seq, time.time_ns(), payload, headers or {})

    def check_room(self, size: int) -> None:
        if self.sealed:
            raise BucketSealed("the bucket is sealed")
        limit = self.spec.max_bytes
        if limit is not None and self.size() + size > limit:
            raise StoreFull("the bucket is full")

    def put_blob(self, digest: str, payload: bytes, *, replace: bool) -> bool:
        """Store a blob; tells whether there was none."""
        if self.sealed:
            raise BucketSealed("the bucket is sealed")
        if digest in self.chunks and not replace:
            return False
        self.chunks[digest] = [self.store(payload)]
        self.removed.pop(digest, None)
        return True

    def seq_of(self, subject: str) -> int:
        message = self.metas.get(subject)
        return message.seq if message else 0

    def put_meta(self, subject: str, payload: bytes, expected: int | None, headers: Mapping[str, str]) -> _Message:
        if expected is not None and self.seq_of(subject) != expected:
            raise WriteConflict("somebody else wrote the object since")
        message = self.store(payload, headers)
        self.metas.pop(subject, None)  # keeps the dict in sequence order
        self.metas[subject] = message
        return message


class MemoryStore:
    """Buckets in memory."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._streams: dict[str, _Stream] = {}
        self._births = itertools.count(1)
        self._nuids = itertools.count(1)
        self._listeners: set[_MemoryHints] = set()

    def bucket(self, name: str) -> MemoryBucket:
        """Return a handle; no request is made."""
        return MemoryBucket(self, wire.check_bucket(name))

    async def create_bucket(self, name: str, spec: BucketSpec) -> BucketState:
        """Create the bucket, or adopt an existing one."""
        wire.check_bucket(name)
        await self.faults.gate("create_bucket")
        if name not in self._streams:
            self._streams[name] = _Stream(spec, f"birth-{next(self._births)}")
        return _state(self._streams[name])

    async def list_buckets(self) -> list[str]:
        """Return the names of all buckets, sorted."""
        await self.faults.gate("list_buckets")
        return sorted(self._streams)

    # -- what tests do behind syncd's back --------------------------------------------------------------------------

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket with all it holds."""
        del self._streams[name]

    def disconnect(self) -> None:
        """Wake all hints, as a renewed connection does."""
        for listener in list(self._listeners):
            listener.wake(0)

    def write_raw_meta(self, bucket: str, token: str, payload: bytes, headers: Mapping[str, str] | None = None) -> int:
        """Store a metadata message as some other client might; return its sequence."""
        subject = f"$O.{bucket}.M.{token}"
        seq = self.stream(bucket).put_meta(subject, payload, None, headers or {}).seq
        self.notify(bucket, seq)
        return seq

    def write_raw_chunks(self, bucket: str, nuid: str, chunks: Sequence[bytes]) -> None:
        """Replace the chunks of a nuid."""
        stream = self.stream(bucket)
        stream.chunks[nuid] = [stream.store(chunk) for chunk in chunks]
        if not chunks:
            del stream.chunks[nuid]

    def blob_payload(self, bucket: str, digest: str) -> bytes | None:
        """Return what is stored for a blob, codec byte and all; ``None`` where there is none."""
        messages = self.stream(bucket).chunks.get(digest)
        return messages[-1].payload if messages else None

    def set_blob_payload(self, bucket: str, digest: str, payload: bytes | None) -> None:
        """Damage, swap or (``None``) remove a blob."""
        self.stream(bucket).removed.pop(digest, None)
        self.write_raw_chunks(bucket, digest, [] if payload is None else [payload])

    def stream(self, bucket: str) -> _Stream:
        """Return a bucket's stream.

        :raises BucketNotFound: there is none.
        """
        try:
            stream = self._streams[bucket]
        except KeyError:
            raise BucketNotFound(f"bucket {bucket!r} does not exist") from None
        stream.sweep()
        return stream

    def fresh_nuid(self) -> str:
        """Return a new nuid."""
        return f"{NUID_PREFIX}{next(self._nuids):022d}"

    def notify(self, bucket: str, seq: int) -> None:
        """Send a hint to whoever listens."""
        if self.faults.lose_hints:
            return
        for listener in list(self._listeners):
            if listener.bucket == bucket:
                listener.wake(seq)
                if self.faults.reorder:
                    listener.wake(max(0, seq - 1))

    def listen(self, listener: _MemoryHints) -> None:
        """Add a listener."""
        self._listeners.add(listener)

    def unlisten(self, listener: _MemoryHints) -> None:
        """Remove a listener."""
        self._listeners.discard(listener)


class _MemoryHints:
    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self._woken = asyncio.Event()
        self._seq = 0

    def wake(self, seq: int) -> None:
        self._seq = max(self._seq, seq)
        self._woken.set()

    async def wait(self, max_seconds: float) -> int:
        try:
            async with asyncio.timeout(max_seconds):
                await self._woken.wait()
        except TimeoutError:
            return 0
        self._woken.clear()
        seq, self._seq = self._seq, 0
        return seq


def _state(stream: _Stream) -> BucketState:
    return BucketState(
        created=stream.created,
        last_seq=stream.last_seq,
        messages=len(stream.metas) + sum(map(len, stream.chunks.values())),
        size=stream.size(),
        sealed=stream.sealed,
        max_bytes=stream.spec.max_bytes,
        description=stream.spec.description,
        metadata={**stream.spec.metadata, "syncd.layout": stream.layout, "syncd.format": str(FORMAT)},
        republished=True,
        ttl_messages=True,
        atomic=True,
        now_ns=time.time_ns(),
    )


class MemoryBucket:
    """One bucket in memory."""

    def __init__(self, store: MemoryStore, name: str) -> None:
        self._store = store
        self._name = name

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self._name

    async def state(self) -> BucketState:
        """See :class:`syncd.store.base.Bucket`."""
        return _state(await self._stream("state"))

    async def changes(self, after: int, *, at_least: int = 0) -> AsyncIterator[Page]:  # noqa: ARG002 - no replicas
        """See :class:`syncd.store.base.Bucket`."""
        while True:
            stream = await self._stream("changes")
            news = [item for item in stream.metas.items() if item[1].seq > after][:PAGE]
            if not news:
                return
            after = news[-1][1].seq
            yield Page(tuple(self._read(subject, message) for subject, message in news), after)

    def hints(self) -> AbstractAsyncContextManager[Hints]:
        """See :class:`syncd.store.base.Bucket`."""
        return self._hints()

    @asynccontextmanager
    async def _hints(self) -> AsyncIterator[Hints]:
        listener = _MemoryHints(self._name)
        self._store.listen(listener)
        try:
            yield listener
        finally:
            self._store.unlisten(listener)

    async def get_info(self, name: str) -> ObjectInfo | None:
        """See :class:`syncd.store.base.Bucket`."""
        subject = wire.meta_subject(self._name, name)
        stream = await self._stream("get_info")
        message = stream.metas.get(subject)
        if message is None:
            return None
        info = self._read(subject, message)
        if isinstance(info, BadMeta):
            raise ObjectCorrupt(info.reason)
        return info

    async def upload(self, source: Source, *, progress: Callable[[int], None] | None = None) -> Stored:
        """See :class:`syncd.store.base.Bucket`."""
        await self._stream("upload")
        nuid = self._store.fresh_nuid()
        sha256, digest, size, chunks = hashlib.sha256(), blake3(), 0, 0
        try:
            while True:
                data = await asyncio.to_thread(_read_chunk, source)
                if not data:
                    break
                stream = await self._stream("upload_chunk")
                stream.chunks.setdefault(nuid, []).append(stream.store(data))
                sha256.update(data)
                digest.update(data)
                size += len(data)
                chunks += 1
                if progress is not None:
                    progress(len(data))
        except BaseException:
            with_stream = self._store._streams.get(self._name)  # noqa: SLF001 - one module, two classes
            if with_stream is not None:
                with_stream.chunks.pop(nuid, None)
            raise
        if not size:
            return EMPTY
        return Stored(nuid, chunks, size, digest.hexdigest(), sha256.hexdigest())

    async def put_meta(self, meta: ObjectMeta, stored: Stored, *, expected_seq: int | None) -> int:
        """See :class:`syncd.store.base.Bucket`."""
        stream = await self._stream("put_meta")
        return self._announce(stream, meta, stored, expected_seq)

    def _announce(self, stream: _Stream, meta: ObjectMeta, stored: Stored, expected: int | None) -> int:
        payload = wire.encode_put(
            self._name, meta, stored, nuid=stored.nuid or self._store.fresh_nuid(), now_ns=time.time_ns()
        )
        return self._write(stream, meta.name, payload, expected)

    def _write(self, stream: _Stream, name: str, payload: bytes, expected: int | None) -> int:
        seq = stream.put_meta(wire.meta_subject(self._name, name), payload, expected, {}).seq
        self._store.notify(self._name, seq)
        return seq

    async def put_many(self, items: Sequence[SmallPut]) -> list[PutResult]:
        """See :class:`syncd.store.base.Bucket`."""
        stream = await self._stream("put_many")
        results = []
        for item in items:
            try:
                results.append(self._put_small(stream, item))
            except SyncdError as error:
                results.append(PutResult(0, None, error))
        return results

    def _put_small(self, stream: _Stream, item: SmallPut) -> PutResult:
        stored = item.stored
        if item.data is not None:
            if len(item.data) > CHUNK_SIZE:
                raise StoreRejected(f"{len(item.data)} bytes are more than one chunk")
            stored = describe(self._store.fresh_nuid(), item.data)
        if stored is None:
            raise StoreRejected("an object needs content")
        stored = stored if stored.nuid else replace(stored, nuid=self._store.fresh_nuid())
        before = stream.chunks.get(stored.nuid)
        if item.data:
            stream.chunks[stored.nuid] = [stream.store(item.data)]
        try:
            return PutResult(self._announce(stream, item.meta, stored, item.expected_seq), stored)
        except SyncdError:
            if before is None:
                stream.chunks.pop(stored.nuid, None)
            raise

    async def delete(self, name: str, *, expected_seq: int | None, metadata: Mapping[str, str]) -> int:
        """See :class:`syncd.store.base.Bucket`."""
        stream = await self._stream("delete")
        payload = wire.encode_tombstone(self._name, name, nuid=self._store.fresh_nuid(), metadata=metadata)
        return self._write(stream, name, payload, expected_seq)

    async def claim(self, publisher: str, *, take_over: bool = False) -> str:
        """See :class:`syncd.store.base.Bucket`."""
        stream = await self._stream("claim")
        if take_over or not stream.publisher:
            stream.publisher = publisher
        return stream.publisher

    async def put_link(
        self, name: str, link: Link, *, expected_seq: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> int:
        """See :class:`syncd.store.base.Bucket`."""
        stream = await self._stream("put_link")
        nuid = self._store.fresh_nuid()
        payload = wire.encode_link(self._name, name, link, nuid=nuid, now_ns=time.time_ns(), metadata=metadata)
        return self._write(stream, name, payload, expected_seq)

    async def download(
        self, info: ObjectInfo, sink: Sink, *, progress: Callable[[int], None] | None = None
    ) -> tuple[str, str]:
        """See :class:`syncd.store.base.Bucket`."""
        check_readable(info)
        sha256, digest, size, count = hashlib.sha256(), blake3(), 0, 0
        after = 0
        while True:
            stream = await self._stream("download_chunk" if count else "download")
            message = next((m for m in stream.chunks.get(info.nuid, []) if m.seq > after), None)
            if message is None:
                break
            after, data = message.seq, message.payload
            size += len(data)
            count += 1
            if size > info.size or count > info.chunks:
                raise ObjectCorrupt("more content than its metadata says")
            await asyncio.to_thread(sink.write, data)
            sha256.update(data)
            digest.update(data)
            if progress is not None:
                progress(len(data))
        if count < info.chunks:
            raise ObjectGone(f"{info.chunks - count} of {info.chunks} chunks are gone")
        if size != info.size or sha256.hexdigest() != info.sha256:
            raise ObjectCorrupt("content does not match its metadata")
        return digest.hexdigest(), sha256.hexdigest()

    async def download_many(self, infos: Sequence[ObjectInfo]) -> AsyncIterator[tuple[ObjectInfo, bytes | Exception]]:
        """See :class:`syncd.store.base.Bucket`."""
        order = reversed(infos) if self._store.faults.reorder else iter(infos)
        for info in order:
            try:
                yield info, await self._fetch(info)
            except SyncdError as error:
                if isinstance(error, ObjectGone | ObjectCorrupt):
                    yield info, error
                else:
                    raise

    async def _fetch(self, info: ObjectInfo) -> bytes:
        stream = await self._stream("download_many")
        check_readable(info)
        if info.chunks > 1:
            raise ObjectCorrupt("more than one chunk")
        messages = stream.chunks.get(info.nuid, [])
        if len(messages) < info.chunks:
            raise ObjectGone("its chunk is gone")
        data = b"".join(message.payload for message in messages) if info.chunks else b""
        check_small(info, data)
        return data

    async def list_chunks(self) -> AsyncIterator[dict[str, int]]:
        """See :class:`syncd.store.base.Bucket`."""
        stream = await self._stream("list_chunks")
        counts = {nuid: len(chunks) for nuid, chunks in stream.chunks.items()}
        for page in _pages(counts):
            yield page
            await self._stream("list_chunks")

    async def remove_chunks(self, nuid: str) -> None:
        """See :class:`syncd.store.base.Bucket`."""
        stream = await self._stream("remove_chunks")
        if stream.sealed:
            raise BucketSealed("the bucket is sealed")
        stream.chunks.pop(nuid, None)

    async def seal(self) -> None:
        """See :class:`syncd.store.base.Bucket`."""
        (await self._stream("seal")).sealed = True

    # -- the generations layout ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def blob_sink(self) -> AsyncIterator[BlobSink]:
        """See :class:`syncd.store.base.Bucket`."""
        yield _MemorySink(self._name, self._stream)

    async def get_blobs(self, digests: Sequence[str]) -> AsyncIterator[tuple[str, bytes | SyncdError]]:
        """See :class:`syncd.store.base.Bucket`."""
        order = list(reversed(digests) if self._store.faults.reorder else digests)
        for digest in order:
            wire.blob_subject(self._name, digest)
        for start in range(0, len(order), BLOB_PAGE):
            stream = await self._stream("get_blobs")
            page = [(digest, _payload(stream, digest)) for digest in order[start : start + BLOB_PAGE]]
            for outcome in await asyncio.to_thread(lambda page=page: list(itertools.starmap(_decoded, page))):  # type: ignore[misc]
                yield outcome

    async def remove_blobs(self, digests: Sequence[str]) -> None:
        """See :class:`syncd.store.base.Bucket`."""
        for digest in digests:
            wire.blob_subject(self._name, digest)
        stream = await self._stream("remove_blobs")
        for digest in digests:
            stream.put_blob(digest, b"", replace=True)
            stream.removed[digest] = time.monotonic() + REMOVED_SECONDS

    async def commit_generation(
        self,
        number: int,
        record: bytes,
        metadata: Mapping[str, str],
        *,
        channel: str,
        expected_seq: int,
        link_metadata: Mapping[str, str] | None = None,
    ) -> int:
        """See :class:`syncd.store.base.Bucket`."""
        commit = encode_commit(
            self._name,
            number,
            record,
            metadata,
            channel=channel,
            nuids=(self._store.fresh_nuid(), self._store.fresh_nuid()),
            now_ns=time.time_ns(),
            link_metadata=link_metadata,
        )
        stream = await self._stream("commit_generation")
        if stream.sealed:
            raise BucketSealed("the bucket is sealed")
        if stream.seq_of(commit.link_subject) != expected_seq:
            raise WriteConflict(f"somebody else moved channel {channel!r} since")
        if stream.seq_of(commit.meta_subject):
            raise WriteConflict(f"generation {number} exists already")
        stream.check_room(len(commit.record) + len(commit.meta) + len(commit.link))
        stream.chunks[commit.nuid] = [stream.store(commit.record)]
        for subject, payload in ((commit.meta_subject, commit.meta), (commit.link_subject, commit.link)):
            seq = stream.put_meta(subject, payload, None, {}).seq
            self._store.notify(self._name, seq)
        return seq

    async def set_layout(self, layout: str) -> None:
        """See :class:`syncd.store.base.Bucket`."""
        (await self._stream("set_layout")).layout = layout

    async def _stream(self, call: str) -> _Stream:
        await self._store.faults.gate(call)
        return self._store.stream(self._name)

    def _read(self, subject: str, message: _Message) -> ObjectInfo | BadMeta:
        return wire.read_meta(
            self._name, subject, message.payload, message.headers, seq=message.seq, time_ns=message.time_ns
        )


class _MemorySink:
    """Blobs on their way; what fails is told by the next call, as with a pipeline."""

    def __init__(self, bucket: str, stream: Callable[[str], Awaitable[_Stream]]) -> None:
        self.stored = 0
        self.stored_bytes = 0
        self.duplicates = 0
        self._bucket = bucket
        self._stream = stream
        self._error: Exception | None = None

    async def put(self, digest: str, payload: bytes, *, replace: bool = False) -> None:
        wire.blob_subject(self._bucket, digest)
        self._check()
        try:
            stream = await self._stream("put_blob")
            fresh = stream.put_blob(digest, payload, replace=replace)
        except Exception as error:  # noqa: BLE001 - raised by the next call
            self._error = error
            return
        if fresh:
            self.stored += 1
            self.stored_bytes += len(payload)
        else:
            self.duplicates += 1

    async def flush(self) -> None:
        await asyncio.sleep(0)
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


def _payload(stream: _Stream, digest: str) -> bytes:
    messages = stream.chunks.get(digest)
    return messages[-1].payload if messages else b""


def _decoded(digest: str, payload: bytes) -> tuple[str, bytes | SyncdError]:
    try:
        return digest, decode(payload, digest)
    except (ObjectGone, ObjectCorrupt) as error:
        return digest, error


def _pages(counts: dict[str, int]) -> Iterator[dict[str, int]]:
    items = list(counts.items())
    for start in range(0, len(items), PAGE):
        yield dict(items[start : start + PAGE])


def _read_chunk(source: Source) -> bytes:
    """Read one full chunk, or what is left; blocking."""
    parts: list[bytes] = []
    wanted = CHUNK_SIZE
    while wanted:
        data = source.read(wanted)
        if not data:
            break
        parts.append(data)
        wanted -= len(data)
    return b"".join(parts)


if TYPE_CHECKING:

    def _keeps_the_contract(store: MemoryStore) -> Store:
        return store
