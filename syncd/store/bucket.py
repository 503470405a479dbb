"""Buckets on a live nats-server: the store's contract (:mod:`syncd.store.base`) in terms of JetStream.

Rules kept here:
 * nats-py's ObjectStore is not used: it hangs, leaks and is quadratic (docs/performance.md);
 * chunks are acknowledged before the metadata that announces them is sent, or are in the same atomic batch;
 * a metadata message has a nuid or expected sequence by which a lost acknowledgement is resolved by reading back;
 * every object is bounded by what its metadata says.

The generations layout's part is :mod:`syncd.store.blobs`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import nats.nuid
import structlog

from syncd.errors import (
    BucketNotFound,
    BucketSealed,
    NotPermitted,
    ObjectCorrupt,
    ObjectGone,
    StoreFull,
    StoreRejected,
    StoreTimeout,
    SyncdError,
    Unavailable,
    WriteConflict,
)
from syncd.store import wire
from syncd.store.api import (
    ATOMIC_DISABLED,
    NAME_IN_USE,
    Api,
    ApiError,
    Busy,
    header_int,
    layout_metadata,
    missing_flags,
    new_stream,
    number,
)
from syncd.store.base import (
    CHUNK_SIZE,
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
from syncd.store.blobs import Blobs
from syncd.store.content import Hashes, Meter, check_readable, check_small, describe, in_thread
from syncd.store.hints import open_hints
from syncd.store.reasons import NoResponders
from syncd.store.stream import EXPECTED, MANY_SUBJECTS, PAGE_BYTES, ROLLUP, STALE_SECONDS, STALE_STEP, Stream, as_batch
from syncd.store.transport import CHUNK_SILENCE_SECONDS, META_SILENCE_SECONDS, End, Transport
from syncd.store.upload import Upload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from nats.aio.msg import Msg

    from syncd.store.connection import Connection
    from syncd.store.lanes import Outgoing

log = structlog.get_logger()

META_PAGE_BYTES: Final = 1024 * 1024
META_PAGE_MESSAGES: Final = 1000
BATCH_MESSAGES: Final = 1000
CLEANUP_SECONDS: Final = 2.0

_OPEN_BATCHES: Final = 4
_GROUPS_UNDER_WAY: Final = 2
_MISSING_TRIES: Final = 3
_MAY_BE_STORED: Final = (WriteConflict, StoreTimeout, Unavailable)


class NatsStore:
    """The buckets that one connection reaches. Bound to the event loop it is made in."""

    def __init__(self, conn: Connection) -> None:
        self._transport = Transport(conn)
        self._api = Api(conn)
        self._nuids = nats.nuid.NUID()
        self._buckets: dict[str, NatsBucket] = {}

    def bucket(self, name: str) -> NatsBucket:
        """Return a handle; no request is made.

        :raises ConfigError: no bucket can have this name.
        """
        if name not in self._buckets:
            self._buckets[name] = NatsBucket(wire.check_bucket(name), self._transport, self._api, self._fresh_nuid)
        return self._buckets[name]

    def _fresh_nuid(self) -> str:
        return NUID_PREFIX + self._nuids.next().decode()

    async def create_bucket(self, name: str, spec: BucketSpec) -> BucketState:
        """Create the bucket, or adopt an existing one (flags it lacks are added where we may; never removed).

        :raises NotPermitted: it does not exist and we may not create it.
        :raises StoreRejected: the server refuses such a bucket, or a stream of that name is something else.
        """
        bucket = self.bucket(name)
        try:
            info = await self._api.stream_info(name)
        except BucketNotFound:
            subject = f"STREAM.CREATE.{wire.stream_of(name)}"
            try:
                await self._api.call(subject, new_stream(name, spec))
            except ApiError as error:
                if error.code != NAME_IN_USE:
                    raise
            return await bucket.state()
        await self._adopt(name, info)
        return await bucket.state()

    async def _adopt(self, name: str, info: Mapping[str, Any]) -> None:
        config = dict(info["config"])
        changes = missing_flags(name, config)
        if not changes:
            return
        try:
            await self._api.call(f"STREAM.UPDATE.{wire.stream_of(name)}", config | changes)
        except (NotPermitted, StoreRejected, NoResponders) as error:
            log.info("bucket_adopted_as_is", bucket=name, lacking=sorted(changes), reason=error.message)
        else:
            log.info("bucket_flags_added", bucket=name, flags=sorted(changes))

    async def list_buckets(self) -> list[str]:
        """Return the names of all Object Store buckets, sorted."""
        names: set[str] = set()
        while True:
            answer = await self._api.call("STREAM.NAMES", {"subject": "$O.*.C.>", "offset": len(names)})
            streams = answer.get("streams") or []
            fresh = {stream.removeprefix("OBJ_") for stream in streams if str(stream).startswith("OBJ_")}
            if not fresh - names or len(names | fresh) >= number(answer, "total"):
                return sorted(name for name in names | fresh if wire.is_bucket(name))
            names |= fresh


@dataclass(slots=True)
class _Put:
    """One item of put_many, ready to send."""

    index: int
    stored: Stored
    data: bytes
    subject: str
    payload: bytes
    expected: int | None

    @property
    def size(self) -> int:
        return len(self.data) + len(self.payload) + 512

    @property
    def meta_headers(self) -> dict[str, str]:
        return _meta_headers(self.expected)


def _meta_headers(expected: int | None) -> dict[str, str]:
    return dict(ROLLUP) if expected is None else {**ROLLUP, EXPECTED: str(expected)}


class NatsBucket:
    """One bucket on a live server."""

    def __init__(self, name: str, transport: Transport, api: Api, fresh_nuid: Callable[[], str]) -> None:
        self._name = name
        self._transport = transport
        self._api = api
        self._fresh_nuid = fresh_nuid
        self._stream = Stream(name, transport, api)
        self._lane = self._stream.lane
        self._blobs = Blobs(self._stream, fresh_nuid)

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self._name

    # -- the bucket -----------------------------------------------------------------------------------------------

    async def state(self) -> BucketState:
        """See :class:`syncd.store.base.Bucket`."""
        return await self._stream.state()

    async def seal(self) -> None:
        """See :class:`syncd.store.base.Bucket`."""
        await self._stream.change(sealed=True)

    def hints(self) -> AbstractAsyncContextManager[Hints]:
        """See :class:`syncd.store.base.Bucket`."""
        return open_hints(self._transport.conn, self._name, self.state)

    # -- metadata -------------------------------------------------------------------------------------------------

    async def changes(self, after: int, *, at_least: int = 0) -> AsyncIterator[Page]:
        """See :class:`syncd.store.base.Bucket`."""
        loop = asyncio.get_running_loop()
        give_up = 0.0
        while True:
            messages, end = await self._stream.collect(
                {
                    "batch": META_PAGE_MESSAGES,
                    "seq": after + 1,
                    "next_by_subj": wire.meta_filter(self._name),
                    "max_bytes": min(META_PAGE_BYTES, self._transport.page_bytes()),
                },
                META_SILENCE_SECONDS,
            )
            if messages:
                after = max(after + 1, end.last_seq)
                yield Page(newest_of(self._read_meta(message) for message in messages), after)
            if messages and end.pending:
                continue
            if after >= at_least:
                return
            give_up = give_up or loop.time() + STALE_SECONDS
            if loop.time() >= give_up:
                return
            await asyncio.sleep(STALE_STEP)

    async def get_info(self, name: str) -> ObjectInfo | None:
        """See :class:`syncd.store.base.Bucket`."""
        message = await self._stream.last(wire.meta_subject(self._name, name))
        if message is None:
            return None
        info = self._read_meta(message)
        if isinstance(info, BadMeta):
            raise ObjectCorrupt(f"its metadata is not readable: {info.reason}")
        return info

    def _read_meta(self, message: Msg) -> ObjectInfo | BadMeta:
        headers = message.headers or {}
        return wire.read_meta(
            self._name,
            headers.get("Nats-Subject", ""),
            message.data,
            headers,
            seq=header_int(headers, "Nats-Sequence"),
            time_ns=wire.parse_time(headers.get("Nats-Time-Stamp", "")),
        )

    async def put_meta(self, meta: ObjectMeta, stored: Stored, *, expected_seq: int | None) -> int:
        """See :class:`syncd.store.base.Bucket`."""
        nuid = stored.nuid or self._fresh_nuid()
        payload = wire.encode_put(self._name, meta, stored, nuid=nuid, now_ns=time.time_ns())
        return await self._write_meta(meta.name, payload, expected_seq)

    async def delete(self, name: str, *, expected_seq: int | None, metadata: Mapping[str, str]) -> int:
        """See :class:`syncd.store.base.Bucket`."""
        payload = wire.encode_tombstone(self._name, name, nuid=self._fresh_nuid(), metadata=metadata)
        return await self._write_meta(name, payload, expected_seq)

    async def claim(self, publisher: str, *, take_over: bool = False) -> str:
        """See :class:`syncd.store.base.Bucket`."""
        subject = wire.chunk_subject(self._name, wire.CLAIM)
        holder, seq = await self._claimed(subject)
        if holder == publisher or (holder and not take_over):
            return holder
        headers = {"Nats-Rollup": "sub"} | _meta_headers(seq)
        try:
            await self._transport.send_and_wait(subject, publisher.encode(), headers, lane=self._lane)
        except (WriteConflict, StoreTimeout, Unavailable) as error:
            # Somebody was faster, or our own message is stored and its acknowledgement lost.
            holder, _ = await self._claimed(subject)
            if not holder:
                raise await self._stream.explain(error) from error
            return holder
        return publisher

    async def _claimed(self, subject: str) -> tuple[str, int]:
        message = await self._stream.last(subject)
        if message is None:
            return "", 0
        return message.data.decode("utf-8", "replace"), header_int(message.headers or {}, "Nats-Sequence")

    async def put_link(
        self, name: str, link: Link, *, expected_seq: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> int:
        """See :class:`syncd.store.base.Bucket`."""
        nuid = self._fresh_nuid()  # no two links are equal: what is read back tells whether it was this one
        payload = wire.encode_link(self._name, name, link, nuid=nuid, now_ns=time.time_ns(), metadata=metadata)
        return await self._write_meta(name, payload, expected_seq)

    async def _write_meta(self, name: str, payload: bytes, expected: int | None) -> int:
        subject = wire.meta_subject(self._name, name)
        headers = {**_meta_headers(expected), "Nats-Msg-Id": self._fresh_nuid()}
        try:
            return await self._transport.send_and_wait(subject, payload, headers, lane=self._lane)
        except (WriteConflict, StoreTimeout, Unavailable) as error:
            # Our own message may be what it conflicts with: sent twice, acknowledged never.
            stored = await self._stream.read_back([(subject, payload)])
            if stored:
                return stored[subject]
            raise await self._stream.explain(error) from error

    # -- writing content --------------------------------------------------------------------------------------------

    async def upload(self, source: Source, *, progress: Callable[[int], None] | None = None) -> Stored:
        """See :class:`syncd.store.base.Bucket`.

        :raises StoreTimeout: also where a change of the stream's leader stored chunks out of order.
        """
        nuid = self._fresh_nuid()
        subject = wire.chunk_subject(self._name, nuid)
        upload = Upload(self._transport, nuid, subject=subject, lane=self._lane, source=source, progress=progress)
        try:
            stored = await upload.run()
            if upload.doubled:
                await self._check_count(subject, stored.chunks)
        except BaseException as error:
            await upload.abandon()
            if upload.chunks:
                await self._clean_up([nuid])
            if isinstance(error, NoResponders):
                raise await self._stream.explain(error) from error
            raise
        return stored

    async def _check_count(self, subject: str, chunks: int) -> None:
        """Make sure that no chunk sent twice is stored twice: the stream's duplicate window may be short.

        :raises StoreTimeout: one is; the upload must be begun anew.
        """
        request = {"batch": 1, "seq": 1, "next_by_subj": subject}
        messages, _ = await self._stream.collect(request, CHUNK_SILENCE_SECONDS)
        if messages and header_int(messages[0].headers or {}, "Nats-Num-Pending") + 1 > chunks:
            raise StoreTimeout("a chunk was stored twice while the connection was renewed")

    async def put_many(self, items: Sequence[SmallPut]) -> list[PutResult]:
        """See :class:`syncd.store.base.Bucket`."""
        nuids = [self._fresh_nuid() for _ in items]
        contents = await in_thread(lambda: list(map(_describe, nuids, items)))
        results: list[PutResult | None] = [None] * len(items)
        puts: list[_Put] = []
        for index, (item, nuid, stored) in enumerate(zip(items, nuids, contents, strict=True)):
            try:
                puts.append(self._prepare(index, item, stored, nuid))
            except SyncdError as error:
                results[index] = PutResult(0, None, error)
        for put, outcome in await self._put_all(puts):
            if isinstance(outcome, SyncdError):
                results[put.index] = PutResult(0, None, outcome)
            else:
                results[put.index] = PutResult(outcome, put.stored)
        assert all(result is not None for result in results)
        return [result for result in results if result is not None]

    def _prepare(self, index: int, item: SmallPut, stored: Stored | None, nuid: str) -> _Put:
        if stored is None or len(item.data or b"") > CHUNK_SIZE:
            raise StoreRejected("a small object has at most one chunk of content")
        stored = stored if stored.nuid else replace(stored, nuid=nuid)
        payload = wire.encode_put(self._name, item.meta, stored, nuid=stored.nuid, now_ns=time.time_ns())
        subject = wire.meta_subject(self._name, item.meta.name)
        return _Put(index, stored, item.data or b"", subject, payload, item.expected_seq)

    async def _put_all(self, puts: list[_Put]) -> list[tuple[_Put, int | SyncdError]]:
        try:
            atomic, _ = await self._stream.flags()
        except SyncdError as error:
            if not isinstance(error, NotPermitted):
                return [(put, error) for put in puts]
            atomic = False
        if not atomic:
            return await self._put_singly(puts)
        done: list[tuple[_Put, int | SyncdError]] = []
        again: list[_Put] = []
        for group, outcome in await self._put_batches(puts):
            if isinstance(outcome, int):
                done.extend(zip(group, self._batch_seqs(group, outcome), strict=True))
            elif isinstance(outcome, BucketSealed | NotPermitted | BucketNotFound):
                done.extend((put, outcome) for put in group)
            elif isinstance(outcome, StoreTimeout | Unavailable) and not isinstance(outcome, Busy):
                stored = await self._stream.read_back((put.subject, put.payload) for put in group)
                if stored is None:
                    done.extend((put, outcome) for put in group)
                    continue
                done.extend((put, stored[put.subject]) for put in group if put.subject in stored)
                again.extend(put for put in group if put.subject not in stored)
            else:
                if isinstance(outcome, ApiError) and outcome.code == ATOMIC_DISABLED:
                    self._stream.atomic = False
                again.extend(group)
        if again:
            done.extend(await self._put_singly(again))
        return done

    async def _put_batches(self, puts: list[_Put]) -> list[tuple[list[_Put], int | SyncdError]]:
        """Send atomic batches, several under way; returns the sequence of each batch's last message, or its error."""
        flying: deque[tuple[list[_Put], Outgoing]] = deque()
        done: list[tuple[list[_Put], int | SyncdError]] = []

        async def land() -> None:
            group, out = flying[0]
            try:
                done.append((group, await out.acked))
            except SyncdError as error:
                done.append((group, error))
            flying.popleft()

        left = deque(puts)
        try:
            while left:
                group = _take_group(left, min(PAGE_BYTES, self._transport.writing.limit))
                *head, (subject, payload, headers) = self._batch_messages(group)
                try:
                    out = await self._transport.publish(
                        subject, payload, headers, lane=self._lane, head=head, again=False
                    )
                except SyncdError as error:
                    done.extend([(group, error), (list(left), error)])
                    break
                flying.append((group, out))
                if len(flying) >= _OPEN_BATCHES:
                    await land()
            while flying:
                await land()
        finally:
            for _, out in flying:
                self._transport.forget(out)
        return done

    def _batch_messages(self, group: Sequence[_Put]) -> list[tuple[str, bytes, dict[str, str]]]:
        """Lay out an atomic batch (ADR-50)."""
        messages: list[tuple[str, bytes, dict[str, str]]] = []
        for put in group:
            if put.data:
                messages.append((wire.chunk_subject(self._name, put.stored.nuid), put.data, {}))
            messages.append((put.subject, put.payload, put.meta_headers))
        return as_batch(self._fresh_nuid(), messages)

    @staticmethod
    def _batch_seqs(group: Sequence[_Put], last: int) -> list[int]:
        """Return the metadata sequences of a committed batch: its messages are stored without gap."""
        seqs = []
        for put in reversed(group):
            seqs.append(last)
            last -= 2 if put.data else 1
        return seqs[::-1]

    async def _put_singly(self, puts: Sequence[_Put]) -> list[tuple[_Put, int | SyncdError]]:
        """Chunks first, then the metadata of those whose chunk is acknowledged."""
        with_data = [put for put in puts if put.data]
        acks = await self._stream.publish_all(
            [
                (
                    wire.chunk_subject(self._name, put.stored.nuid),
                    put.data,
                    {"Nats-Msg-Id": f"{put.stored.nuid}.0"},
                )
                for put in with_data
            ]
        )
        failed = {put.index: ack for put, ack in zip(with_data, acks, strict=True) if isinstance(ack, SyncdError)}
        ready = [put for put in puts if put.index not in failed]
        answers = await self._stream.publish_all(
            [(put.subject, put.payload, {**put.meta_headers, "Nats-Msg-Id": self._fresh_nuid()}) for put in ready]
        )
        outcomes: list[tuple[_Put, int | SyncdError]] = [
            (put, failed[put.index]) for put in puts if put.index in failed
        ]
        doubtful = [put for put, ack in zip(ready, answers, strict=True) if isinstance(ack, _MAY_BE_STORED)]
        stored = (await self._stream.read_back((put.subject, put.payload) for put in doubtful)) or {}
        orphans: list[str] = []
        for put, ack in zip(ready, answers, strict=True):
            if isinstance(ack, SyncdError) and put.subject in stored:
                outcomes.append((put, stored[put.subject]))
                continue
            outcomes.append((put, ack))
            if isinstance(ack, WriteConflict | StoreFull | StoreRejected) and put.data:
                orphans.append(put.stored.nuid)
        await self._clean_up(orphans)
        return outcomes

    async def remove_chunks(self, nuid: str) -> None:
        """See :class:`syncd.store.base.Bucket`."""
        if not wire.is_nuid(nuid):
            raise StoreRejected("a nuid that is no subject token")
        await self._stream.free([wire.chunk_subject(self._name, nuid)])

    async def _clean_up(self, nuids: Sequence[str]) -> None:
        """Remove chunks that nothing announces, as far as that goes quickly; the publisher's audit finds the rest."""
        if not nuids:
            return

        async def remove() -> None:
            for nuid in nuids:
                await self.remove_chunks(nuid)

        task = asyncio.create_task(remove())
        try:
            await asyncio.wait({task}, timeout=CLEANUP_SECONDS)
        finally:
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if outcome is not None:
            log.debug("chunks_left_behind", bucket=self._name, objects=len(nuids), reason=str(outcome))

    async def list_chunks(self) -> AsyncIterator[dict[str, int]]:
        """See :class:`syncd.store.base.Bucket`."""
        prefix = wire.chunk_prefix(self._name)
        claim = wire.chunk_subject(self._name, wire.CLAIM)
        offset = 0
        while True:
            request = {"subjects_filter": wire.chunk_filter(self._name), "offset": offset}
            info = await self._api.stream_info(self._name, request)
            listed = info["state"].get("subjects")
            subjects: dict[str, Any] = listed if isinstance(listed, dict) else {}
            page = {
                subject.removeprefix(prefix): count
                for subject, count in subjects.items()
                if subject.startswith(prefix) and subject != claim and type(count) is int
            }
            if page:
                yield page
            offset += len(subjects)
            if not subjects or offset >= number(info, "total"):
                return

    # -- reading content --------------------------------------------------------------------------------------------

    async def download(
        self, info: ObjectInfo, sink: Sink, *, progress: Callable[[int], None] | None = None
    ) -> tuple[str, str]:
        """See :class:`syncd.store.base.Bucket`."""
        check_readable(info)
        hashes = Hashes()
        meter = Meter(info)
        page: asyncio.Task[tuple[list[Msg], End]] | None = None
        if info.chunks:
            page = asyncio.create_task(self._chunk_page(info, meter))
        try:
            while page is not None:
                messages, end = await page
                data = [message.data for message in messages]
                meter.count(data, end.last_seq)
                page = None
                if not meter.complete:
                    page = asyncio.create_task(self._chunk_page(info, meter))
                await in_thread(lambda data=data: hashes.pass_on(data, sink))  # type: ignore[misc]
                if progress is not None:
                    progress(sum(map(len, data)))
        finally:
            if page is not None:
                page.cancel()
                await asyncio.gather(page, return_exceptions=True)
        if hashes.sha256.hexdigest() != info.sha256:
            raise ObjectCorrupt("its content does not match its SHA-256 digest")
        return hashes.blake3.hexdigest(), hashes.sha256.hexdigest()

    async def _chunk_page(self, info: ObjectInfo, meter: Meter) -> tuple[list[Msg], End]:
        """Fetch the next chunks; a replica that has none yet is asked again for a short time."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + STALE_SECONDS
        while True:
            request = {
                "batch": info.chunks - meter.chunks + 1,
                "seq": meter.seq + 1,
                "next_by_subj": wire.chunk_subject(self._name, info.nuid),
                "max_bytes": self._transport.page_bytes(),
                "no_hdr": True,
            }
            messages, end = await self._stream.collect(request, CHUNK_SILENCE_SECONDS)
            if messages:
                return messages, end
            if loop.time() >= give_up:
                raise ObjectGone(f"{info.chunks - meter.chunks} of {info.chunks} chunks are gone")
            await asyncio.sleep(STALE_STEP)

    async def download_many(self, infos: Sequence[ObjectInfo]) -> AsyncIterator[tuple[ObjectInfo, bytes | Exception]]:
        """See :class:`syncd.store.base.Bucket`.

        :raises SyncdError: the store itself fails; the items not yielded by then are undecided.
        """
        left = deque(infos)
        flying: deque[asyncio.Task[list[tuple[ObjectInfo, bytes | Exception]]]] = deque()
        try:
            while left or flying:
                while left and len(flying) < _GROUPS_UNDER_WAY:
                    group = _take_infos(left, min(PAGE_BYTES, self._transport.page_bytes()))
                    flying.append(asyncio.create_task(self._fetch_group(group)))
                for item in await flying[0]:
                    yield item
                flying.popleft()
        finally:
            for task in flying:
                task.cancel()
            await asyncio.gather(*flying, return_exceptions=True)

    async def _fetch_group(self, infos: Sequence[ObjectInfo]) -> list[tuple[ObjectInfo, bytes | Exception]]:
        done: list[tuple[ObjectInfo, bytes | Exception]] = []
        found: list[tuple[ObjectInfo, bytes]] = []
        wanted: dict[str, list[ObjectInfo]] = {}
        for info in infos:
            refusal = _refusal_of_small(info)
            if refusal is not None:
                done.append((info, refusal))
            elif info.chunks:
                wanted.setdefault(wire.chunk_subject(self._name, info.nuid), []).append(info)
            else:
                found.append((info, b""))
        for attempt in range(_MISSING_TRIES):
            if not wanted:
                break
            if attempt:
                await asyncio.sleep(STALE_STEP)
            async for page in self._stream.newest(list(wanted), CHUNK_SILENCE_SECONDS):
                for message in page:
                    for info in wanted.pop((message.headers or {}).get("Nats-Subject", ""), []):
                        if len(message.data) == info.size:
                            found.append((info, message.data))
                        else:  # not kept: it may be as large as a message can be
                            done.append((info, _wrong_size(len(message.data))))
        done.extend((info, ObjectGone("its chunk is gone")) for group in wanted.values() for info in group)
        done.extend(await in_thread(lambda: [_verified(info, data) for info, data in found]))
        return done

    # -- the generations layout ---------------------------------------------------------------------------------------

    def blob_sink(self) -> AbstractAsyncContextManager[BlobSink]:
        """See :class:`syncd.store.base.Bucket`."""
        return self._blobs.sink()

    def get_blobs(self, digests: Sequence[str]) -> AsyncIterator[tuple[str, bytes | SyncdError]]:
        """See :class:`syncd.store.base.Bucket`."""
        return self._blobs.get(digests)

    async def remove_blobs(self, digests: Sequence[str]) -> None:
        """See :class:`syncd.store.base.Bucket`."""
        await self._blobs.remove(digests)

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
        """See :class:`syncd.store.base.Bucket`.

        :raises StoreRejected: the stream takes no atomic batches.
        """
        return await self._blobs.commit(
            number, record, metadata, channel=channel, expected_seq=expected_seq, link_metadata=link_metadata
        )

    async def set_layout(self, layout: str) -> None:
        """See :class:`syncd.store.base.Bucket`."""
        state = await self._stream.state()
        wanted = {**state.metadata, **layout_metadata(layout)}
        if state.metadata != wanted:
            await self._stream.change(metadata=wanted)


def newest_of(metas: Iterable[ObjectInfo | BadMeta]) -> tuple[ObjectInfo | BadMeta, ...]:
    """Keep the last metadata message of each name (JavaScript writes links without rollup), in sequence order."""
    kept: dict[tuple[bool, str], ObjectInfo | BadMeta] = {}
    for meta in metas:
        key = (True, meta.subject) if isinstance(meta, BadMeta) else (False, meta.name)
        kept.pop(key, None)
        kept[key] = meta
    return tuple(kept.values())


def _describe(nuid: str, item: SmallPut) -> Stored | None:
    return item.stored if item.data is None else describe(nuid, item.data)


def _refusal_of_small(info: ObjectInfo) -> ObjectCorrupt | None:
    try:
        check_readable(info)
    except ObjectCorrupt as error:
        return error
    return ObjectCorrupt("it has more than one chunk") if info.chunks > 1 else None


def _wrong_size(size: int) -> SyncdError:
    if not size:  # a remover's rollup, about to expire
        return ObjectGone("its chunk was removed")
    return ObjectCorrupt("its chunk has not the size that its metadata says")


def _verified(info: ObjectInfo, data: bytes) -> tuple[ObjectInfo, bytes | Exception]:
    try:
        check_small(info, data)
    except ObjectCorrupt as error:
        return info, error
    return info, data


def _take_group(left: deque[_Put], limit: int) -> list[_Put]:
    group = [left.popleft()]
    size, messages, subjects = group[0].size, 2, {group[0].subject}
    while left and size + left[0].size <= limit and messages + 2 <= BATCH_MESSAGES:
        if left[0].subject in subjects:
            break  # the server refuses to roll one subject up twice in a batch
        group.append(left.popleft())
        subjects.add(group[-1].subject)
        size += group[-1].size
        messages += 2
    return group


def _take_infos(left: deque[ObjectInfo], limit: int) -> list[ObjectInfo]:
    group = [left.popleft()]
    size = group[0].size
    while left and size + left[0].size <= limit and len(group) < MANY_SUBJECTS:
        group.append(left.popleft())
        size += group[-1].size + 512
    return group


if TYPE_CHECKING:

    def _keeps_the_contract(store: NatsStore) -> Store:
        return store
