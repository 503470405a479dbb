"""Source directory -> bucket: watch, settle, scan, then what the layout says (announce.py, commit.py).

Rules kept here (docs/architecture.md):
 * Events only hint; a scan decides. Doubt, reconnects and a timer mean a full round.
 * A missing source is a problem, never "everything was deleted".
 * What is not found is looked for twice: editors take a file away for a moment while they save it, and a look comes at
   any time, also between two system calls of somebody else.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from syncd.agenda import Agenda
from syncd.announce import Announcer
from syncd.commit import Committer
from syncd.concurrency import run_together
from syncd.errors import SafetyHalt, StoreFull, SyncdError, UsageError
from syncd.index import Index
from syncd.outlet import Outlet, PublishOptions, PushResult, Wish
from syncd.retry import backoff
from syncd.rules import IGNORE_FILE
from syncd.scan import Scanner
from syncd.service import FolderThread, keep_rounds
from syncd.source import LOOK_LIMIT, Source
from syncd.status import Allowance, FolderState, StatusKeeper
from syncd.watch import PathWatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from syncd.model import Problem
    from syncd.progress import Progress
    from syncd.retention import Collected
    from syncd.store.base import Bucket, Hints, Store

log = structlog.get_logger()

PUSH_RETRIES = 5
EVERYWHERE = frozenset({"", IGNORE_FILE})
"""Hinted paths that change the verdict on all others."""
GONE_SECONDS = 1.0
"""What is not found is looked for once more after the settle time, but after so long at most."""
HINT_GRACE_SECONDS = 0.5
"""A notification of our own write can overtake its acknowledgement by this much."""


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
        self._outlet: Outlet
        self._log = log.bind(folder=options.folder, role="publish")
        self._full_seconds = 0.0

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
        change_layout: bool = False,
        note: str = "",
        progress: Callable[[Progress], None] | None = None,
    ) -> PushResult:
        """Do one full round; paths that change while being read are tried again a few times.

        :param take_over: become the folder's publisher, whoever was before.
        :param change_layout: give the bucket the configured layout; what it holds in the other one goes.
        :param note: text for the generation.
        :raises SafetyHalt: the plan would delete too much and ``allow_delete`` is not given.
        :raises LayoutMismatch: the bucket has content in another layout and ``change_layout`` is not given.
        """
        wish = Wish(allow_delete=allow_delete, take_over=take_over, change_layout=change_layout, note=note)
        try:
            await self._open()
            waits = backoff(0.1, 2.0)
            total = PushResult()
            await self._round(None, total, wish, progress=progress)
            for _ in range(PUSH_RETRIES):
                if not total.again:
                    break
                await asyncio.sleep(next(waits))
                paths = None if total.conflict else frozenset(total.again)
                more = PushResult()
                await self._round(paths, more, wish, progress=progress)
                total.add(more)
            total.problems = await self._thread.run(self._problems)
            return total
        finally:
            await self._close()

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Free what no kept generation reaches, once (generations layout).

        :param dry_run: only say what would be freed; neither the bucket nor the index changes.
        :raises UsageError: the folder has the objects layout, which frees by itself.
        """
        if dry_run:
            self._index_file = None  # nothing of it is needed to look: what is noted meanwhile is nobody's to keep
        try:
            await self._open()
            if not isinstance(self._outlet, Committer):
                raise UsageError(
                    f"folder {self._options.folder!r} has the objects layout",
                    hint="it frees replaced content by itself",
                )
            return await self._outlet.collect(dry_run=dry_run)
        finally:
            await self._close()

    async def _open(self) -> None:
        def opened() -> None:
            self._index = Index(self._index_file)
            options = self._options
            scanner = Scanner(options.path, options.rules, symlinks=options.symlinks)
            self._source = Source(scanner, self._index, options.folder)
            if self._index.note("layout", "objects") != options.layout:  # what it remembers of the bucket is another's
                self._index.forget_bucket()
                self._index.set_note("layout", options.layout)
            layout = Committer if options.layout == "generations" else Announcer
            self._outlet = layout(
                options, self._store, self._bucket, self._index, self._source, thread=self._thread, clock=self._clock
            )

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
        told = 0  # a lost, forged or foreign hint: one full round, not one for each until the next look at everything
        while True:
            started = time.monotonic()
            seq = await hints.wait(self._options.rescan_seconds)
            if seq == 0:
                told = 0
                if time.monotonic() - started < self._options.rescan_seconds - 0.1:  # not the timer: a new connection
                    self._outlet.doubt()
                agenda.wake()
            elif seq > max(told, self._outlet.last_seq):
                await asyncio.sleep(HINT_GRACE_SECONDS)
                if seq > self._outlet.last_seq:
                    told = seq
                    agenda.full()

    # -- rounds --------------------------------------------------------------------------------------------------

    async def _kept_round(self, paths: frozenset[str] | None, *, allow_delete: bool) -> PushResult:
        """Do a round and say what it did, also where it failed or was held half-way."""
        result = PushResult()
        try:
            await self._round(paths, result, Wish(allow_delete=allow_delete))
        finally:
            if result.puts or result.deletes or result.committed:
                self._log.info(
                    "published",
                    generation=result.generation,
                    puts=result.puts,
                    deletes=result.deletes,
                    uploaded_bytes=result.uploaded_bytes,
                    reused_bytes=result.reused_bytes,
                )
        return result

    async def _finish_round(self, result: PushResult, agenda: Agenda) -> None:
        self._status.set_problems(await self._thread.run(self._problems))
        if result.generation:
            self._status.set(generation=result.generation, root=result.root)
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
        wish: Wish,
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Bring the bucket up to the source for ``paths`` (``None``: for all).

        :param result: gets what was done, also where that ends with an exception.
        :raises SafetyHalt: deletes are held.
        :raises StoreFull: some content has no room; in the objects layout everything else of the round is done.
        """
        if paths is None:
            await self._outlet.catch_up(wish)
        touched = await self._scan(paths)
        try:
            await self._outlet.publish(touched, result, wish, progress)
        except SafetyHalt:
            await self._outlet.tidy()
            raise
        except StoreFull:  # what it left may be all that is in the way of the next one
            self._outlet.doubt()
            await self._outlet.tidy()
            raise
        except SyncdError:
            self._outlet.doubt()
            raise
        if paths is None:
            entries, size = await self._thread.run(lambda: (self._index.count_local(), self._index.local_bytes()))
            self._status.set(entries=entries, bytes=size)
        await self._outlet.tidy()
        if result.full is not None or result.conflict:
            self._outlet.doubt()
        if result.full is not None:
            raise result.full

    async def _scan(self, paths: frozenset[str] | None) -> Collection[str] | None:
        """Bring the index up to the disk; return the paths to compare with the bucket, ``None`` for all."""
        if paths is None or len(paths) > LOOK_LIMIT or not paths.isdisjoint(EVERYWHERE):
            started = time.monotonic()
            gone = await self._thread.run(self._source.scan)
            self._full_seconds = time.monotonic() - started
            await self._look_again(gone)
            return None
        touched, gone = await self._thread.run(lambda: self._source.look(paths))
        more = await self._look_again(gone)
        return None if more is None else touched | more

    async def _look_again(self, gone: Collection[str]) -> set[str] | None:
        """Look once more for what was not found; return every path whose row may have changed, ``None``: any may."""
        if not gone:
            return set()
        await asyncio.sleep(min(self._options.settle_seconds, GONE_SECONDS))
        if len(gone) > LOOK_LIMIT:
            await self._thread.run(self._source.scan)
            return None
        return (await self._thread.run(lambda: self._source.look(gone))).touched


async def _feed_paths(watcher: PathWatcher, agenda: Agenda) -> None:
    while True:
        hints = await watcher.next(3600.0)
        if hints.rescan:
            agenda.full()
        if hints.paths:
            agenda.hint(hints.paths)
