"""The objects layout's way into the bucket: puts, metadata and tombstones, each file for itself.

Rules kept here (docs/architecture.md):
 * A file is read between two equal stats or not at all in this round.
 * Metadata is written only after the server acknowledged every chunk it announces.
 * The index remembers only what the server acknowledged. A crash anywhere leaves chunks that nothing announces
   (the audit finds them) or an announcement not yet remembered (the next catch-up reads it back).
 * Nothing is deleted that syncd did not write.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import BucketSealed, FileChanged, SafetyHalt, StoreFull, StoreTimeout, SyncdError, WriteConflict
from syncd.holdings import Holdings
from syncd.index import LocalRow, RemoteRow
from syncd.index.blobs import Blobs
from syncd.model import Entry, Kind, Problem
from syncd.outlet import DeletionGuard, PublishOptions, PushResult, Wish
from syncd.paths import printable
from syncd.plan import PublishAction, publish_action
from syncd.progress import Meter, Progress
from syncd.relayout import drop_generations
from syncd.retry import is_transient
from syncd.scan import Unreadable
from syncd.source import ScanStopped, Source
from syncd.store.base import CHUNK_SIZE, EMPTY, ObjectMeta, PutResult, SmallPut, Stored
from syncd.store.mapping import ALLOWED, PUBLISHER, object_meta, stored_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from syncd.index import Index
    from syncd.service import FolderThread
    from syncd.store.base import Bucket, Store

log = structlog.get_logger()

BATCH_ITEMS = 400
BATCH_BYTES = 4 * 1024 * 1024
PARALLEL_UPLOADS = 4
UNHASHED_BYTES = 32 * 1024 * 1024
"""Larger files whose size the bucket does not have are not hashed before they are sent."""
PARALLEL_DELETES = 64
DELETE_PAGE = 1000
CHUNK_OVERHEAD = 256
META_OVERHEAD = 2048


@dataclass(frozen=True, slots=True)
class _Item:
    """One path on its way to the bucket: ``data`` to send, ``stored`` to announce, or neither: to be uploaded."""

    row: LocalRow
    remote: RemoteRow | None
    data: bytes | None = None
    stored: Stored | None = None


@dataclass(slots=True)
class _Batch:
    """The next changed paths.

    :ivar twins: content that an earlier path of this batch, or of the one before it, brings to the bucket.
    :ivar digests: of all content in it; "size N" for content that is sent without having been hashed.
    :ivar last: where the batch after it begins, "" when there is nothing left.
    """

    small: list[_Item] = field(default_factory=list)
    large: list[_Item] = field(default_factory=list)
    twins: list[_Item] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    last: str = ""


class Announcer:
    """Puts the changed files of a source into a bucket; an :class:`syncd.outlet.Outlet`."""

    def __init__(
        self,
        options: PublishOptions,
        store: Store,
        bucket: Bucket,
        index: Index,
        source: Source,
        *,
        thread: FolderThread,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._bucket = bucket
        self._index = index
        self._source = source
        self._thread = thread
        self._clock = clock
        self._guard = DeletionGuard(options.max_delete_percent, clock)
        self._holdings = Holdings(options, store, bucket, index, thread, clock)
        self._log = log.bind(folder=options.folder, role="publish")

    @property
    def last_seq(self) -> int:
        """See :class:`syncd.outlet.Outlet`."""
        return self._holdings.last_seq

    def wrote(self, *seqs: int) -> None:
        """See :class:`syncd.outlet.Outlet`."""
        self._holdings.wrote(*seqs)

    def doubt(self) -> None:
        """See :class:`syncd.outlet.Outlet`."""
        self._holdings.doubt()

    async def catch_up(self, wish: Wish) -> None:
        """See :class:`syncd.outlet.Outlet`."""
        await self._holdings.catch_up(wish)

    async def publish(
        self,
        touched: Collection[str] | None,
        result: PushResult,
        wish: Wish,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """See :class:`syncd.outlet.Outlet`; adds that other paths go on where there is no room for some content."""
        await self._put_changed(touched, result, progress)
        await self._delete_gone(touched, result, allow_delete=wish.allow_delete)
        if wish.change_layout and result.full is None and not result.again:
            await self._drop_generations()
            self._log.info("layout_converted", layout="objects", objects=0)

    async def _drop_generations(self) -> None:
        state = await self._bucket.state()
        now = state.now_ns / 1e9 if state.now_ns else self._clock()  # as collections count ages
        blobs = Blobs(self._index)

        async def freeing(digests: Collection[str]) -> None:
            await self._thread.run(lambda: blobs.free(digests, now))

        await drop_generations(self._bucket, freeing)

    async def tidy(self) -> None:
        """See :class:`syncd.outlet.Outlet`."""
        await self._holdings.free_garbage()

    # -- puts ------------------------------------------------------------------------------------------------------

    async def _put_changed(
        self, touched: Collection[str] | None, result: PushResult, progress: Callable[[Progress], None] | None
    ) -> None:
        files, size = (0, 0) if progress is None else await self._thread.run(lambda: self._count_puts(touched))
        meter = Meter(progress, files, size)
        batch = await self._read_batch(touched, _Batch(), result)
        while batch.last:  # the next batch is read while this one is on its way
            sent, following = await asyncio.gather(
                self._send(batch, result, meter), self._read_batch(touched, batch, result), return_exceptions=True
            )
            for outcome in (sent, following):
                if isinstance(outcome, BaseException):
                    raise outcome
            assert isinstance(following, _Batch)
            batch = following
        await self._send(batch, result, meter)

    async def _read_batch(self, touched: Collection[str] | None, before: _Batch, result: PushResult) -> _Batch:
        return await self._thread.run(lambda: self._next_batch(touched, before, result))

    async def _send(self, batch: _Batch, result: PushResult, meter: Meter) -> None:
        if batch.small:
            await self._put_small(await self._fitting(batch.small, result), result, meter)
        if batch.large:
            await self._put_large(await self._fitting(batch.large, result), result, meter)
        if batch.twins:
            twins = await self._thread.run(lambda: self._resolve_twins(batch.twins, result))
            await self._put_small(await self._fitting(twins, result), result, meter)

    async def _fitting(self, items: list[_Item], result: PushResult) -> list[_Item]:
        """Leave out what a limited bucket has no room for; what is smaller goes on."""
        room = await self._holdings.room()
        if room is None:
            return items
        fitting = []
        for item in items:
            size = _size_in_bucket(item)
            if size <= room:
                room -= size
                fitting.append(item)
            else:
                result.full = StoreFull(
                    f"bucket {self._options.folder!r} has no room for {printable(item.row.path)}",
                    hint="raise max_bytes of the bucket, or remove files",
                )
        return fitting

    def _count_puts(self, touched: Collection[str] | None) -> tuple[int, int]:
        files = size = 0
        for _, local, remote in self._index.diff(touched):
            if local is not None:
                files += 1
                if remote is None or not local.entry.same_content(remote.entry):
                    size += local.entry.size
        return files, size

    def _next_batch(self, touched: Collection[str] | None, before: _Batch, result: PushResult) -> _Batch:
        """Take the next changed paths; the content of small files is read and hashed here, once.

        :param before: the batch that is on its way: what it carries, the index does not know yet.
        """
        hashed: list[LocalRow] = []
        with self._index.transaction():
            batch = self._fill_batch(touched, before, result, hashed)
            self._index.put_local(hashed)
        return batch

    def _fill_batch(
        self, touched: Collection[str] | None, before: _Batch, result: PushResult, hashed: list[LocalRow]
    ) -> _Batch:
        batch = _Batch()
        size = 0
        for path, local, remote in self._index.diff(touched, after=before.last):
            if self._source.stopping:
                raise ScanStopped
            if local is None:
                continue
            size_key = f"size {local.entry.size}"
            same_size = size_key in batch.digests or size_key in before.digests
            item = self._prepare(local, remote, result, hashed, size_in_flight=same_size)
            if item is not None:
                key = item.row.entry.digest or size_key
                if item.stored is None and (same_size or key in batch.digests or key in before.digests):
                    batch.twins.append(replace(item, data=None))
                else:
                    batch.digests.add(key)
                    to_upload = item.stored is None and item.data is None
                    (batch.large if to_upload else batch.small).append(item)
                    size += len(item.data) if item.data is not None else 0
            batch.last = path
            items = len(batch.small) + len(batch.twins)
            if items >= BATCH_ITEMS or size >= BATCH_BYTES or len(batch.large) >= PARALLEL_UPLOADS:
                return batch
        batch.last = ""
        return batch

    def _prepare(
        self,
        row: LocalRow,
        remote: RemoteRow | None,
        result: PushResult,
        hashed: list[LocalRow],
        *,
        size_in_flight: bool,
    ) -> _Item | None:
        """Decide what one path needs, hashing it where its digest is not known; ``None``: nothing, or not now.

        :param size_in_flight: content of this size is being sent unhashed: it may be the same.
        """
        if row.entry.kind is not Kind.FILE:
            return _Item(row, remote, stored=EMPTY)
        data: bytes | None = None
        if not row.entry.digest:
            new_size = row.entry.size >= UNHASHED_BYTES and not size_in_flight
            if new_size and not self._index.has_content_of(row.entry.size):
                return _Item(row, remote)  # the bucket cannot have it: it is hashed while it is sent, and read once
            fresh = self._hash(row, result)
            if fresh is None:
                return None
            row, data = fresh
            hashed.append(row)
        entry, ours = row.entry, remote is not None and bool(remote.publisher)
        action = publish_action(entry, remote.entry if remote else None, remote_is_ours=ours)
        if action is PublishAction.NOTHING:
            return None
        if action is PublishAction.PUT_META and remote is not None:
            return _Item(row, remote, stored=stored_of(remote))
        if entry.size == 0:
            return _Item(row, remote, stored=EMPTY)
        stored = self._known_content(entry)
        if stored is not None:
            result.reused_bytes += entry.size
            return _Item(row, remote, stored=stored)
        if data is None and entry.size <= CHUNK_SIZE:
            fresh = self._hash(row, result)  # hashed in an earlier round whose put failed: its content is needed again
            if fresh is None:
                return None
            row, data = fresh
            hashed.append(row)
        return _Item(row, remote, data=data)

    def _hash(self, row: LocalRow, result: PushResult) -> tuple[LocalRow, bytes | None] | None:
        """Read a file between two equal stats; its failure is its own."""
        try:
            return self._source.scanner.hash_file(row.path, keep=CHUNK_SIZE)
        except FileChanged:
            result.again.add(row.path)
            return None
        except Unreadable as error:
            self._source.note_problem(Problem(row.path, "unreadable", error.message), row.path)
            return None

    def _known_content(self, entry: Entry) -> Stored | None:
        """Find content the bucket has already: under another name, or replaced and not yet freed."""
        row = self._index.find_remote_content(entry.digest, entry.size)
        if row is not None and row.publisher:
            return stored_of(row)
        return self._index.take_garbage(entry.digest, entry.size)

    def _resolve_twins(self, items: Iterable[_Item], result: PushResult) -> list[_Item]:
        """Announce content that has arrived meanwhile; what has not is tried again by itself."""
        resolved = []
        for item in items:
            stored = self._known_content(item.row.entry)
            if stored is None:
                result.again.add(item.row.path)
                continue
            result.reused_bytes += item.row.entry.size
            resolved.append(replace(item, stored=stored))
        return resolved

    def _meta(self, row: LocalRow) -> ObjectMeta:
        return object_meta(row.path, row.entry, publisher=self._options.publisher, extra=self._options.metadata)

    async def _put_small(self, items: list[_Item], result: PushResult, meter: Meter) -> None:
        puts = [
            SmallPut(self._meta(item.row), item.data, item.stored, item.remote.seq if item.remote else None)
            for item in items
        ]
        outcomes = await self._bucket.put_many(puts)
        crash_point("metas_stored")
        self._holdings.wrote(*(outcome.seq for outcome in outcomes))
        await self._thread.run(lambda: self._remember_puts(zip(items, outcomes, strict=True), result))
        for item in items:
            meter.done(len(item.data) if item.data is not None else 0)

    async def _put_large(self, items: list[_Item], result: PushResult, meter: Meter) -> None:
        """Upload some large files side by side; a failure that ends the round is raised when all are through."""
        tasks = [asyncio.create_task(self._put_one(item, result, meter)) for item in items]
        try:
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _put_one(self, item: _Item, result: PushResult, meter: Meter) -> None:
        path = item.row.path
        try:
            row, stored = await self._upload(item.row, meter)
            crash_point("content_stored")
            item = replace(item, row=row)
            expected = item.remote.seq if item.remote else None
            seq = await self._bucket.put_meta(self._meta(row), stored, expected_seq=expected)
        except FileChanged:
            result.again.add(path)
            return
        except SyncdError as error:
            outcome = PutResult(0, None, error)
        else:
            outcome = PutResult(seq, stored)
            self._holdings.wrote(seq)
        await self._thread.run(lambda: self._remember_puts([(item, outcome)], result))
        meter.done(0)

    async def _upload(self, row: LocalRow, meter: Meter) -> tuple[LocalRow, Stored]:
        """Send a file's content; return its row with the digest of what was sent.

        :raises FileChanged: what was sent is not what was hashed; nothing announces it and it is freed later.
        """
        try:
            file = await asyncio.to_thread(self._source.scanner.open_file, row.path)
        except Unreadable as error:
            raise FileChanged(error.message) from error  # it vanished, or may be read no more: look again
        try:
            stored = await self._bucket.upload(file, progress=meter.add)
            if stored.chunks:  # none: it was truncated meanwhile
                await self._thread.run(lambda: self._index.add_garbage(stored.nuid, self._clock(), stored))
            await asyncio.to_thread(file.check)
            sent = file.row(stored.digest)
        finally:
            await asyncio.shield(asyncio.to_thread(file.close))
        if row.entry.digest and stored.digest != row.entry.digest:
            raise FileChanged(f"{printable(row.path)} changed between hashing and upload")
        if not row.entry.digest:
            await self._thread.run(lambda: self._index.put_local([sent]))
        return sent, stored

    def _remember_puts(self, pairs: Iterable[tuple[_Item, PutResult]], result: PushResult) -> None:
        """Write acknowledged puts into the index; a failed one is tried again.

        :raises SyncdError: a failure that is not one path's (the store is away or sealed).
        """
        rows: list[RemoteRow] = []
        replaced: list[RemoteRow] = []
        fatal: Exception | None = None
        for item, outcome in pairs:
            if outcome.error is not None:
                fatal = self._put_failed(item.row.path, outcome.error, result) or fatal
                continue
            stored = outcome.stored or item.stored or EMPTY
            rows.append(_announced(item.row, stored, outcome.seq, self._options))
            if item.remote is not None and item.remote.nuid != stored.nuid:
                replaced.append(item.remote)
            self._source.problems.clear(item.row.path)
            result.puts += 1
            result.uploaded_bytes += 0 if item.stored is not None else stored.size
        with self._index.transaction():
            self._index.put_remote(rows)
            self._index.drop_garbage([row.nuid for row in rows])
            self._holdings.discard(replaced)
        if fatal is not None:
            raise fatal

    def _put_failed(self, path: str, error: Exception, result: PushResult) -> Exception | None:
        """Sort one path's failure; returns it where the whole round must end."""
        if isinstance(error, StoreFull):
            result.full = error  # others may be smaller, and deletes make room
            return None
        if isinstance(error, WriteConflict | StoreTimeout):
            self._log.warning("put_refused", path=path, error=str(error))
            result.again.add(path)
            result.conflict = True
            self._index.drop_remote([path])  # what we believed is stale: the retry writes over what is there
            return None
        if isinstance(error, SyncdError) and not is_transient(error) and not isinstance(error, BucketSealed):
            self._source.note_problem(Problem(path, "refused", error.message), path)
            return None
        return error

    # -- deletes ---------------------------------------------------------------------------------------------------

    async def _delete_gone(self, touched: Collection[str] | None, result: PushResult, *, allow_delete: bool) -> None:
        """Write tombstones for what the source no longer has.

        :raises SafetyHalt: too many, and nobody allowed it.
        """
        deletes = await self._thread.run(lambda: sum(1 for _ in self._gone(touched)))
        if deletes or touched is None:
            reason = self._guard.judge(deletes, await self._thread.run(self._index.count_ours))
            if reason and not allow_delete:
                raise SafetyHalt(
                    f"folder {self._options.folder!r}: {reason}",
                    hint=f"if that is meant: syncd allow {self._options.folder}, or syncd push --allow-delete",
                )
            if reason:
                self._guard.forget()
        metadata = {PUBLISHER: self._options.publisher} | ({ALLOWED: "1"} if allow_delete else {})
        while deletes > 0:
            rows = await self._thread.run(
                lambda: [row for row, _ in zip(self._gone(touched), range(DELETE_PAGE), strict=False)]
            )
            if not rows:
                return
            deleted = await self._delete_rows(rows, metadata, result)
            crash_point("tombstones_stored")
            await self._thread.run(lambda deleted=deleted: self._forget_deleted(deleted))  # type: ignore[misc]
            result.deletes += len(deleted)
            deletes -= len(rows)

    async def _delete_rows(
        self, rows: list[RemoteRow], metadata: Mapping[str, str], result: PushResult
    ) -> list[RemoteRow]:
        gate = asyncio.Semaphore(PARALLEL_DELETES)
        conflicts: list[str] = []

        async def delete(row: RemoteRow) -> RemoteRow | None:
            async with gate:
                try:
                    seq = await self._bucket.delete(row.path, expected_seq=row.seq, metadata=metadata)
                except WriteConflict:
                    conflicts.append(row.path)
                    return None
                self._holdings.wrote(seq)
                return row

        deleted = [row for row in await asyncio.gather(*map(delete, rows)) if row is not None]
        if conflicts:
            result.again.update(conflicts)
            result.conflict = True
            await self._thread.run(lambda: self._index.drop_remote(conflicts))
        return deleted

    def _gone(self, touched: Collection[str] | None) -> Iterator[RemoteRow]:
        for _, local, remote in self._index.diff(touched):
            if remote is not None and local is None:
                action = publish_action(None, remote.entry, remote_is_ours=bool(remote.publisher))
                if action is PublishAction.DELETE:
                    yield remote

    def _forget_deleted(self, rows: list[RemoteRow]) -> None:
        with self._index.transaction():
            self._index.drop_remote([row.path for row in rows])
            self._holdings.discard(rows)


def _size_in_bucket(item: _Item) -> int:
    """Estimate the bytes that a put takes, headers and metadata included; rather too many."""
    content = 0 if item.stored is not None else item.row.entry.size
    chunks = -(-content // CHUNK_SIZE)
    return content + chunks * CHUNK_OVERHEAD + META_OVERHEAD + 4 * len(item.row.path.encode())


def _announced(row: LocalRow, stored: Stored, seq: int, options: PublishOptions) -> RemoteRow:
    """Return what the bucket announces after a put."""
    entry = row.entry
    if entry.kind is Kind.FILE:
        entry = Entry(entry.kind, entry.mode, entry.mtime_ns, entry.size, stored.digest, stored.sha256)
    return RemoteRow(
        path=row.path,
        entry=entry,
        bucket=options.folder,
        name=row.path,
        nuid=stored.nuid,
        chunks=stored.chunks,
        chunk_size=stored.chunk_size,
        seq=seq,
        publisher=options.publisher,
    )
