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

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import structlog

from syncd.agenda import Agenda
from syncd.concurrency import run_together
from syncd.crashpoints import crash_point
from syncd.errors import (
    BadName,
    BucketNotFound,
    DiskProblem,
    ObjectCorrupt,
    ObjectGone,
    SafetyHalt,
    SyncdError,
)
from syncd.index import Index, LocalRow, RemoteRow
from syncd.mirror import Mirror, Outcome, Placed
from syncd.model import Entry, Kind, Problem, Stat
from syncd.paths import ancestors, check_path
from syncd.plan import Difference, DirMeta, mirror_halt, parents_of, plan_mirror
from syncd.progress import Meter, Progress
from syncd.retry import backoff, is_transient
from syncd.status import Allowance, FolderState, StatusKeeper
from syncd.store.base import BadMeta, ObjectInfo
from syncd.store.mapping import ALLOWED, object_info, remote_row

if TYPE_CHECKING:
    from pathlib import Path

    from syncd.mirror import Disk
    from syncd.rules import Rules
    from syncd.store.base import Bucket, Hints, Link, Store

log = structlog.get_logger()

T = TypeVar("T")

BATCH_PATHS = 10_000
"""Differences planned and journaled at once: bounds memory; a larger change is applied in several batches."""
MAX_PASSES = 3
SMALL_FILE = 64 * 1024
FETCH_ITEMS = 500
FETCH_BYTES = 4 * 1024 * 1024
PARALLEL_DOWNLOADS = 4
FETCH_TRIES = 4
FIRST_RETRY_SECONDS = 30.0
MAX_RETRY_SECONDS = 3600.0
MAX_FAILURES = 10_000
MAX_LINKS = 10_000


@dataclass(frozen=True, slots=True)
class SubscribeOptions:
    """One ``[[subscribe]]`` as plain values.

    :ivar folder: the bucket's name.
    :ivar settle_seconds: quiet time after a hint, so that what was written together is applied together.
    :ivar rescan_seconds: how often the mirror's files and the bucket are compared without any hint.
    """

    folder: str
    path: Path
    rules: Rules
    drift: Literal["repair", "report", "keep"] = "repair"
    settle_seconds: float = 0.02
    rescan_seconds: float = 60.0


@dataclass(slots=True)
class PullResult:
    """What one or more rounds did."""

    placed: int = 0
    removed: int = 0
    downloaded_bytes: int = 0
    reused_bytes: int = 0
    drifted: int = 0
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class _Fetch:
    """One file whose content is to be staged, or was, or could not be."""

    row: RemoteRow
    staged: str = ""
    in_place: LocalRow | None = None
    error: SyncdError | None = None


