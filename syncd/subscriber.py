"""Bucket -> mirror: watch, resolve, plan, stage, verify, apply, remember.

Rules kept here (docs/architecture.md):
 * Truth comes from catch-up; hints only say "look now". An absence of any length is made up by sequence, and by a
   full listing where history is gone or the local state is lost.
 * Nothing in the mirror changes until all content of the batch is staged, verified and durable.
 * The index says what syncd keeps in the mirror. What it does not name, syncd did not write and does not remove.
 * A failure belongs to its path: it is reported, tried again at the next full round, and the rest goes on.
 * A crash anywhere leaves staged litter (swept), a durable journal (rolled forward) or an applied batch that is not
   remembered (the next reconcile adopts it by digest).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from syncd.agenda import Agenda
from syncd.announced import Announced
from syncd.concurrency import run_together
from syncd.crashpoints import crash_point
from syncd.drift import DriftCheck
from syncd.errors import SafetyHalt
from syncd.fetch import Fetcher, PullResult
from syncd.index import Index, LocalRow, RemoteRow
from syncd.mirror import Mirror
from syncd.model import Kind, Problem
from syncd.plan import Difference, DirMeta, mirror_halt, parents_of, plan_mirror
from syncd.progress import Meter, Progress
from syncd.service import FolderThread, keep_rounds
from syncd.status import Allowance, StatusKeeper

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from syncd.drift import DriftPolicy
    from syncd.fetch import Fetch, Row
    from syncd.mirror import Outcome, Placed
    from syncd.rules import Rules
    from syncd.store.base import Bucket, Hints, Store

log = structlog.get_logger()

BATCH_PATHS = 10_000
"""Differences planned and journaled at once: bounds memory; a larger change is applied in several batches."""
MAX_PASSES = 3
FIRST_RETRY_SECONDS = 30.0
MAX_RETRY_SECONDS = 3600.0
MAX_FAILURES = 10_000
REFUSED = {"bad_metadata", "bad_object"}
"""Problems of an object that is there and cannot be had: the version before stays in the mirror."""
LIST_SECONDS = 3600.0
"""How often a full round lists the whole bucket: tombstones do not live for ever, and others may purge."""


@dataclass(frozen=True, slots=True)
class SubscribeOptions:
    """One ``[[subscribe]]`` as plain values.

    :ivar folder: the bucket's name.
    :ivar owner: user and group id that everything in the mirror gets, -1: as it is; ``None``: whoever runs syncd.
    :ivar settle_seconds: quiet time after a hint, so that what was written together is applied together.
    :ivar rescan_seconds: how often the mirror's files and the bucket are compared without any hint.
    """

    folder: str
    path: Path
    rules: Rules
    drift: DriftPolicy = "repair"
    owner: tuple[int, int] | None = None
    settle_seconds: float = 0.01
    rescan_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """A path that could not be brought up to ``seq``: tried again later and later.

    At once when it changes, or anything below it: a file waits for the deletions that empty the directory in its way.
    """

    problem: Problem
    seq: int
    tries: int
    not_before: float


@dataclass(slots=True)
class _Count:
    """The size of a plan; directories are not counted among removals: those of other clients have no tombstone."""

    changes: int = 0
    size: int = 0
    adds: int = 0
    removes: int = 0
    allowed: int = 0
    unexplained: int = 0
    mirrored: int = 0


class Subscriber:
    """Keeps one mirror directory equal to one bucket.

    :param index_file: where the index lives; ``None``: in memory.
    :param allowance: a person's word on a safety halt; none is ever given without it.
    """

    def __init__(
        self,
        options: SubscribeOptions,
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
        self._thread = FolderThread(f"mirror-{options.folder}")
        self._index: Index
        self._mirror: Mirror
        self._announced: Announced
        self._drift: DriftCheck
        self._fetcher: Fetcher
        self._log = log.bind(folder=options.folder, role="subscribe")
        self._failures: dict[str, _Failure] = {}
        self._hinted = 0
        self._list_at = 0.0
        self._full_seconds = 0.0

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Mirror until cancelled.

        :raises Locked: another process keeps this mirror.
        """
        agenda = Agenda(
            settle=self._options.settle_seconds, rescan=self._options.rescan_seconds, allowed=self._allowance.given
        )
        try:
            await self._open()
            async with self._bucket.hints() as hints:
                rounds = keep_rounds(
                    agenda,
                    lambda paths, allowed: self._round(full=paths is None, allow_delete=allowed),
                    lambda result: self._finish_round(result, agenda),
                    status=self._status,
                    allowance=self._allowance,
                    broken=lambda: self._index.broken,
                    rescan=self._options.rescan_seconds,
                    log=self._log,
                )
                await run_together(rounds, self._feed_bucket(hints, agenda))
        finally:
            await self._close()

    async def pull(
        self, *, allow_delete: bool = False, progress: Callable[[Progress], None] | None = None
    ) -> PullResult:
        """Bring the mirror up to the bucket once.

        :raises BucketNotFound: there is no such bucket.
        :raises SafetyHalt: the plan would empty the mirror and ``allow_delete`` is not given.
        """
        try:
            await self._open()
            result = await self._round(full=True, allow_delete=allow_delete, progress=progress)
            result.problems = self._problems()
            return result
        finally:
            await self._close()

    async def _open(self) -> None:
        def opened() -> list[Placed]:
            options = self._options
            self._index = Index(self._index_file)
            self._mirror = Mirror.open(options.path, owner=options.owner)
            self._announced = Announced(self._store, self._bucket, self._index, options.rules, self._thread)
            self._drift = DriftCheck(self._mirror, self._index, options.drift, options.folder)
            self._fetcher = Fetcher(self._store, self._index, self._mirror, self._thread)
            placed = self._mirror.recover()
            self._drift.settle()
            return placed

        placed = await self._thread.run(opened)
        if self._index.recovered:
            self._log.warning("index_rebuilt", reason=self._index.recovered)
        if placed:
            await self._thread.run(lambda: self._remember(placed))
            self._log.info("journal_rolled_forward", paths=len(placed))

    async def _close(self) -> None:
        def closed() -> None:
            if hasattr(self, "_mirror"):
                self._mirror.close()
            if hasattr(self, "_index"):
                self._index.close()

        if hasattr(self, "_drift"):
            self._drift.stopping = True  # the thread may be in the middle of a check: it looks between paths
        await self._thread.close(closed)

    def _problems(self) -> list[Problem]:
        return sorted(self._announced.problems.all() + self._drift.problems.all(), key=lambda problem: problem.path)

    # -- rounds --------------------------------------------------------------------------------------------------

    async def _feed_bucket(self, hints: Hints, agenda: Agenda) -> None:
        while True:
            seq = await hints.wait(self._options.rescan_seconds)
            if seq == 0:
                agenda.wake()
            else:
                self._hinted = max(self._hinted, seq)
                agenda.hint([""])

    async def _finish_round(self, result: PullResult, agenda: Agenda) -> None:
        agenda.done(self._full_seconds)
        if result.placed or result.removed or result.drifted:
            self._log.info(
                "mirrored",
                placed=result.placed,
                removed=result.removed,
                drifted=result.drifted,
                downloaded_bytes=result.downloaded_bytes,
                reused_bytes=result.reused_bytes,
            )
        self._status.set_problems(self._problems())
        self._status.in_sync()

    async def _round(
        self, *, full: bool, allow_delete: bool, progress: Callable[[Progress], None] | None = None
    ) -> PullResult:
        """Bring the mirror up to the bucket: everything, or what changed since the last round.

        :raises SafetyHalt: removals are held; nothing of the plan is done.
        """
        started = time.monotonic()
        hinted, self._hinted = self._hinted, 0
        listing = full and (started >= self._list_at or self._announced.listing_wanted)
        touched = await self._announced.catch_up(full=listing, hinted=hinted)
        for path in touched or ():
            self._failures.pop(path, None)
        if full:
            await self._thread.run(self._drift.check)
            touched = None
        if listing:
            self._list_at = started + LIST_SECONDS
        result = PullResult()
        await self._bring_up(touched, result, allow_delete=allow_delete, progress=progress)
        if full:
            self._full_seconds = time.monotonic() - started
        if full or result.placed or result.removed:
            entries, size = await self._thread.run(lambda: (self._index.count_local(), self._index.local_bytes()))
            self._status.set(entries=entries, bytes=size)
        return result

    # -- plan, stage, apply ----------------------------------------------------------------------------------------

    async def _bring_up(
        self,
        touched: Collection[str] | None,
        result: PullResult,
        *,
        allow_delete: bool,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """Apply all differences in batches; each batch is staged whole before anything changes."""
        count = await self._thread.run(lambda: self._count(touched))
        reason = mirror_halt(
            count.removes, count.mirrored, count.adds, allowed=count.allowed, unexplained=count.unexplained
        )
        if reason and not allow_delete:
            raise SafetyHalt(
                f"mirror of {self._options.folder!r}: {reason}",
                hint=f"if that is meant: syncd allow {self._options.folder}, or syncd pull --allow-delete",
            )
        meter = Meter(progress, count.changes, count.size)
        self._status.set(pending=count.changes + count.removes)
        for _ in range(MAX_PASSES):
            after: str | None = ""
            batches = 0
            while after is not None:
                begin = after
                rows, after = await self._thread.run(lambda begin=begin: self._differences(touched, begin))  # type: ignore[misc]
                if rows:
                    await self._apply_batch(rows, result, meter)
                    batches += 1
            if batches <= 1:
                break
            # A directory whose children were removed by a later batch than its own is removed by the next pass.
        self._announced.forget_removals()

    def _count(self, touched: Collection[str] | None) -> _Count:
        count = _Count()
        for path, local, remote in self._index.diff(touched):
            if self._left_alone(path, local, remote):
                continue
            if remote is not None:
                count.changes += 1
                count.adds += local is None and remote.entry.kind is not Kind.DIR
                if local is None or not local.entry.same_content(remote.entry):
                    count.size += remote.entry.size
            elif local is not None and local.entry.kind is not Kind.DIR:
                count.removes += 1
                count.allowed += path in self._announced.allowed_removals
                count.unexplained += path not in self._announced.explained_removals
        if count.removes:
            count.mirrored = self._index.count_local(dirs=False)
        return count

    def _differences(self, touched: Collection[str] | None, after: str) -> tuple[list[Row], str | None]:
        rows = []
        for row in self._index.diff(touched, after=after):
            if self._left_alone(*row):
                continue
            rows.append(row)
            if len(rows) >= BATCH_PATHS:
                return rows, row[0]
        return rows, None

    def _left_alone(self, path: str, local: LocalRow | None, remote: RemoteRow | None) -> bool:
        """Tell whether a difference is to stay: drift under a policy that keeps it, a directory still in use."""
        if path in self._drift.held:
            return True
        if remote is None:
            if self._announced.problems.code(path) in REFUSED:
                return True  # what is here stays
            if self._announced.in_doubt and path not in self._announced.explained_removals:
                return True
            # No object describes the directory, or none any more, but there are objects below it.
            return local is not None and local.entry.kind is Kind.DIR and self._index.has_remote_below(path)
        failure = self._failures.get(path)
        if failure is None or failure.seq != remote.seq or self._clock() >= failure.not_before:
            return False
        self._drift.problems.note(failure.problem)  # a full check forgets all, and this one is not tried now
        return True

    async def _apply_batch(self, rows: list[Row], result: PullResult, meter: Meter) -> None:
        """Stage, verify and apply one batch."""
        fetches = await self._thread.run(lambda: self._fetcher.find_local(rows, result))
        missing = [fetch for fetch in fetches.values() if not fetch.staged and not fetch.in_place]
        await self._fetcher.download(missing, result, meter)
        crash_point("batch_staged")
        outcome = await self._thread.run(lambda: self._commit(rows, fetches))
        seqs = {path: remote.seq for path, _, remote in rows if remote is not None}
        for problem in outcome.problems:
            self._drift.problems.note(problem)
            self._note_failure(problem, seqs)
        for placed in outcome.placed:
            self._failures.pop(placed.path, None)
            self._drift.problems.clear(placed.path)
        for path in outcome.drifted:
            self._log.warning("drift", path=path, policy=self._options.drift)
        result.drifted += len(outcome.drifted)
        result.placed += sum(1 for placed in outcome.placed if placed.entry is not None)
        result.removed += sum(1 for placed in outcome.placed if placed.entry is None)

    def _note_failure(self, problem: Problem, seqs: Mapping[str, int]) -> None:
        path = problem.path
        seq = seqs.get(path)
        if seq is None or len(self._failures) >= MAX_FAILURES:
            return
        before = self._failures.get(path)
        tries = before.tries + 1 if before is not None and before.seq == seq else 0
        wait = min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(tries, 10))
        self._failures[path] = _Failure(problem, seq, tries, self._clock() + wait)

    # -- commit ------------------------------------------------------------------------------------------------------

    def _commit(self, rows: Iterable[Row], fetches: dict[str, Fetch]) -> Outcome:
        """Plan and apply a staged batch, then remember it."""
        differences = list(self._to_differences(rows, fetches))
        touched = [row.path for row in differences]
        plan = plan_mirror(differences, [meta for path in parents_of(touched) if (meta := self._dir_meta(path))])
        self._drift.expect(plan)
        try:
            outcome = self._mirror.commit(plan, drift=self._options.drift)
            crash_point("batch_applied")
            self._remember(outcome.placed)
        finally:
            self._mirror.discard_staged()
        return outcome

    def _to_differences(self, rows: Iterable[Row], fetches: dict[str, Fetch]) -> Iterator[Difference]:
        for path, local, remote in rows:
            have, stat = (local.entry, local.stat) if local is not None else (None, None)
            if remote is None:
                yield Difference(path, have, stat, None)
                continue
            want, staged = remote.entry, ""
            fetch = fetches.get(path)
            if fetch is not None:
                if fetch.error is not None:
                    problem = Problem(path, "not_fetched", fetch.error.message)
                    self._drift.problems.note(problem)
                    self._note_failure(problem, {path: remote.seq})
                    continue
                want, staged = fetch.row.entry, fetch.staged
                if fetch.in_place is not None:
                    have, stat = fetch.in_place.entry, fetch.in_place.stat
            elif want.kind is Kind.SYMLINK and not (have is not None and have.same_content(want)):
                staged = self._mirror.stage_symlink(want)
            yield Difference(path, have, stat, want, staged)

    def _dir_meta(self, path: str) -> DirMeta | None:
        remote = self._index.remote(path)
        if remote is None or remote.entry.kind is not Kind.DIR:
            return None
        return DirMeta(path, remote.entry.mode, remote.entry.mtime_ns)

    def _remember(self, placed: Iterable[Placed]) -> None:
        """Write into the index what is in the mirror now."""
        rows: list[LocalRow] = []
        gone: list[str] = []
        for item in placed:
            if item.entry is None or item.stat is None:
                gone.append(item.path)
                continue
            rows.append(LocalRow(item.path, item.entry, item.stat))
        with self._index.transaction():
            self._index.drop_local(gone)
            self._index.put_local(rows)
            self._drift.remembered()
