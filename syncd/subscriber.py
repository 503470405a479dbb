"""Bucket -> mirror: watch, resolve, plan, stage, verify, apply, remember.

Rules kept here (docs/architecture.md):
 * Truth comes from catch-up; hints only say "look now". An absence of any length is made up by sequence, and by a
   full listing where history is gone or the local state is lost.
 * What a bucket announces, and how content is had, is its layout's business (``objects.py``, ``checkout.py``); the
   bucket says which layout it has, and may change it.
 * Nothing in the mirror changes until all content of the batch (objects) or of the generation is staged, verified and
   durable. A generation whose application was cut off is finished before anything else.
 * The index says what syncd keeps in the mirror. What it does not name, syncd did not write and does not remove.
 * A failure belongs to its path: it is reported, tried again at the next full round, and the rest goes on.
 * A crash anywhere leaves staged litter (swept), a durable journal (rolled forward) or an applied batch that is not
   remembered (the next reconcile adopts it by digest).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import structlog

from syncd.agenda import Agenda
from syncd.checkout import Checkout, Held, NoGeneration
from syncd.concurrency import run_together
from syncd.crashpoints import crash_point
from syncd.drift import DriftCheck, keep_auditing
from syncd.errors import DiskProblem, FormatTooNew, ObjectCorrupt, ObjectGone, SafetyHalt, Untrusted, UsageError
from syncd.extraneous import Extraneous
from syncd.guard import Guard, TrustNote
from syncd.index import Index, LocalRow, RemoteRow
from syncd.mirror import ContentChanged, Mirror
from syncd.mirrorwatch import MirrorWatch
from syncd.model import Kind, Problem
from syncd.objects import Objects
from syncd.plan import Difference, DirMeta, mirror_halt, parents_of, plan_mirror
from syncd.progress import Meter, Progress
from syncd.rollout import Rollout, RolloutOptions, WentBack
from syncd.service import FolderThread, keep_rounds
from syncd.standing import Standing
from syncd.status import Allowance, StatusKeeper
from syncd.store.base import HEAD
from syncd.trees import layout_of
from syncd.upstream import Overtaken, PullResult

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from syncd.checkout import Applied
    from syncd.drift import DriftPolicy
    from syncd.mirror import Outcome, Placed
    from syncd.rules import Rules
    from syncd.store.base import Bucket, BucketState, Hints, Store
    from syncd.trees import Layout
    from syncd.trust import Trust
    from syncd.upstream import Fetch, Row, Upstream

log = structlog.get_logger()

BATCH_PATHS = 10_000
"""Differences planned and journaled at once: bounds memory; a larger change is applied in several batches."""
MAX_PASSES = 3
FIRST_RETRY_SECONDS = 30.0
MAX_RETRY_SECONDS = 3600.0
MAX_FAILURES = 10_000
GATHER_PATHS = 4000
"""Differences looked at together while a generation is gathered."""
LAYOUT = "layout"
TRUST_FILE = "trust.json"
"""Beside the index, which may be lost and rebuilt: what was seen must not be."""
PIN_SECONDS = 0.5
LIST_SECONDS = 3600.0
"""How often a full round lists the whole bucket: tombstones do not live for ever, and others may purge."""


@dataclass(frozen=True, slots=True)
class SubscribeOptions:
    """One ``[[subscribe]]`` as plain values.

    :ivar folder: the bucket's name.
    :ivar owner: user and group id that everything in the mirror gets, -1: as it is; ``None``: whoever runs syncd.
    :ivar settle_seconds: quiet time after a hint, so that what was written together is applied together.
    :ivar rescan_seconds: how often the mirror's files and the bucket are compared without any hint.
    :ivar channel: which channel to follow (generations layout).
    :ivar pin: the generation to stay at, whatever the channel says; 0: none.
    :ivar trust: the keys that must have signed what is gone to; ``None``: nothing is checked.
    :ivar extraneous: what becomes of files that syncd never wrote.
    :ivar verify_rate: bytes per second that are read to find silent changes, 0: none.
    """

    folder: str
    path: Path
    rules: Rules
    drift: DriftPolicy = "repair"
    owner: tuple[int, int] | None = None
    settle_seconds: float = 0.01
    rescan_seconds: float = 60.0
    channel: str = HEAD
    pin: int = 0
    trust: Trust | None = None
    extraneous: Literal["keep", "delete"] = "keep"
    verify_rate: int = 0
    rollout: RolloutOptions = field(default_factory=RolloutOptions)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A path that could not be brought up to ``seq``: tried again later and later.

    At once when it changes, or anything below it: a file waits for the deletions that empty the directory in its way.
    """

    problem: Problem
    seq: int
    tries: int
    not_before: float