@dataclass(frozen=True, slots=True)
class _Failure:
    """A path that could not be brought up to ``seq``: tried again later and later, at once when it changes."""

    seq: int
    tries: int
    not_before: float


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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"mirror-{options.folder}")
        self._index: Index
        self._mirror: Mirror
        self._log = log.bind(folder=options.folder, role="subscribe")
        self._remote_problems: dict[str, Problem] = {}
        self._local_problems: dict[str, Problem] = {}
        self._links: dict[str, Link] = {}
        self._had_links = True  # those of an earlier run, until the first look
        self._drifted: dict[str, Stat | None] = {}
        self._failures: dict[str, _Failure] = {}
        self._hinted = 0
        self._allowed_removals: set[str] = set()
        self._full_seconds = 0.0
        self._stopping = False

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
                await run_together(self._rounds(agenda), self._feed_bucket(hints, agenda))
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
            self._index = Index(self._index_file)
            self._mirror = Mirror.open(self._options.path)
            return self._mirror.recover()

        placed = await self._disk(opened)
        if self._index.recovered:
            self._log.warning("index_rebuilt", reason=self._index.recovered)
        if placed:
            await self._disk(lambda: self._remember(placed))
            self._log.info("journal_rolled_forward", paths=len(placed))

    async def _close(self) -> None:
        def closed() -> None:
            if hasattr(self, "_mirror"):
                self._mirror.close()
            if hasattr(self, "_index"):
                self._index.close()

        self._stopping = True
        self._thread.submit(closed)
        await asyncio.shield(asyncio.to_thread(self._thread.shutdown, wait=True))

    async def _disk(self, function: Callable[[], T]) -> T:
        """Run blocking work in this mirror's own thread: index and mirror are confined to it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _problems(self) -> list[Problem]:
        problems = self._remote_problems | self._local_problems
        return sorted(problems.values(), key=lambda problem: problem.path)

    def _note_remote_problem(self, path: str, code: str, text: str) -> None:
        problem = Problem(path, code, text)
        if self._remote_problems.get(path) != problem:
            self._log.warning("object_refused", path=path, code=code, text=text)
        self._remote_problems[path] = problem

    def _note_local_problem(self, problem: Problem) -> None:
        if self._local_problems.get(problem.path) != problem:
            self._log.warning("path_problem", path=problem.path, code=problem.code, text=problem.text)
        self._local_problems[problem.path] = problem

    # -- rounds --------------------------------------------------------------------------------------------------

    async def _feed_bucket(self, hints: Hints, agenda: Agenda) -> None:
        while True:
            seq = await hints.wait(self._options.rescan_seconds)
            if seq == 0:
                agenda.wake()
            else:
                self._hinted = max(self._hinted, seq)
                agenda.hint([""])

    async def _rounds(self, agenda: Agenda) -> None:
        waits = backoff()
        failing = ""
        while True:
            paths = await agenda.due()
            halted = self._status.now.state is FolderState.HALTED
            if paths is None or self._status.now.state is not FolderState.IN_SYNC:
                self._status.set(state=FolderState.SYNCING)
            try:
                result = await self._round(full=paths is None, allow_delete=halted and self._allowance.given())
            except SafetyHalt as halt:
                if self._status.now.error != halt.message:
                    self._log.error("safety_halt", reason=halt.message)
                self._status.set(state=FolderState.HALTED, error=halt.message, hint=halt.hint)
                agenda.halted()
            except SyncdError as error:
                waiting = is_transient(error)
                self._status.set(
                    state=FolderState.WAITING if waiting else FolderState.FAILED, error=error.message, hint=error.hint
                )
                if failing != error.message:
                    self._log.warning("round_failed", error=error.message, hint=error.hint)
                failing = error.message
                agenda.failed(next(waits) if waiting else self._options.rescan_seconds)
            else:
                if failing:
                    self._log.info("round_recovered", after=failing)
                failing, waits = "", backoff()
                agenda.done(self._full_seconds)
                self._tell(result)

    def _tell(self, result: PullResult) -> None:
        if result.placed or result.removed or result.drifted:
            self._log.info(
                "mirrored",
                placed=result.placed,
                removed=result.removed,
                drifted=result.drifted,
                downloaded_bytes=result.downloaded_bytes,
                reused_bytes=result.reused_bytes,
            )
        self._allowance.clear()
        self._status.set_problems(self._problems())
        self._status.in_sync()

    async def _round(
        self, *, full: bool, allow_delete: bool, progress: Callable[[Progress], None] | None = None
    ) -> PullResult:
        """Bring the mirror up to the bucket: everything, or what changed since the last round.

        :raises SafetyHalt: removals are held; nothing of the plan is done.
        """
        started = time.monotonic()
        touched = await self._catch_up(full=full)
        if full:
            await self._disk(self._check_disk)
            touched = None
        result = PullResult()
        await self._bring_up(touched, result, allow_delete=allow_delete, progress=progress)
        if full:
            self._full_seconds = time.monotonic() - started
        entries, size = await self._disk(lambda: (self._index.count_local(), self._index.local_bytes()))
        self._status.set(entries=entries, bytes=size)
        return result

    # -- what the bucket has ---------------------------------------------------------------------------------------

    async def _catch_up(self, *, full: bool) -> set[str] | None:
        """Read what the bucket announces into the index; return the paths that may have changed, ``None`` for all.

        A full listing is needed when the bucket is another one than before, when it lies behind what we saw (restored
        from a backup), and now and then, because tombstones do not live for ever.
        """
        state = await self._bucket.state()
        known, position = await self._disk(lambda: (self._index.note("bucket"), int(self._index.note("position", "0"))))
        if known != state.created or position > state.last_seq:
            if known:
                self._log.warning("bucket_replaced", bucket=self._options.folder)
            full = True
        touched: set[str] = set()
        at_least, self._hinted = min(self._hinted, state.last_seq), 0
        if full:
            await self._list(state.created, at_least)
        else:
            async for page in self._bucket.changes(position, at_least=at_least):
                items, last_seq = page.items, page.last_seq
                touched |= await self._disk(lambda items=items, last_seq=last_seq: self._take_page(items, last_seq))  # type: ignore[misc]
        touched |= await self._follow_links()
        return None if full else touched

    async def _list(self, created: str, at_least: int) -> None:
        """Read the whole bucket; names that it no longer has are forgotten once the listing is complete."""
        await self._disk(self._index.begin_listing)
        self._remote_problems.clear()
        self._links.clear()
        last = 0
        async for page in self._bucket.changes(0, at_least=at_least):
            items, last = page.items, page.last_seq
            await self._disk(lambda items=items, last=last: self._take_page(items, last, listed=True))  # type: ignore[misc]

        def finish() -> None:
            with self._index.transaction():
                self._index.drop_unlisted()
                self._index.set_note("bucket", created)
                self._index.set_note("position", str(last))

        await self._disk(finish)

    def _take_page(self, items: Iterable[ObjectInfo | BadMeta], last_seq: int, *, listed: bool = False) -> set[str]:
        """Store one page of metas; return the paths they are about."""
        rows: list[RemoteRow] = []
        gone: list[str] = []
        touched: set[str] = set()
        for item in items:
            if isinstance(item, BadMeta):
                self._note_remote_problem(item.subject, "bad_metadata", item.reason)
                continue
            try:
                check_path(item.name)
            except BadName as error:
                # Never into the index: its keys are paths.
                if not item.deleted:
                    self._note_remote_problem(item.name, "bad_name", error.message)
                continue
            touched.update((item.name, *ancestors(item.name)))
            self._local_problems.pop(item.name, None)
            self._links.pop(item.name, None)
            if item.deleted:
                gone.append(item.name)
                self._remote_problems.pop(item.name, None)
                if ALLOWED in item.metadata:
                    self._allowed_removals.add(item.name)
                continue
            if item.link is not None:
                self._note_link(item.name, item.link)
                gone.append(item.name)
                continue
            row = self._row(item)
            if row is None:
                gone.append(item.name)  # a refused object does not leave an older one standing in the plan
            else:
                self._remote_problems.pop(item.name, None)
                rows.append(row)
        with self._index.transaction():
            self._index.drop_remote(gone)
            self._index.put_remote(rows, listed=listed)
            if not listed:
                self._index.set_note("position", str(last_seq))
        return touched

    def _row(self, item: ObjectInfo, path: str | None = None, via: str = "") -> RemoteRow | None:
        """Read an object as a row; ``None`` where it does not take part or is refused (and reported)."""
        where = item.name if path is None else path
        try:
            row = remote_row(item, path=path, via=via)
        except BadName as error:
            self._note_remote_problem(where, "bad_name", error.message)
            return None
        except ObjectCorrupt as error:
            self._note_remote_problem(where, "bad_object", error.message)
            return None
        return row if self._options.rules.takes(row.path, is_dir=row.entry.kind is Kind.DIR) else None

    # -- links -----------------------------------------------------------------------------------------------------

    def _note_link(self, name: str, link: Link) -> None:
        if len(self._links) >= MAX_LINKS:
            self._note_remote_problem(name, "too_many_links", f"more than {MAX_LINKS} links in the bucket")
            return
        self._links[name] = link

    async def _follow_links(self) -> set[str]:
        """Resolve every link anew: what it points to may have changed in a bucket that we do not watch."""
        touched: set[str] = set()
        if not self._links and not self._had_links:
            return touched
        self._had_links = bool(self._links)
        for name, link in list(self._links.items()):
            try:
                rows = await self._resolve(name, link)
            except SyncdError as error:
                self._note_remote_problem(name, "dead_link", error.message)
                if not isinstance(error, BucketNotFound | ObjectGone | ObjectCorrupt):
                    raise
                rows = []
            else:
                self._remote_problems.pop(name, None)
            touched |= await self._disk(lambda name=name, rows=rows: self._index.replace_via(name, rows))  # type: ignore[misc]
        for gone in await self._disk(self._index.vias) - set(self._links):
            touched |= await self._disk(lambda gone=gone: self._index.replace_via(gone, ()))  # type: ignore[misc]
        return touched | {above for path in touched for above in ancestors(path)}

    async def _resolve(self, name: str, link: Link) -> list[RemoteRow]:
        """Return what a link brings: one object, or a bucket's objects below the link's name.

        :raises ObjectGone: the target does not exist. :raises ObjectCorrupt: it is itself a link.
        """
        bucket = self._store.bucket(link.bucket)
        if link.name is not None:
            info = await bucket.get_info(link.name)
            if info is None or info.deleted:
                raise ObjectGone(f"link {name!r} points to {link.bucket}/{link.name}, which does not exist")
            if info.link is not None:
                raise ObjectCorrupt(f"link {name!r} points to another link")
            row = self._row(info, path=name, via=name)
            return [] if row is None else [row]
        rows: list[RemoteRow] = []
        async for page in bucket.changes(0):
            for item in page.items:
                if isinstance(item, BadMeta) or item.deleted or item.link is not None:
                    continue
                row = self._row(item, path=f"{name}/{item.name}", via=name)
                if row is not None:
                    rows.append(row)
        return rows

    # -- what the mirror has ---------------------------------------------------------------------------------------

    def _check_disk(self) -> None:
        """Compare the mirror's files with the index by their stat fields, and what differs by content."""
        self._local_problems.clear()
        drifted, self._drifted = self._drifted, {}
        for row in self._index.iter_local():
            if self._stopping:
                return
            disk = self._mirror.look(row.path)
            if disk is not None and _unchanged(row, disk):
                continue
            if row.path in drifted and drifted[row.path] == (disk.stat if disk else None):
                self._drifted[row.path] = drifted[row.path]  # left as it is by policy, and the same as last time
                self._report_drift(row.path, again=True)
                continue
            self._recheck(row, disk)

    def _recheck(self, row: LocalRow, disk: Disk | None) -> None:
        """Read a path whose stat fields changed, and decide whether that is drift."""
        have = None if disk is None else self._read_back(row.path, disk)
        remote = self._index.remote(row.path)
        harmless = have is not None and (
            have.entry.same_content(row.entry) or (remote is not None and have.entry.same_content(remote.entry))
        )
        if not harmless and self._options.drift != "repair":
            self._drifted[row.path] = disk.stat if disk else None
            self._report_drift(row.path)
            return
        if not harmless:
            self._report_drift(row.path)
        if have is None:
            self._index.drop_local([row.path])  # gone, or another kind of thing, which the plan then finds in its way
        else:
            self._index.put_local([have])

    def _read_back(self, path: str, disk: Disk) -> LocalRow | None:
        """Describe what is at a path now; ``None`` where that is nothing that syncd could have written."""
        stat = disk.stat
        if disk.kind is Kind.DIR:
            return LocalRow(path, Entry(Kind.DIR, disk.mode, stat.mtime_ns), stat)
        if disk.kind is Kind.SYMLINK:
            return LocalRow(path, Entry(Kind.SYMLINK, 0o777, stat.mtime_ns, target=disk.target), stat)
        if disk.kind is not Kind.FILE:
            return None
        try:
            digest, sha256, stat = self._mirror.read_digests(path)
        except SyncdError as error:
            self._note_local_problem(Problem(path, "unreadable", error.message))
            return None
        return LocalRow(path, Entry(Kind.FILE, disk.mode, stat.mtime_ns, stat.size, digest, sha256), stat)

    def _report_drift(self, path: str, *, again: bool = False) -> None:
        if not again:
            self._log.warning("drift", path=path, policy=self._options.drift)
        if self._options.drift == "report":
            self._note_local_problem(Problem(path, "drift", "changed in the mirror by somebody else"))

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
        removes, mirrored, changes, size = await self._disk(lambda: self._count(touched))
        reason = "" if allow_delete else mirror_halt(removes, mirrored, len(self._allowed_removals))
        if reason:
            raise SafetyHalt(
                f"mirror of {self._options.folder!r}: {reason}",
                hint=f"if that is meant: syncd allow {self._options.folder}",
            )
        meter = Meter(progress, changes, size)
        self._status.set(pending=changes + removes)
        for _ in range(MAX_PASSES):
            after: str | None = ""
            batches = 0
            while after is not None:
                begin = after
                rows, after = await self._disk(lambda begin=begin: self._differences(touched, begin))  # type: ignore[misc]
                if rows:
                    await self._apply_batch(rows, result, meter)
                    batches += 1
            if batches <= 1:
                break
            # A directory whose children were removed by a later batch than its own is removed by the next pass.
        self._allowed_removals.clear()

    def _count(self, touched: Collection[str] | None) -> tuple[int, int, int, int]:
        removes = changes = size = 0
        for path, local, remote in self._index.diff(touched):
            if self._left_alone(path, local, remote):
                continue
            if remote is None:
                removes += 1
            else:
                changes += 1
                if local is None or not local.entry.same_content(remote.entry):
                    size += remote.entry.size
        return removes, self._index.count_local(), changes, size

    def _differences(
        self, touched: Collection[str] | None, after: str
    ) -> tuple[list[tuple[str, LocalRow | None, RemoteRow | None]], str | None]:
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
        if path in self._drifted:
            return True
        if remote is None:
            # No object describes the directory, or none any more, but there are objects below it.
            return local is not None and local.entry.kind is Kind.DIR and self._index.has_remote_below(path)
        failure = self._failures.get(path)
        return failure is not None and failure.seq == remote.seq and self._clock() < failure.not_before

    async def _apply_batch(
        self, rows: list[tuple[str, LocalRow | None, RemoteRow | None]], result: PullResult, meter: Meter
    ) -> None:
        """Stage, verify and apply one batch."""
        fetches = await self._disk(lambda: self._find_content(rows, result))
        await self._download(
            [fetch for fetch in fetches.values() if not fetch.staged and not fetch.in_place], result, meter
        )
        crash_point("batch_staged")
        outcome = await self._disk(lambda: self._commit(rows, fetches))
        seqs = {path: remote.seq for path, _, remote in rows if remote is not None}
        for problem in outcome.problems:
            self._note_local_problem(problem)
            self._note_failure(problem.path, seqs)
        for placed in outcome.placed:
            self._failures.pop(placed.path, None)
        for path in outcome.drifted:
            self._log.warning("drift", path=path, policy=self._options.drift)
        result.drifted += len(outcome.drifted)
        result.placed += sum(1 for placed in outcome.placed if placed.entry is not None)
        result.removed += sum(1 for placed in outcome.placed if placed.entry is None)

    def _note_failure(self, path: str, seqs: Mapping[str, int]) -> None:
        seq = seqs.get(path)
        if seq is None or len(self._failures) >= MAX_FAILURES:
            return
        before = self._failures.get(path)
        tries = before.tries + 1 if before is not None and before.seq == seq else 0
        wait = min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(tries, 10))
        self._failures[path] = _Failure(seq, tries, self._clock() + wait)

    def _find_content(
        self, rows: Iterable[tuple[str, LocalRow | None, RemoteRow | None]], result: PullResult
    ) -> dict[str, _Fetch]:
        """For every file whose content changes: take it from this mirror where it is there already."""
        fetches: dict[str, _Fetch] = {}
        for path, local, remote in rows:
            if remote is None or remote.entry.kind is not Kind.FILE:
                continue
            if local is not None and local.entry.same_content(remote.entry):
                continue
            fetch = fetches[path] = _Fetch(remote)
            if local is None:
                fetch.in_place = self._adopt(path, remote.entry)
            if fetch.in_place is None:
                fetch.staged = self._copy_from_mirror(remote.entry)
            if fetch.in_place or fetch.staged:
                result.reused_bytes += remote.entry.size
        return fetches

    def _adopt(self, path: str, want: Entry) -> LocalRow | None:
        """Recognise by digest a file that is there already (lost state, or copied there by hand)."""
        disk = self._mirror.look(path)
        if disk is None or disk.kind is not Kind.FILE or disk.stat.size != want.size:
            return None
        try:
            digest, sha256, stat = self._mirror.read_digests(path)
        except SyncdError:
            return None
        have = Entry(Kind.FILE, disk.mode, stat.mtime_ns, stat.size, digest, sha256)
        return LocalRow(path, have, stat) if have.same_content(want) else None

    def _copy_from_mirror(self, want: Entry) -> str:
        """Stage a copy of another file of the mirror with the same content; "" where there is none."""
        row = self._index.find_local_content(want.digest, want.sha256, want.size)
        if row is None or want.size == 0:
            return ""
        try:
            return self._mirror.stage_copy(row.path, want)
        except DiskProblem:
            raise
        except SyncdError:
            return ""  # it changed since the index saw it: download instead

    # -- download ----------------------------------------------------------------------------------------------------

    async def _download(self, fetches: list[_Fetch], result: PullResult, meter: Meter) -> None:
        """Stage the content of all ``fetches``; a failure of one object is noted in it.

        :raises SyncdError: the store or the disk failed: the batch is given up, the mirror is as it was.
        """
        small = [fetch for fetch in fetches if fetch.row.entry.size <= SMALL_FILE and fetch.row.chunks <= 1]
        large = [fetch for fetch in fetches if not (fetch.row.entry.size <= SMALL_FILE and fetch.row.chunks <= 1)]
        for group in _groups(small):
            await self._download_small(group, result, meter)
        gate = asyncio.Semaphore(PARALLEL_DOWNLOADS)

        async def one(fetch: _Fetch) -> None:
            async with gate:
                await self._download_large(fetch, result, meter)

        tasks = [asyncio.create_task(one(fetch)) for fetch in large]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _download_small(self, group: list[_Fetch], result: PullResult, meter: Meter) -> None:
        by_bucket: dict[str, list[_Fetch]] = {}
        for fetch in group:
            by_bucket.setdefault(fetch.row.bucket, []).append(fetch)
        for name, fetches in by_bucket.items():
            bucket = self._store.bucket(name)
            got: list[tuple[_Fetch, bytes]] = []
            waiting: dict[tuple[str, str, int], list[_Fetch]] = {}
            for fetch in fetches:
                waiting.setdefault((fetch.row.name, fetch.row.nuid, fetch.row.seq), []).append(fetch)
            infos = [object_info(same[0].row) for same in waiting.values()]
            async for info, data in bucket.download_many(infos):
                for fetch in waiting[info.name, info.nuid, info.seq]:
                    if isinstance(data, bytes):
                        got.append((fetch, data))
                    elif isinstance(data, ObjectGone | ObjectCorrupt):
                        fetch.error = data
                    else:
                        raise data
            staged = await self._disk(lambda got=got: self._mirror.stage_bytes([(f.row.entry, d) for f, d in got]))  # type: ignore[misc]
            for (fetch, data), outcome in zip(got, staged, strict=True):
                if isinstance(outcome, str):
                    fetch.staged = outcome
                    result.downloaded_bytes += len(data)
                    meter.done(len(data))
                elif isinstance(outcome, DiskProblem):
                    raise outcome
                else:
                    fetch.error = ObjectCorrupt(f"{fetch.row.path}: {outcome}")
        for fetch in group:
            if isinstance(fetch.error, ObjectGone):
                await self._download_large(fetch, result, meter)  # it was replaced meanwhile: read its metadata again

    async def _download_large(self, fetch: _Fetch, result: PullResult, meter: Meter) -> None:
        bucket = self._store.bucket(fetch.row.bucket)
        waits = backoff(0.05, 1.0)
        for _ in range(FETCH_TRIES):
            try:
                await self._download_once(bucket, fetch, meter)
            except ObjectGone as error:
                fetch.error = error
                if not await self._refresh(bucket, fetch):
                    # Deleted, or a replica that is behind: the next catch-up tells the one, time mends the other.
                    await asyncio.sleep(next(waits))
            except ObjectCorrupt as error:
                fetch.error = error
                return
            else:
                fetch.error = None
                result.downloaded_bytes += fetch.row.entry.size
                meter.done(0)
                return

    async def _download_once(self, bucket: Bucket, fetch: _Fetch, meter: Meter) -> None:
        entry = fetch.row.entry
        staged = await self._disk(lambda: self._mirror.stage(entry))
        try:
            digest, _ = await bucket.download(object_info(fetch.row), staged, progress=meter.add)
            if entry.digest and digest != entry.digest:
                raise ObjectCorrupt(f"{fetch.row.path}: content does not match the BLAKE3 digest in its metadata")
            fetch.staged = await asyncio.to_thread(staged.finish)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(staged.discard))
            raise

    async def _refresh(self, bucket: Bucket, fetch: _Fetch) -> bool:
        """Read the metadata again after chunks vanished; tell whether it names other content now."""
        info = await bucket.get_info(fetch.row.name)
        if info is None or info.deleted or info.link is not None or info.nuid == fetch.row.nuid:
            return False
        row = self._row(info, path=fetch.row.path, via=fetch.row.via)
        if row is None:
            return False
        fetch.row = row
        await self._disk(lambda: self._index.put_remote([row]))
        return True

    # -- commit ------------------------------------------------------------------------------------------------------

    def _commit(
        self, rows: Iterable[tuple[str, LocalRow | None, RemoteRow | None]], fetches: dict[str, _Fetch]
    ) -> Outcome:
        """Plan and apply a staged batch, then remember it."""
        differences = list(self._to_differences(rows, fetches))
        touched = [row.path for row in differences]
        plan = plan_mirror(differences, [meta for path in parents_of(touched) if (meta := self._dir_meta(path))])
        try:
            outcome = self._mirror.commit(plan, drift=self._options.drift)
            crash_point("batch_applied")
            self._remember(outcome.placed)
        finally:
            self._mirror.discard_staged()
        return outcome

    def _to_differences(
        self, rows: Iterable[tuple[str, LocalRow | None, RemoteRow | None]], fetches: dict[str, _Fetch]
    ) -> Iterator[Difference]:
        for path, local, remote in rows:
            have, stat = (local.entry, local.stat) if local is not None else (None, None)
            if remote is None:
                yield Difference(path, have, stat, None)
                continue
            want, staged = remote.entry, ""
            fetch = fetches.get(path)
            if fetch is not None:
                if fetch.error is not None:
                    self._note_local_problem(Problem(path, "not_fetched", fetch.error.message))
                    self._note_failure(path, {path: remote.seq})
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


def _unchanged(row: LocalRow, disk: Disk) -> bool:
    """Tell whether the quick check holds; a directory's and a symlink's own fields are all there is to compare."""
    if disk.kind is not row.entry.kind:
        return False
    if disk.kind is Kind.FILE:
        return disk.stat == row.stat and disk.mode == row.entry.mode
    if disk.kind is Kind.SYMLINK:
        return disk.target == row.entry.target and disk.stat.mtime_ns == row.entry.mtime_ns
    return disk.mode == row.entry.mode and disk.stat.mtime_ns == row.entry.mtime_ns


def _groups(fetches: Iterable[_Fetch]) -> Iterator[list[_Fetch]]:
    """Group small files to bounded requests."""
    group: list[_Fetch] = []
    size = 0
    for fetch in fetches:
        if group and (len(group) >= FETCH_ITEMS or size + fetch.row.entry.size > FETCH_BYTES):
            yield group
            group, size = [], 0
        group.append(fetch)
        size += fetch.row.entry.size
    if group:
        yield group
