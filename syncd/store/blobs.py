"""The generations layout on a live server: blobs in and out, and the commit that announces them.

Rules kept here (docs/format.md):
 * a blob is one message on the chunk subject of its digest, and is never half there;
 * a blob is sent with the expectation that there is none: the server's refusal *is* the dedup hit, and makes sending
   twice harmless. Message ids would not help: the server looks at the expectation first (nats-server 2.15);
 * a generation appears together with the channel that points at it, in one atomic batch, or not at all. The batch may
   be sent again as it is: its expectations let it in only once, and its bytes tell whether it was this one;
 * memory is bounded by the transport's windows, and for decompressed blobs by :data:`DECODED_BYTES` per step.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from syncd.errors import (
    BucketNotFound,
    NotPermitted,
    ObjectCorrupt,
    ObjectGone,
    StoreRejected,
    StoreTimeout,
    SyncdError,
    Unavailable,
    WriteConflict,
)
from syncd.retry import backoff
from syncd.store import wire
from syncd.store.api import ATOMIC_DISABLED, ATOMIC_INCOMPLETE, ApiError, header_int
from syncd.store.codec import decode
from syncd.store.content import in_thread
from syncd.store.generation import CommitMessages, encode_commit
from syncd.store.stream import EXPECTED, ROLLUP, STALE_SECONDS, STALE_STEP, Stream, as_batch
from syncd.store.transport import CHUNK_SILENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from syncd.store.base import BlobSink
    from syncd.store.lanes import Outgoing

    Outcome = tuple[str, bytes | SyncdError]

ASKED_AT_ONCE: Final = 128
"""Digests per request: the server looks all of them up anew for every page."""
GROUPS_UNDER_WAY: Final = 3
DECODED_BYTES: Final = 4 * 1024 * 1024
MISSING_TRIES: Final = 3
REMOVED_AT_ONCE: Final = 1000
COMMIT_SECONDS: Final = 60.0
"""How long a commit of unknown outcome is tried anew; an attempt under way is not cut short."""


class Blobs:
    """The blobs and generations of one bucket."""

    def __init__(self, stream: Stream, fresh_nuid: Callable[[], str]) -> None:
        self._stream = stream
        self._fresh_nuid = fresh_nuid

    # -- blobs --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def sink(self) -> AsyncIterator[BlobSink]:
        """See :meth:`syncd.store.base.Bucket.blob_sink`."""
        sink = _Sink(self._stream)
        try:
            yield sink
        finally:
            sink.abandon()

    async def get(self, digests: Sequence[str]) -> AsyncIterator[Outcome]:
        """See :meth:`syncd.store.base.Bucket.get_blobs`."""
        wanted = {wire.blob_subject(self._stream.bucket, digest): digest for digest in digests}
        for attempt in range(MISSING_TRIES):
            if attempt:
                await asyncio.sleep(STALE_STEP)
            async with aclosing(self._fetch(list(wanted), wanted)) as found:
                async for outcomes in found:
                    for outcome in outcomes:
                        yield outcome
            if not wanted:
                return
        for digest in wanted.values():
            yield digest, ObjectGone(f"blob {digest[:12]} is gone")

    async def _fetch(self, subjects: Sequence[str], wanted: dict[str, str]) -> AsyncGenerator[list[Outcome]]:
        """Yield blobs as several requests bring them.

        :param wanted: subject -> digest; what is yielded is taken out.
        """
        groups = deque(subjects[at : at + ASKED_AT_ONCE] for at in range(0, len(subjects), ASKED_AT_ONCE))
        results: asyncio.Queue[list[Outcome] | Exception | None] = asyncio.Queue(maxsize=1)

        async def work() -> None:
            outcome: Exception | None = None
            try:
                while groups:
                    await self._fetch_group(groups.popleft(), wanted, results.put)
            except Exception as error:  # noqa: BLE001 - raised by the reader of the queue
                outcome = error
            await results.put(outcome)

        workers = [asyncio.create_task(work()) for _ in range(min(GROUPS_UNDER_WAY, len(groups)))]
        left = len(workers)
        try:
            while left:
                result = await results.get()
                if isinstance(result, list):
                    yield result
                elif result is None:
                    left -= 1
                else:
                    raise result
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _fetch_group(
        self, subjects: Sequence[str], wanted: dict[str, str], put: Callable[[list[Outcome]], Awaitable[None]]
    ) -> None:
        async with aclosing(self._stream.newest(subjects, CHUNK_SILENCE_SECONDS)) as pages:
            async for page in pages:
                payloads: deque[tuple[str, bytes]] = deque()
                for message in page:
                    # Empty is what a remover leaves for a moment: as good as missing, and perhaps an old replica's.
                    digest = wanted.pop((message.headers or {}).get("Nats-Subject", ""), "") if message.data else ""
                    if digest:
                        payloads.append((digest, message.data))
                while payloads:
                    await put(await in_thread(partial(_decode_some, payloads)))

    async def remove(self, digests: Sequence[str]) -> None:
        """See :meth:`syncd.store.base.Bucket.remove_blobs`."""
        subjects = [wire.blob_subject(self._stream.bucket, digest) for digest in digests]
        for start in range(0, len(subjects), REMOVED_AT_ONCE):
            await self._stream.free(subjects[start : start + REMOVED_AT_ONCE])

    # -- generations --------------------------------------------------------------------------------------------------

    async def commit(
        self,
        number: int,
        record: bytes,
        metadata: Mapping[str, str],
        *,
        channel: str,
        expected_seq: int,
        link_metadata: Mapping[str, str] | None,
    ) -> int:
        """See :meth:`syncd.store.base.Bucket.commit_generation`."""
        messages = encode_commit(
            self._stream.bucket,
            number,
            record,
            metadata,
            channel=channel,
            nuids=(self._fresh_nuid(), self._fresh_nuid()),
            now_ns=time.time_ns(),
            link_metadata=link_metadata,
        )
        await self._require_atomic()
        give_up = time.monotonic() + COMMIT_SECONDS
        waits = backoff(STALE_STEP, 2.0)
        doubtful = False
        while True:
            try:
                return await self._send_commit(messages, expected_seq)
            except (WriteConflict, StoreTimeout, Unavailable) as error:
                conflict = isinstance(error, WriteConflict)
                if conflict and not doubtful:
                    raise await self._tell_conflict(messages, number, channel, expected_seq) from error
                reason = await self._stream.explain(error)
                if isinstance(reason, BucketNotFound) or self._stream.api.conn.state == "closed":
                    raise reason from error
                seq = await self._read_commit(messages, patient=conflict)
                if seq:
                    return seq
                if conflict:
                    raise await self._tell_conflict(messages, number, channel, expected_seq) from error
                if time.monotonic() >= give_up:
                    raise reason from error
                doubtful = True
            await asyncio.sleep(next(waits))

    async def _require_atomic(self) -> None:
        """Refuse before anything is sent: a server that knows no batches would store the messages one by one."""
        stream = self._stream
        with suppress(NotPermitted):  # then the server's own word has to do
            atomic, _ = await stream.flags()
            if not atomic and not (await stream.state()).atomic:
                raise _no_batches(stream)

    async def _send_commit(self, messages: CommitMessages, expected_seq: int) -> int:
        """Send the batch once.

        :raises Unavailable: also where the server lost a part of the batch; it stored nothing then.
        """
        stream = self._stream
        batch = [
            (wire.chunk_subject(stream.bucket, messages.nuid), messages.record, {}),
            (messages.meta_subject, messages.meta, {**ROLLUP, EXPECTED: "0"}),
            (messages.link_subject, messages.link, {**ROLLUP, EXPECTED: str(expected_seq)}),
        ]
        *head, (subject, payload, headers) = as_batch(self._fresh_nuid(), batch)
        try:
            out = await stream.transport.publish(subject, payload, headers, lane=stream.lane, head=head, again=False)
            try:
                return await out.acked
            finally:
                stream.transport.forget(out)
        except ApiError as error:
            if error.code == ATOMIC_DISABLED:
                stream.atomic = False
                raise _no_batches(stream) from error
            if error.code == ATOMIC_INCOMPLETE:
                raise Unavailable(f"commit: {error.message}") from error
            raise

    async def _read_commit(self, messages: CommitMessages, *, patient: bool) -> int:
        """Return the link's sequence if the commit is stored, 0 if it is not, or that cannot be found out.

        :param patient: a replica may be behind.
        """
        give_up = time.monotonic() + (STALE_SECONDS if patient else 0)
        while True:
            stored = await self._stream.read_back(
                [(messages.meta_subject, messages.meta), (messages.link_subject, messages.link)]
            )
            if stored:
                # Somebody may have moved the channel since; a batch is stored without gap, the link last.
                return stored.get(messages.link_subject) or stored[messages.meta_subject] + 1
            if time.monotonic() >= give_up:
                return 0
            await asyncio.sleep(STALE_STEP)

    async def _tell_conflict(
        self, messages: CommitMessages, number: int, channel: str, expected_seq: int
    ) -> WriteConflict:
        """Find out which of the two expectations failed."""
        moved = f"somebody else moved channel {channel!r} since"
        try:
            link = await self._stream.last(messages.link_subject)
        except SyncdError:
            return WriteConflict(f"{moved}, or generation {number} exists already")
        if header_int((link.headers if link is not None else None) or {}, "Nats-Sequence") == expected_seq:
            return WriteConflict(f"generation {number} exists already")
        return WriteConflict(moved)


def _no_batches(stream: Stream) -> StoreRejected:
    return StoreRejected(
        f"bucket {stream.bucket!r} takes no atomic batches, which the generations layout commits with",
        hint=f"set allow_atomic of stream {stream.lane}; its publisher does that where it may change the stream",
    )


class _Sink:
    """Blobs on their way; see :class:`syncd.store.base.BlobSink`."""

    def __init__(self, stream: Stream) -> None:
        self.stored = 0
        self.stored_bytes = 0
        self.duplicates = 0
        self._stream = stream
        self._flying: dict[int, Outgoing] = {}
        self._error: SyncdError | None = None
        self._moved = asyncio.Event()

    async def put(self, digest: str, payload: bytes, *, replace: bool = False) -> None:
        subject = wire.blob_subject(self._stream.bucket, digest)
        self._check()
        headers = ROLLUP if replace else {EXPECTED: "0"}
        out = await self._stream.transport.publish(subject, payload, headers, lane=self._stream.lane)
        self._flying[out.order] = out
        out.acked.add_done_callback(partial(self._land, out, replace))

    async def flush(self) -> None:
        while self._flying and self._error is None:
            self._moved.clear()
            await self._moved.wait()
        self._check()

    def abandon(self) -> None:
        """Forget what is under way; it may still be stored."""
        for out in self._flying.values():
            self._stream.transport.forget(out)
        self._flying.clear()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _land(self, out: Outgoing, replace: bool, acked: asyncio.Future[int]) -> None:  # noqa: FBT001 - a callback
        if self._flying.pop(out.order, None) is None or acked.cancelled():
            return
        error = acked.exception()
        if error is None or (isinstance(error, WriteConflict) and not replace and out.sends > 1):
            self.stored += 1  # a conflict of what was sent twice is with itself, but for a rare duplicate
            self.stored_bytes += len(out.payload)
        elif isinstance(error, WriteConflict) and not replace:
            self.duplicates += 1
        elif self._error is None:
            assert isinstance(error, SyncdError)  # the transport knows no other
            self._error = error
        if not self._flying or self._error is not None:
            self._moved.set()


def _decode_some(payloads: deque[tuple[str, bytes]]) -> list[Outcome]:
    """Take payloads and decode them until that is enough for once. Blocking."""
    done: list[Outcome] = []
    size = 0
    while payloads and size < DECODED_BYTES:
        digest, payload = payloads.popleft()
        try:
            data = decode(payload, digest)
        except (ObjectGone, ObjectCorrupt) as error:
            done.append((digest, error))
        else:
            done.append((digest, data))
            size += len(data)
    return done