class StagedVanished(DiskProblem):
    """Some content was not there when it was to be put in place: the next round stages it again."""


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


@dataclass(slots=True)
class _Trip:
    """One round on its way.

    :ivar touched: paths that may differ, ``None`` for all.
    :ivar checked: the whole mirror was compared with the index.
    :ivar listed: the whole bucket was listed.
    :ivar regathered: how often content was not any more what it was.
    """

    full: bool
    allow_delete: bool
    progress: Callable[[Progress], None] | None
    result: PullResult = field(default_factory=PullResult)
    touched: set[str] | None = field(default_factory=set)
    checked: bool = False
    listed: bool = False
    regathered: int = 0

    def touch(self, paths: Collection[str] | None) -> None:
        """Add paths that may differ, ``None`` for all."""
        self.touched = None if paths is None or self.touched is None else {*self.touched, *paths}


class Subscriber:
    """Keeps one mirror directory equal to one bucket.

    :param index_file: where the index lives; ``None``: in memory.
    :param allowance: a person's word on a safety halt; none is ever given without it.
    :param pin: returns the generation that a person of this host wants it to stay at, 0 for none.
    """

    def __init__(
        self,
        options: SubscribeOptions,
        store: Store,
        index_file: Path | None,
        *,
        status: StatusKeeper,
        allowance: Allowance | None = None,
        pin: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._options = options
        self._store = store
        self._bucket: Bucket = store.bucket(options.folder)
        self._index_file = index_file
        self._status = status
        self._allowance = allowance or Allowance()
        self._pin = pin
        self._clock = clock
        self._thread = FolderThread(f"mirror-{options.folder}")
        self._index: Index
        self._mirror: Mirror
        self._objects: Objects
        self._checkout: Checkout
        self._rollout: Rollout
        self._standing: Standing
        self._extraneous: Extraneous
        self._suspected: set[str] = set()
        self._left_as_found: set[str] = set()
        self._holding = False
        self._layout: Layout | None = None
        self._layout_of = ""
        self._drift: DriftCheck
        self._log = log.bind(folder=options.folder, role="subscribe")
        self._failures: dict[str, _Failure] = {}
        self._hinted = 0
        self._refused = False
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
                    lambda paths, allowed: self._kept_round(full=paths is None, allowed=allowed),
                    lambda result: self._finish_round(result, agenda),
                    status=self._status,
                    allowance=self._allowance,
                    broken=lambda: self._index.broken,
                    rescan=self._options.rescan_seconds,
                    log=self._log,
                )
                others = [self._feed_drift(agenda), self._feed_pin(agenda)]
                if self._options.verify_rate:
                    others.append(self._audit(agenda))
                await run_together(rounds, self._feed_bucket(hints, agenda), *others)
        finally:
            await self._close()

    async def pull(
        self,
        *,
        allow_delete: bool = False,
        generation: int = 0,
        progress: Callable[[Progress], None] | None = None,
    ) -> PullResult:
        """Bring the mirror up to the bucket once.

        :param allow_delete: hold nothing back: neither removals nor a generation that was refused.
        :param generation: go to this generation; 0: to the channel's.
        :raises BucketNotFound: there is no such bucket.
        :raises SafetyHalt: the plan would empty the mirror and ``allow_delete`` is not given.
        :raises ObjectCorrupt, ObjectGone: the generation cannot be had; the mirror is as it was.
        :raises UsageError: the bucket has no generations.
        """
        try:
            await self._open()
            self._checkout.explicit = generation or self._options.pin
            if allow_delete:
                await self._thread.run(self._standing.forget_refusals)
            result = await self._round(full=True, allow_delete=allow_delete, progress=progress)
            result.problems = self._problems()
            return result
        finally:
            await self._close()

    async def _open(self) -> None:
        def opened() -> list[Placed]:
            options = self._options
            self._index = Index(self._index_file)
            rollout = options.rollout
            self._mirror = Mirror.open(options.path, owner=options.owner, mode=rollout.mode)
            self._standing = Standing(self._index, hooked=rollout.hooked)
            note = TrustNote(self._index_file and self._index_file.with_name(TRUST_FILE), self._index)
            guard = Guard(self._bucket, options.channel, options.trust, note, self._thread, self._clock)
            half = (self._index, self._mirror, options.rules, self._thread)
            self._objects = Objects(self._store, self._bucket, *half, modes=rollout.modes)
            self._checkout = Checkout(
                self._bucket,
                options.channel,
                *half,
                guard=guard,
                standing=self._standing,
                modes=rollout.modes,
                clock=self._clock,
            )
            self._rollout = Rollout(
                rollout,
                self._checkout,
                self._standing,
                self._index,
                self._mirror,
                self._thread,
                folder=options.folder,
                index_file=self._index_file,
            )
            self._drift = DriftCheck(self._mirror, self._index, options.drift, options.folder)
            self._extraneous = Extraneous(self._mirror, self._index, options.rules, options.folder)
            placed = self._mirror.recover(self._checkout.keeps())
            self._rollout.recover()
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
        if hasattr(self, "_extraneous"):
            self._extraneous.stopping = True
        await self._thread.close(closed)

    def _problems(self) -> list[Problem]:
        upstream = self._upstream.problems.all() if self._layout is not None else []
        return sorted(
            upstream + self._drift.problems.all() + self._extraneous.problems, key=lambda problem: problem.path
        )

    # -- rounds --------------------------------------------------------------------------------------------------

    async def _feed_bucket(self, hints: Hints, agenda: Agenda) -> None:
        while True:
            seq = await hints.wait(self._options.rescan_seconds)
            if seq == 0:
                agenda.wake()
            elif self._refused:
                self._hinted = max(self._hinted, seq)
                agenda.wake()  # what could not be had may be followed by what can
            else:
                self._hinted = max(self._hinted, seq)
                # What belongs together is committed together there: nothing to wait for.
                agenda.settle = 0.0 if self._layout == "generations" else self._options.settle_seconds
                agenda.hint([""])

    async def _feed_drift(self, agenda: Agenda) -> None:
        """Look at what somebody else changes in the mirror."""

        async def suspects(paths: frozenset[str]) -> Collection[str]:
            return await self._thread.run(lambda: self._drift.suspects(paths))

        path = self._options.path
        tree = path / "current" if self._rollout.is_release else path

        def on_mode(mode: str, reason: str) -> None:
            self._log.info("watch_mode", mode=mode, reason=reason)
            self._status.set(watching=mode)

        async with MirrorWatch(lambda: tree, suspects, on_mode=on_mode) as watch:
            while True:
                hints = await watch.next()
                if hints.rescan:
                    agenda.full()
                else:
                    self._suspect(hints.paths, agenda)

    def _suspect(self, paths: Collection[str], agenda: Agenda) -> None:
        self._suspected.update(paths)
        agenda.hint([""])

    async def _audit(self, agenda: Agenda) -> None:
        await keep_auditing(
            self._drift,
            self._thread.run,
            lambda paths: self._suspect(paths, agenda),
            rate=self._options.verify_rate,
        )

    async def _feed_pin(self, agenda: Agenda) -> None:
        """Take notice of a person's pin within a second."""
        known = self._pin_or_damage()
        while True:
            await asyncio.sleep(PIN_SECONDS)
            if (now := self._pin_or_damage()) != known:
                known = now
                agenda.wake()

    def _pin_or_damage(self) -> int:
        try:
            return self._pin()
        except DiskProblem:
            return -1  # the round says what is wrong with it

    async def _finish_round(self, result: PullResult, agenda: Agenda) -> None:
        agenda.done(self._full_seconds)
        self._tell(result)
        self._status.in_sync()

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
        self._status.set_problems(self._problems())

    async def _kept_round(self, *, full: bool, allowed: bool) -> PullResult:
        """Do a round of the daemon's.

        :param allowed: a person gave a word while something was held: on refused generations where there are any, else
            on deletions.
        """
        if allowed and self._holding:
            await self._thread.run(self._standing.forget_refusals)
            await asyncio.to_thread(self._allowance.clear)  # one word, one more try
            allowed, full = False, True
        self._checkout.explicit = self._pin() or self._options.pin
        self._status.set(channel=self._options.channel, pinned=self._checkout.explicit)
        self._holding = False
        try:
            return await self._round(full=full, allow_delete=allowed)
        except Held:
            self._holding = True
            raise

    async def _round(
        self, *, full: bool, allow_delete: bool, progress: Callable[[Progress], None] | None = None
    ) -> PullResult:
        """Bring the mirror up to the bucket: everything, or what changed since the last round.

        :raises SafetyHalt: removals are held, and nothing of the plan is done; or a generation is held back, and what
            is applied is as it must be.
        """
        started = time.monotonic()
        trip = _Trip(full, allow_delete, progress)
        result = trip.result
        trip.full = await self._finish_interrupted(result) or full
        while not await self._go(trip, started):
            pass
        if trip.full:
            self._list_at = started + LIST_SECONDS if trip.listed else self._list_at
            self._full_seconds = time.monotonic() - started
        held = self._checkout.held if self._layout == "generations" else None
        if trip.full and held is None:
            result.removed += await self._remove_extraneous(allow_delete=allow_delete)
        if trip.full or result.placed or result.removed:
            entries, size = await self._thread.run(lambda: (self._index.count_local(), self._index.local_bytes()))
            self._status.set(entries=entries, bytes=size)
        if held is not None:
            self._refused = True
            self._tell(result)
            raise held
        return result

    async def _go(self, trip: _Trip, started: float) -> bool:
        """Go to where the bucket points once; tell whether that was reached."""
        hinted, self._hinted = self._hinted, 0
        state = await self._bucket.state()
        await self._choose_layout(state, full=trip.full)
        listing = trip.full and not trip.checked and (started >= self._list_at or self._upstream.listing_wanted)
        trip.listed = trip.listed or listing
        try:
            found = await self._upstream.catch_up(state, full=listing, hinted=hinted)
            trip.touch(found)
            for path in trip.touched or ():
                self._failures.pop(path, None)
            await self._look_for_drift(trip)
            await self._bring_up(trip)
        except Overtaken:
            self._log.info("generation_overtaken")
        except WentBack:
            await self._go_back(trip.result)
            trip.full = True
        except ContentChanged as error:
            trip.regathered += 1
            if trip.regathered >= MAX_PASSES:
                raise
            self._log.info("gathered_again", reason=error.message)
            trip.full = True
        except (ObjectCorrupt, ObjectGone, FormatTooNew, Untrusted, Held):
            self._refused = True
            self._status.set_problems(self._problems())
            if not await self._is_overtaken():
                raise
        except NoGeneration:
            self._refused = True
            self._status.set_problems(self._problems())
            raise
        else:
            self._refused = False
            return True
        return False

    async def _look_for_drift(self, trip: _Trip) -> None:
        suspected, self._suspected = self._suspected, set()
        if trip.full and not trip.checked:
            await self._thread.run(self._drift.check)
            if self._rollout.is_release:
                await self._mend_link(trip)
            trip.checked = True
            trip.result.drifted += self._drift.drifted
        elif suspected:
            trip.touch(await self._thread.run(lambda: self._drift.check(suspected)))
            trip.result.drifted += self._drift.drifted

    async def _mend_link(self, trip: _Trip) -> None:
        if await self._thread.run(lambda: self._rollout.mend_link(self._options.drift)):
            trip.result.drifted += 1
            if self._options.drift == "report":
                self._drift.problems.note(Problem("current", "drift", f"it does not lead to {self._mirror.release}"))

    async def _remove_extraneous(self, *, allow_delete: bool) -> int:
        if self._options.extraneous != "delete" or self._upstream.in_doubt:
            return 0
        return await self._thread.run(
            lambda: self._extraneous.remove(spare=self._upstream.refuses, allow_delete=allow_delete)
        )

    async def _choose_layout(self, state: BucketState, *, full: bool) -> None:
        """Take up the layout that the bucket has now.

        :raises FormatTooNew: a newer version wrote it.
        :raises UsageError: a generation is asked for where there are none.
        """
        if self._layout is None or full or "syncd.layout" in state.metadata or state.created != self._layout_of:
            layout = await layout_of(self._bucket, state)
            if layout == "objects" and self._options.trust is not None:
                raise Untrusted(
                    f"folder {self._options.folder!r} has the objects layout, where nothing is signed",
                    hint='publish it with layout = "generations" and sign_seed_file, or remove trusted_keys',
                )
            remembered = await self._thread.run(lambda: self._index.note(LAYOUT))
            before = self._layout or remembered
            if before and before != layout:
                self._log.warning("layout_changed", before=before, now=layout)
                if layout == "objects":
                    await self._thread.run(self._objects.begin)
                await self._thread.run(self._checkout.begin)
                self._status.set(generation=0, root="", exact=False)
                self._list_at = 0.0
            if before != layout:
                await self._thread.run(lambda: self._index.set_note(LAYOUT, layout))
            self._layout, self._layout_of = layout, state.created
        if self._layout == "objects":
            self._refuse_settings()

    def _refuse_settings(self) -> None:
        """Refuse what only generations can do, rather than leave it out in silence.

        :raises UsageError: it is asked for.
        """
        options = self._options
        lacks = ""
        if self._rollout.is_release:
            lacks = "release mode cannot build from"
        elif self._checkout.explicit:
            lacks = "knows no generations"
        elif options.rollout.check or options.rollout.hooked:
            lacks = "runs no hooks"
        elif options.channel != HEAD:
            lacks = f"has no channels ({options.channel!r})"
        if lacks:
            raise UsageError(
                f"folder {options.folder!r} has the objects layout, which {lacks}",
                hint='take that out of [[subscribe]], or publish it with layout = "generations"',
            )

    @property
    def _upstream(self) -> Upstream:
        return self._checkout if self._layout == "generations" else self._objects

    async def _is_overtaken(self) -> bool:
        return self._layout == "generations" and await self._checkout.overtaken(self._hinted)

    # -- plan, stage, apply ----------------------------------------------------------------------------------------

    async def _bring_up(self, trip: _Trip) -> None:
        """Apply all differences in batches; each batch is staged whole before anything changes."""
        whole = self._layout == "generations" and await self._thread.run(self._rollout.builds_whole)
        touched, result = None if trip.full or whole else trip.touched, trip.result
        count = await self._thread.run(lambda: self._count(touched))
        reason = mirror_halt(
            count.removes, count.mirrored, count.adds, allowed=count.allowed, unexplained=count.unexplained
        )
        if reason and not trip.allow_delete:
            raise SafetyHalt(
                f"mirror of {self._options.folder!r}: {reason}",
                hint=f"if that is meant: syncd allow {self._options.folder}, or syncd pull --allow-delete",
            )
        meter = Meter(trip.progress, count.changes, count.size)
        self._status.set(pending=count.changes + count.removes)

        async def pages(after: str) -> tuple[list[Row], str | None]:
            def page() -> tuple[list[Row], str | None]:
                rows, last = self._differences(touched, after, GATHER_PATHS, whole=whole)
                return rows + (self._unlike() if whole and last is None else []), last

            return await self._thread.run(page)

        if count.changes or (whole and self._drift.held):
            await self._upstream.gather(pages, result, meter, self._is_overtaken)
        if self._layout == "generations":
            await self._roll_out(touched, result, meter)
        else:
            await self._apply(touched, result, meter)
            self._upstream.forget_removals()

    async def _roll_out(self, touched: Collection[str] | None, result: PullResult, meter: Meter) -> None:
        """Bring the generation that was gathered into place, with its hooks.

        :raises Held: a hook refuses it.
        :raises WentBack: hooks failed afterwards.
        """
        moving = await self._thread.run(self._rollout.moving)
        if moving and self._standing.refused(self._checkout.target.record):
            return  # what is announced is not gone to, and what is here cannot be read any more: it stays
        async with self._rollout.going():
            if self._rollout.is_release and not await self._thread.run(self._rollout.is_current):
                before = await self._thread.run(self._index.count_local)
                await self._rollout.release(
                    self._changes(touched, whole=True), self._drift.problems, frozenset(self._drift.held)
                )
                await self._thread.run(self._leave_tree)
                result.placed += max(0, await self._thread.run(self._index.count_local) - before)
            else:
                if moving and not self._rollout.is_release:
                    await self._rollout.check_mirror(self._changes(touched), frozenset(self._drift.held))
                await self._apply(touched, result, meter)
        self._upstream.forget_removals()
        await self._end_generation(result)

    def _changes(self, touched: Collection[str] | None, *, whole: bool = False) -> Iterator[Row]:
        return (row for row in self._index.diff(touched) if not self._left_alone(*row, whole=whole))

    def _unlike(self) -> list[Row]:
        """Return files that are not what the index says of them, and stay so, as files that are not here."""
        rows = ((path, None, self._index.remote(path)) for path in sorted(self._drift.held))
        return [row for row in rows if row[2] is not None]

    def _leave_tree(self) -> None:
        """Another release is current: what was wrong with the one before is not wrong with it."""
        self._drift.leave()
        for path, failure in self._failures.items():
            if self._drift.problems.code(path) == failure.problem.code:
                self._drift.problems.clear(path)
        self._failures.clear()
        self._left_as_found.clear()

    async def _apply(self, touched: Collection[str] | None, result: PullResult, meter: Meter) -> None:
        begun = False
        for _ in range(MAX_PASSES):
            after: str | None = ""
            batches = 0
            while after is not None:
                begin = after
                rows, after = await self._thread.run(lambda begin=begin: self._differences(touched, begin, BATCH_PATHS))  # type: ignore[misc]
                if not rows:
                    continue
                if self._layout == "generations" and not begun:
                    await self._thread.run(self._checkout.begin_apply)
                    begun = True
                await self._apply_batch(rows, result, meter)
                batches += 1
            if batches <= 1:
                break
            # A directory whose children were removed by a later batch than its own is removed by the next pass.

    async def _finish_interrupted(self, result: PullResult) -> bool:
        """Roll forward a generation whose application was cut off: what it needs is staged, no network is asked.

        :returns: whether it was gone back from, so that everything is to be looked at.
        """
        interrupted = await self._thread.run(lambda: self._checkout.interrupted)
        try:
            if interrupted and self._rollout.is_release and not self._mirror.release:
                await self._thread.run(self._checkout.give_up_apply)  # what it was applied to is gone
                return True
            if interrupted:
                self._layout = "generations"
                self._log.info("generation_rolled_forward")
                async with self._rollout.going():
                    await self._apply(None, result, Meter(None))
                self._failures.clear()  # this round compares everything, and repairs what was changed meanwhile
                await self._end_generation(result)
            elif self._standing.due:
                self._log.info("hooks_run_again", generation=self._standing.number)
                await self._rollout.finish()
        except WentBack:
            await self._go_back(result)
            return True
        except StagedVanished:
            return True
        except Held:
            if not self._rollout.is_release:
                await self._thread.run(self._checkout.give_up_apply)  # from the midst of it back to the one before
            return True
        return False

    async def _go_back(self, result: PullResult) -> None:
        """Be at the generation before at once, where that needs no server; what the bucket says comes after it."""
        number, reason = self._standing.number, self._standing.refused(self._standing.record)
        if await self._rollout.go_back():
            await self._end_generation(result)
        self._layout = "generations"  # nothing else can be gone back from
        self._checkout.problems.note(Problem("", "generation_held", f"generation {number} failed here: {reason}"))
        self._status.set_problems(self._problems())

    async def _end_generation(self, result: PullResult) -> None:
        """Remember the generation that the mirror has now.

        :raises DiskProblem: some of it is missing here; the next round stages it again.
        """

        def ended() -> tuple[bool, Applied]:
            complete = not self._checkout.missing()
            exact = not (self._drift.held or self._left_as_found or self._drift.problems.all())
            return complete, self._checkout.end_apply(complete=complete, exact=exact)

        complete, applied = await self._thread.run(ended)
        result.generation, result.root = applied.number, applied.root
        self._status.set(generation=applied.number, root=applied.root, exact=applied.exact)
        if not complete:
            raise StagedVanished("staged content vanished before it was put in place", hint="it is staged again")
        await self._rollout.finish()
        await self._checkout.learn()

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
                count.allowed += self._upstream.allows(path)
                count.unexplained += not self._upstream.explains(path)
        if count.removes:
            count.mirrored = self._index.count_local(dirs=False)
        return count

    def _differences(
        self, touched: Collection[str] | None, after: str, limit: int, *, whole: bool = False
    ) -> tuple[list[Row], str | None]:
        """Return a page of what is to be done, and the path to go on after, ``None`` at the end."""
        rows = []
        for row in self._index.diff(touched, after=after):
            if self._left_alone(*row, whole=whole):
                continue
            rows.append(row)
            if len(rows) >= limit:
                return rows, row[0]
        return rows, None

    def _left_alone(self, path: str, local: LocalRow | None, remote: RemoteRow | None, *, whole: bool = False) -> bool:
        """Tell whether a difference is to stay: drift under a policy that keeps it, a directory still in use.

        :param whole: a whole tree is built, in which nothing is missing for what is wrong with the one that is here.
        """
        if whole and remote is not None:
            return False
        if path in self._drift.held:
            return True
        if remote is None:
            if self._upstream.refuses(path):
                return True  # what is here stays
            if self._upstream.in_doubt and not self._upstream.explains(path):
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
        fetches = await self._upstream.fetch(rows, result, meter)
        crash_point("batch_staged")
        outcome = await self._thread.run(lambda: self._commit(rows, fetches))
        crash_point("between_pages")
        seqs = {path: remote.seq for path, _, remote in rows if remote is not None}
        for problem in outcome.problems:
            self._drift.problems.note(problem)
            self._note_failure(problem, seqs)
        self._left_as_found.update(outcome.drifted)
        for placed in outcome.placed:
            self._left_as_found.discard(placed.path)
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
            self._upstream.batch_ended()
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
                if not fetch.staged and fetch.in_place is None:
                    continue  # lost since it was gathered: the next round stages it again
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
