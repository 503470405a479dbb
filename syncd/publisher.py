"""Source directory -> bucket: watch, settle, scan, plan, upload, announce, remember.

Rules kept here (docs/architecture.md):
 * Events only hint; a scan decides. Doubt, reconnects and a timer mean a full round.
 * A file is read between two equal stats or not at all in this round.
 * Metadata is written only after the server acknowledged every chunk it announces.
 * The index remembers only what the server acknowledged. A crash anywhere leaves chunks that nothing announces
   (the audit finds them) or an announcement not yet remembered (the next catch-up reads it back).
 * Nothing is deleted that syncd did not write; a missing source is a problem, never "everything was deleted".
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog

from syncd.agenda import Agenda
from syncd.concurrency import run_together
from syncd.crashpoints import crash_point
from syncd.errors import (
    BucketSealed,
    FileChanged,
    SafetyHalt,
    StoreFull,
    StoreTimeout,
    SyncdError,
    WriteConflict,
)
from syncd.holdings import Holdings, PublishOptions
from syncd.index import Index, LocalRow, RemoteRow
from syncd.model import Entry, Kind, Problem
from syncd.paths import printable
from syncd.plan import PublishAction, publish_action, publish_halt
from syncd.progress import Meter, Progress
from syncd.retry import backoff, is_transient
from syncd.rules import IGNORE_FILE
from syncd.scan import Scanner, Unreadable
from syncd.service import FolderThread, keep_rounds
from syncd.source import LOOK_LIMIT, ScanStopped, Source
from syncd.status import Allowance, FolderState, StatusKeeper
from syncd.store.base import CHUNK_SIZE, EMPTY, ObjectMeta, PutResult, SmallPut, Stored
from syncd.store.mapping import ALLOWED, PUBLISHER, object_meta, stored_of
from syncd.watch import PathWatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from syncd.store.base import Bucket, Hints, Store

log = structlog.get_logger()

BATCH_ITEMS = 400
BATCH_BYTES = 4 * 1024 * 1024
PARALLEL_UPLOADS = 4
UNHASHED_BYTES = 32 * 1024 * 1024
"""Larger files whose size the bucket does not have are not hashed before they are sent."""
PARALLEL_DELETES = 64
DELETE_PAGE = 1000
PUSH_RETRIES = 5
CHUNK_OVERHEAD = 256
META_OVERHEAD = 2048
HALT_WINDOW_SECONDS = 600.0
"""Deletes are judged against the most paths published within this time: ``rm -r`` arrives in pieces."""
EVERYWHERE = frozenset({"", IGNORE_FILE})
"""Hinted paths that change the verdict on all others."""
HINT_GRACE_SECONDS = 0.5
"""A notification of our own write can overtake its acknowledgement by this much."""


@dataclass(slots=True)
class PushResult:
    """What one or more rounds did.

    :ivar again: paths that could not be read or written this time and are tried again soon.
    :ivar conflict: somebody else wrote to the bucket: look at everything again.
    :ivar full: there was no room for some content.
    """

    puts: int = 0
    deletes: int = 0
    uploaded_bytes: int = 0
    reused_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    again: set[str] = field(default_factory=set)
    conflict: bool = False
    full: StoreFull | None = None

    def add(self, more: PushResult) -> None:
        """Add a later round."""
        self.puts += more.puts
        self.deletes += more.deletes
        self.uploaded_bytes += more.uploaded_bytes
        self.reused_bytes += more.reused_bytes
        self.again = more.again
        self.conflict = more.conflict


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


class Publisher:
    """Keeps one bucket equal to one source directory.

    :param index_file: where the index lives; ``None``: in memory, for one round.
    :param allowance: a person's word on a safety halt; none is ever given without it.
    :param clock: wall clock, seconds since the epoch.
    """

    def __init__(
        self,
        options: PublishOptions,
        store: Store,
        index_file: Path | None,
        *,
        status: StatusKeeper,
        allowance: Allowance | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._options = options
        self._store = store
        self._bucket: Bucket = store.bucket(options.folder)
        self._index_file = index_file
        self._status = status
        self._allowance = allowance or Allowance()
        self._clock = clock
        self._thread = FolderThread(f"publish-{options.folder}")
        self._index: Index
        self._source: Source
        self._holdings: Holdings
        self._log = log.bind(folder=options.folder, role="publish")
        self._full_seconds = 0.0
        self._published: deque[tuple[float, int]] = deque()

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Publish until cancelled.

        :raises FolderTaken: somebody else publishes this folder; trying again would not mend that.
        """
        agenda = Agenda(
            settle=self._options.settle_seconds, rescan=self._options.rescan_seconds, allowed=self._allowance.given
        )
        try:
            await self._open()
            async with (
                PathWatcher(self._options.path, on_mode=self._on_watch_mode) as watcher,
                self._bucket.hints() as hints,
            ):
                rounds = keep_rounds(
                    agenda,
                    lambda paths, allowed: self._kept_round(paths, allow_delete=allowed),
                    lambda result: self._finish_round(result, agenda),
                    status=self._status,
                    allowance=self._allowance,
                    broken=lambda: self._index.broken,
                    rescan=self._options.rescan_seconds,
                    log=self._log,
                )
                await run_together(rounds, _feed_paths(watcher, agenda), self._feed_bucket(hints, agenda))
        finally:
            await self._close()

    async def push(
        self,
        *,
        allow_delete: bool = False,
        take_over: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> PushResult:
        """Do one full round; paths that change while being read are tried again a few times.

        :param take_over: become the folder's publisher, whoever was before.

        :raises SafetyHalt: the plan would delete too much and ``allow_delete`` is not given.
        """
        try:
            await self._open()
            if take_over:
                await self._holdings.catch_up(take_over=True)
            waits = backoff(0.1, 2.0)
            total = PushResult()
            await self._round(None, total, allow_delete=allow_delete, progress=progress)
            for _ in range(PUSH_RETRIES):
                if not total.again:
                    break
                await asyncio.sleep(next(waits))
                paths = None if total.conflict else frozenset(total.again)
                more = PushResult()
                await self._round(paths, more, allow_delete=allow_delete, progress=progress)
                total.add(more)
            total.problems = await self._thread.run(self._problems)
            return total
        finally:
            await self._close()

    async def _open(self) -> None:
        def opened() -> None:
            self._index = Index(self._index_file)
            options = self._options
            scanner = Scanner(options.path, options.rules, symlinks=options.symlinks)
            self._source = Source(scanner, self._index, options.folder)
            self._holdings = Holdings(options, self._store, self._bucket, self._index, self._thread, self._clock)

        await self._thread.run(opened)
        if self._index.recovered:
            self._log.warning("index_rebuilt", reason=self._index.recovered)

    async def _close(self) -> None:
        def closed() -> None:
            if hasattr(self, "_index"):
                self._index.close()

        if hasattr(self, "_source"):
            self._source.stopping = True  # the thread may be in the middle of a scan: it looks between paths
        await self._thread.close(closed)

    def _problems(self) -> list[Problem]:
        return self._source.problems.all()

    # -- hints ---------------------------------------------------------------------------------------------------

    def _on_watch_mode(self, mode: str, reason: str) -> None:
        self._log.info("watch_mode", mode=mode, reason=reason)
        self._status.set(watching=mode)

    async def _feed_bucket(self, hints: Hints, agenda: Agenda) -> None:
        """A reconnect, or a write that is not ours, asks for a full round."""
        while True:
            started = time.monotonic()
            seq = await hints.wait(self._options.rescan_seconds)
            if seq == 0:
                if time.monotonic() - started < self._options.rescan_seconds - 0.1:  # not the timer: a new connection
                    self._holdings.doubt()
                agenda.wake()
            elif seq > self._holdings.last_seq:
                await asyncio.sleep(HINT_GRACE_SECONDS)
                if seq > self._holdings.last_seq:
                    self._holdings.wrote(seq)  # a lost, forged or foreign one: one full round, not one per hint
                    agenda.full()

    # -- rounds --------------------------------------------------------------------------------------------------

    async def _kept_round(self, paths: frozenset[str] | None, *, allow_delete: bool) -> PushResult:
        """Do a round and say what it did, also where it failed or was held half-way."""
        result = PushResult()
        try:
            await self._round(paths, result, allow_delete=allow_delete)
        finally:
            if result.puts or result.deletes:
                self._log.info(
                    "published",
                    puts=result.puts,
                    deletes=result.deletes,
                    uploaded_bytes=result.uploaded_bytes,
                    reused_bytes=result.reused_bytes,
                )
        return result

    async def _finish_round(self, result: PushResult, agenda: Agenda) -> None:
        self._status.set_problems(await self._thread.run(self._problems))
        agenda.done(self._full_seconds)
        if result.conflict:
            agenda.full()
        if result.again:
            agenda.again(result.again)
            self._status.set(state=FolderState.SYNCING, pending=len(result.again), error="", hint="")
        else:
            self._status.in_sync()

    async def _round(
        self,
        paths: frozenset[str] | None,
        result: PushResult,
        *,
        allow_delete: bool,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Bring the bucket up to the source for ``paths`` (``None``: for all).

        :param result: gets what was done, also where that ends with an exception.
        :raises SafetyHalt: deletes are held; everything else of the round is done.
        :raises StoreFull: some content has no room; everything else of the round is done, and what makes room is.
        """
        if paths is None:
            await self._holdings.catch_up()
        touched = await self._scan(paths)
        try:
            await self._put_changed(touched, result, progress)
            await self._delete_gone(touched, result, allow_delete=allow_delete)
        except SafetyHalt:
            await self._holdings.free_garbage()
            raise
        except SyncdError:
            self._holdings.doubt()
            raise
        if paths is None:
            entries, size = await self._thread.run(lambda: (self._index.count_local(), self._index.local_bytes()))
            self._status.set(entries=entries, bytes=size)
        await self._holdings.free_garbage()
        if result.full is not None or result.conflict:
            self._holdings.doubt()
        if result.full is not None:
            raise result.full

    async def _scan(self, paths: frozenset[str] | None) -> Collection[str] | None:
        """Bring the index up to the disk; return the paths to compare with the bucket, ``None`` for all."""
        if paths is None or len(paths) > LOOK_LIMIT or not paths.isdisjoint(EVERYWHERE):
            started = time.monotonic()
            await self._thread.run(self._source.scan)
            self._full_seconds = time.monotonic() - started
            return None
        return await self._thread.run(lambda: self._source.look(paths))

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
            published = await self._thread.run(self._index.count_ours)
            peak = self._peak(published)
        if deletes:
            reason = publish_halt(peak - (published - deletes), peak, self._options.max_delete_percent)
            if reason and not allow_delete:
                raise SafetyHalt(
                    f"folder {self._options.folder!r}: {reason}",
                    hint=f"if that is meant: syncd allow {self._options.folder}, or syncd push --allow-delete",
                )
            if reason:
                self._published.clear()
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

    def _peak(self, published: int) -> int:
        """Return the most paths that were published within the halt window."""
        now = self._clock()
        self._published.append((now, published))
        while self._published[0][0] < now - HALT_WINDOW_SECONDS:
            self._published.popleft()
        # Only falling maxima can ever be the peak again: drop what a later, higher count makes pointless.
        while len(self._published) > 1 and self._published[-2][1] <= published:
            del self._published[-2]
        return max(count for _, count in self._published)

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


async def _feed_paths(watcher: PathWatcher, agenda: Agenda) -> None:
    while True:
        hints = await watcher.next(3600.0)
        if hints.rescan:
            agenda.full()
        if hints.paths:
            agenda.hint(hints.paths)


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
