"""A bucket of the generations layout as a mirror sees it: which generation to go to, and what that is made of.

Rules kept here:
 * the channel decides; a read that is older than what was seen in the same bucket is stale and changes nothing; one
   that stays so is a problem. Nothing that the bucket says, or does not, keeps an alarm from being raised;
 * what is gone back to is judged anew: what may be applied today, not what might be when it was;
 * only directory nodes that differ are read, and the ``remote`` half of the index changes in one transaction: it
   describes one generation, exactly;
 * a generation is had whole or not at all: what cannot be read refuses all of it, is reported, and is tried again
   later and later; a newer one is tried at once;
 * numbers, records and digests are remembered across restarts.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import BadName, ObjectCorrupt, ObjectGone, SafetyHalt, SyncdError, Unavailable, Untrusted
from syncd.gather import UNREADABLE, Gatherer, Unfetchable
from syncd.index.checkout import CheckoutTables, Walked, place_text
from syncd.mirror import PART_NAME
from syncd.model import Entry, Kind, Problem
from syncd.moves import time_text
from syncd.nodes import Location, NodeRef, digest_of
from syncd.paths import MAX_PATH_BYTES, check_path, is_private, printable
from syncd.problems import ProblemBook as PathBook
from syncd.store.base import CHANNELS, HEAD
from syncd.trees import TreeReader

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator

    from syncd.guard import Guard
    from syncd.index import Index
    from syncd.mirror import Mirror
    from syncd.modes import ModePolicy
    from syncd.nodes import Node
    from syncd.progress import Meter
    from syncd.rules import Rules
    from syncd.service import FolderThread
    from syncd.standing import Standing
    from syncd.store.base import Bucket, BucketState
    from syncd.trees import Commit
    from syncd.upstream import Fetch, Pages, PullResult, Row

log = structlog.get_logger()

NODES_AT_ONCE: Final = 64
NODE_BYTES_AT_ONCE: Final = 8 * 1024 * 1024
_DIR = Kind.DIR
MAX_ENTRIES: Final = 20_000_000
"""Entries of one walk: a forged tree may name one directory a thousand times on every level."""
FIRST_RETRY_SECONDS: Final = 30.0
MAX_RETRY_SECONDS: Final = 3600.0
STALE_TRIES: Final = (0.02, 0.05, 0.1, 0.2)
"""Waits, in seconds, for a replica that is behind the hint we came for, or behind what we have."""
BEHIND_SECONDS: Final = 60.0
"""How long the channel may be read as it was before: replicas are behind for less than a second."""

TARGET: Final = "target"
APPLIED: Final = "applied"
APPLYING: Final = "applying"
STEP: Final = "step"
BEHIND: Final = "behind"
"""Since when (seconds since the epoch) the channel is read as it was before; 0: it is not."""


class NoGeneration(Unavailable):
    """The channel points at no generation yet."""


class Held(SafetyHalt):
    """The channel points at a generation that is not gone to: what is applied stays, and is kept as it must be."""


@dataclass(frozen=True, slots=True)
class Target:
    """The generation that the ``remote`` half of the index describes.

    :ivar record: digest of its record; "" where none is described.
    :ivar root: its tree digest.
    :ivar files, size: as its record says.
    :ivar allowed: a person allowed the removal of everything at the publisher.
    :ivar partial: the mirror's rules leave something of it out.
    :ivar rules: fingerprint of these rules.
    :ivar bucket: which bucket of that name it came from.
    :ivar seq: sequence of the channel's metadata message last seen there.
    :ivar highest, highest_record: the highest number ever seen, and its record.
    """

    number: int = 0
    record: str = ""
    root: str = ""
    files: int = 0
    size: int = 0
    allowed: bool = False
    partial: bool = False
    rules: str = ""
    bucket: str = ""
    seq: int = 0
    highest: int = 0
    highest_record: str = ""


@dataclass(frozen=True, slots=True)
class Applied:
    """The generation that the mirror has.

    :ivar number: 0 for none.
    :ivar root: the generation's own tree digest; the mirror's differs where ``exact`` is not set.
    :ivar exact: nothing of it is left out, held back or in trouble.
    :ivar rules: fingerprint of what decides which part of a tree the mirror has, and with which modes.
    """

    number: int = 0
    record: str = ""
    root: str = ""
    exact: bool = False
    rules: str = ""

    @property
    def tree(self) -> str:
        """What tells this tree, as the mirror takes it, from others."""
        return f"{self.root} {self.rules}"


_N = TypeVar("_N", Target, Applied)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A generation that could not be had."""

    record: str
    error: SyncdError
    tries: int
    not_before: float


class _Count:
    """What a walk has met, against what the generation's record says: a forged tree ends early.

    :ivar left_out: the mirror's rules leave something out.
    """

    def __init__(self, target: Target) -> None:
        self._files = target.files
        self._size = target.size
        self._entries = MAX_ENTRIES
        self.left_out = False

    def add(self, files: int, size: int) -> None:
        """Count an entry.

        :param files: 0 for a directory, 1 for anything else.
        :raises ObjectCorrupt: there are more than the record says.
        """
        self._entries -= 1
        self._files -= files
        self._size -= size
        if self._entries < 0 or self._files < 0 or self._size < 0:
            raise ObjectCorrupt("the tree holds more than its generation's record says")


class KeptNames:
    """Staged content that outlives a restart: what is noted, and large files in the making that are still wanted."""

    def __init__(self, tables: CheckoutTables) -> None:
        self._tables = tables

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        part = PART_NAME.fullmatch(name)
        return self._tables.is_announced(part[1]) if part is not None else self._tables.is_staged(name)


class _NodeCache:
    """The chunks of large nodes, kept in the index. Called from other threads than the folder's."""

    def __init__(self, tables: CheckoutTables, thread: FolderThread) -> None:
        self._tables = tables
        self._thread = thread
        self.used = False

    def get(self, digests: Collection[str]) -> dict[str, bytes]:
        self.used = True
        return self._thread.call(lambda: self._tables.get_cached(digests))

    def put(self, blobs: dict[str, bytes]) -> None:
        self._thread.call(lambda: self._tables.put_cached(blobs))


class ProblemBook(PathBook):
    """Of the whole generation there may be several problems at once, one of each code."""

    def note(self, problem: Problem) -> None:
        """See :class:`syncd.problems.ProblemBook`."""
        key = f"{problem.path}\0{problem.code}"
        if self._now.get(key, self._before.get(key)) != problem:
            self._log.warning(self._event, path=problem.path, code=problem.code, text=problem.text)
        self._now[key] = problem


class Kept(Protocol):
    """Generations that are materialised here, beside the one that is current."""

    async def ready(self, target: Target) -> str:
        """Return the name of one that may be gone to, "" where there is none.

        :raises Held: there is one, and it is refused.
        """
        ...

    def take(self, name: str) -> None:
        """Go to it; both halves of the index and its notes are those of that time. Blocking.

        :raises DiskProblem: what is known of it cannot be read back.
        """


class Checkout:
    """One bucket of generations. See :class:`syncd.upstream.Upstream`.

    :ivar tables: of the index, for what is staged and announced.
    :ivar problems: why the newest generation cannot be had.
    :ivar explicit: go to this generation, whatever the channel says; 0: to the channel's.
    :ivar held: why the channel's generation is not gone to, ``None`` where it is.
    :ivar kept: takes up a generation that is materialised here already and returns whether there was one.
    """

    in_doubt = False
    listing_wanted = False

    def __init__(
        self,
        bucket: Bucket,
        channel: str,
        index: Index,
        mirror: Mirror,
        rules: Rules,
        thread: FolderThread,
        *,
        guard: Guard,
        standing: Standing,
        modes: ModePolicy,
        now: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._guard = guard
        self._standing = standing
        self._modes = modes
        self._bucket = bucket
        self._channel = channel
        self._index = index
        self._mirror = mirror
        self._rules = rules
        self._thread = thread
        self._now = now
        self._clock = clock
        self._log = log.bind(folder=bucket.name, role="subscribe")
        self.tables = CheckoutTables(index)
        self._gatherer = Gatherer(bucket, index, self.tables, mirror, thread)
        self._refusal: _Refusal | None = None
        self._looked_for = 0
        self._learned = ""
        self._target = _target(index.note(TARGET))
        self._behind_since = _seconds(index.note(BEHIND))
        self.problems = ProblemBook(self._log, "generation_refused")
        self.explicit = 0
        self.held: SyncdError | None = None
        self.kept: Kept | None = None
        self.commit: Commit | None = None
        applied = self.applied()
        standing.adopt(applied.number, applied.record)

    # -- which generation ----------------------------------------------------------------------------------------------

    async def catch_up(self, state: BucketState, *, full: bool, hinted: int) -> set[str] | None:
        """See :meth:`Upstream.catch_up`.

        :raises NoGeneration: nothing is committed yet.
        :raises ObjectCorrupt, ObjectGone, FormatTooNew: the generation cannot be read; the index is as it was.
        """
        self.problems.begin()
        self._guard.begin(state)
        try:
            commit = await self._resolve(state, min(hinted, state.last_seq))
        except (NoGeneration, Untrusted, Held, *UNREADABLE) as error:
            if isinstance(error, UNREADABLE):
                self.problems.note(Problem("", "bad_generation", error.message))
            await self._raise_alarms()
            raise
        await self._raise_alarms()
        touched: set[str] | None = set()
        if commit is not None:
            self._check_refused(commit)
            touched = await self._go_to(commit, state)
        return None if full else touched

    async def _raise_alarms(self) -> None:
        """Say what holds whatever the bucket said, or did not, in this round."""
        try:
            await self._guard.follow()
        except Untrusted as error:  # what is remembered is damaged
            if self.held is None:
                self.held = error
                self.problems.note(Problem("", "generation_held", error.message))
        if self.explicit:
            return  # what a person asked for by its number does not end
        if since := self._guard.stale_since():
            text = f"nothing fresh has arrived: channel {self._channel!r} was good until {since}"
            self.problems.note(Problem("", "stale", text))
        if self._behind_since and self._clock() - self._behind_since >= BEHIND_SECONDS:
            text = (
                f"channel {self._channel!r} is read as it was before what is here, since"
                f" {time_text(self._behind_since)}: a replica far behind, a bucket that was restored, or somebody who"
                " shows an old state"
            )
            self.problems.note(Problem("", "channel_behind", text))

    async def _mark_behind(self, *, behind: bool) -> None:
        """Remember since when the channel is read as it was before, or that it is not."""
        now = self._clock()
        since = (self._behind_since if 0 < self._behind_since <= now else now) if behind else 0.0
        if since != self._behind_since:
            await self._thread.run(lambda: self._index.set_note(BEHIND, repr(since)))
            self._behind_since = since

    async def _resolve(self, state: BucketState, hinted: int) -> Commit | None:
        """Return where to go; ``None`` to stay: what was read is older than what we saw before, or is not gone to."""
        reader = TreeReader(self._bucket)
        self.held = None
        if self.explicit:
            numbered = await self._numbered(reader, self.explicit)
            return await self._unless_refused(reader, numbered) if numbered is not None else None
        seen = self._target
        same_bucket = seen.bucket == state.created and state.last_seq >= seen.seq
        least = max(hinted, seen.seq) if same_bucket else hinted
        commit = await reader.channel(self._channel)
        for wait in STALE_TRIES:
            if commit is not None and commit.seq >= least:
                break
            await asyncio.sleep(wait)
            commit = await reader.channel(self._channel)
        if commit is None:
            raise self._nowhere()
        await self._mark_behind(behind=same_bucket and commit.seq < seen.seq)
        if same_bucket:
            if commit.seq < seen.seq:
                self._log.info("stale_read_ignored", seq=commit.seq, seen=seen.seq)
                return None
            if commit.generation.number < seen.number and commit.seq > seen.seq:
                self._log.info("channel_moved_back", generation=commit.generation.number, before=seen.number)
        elif seen.bucket:
            self._log.warning("bucket_replaced", bucket=self._bucket.name)
        return await self._allowed(reader, commit)

    def _nowhere(self) -> NoGeneration:
        folder, channel = self._bucket.name, self._channel
        if channel == HEAD:
            return NoGeneration(
                f"channel {channel!r} of {folder!r} points at no generation yet",
                hint="its publisher has not committed any; the mirror stays as it is",
            )
        return NoGeneration(
            f"there is no channel {channel!r} of {folder!r}, or it points at no generation",
            hint=f"look: syncd channels {folder}; make it: syncd promote {folder} N --channel {channel}",
        )

    async def _numbered(self, reader: TreeReader, number: int) -> Commit | None:
        commit = await reader.generation(number)
        if commit is None and self._target.number == number:
            return None  # collected meanwhile: what is here stays, and is kept as it must be
        if commit is None:
            raise ObjectGone(
                f"generation {number} of {self._bucket.name!r} does not exist (any more)",
                hint=f"see: syncd log {self._bucket.name}; a pin is let go with: syncd pin {self._bucket.name} --clear",
            )
        await self._guard.judge_number(commit)
        return commit

    async def _allowed(self, reader: TreeReader, commit: Commit) -> Commit | None:
        """Return the channel's generation, or, where that must not or shall not be gone to, the one to be at.

        :raises Untrusted, Held: there is none: nothing was ever applied here.
        """
        try:
            await self._guard.judge(commit)
        except Untrusted as error:
            self.held = error
            return await self._stay(reader, error)
        return await self._unless_refused(reader, commit)

    async def _unless_refused(self, reader: TreeReader, commit: Commit) -> Commit | None:
        reason = self._standing.refused(commit.digest)
        if not reason:
            return commit
        self.held = Held(
            f"generation {commit.generation.number} of {self._bucket.name!r} is held back: {reason}",
            hint=f"publish a newer one, or have it tried again: syncd allow {self._bucket.name}",
        )
        return await self._stay(reader, self.held)

    async def _stay(self, reader: TreeReader, held: SyncdError) -> Commit | None:
        """Return the generation to be at instead; ``None`` where that is what the index describes.

        What is gone back to is judged by today's trust: keys may have been removed since it was applied. Without that
        the host stays where it is, as if there were nothing to go back to.

        :raises Untrusted, Held: there is none.
        """
        self.problems.note(Problem("", "generation_held", held.message))
        number, record = self._standing.at
        here = None
        if number and record != self._standing.record and (self._guard.active or self._target.record != record):
            here = await _exactly(reader, number, record)
            why = "the bucket does not have it any more"
            try:
                if here is not None:
                    await self._guard.judge_number(here)
            except Untrusted as error:
                here, why = None, error.message
            if here is None:
                text = f"generation {number}, the last one that ended well here, is not gone back to: {why}"
                self.problems.note(Problem("", "not_gone_back", text))
                self.held = held = type(held)(f"{held.message}; {text}", hint=held.hint)
                number, record = self._standing.number, self._standing.record
        if not number:
            raise held
        if self._target.record == record:
            return None
        if here is None:
            here = await _exactly(reader, number, record)
        if here is None:
            raise held  # what is applied cannot be read any more, and what is announced shall not be applied
        return here

    async def overtaken(self, hinted: int) -> bool:
        """Tell whether the channel has moved on since the last :meth:`catch_up`.

        :param hinted: the highest sequence hinted since; without a new one nobody is asked.
        """
        if self.explicit or hinted <= max(self._looked_for, self._target.seq):
            return False
        self._looked_for = hinted
        info = await self._bucket.get_info(CHANNELS + self._channel)
        return info is not None and info.seq > self._target.seq

    # -- what is refused -----------------------------------------------------------------------------------------------

    def _check_refused(self, commit: Commit) -> None:
        refusal = self._refusal
        if refusal is None or refusal.record != commit.digest or self._now() >= refusal.not_before:
            return
        self.problems.note(Problem("", "bad_generation", refusal.error.message))
        raise refusal.error

    def _refuse(self, record: str, error: SyncdError, problem: Problem) -> None:
        """Note that a generation cannot be had; the next try comes later and later."""
        before = self._refusal
        tries = before.tries + 1 if before is not None and before.record == record else 0
        wait = min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(tries, 10))
        self._refusal = _Refusal(record, error, tries, self._now() + wait)
        self.problems.note(problem)

    # -- what it is made of --------------------------------------------------------------------------------------------

    async def _go_to(self, commit: Commit, state: BucketState) -> set[str] | None:
        """Make the ``remote`` half describe a generation."""
        self.commit = commit
        generation, seen = commit.generation, self._target
        same_bucket = seen.bucket == state.created
        target = Target(
            number=generation.number,
            record=commit.digest,
            root=generation.root.tree,
            files=generation.files,
            size=generation.size,
            allowed=generation.allowed,
            partial=seen.partial,
            rules=self._fingerprint,
            bucket=state.created,
            seq=(seen.seq if same_bucket else 0) if self.explicit else commit.seq,
            highest=seen.highest,
            highest_record=seen.highest_record,
        )
        if generation.number >= seen.highest:
            target = replace(target, highest=generation.number, highest_record=commit.digest)
        if (target.record, target.rules) == (seen.record, seen.rules):
            if target != seen:
                await self._thread.run(lambda: self._keep_target(target))
            return set()
        if self.kept is not None and (name := await self.kept.ready(target)):
            await self._thread.run(lambda: self.take_kept(name, target))
            return None
        if target.rules != seen.rules:
            await self._thread.run(self.tables.forget_nodes)
        try:
            return await self._walk(generation.root, target)
        except UNREADABLE as error:
            self._refuse(commit.digest, error, Problem("", "bad_tree", error.message))
            raise

    async def _walk(self, root: NodeRef, target: Target) -> set[str] | None:
        cache = _NodeCache(self.tables, self._thread)
        reader = TreeReader(self._bucket, cache)
        self._gatherer.at_hand = reader.kept
        await self._thread.run(lambda: self.tables.begin_walk(root))
        count = _Count(target)
        while dirs := await self._thread.run(lambda: self.tables.next_dirs(NODES_AT_ONCE, NODE_BYTES_AT_ONCE)):
            nodes = await reader.nodes([ref for _, ref in dirs])
            found = list(zip((path for path, _ in dirs), nodes, strict=True))
            await self._thread.run(lambda found=found: self._take_nodes(found, count))  # type: ignore[misc]

        def finish() -> set[str] | None:
            with self._index.transaction():
                step = int(self._index.note(STEP, "0")) + 1
                touched = self.tables.finish_walk(self._bucket.name, "generation", step)
                self._index.set_note(STEP, str(step))
                partial = count.left_out or (target.partial and target.rules == self._target.rules)
                self._keep_target(replace(target, partial=partial))
            if cache.used:
                self.tables.drop_unused_cached()
            return touched

        touched = await self._thread.run(finish)
        crash_point("walked")
        return touched

    def take_kept(self, name: str, target: Target) -> None:
        """Go to a generation that is materialised here: both halves of the index are those of that time. Blocking.

        :raises DiskProblem: what is known of it cannot be read back.
        """
        assert self.kept is not None
        self.kept.take(name)
        kept = _target(self._index.note(TARGET))
        self._keep_target(replace(target, partial=kept.partial))

    def back_to(self, note: str) -> Target | None:
        """Return where to go, to be at a generation that was the target before; ``None``: with other rules than now.

        :param note: what was noted of it then.
        """
        then, now = _target(note), self._target
        if then.rules != self._fingerprint:
            return None
        seen = {name: getattr(now, name) for name in ("bucket", "seq", "highest", "highest_record")}
        return replace(then, **seen)

    async def trusts(self, commit: str) -> bool:
        """Tell whether today's keys have signed a generation that is kept here (see :attr:`commit_note`)."""
        if not self._guard.active:
            return True
        try:
            fields = json.loads(commit)
            record = fields["record"].encode()
            if digest_of(record) != self._standing.at[1]:
                return False
            await self._guard.judge_kept(record, fields["signatures"])
        except (ValueError, TypeError, KeyError, AttributeError, Untrusted):
            return False
        return True

    @property
    def commit_note(self) -> str:
        """The target's record and who signed it, as text to be kept; "" where that is not known."""
        commit = self.commit
        if commit is None or commit.digest != self._target.record:
            return ""
        return json.dumps({"record": commit.record.decode(), "signatures": commit.signatures})

    @property
    def _fingerprint(self) -> str:
        """What decides which part of a tree the mirror has, and how."""
        return " ".join(filter(None, (self._rules.fingerprint, self._modes.fingerprint)))

    def _keep_target(self, target: Target) -> None:
        self._index.set_note(TARGET, json.dumps(asdict(target)))
        self._target = target

    def _take_nodes(self, nodes: list[tuple[str, Node]], count: _Count) -> None:
        with self._index.transaction():
            for path, node in nodes:
                self.tables.add_directory(path, self._children(path, node, count))

    def _children(self, path: str, node: Node, count: _Count) -> Iterator[Walked]:
        """Yield what takes part of a directory's children, and what must be descended into.

        :raises ObjectCorrupt: a name that must not become a path, or more than the generation's record says.
        """
        prefix = f"{path}/" if path else ""
        room = MAX_PATH_BYTES - len(prefix.encode())
        rules = self._rules
        modes = self._modes if self._modes.fingerprint else None
        try:
            for name, kind, mode, mtime_ns, size, digest, target, where, blob, offset, length in node.rows():
                full = prefix + name
                if not path or is_private(name) or len(name) * 4 > room:  # the node has checked the name by itself
                    check_path(full)
                if modes is not None:
                    kept = modes.apply(Entry(kind, mode, mtime_ns)).mode
                    count.left_out = count.left_out or kept != mode
                    mode = kept  # noqa: PLW2901
                if kind is _DIR:
                    count.add(0, 0)
                    takes = rules.takes(full, is_dir=True)
                    count.left_out = count.left_out or not takes
                    if takes or rules.may_descend(full):
                        below = NodeRef(digest, Location(where, blob, offset), length)
                        yield Walked(name, kind, mode, mtime_ns, 0, "", "", "", below, takes)
                    continue
                count.add(1, size)
                if rules.takes(full, is_dir=False):
                    yield Walked(name, kind, mode, mtime_ns, size, digest, target, place_text(where, blob, offset))
                else:
                    count.left_out = True
        except (BadName, ObjectCorrupt) as error:
            raise ObjectCorrupt(f"directory {printable(path) or '.'}: {error.message}") from error

    # -- removals ------------------------------------------------------------------------------------------------------

    def refuses(self, path: str) -> bool:  # noqa: ARG002 - a generation is had whole or not at all
        """See :class:`syncd.upstream.Upstream`."""
        return False

    def explains(self, path: str) -> bool:  # noqa: ARG002 - a generation says all that there is
        """See :class:`syncd.upstream.Upstream`."""
        return True

    def allows(self, path: str) -> bool:  # noqa: ARG002
        """See :class:`syncd.upstream.Upstream`."""
        return self._target.allowed

    def forget_removals(self) -> None:
        """See :class:`syncd.upstream.Upstream`."""

    # -- content and applying ------------------------------------------------------------------------------------------

    async def gather(
        self, pages: Pages, result: PullResult, meter: Meter, overtaken: Callable[[], Awaitable[bool]]
    ) -> None:
        """Stage all content of the generation; nothing in the mirror changes before.

        :raises Overtaken: the channel has moved on.
        :raises ObjectCorrupt, ObjectGone, FormatTooNew: some content cannot be had, so nothing is applied.
        """
        try:
            await self._gatherer.gather(pages, result, meter, overtaken)
        except Unfetchable as failed:
            code = "content_gone" if isinstance(failed.error, ObjectGone) else "bad_content"
            error = type(failed.error)(f"{printable(failed.path)}: {failed.error.message}", hint=failed.error.hint)
            self._refuse(self._target.record, error, Problem(failed.path, code, failed.error.message))
            raise error from failed
        crash_point("generation_staged")

    async def fetch(self, rows: list[Row], result: PullResult, meter: Meter) -> dict[str, Fetch]:  # noqa: ARG002
        """Return what :meth:`gather` staged for one batch."""
        return await self._thread.run(lambda: self._gatherer.staged(rows))

    def batch_ended(self) -> None:
        """See :class:`syncd.upstream.Upstream`: what is staged for later batches stays."""

    @property
    def interrupted(self) -> bool:
        """Whether a generation is applied in part: it has to be finished first. Blocking."""
        return bool(self._index.note(APPLYING))

    def begin(self) -> None:
        """The layout changed: the ``remote`` half describes no generation of ours. Blocking."""
        with self._index.transaction():
            self.tables.forget_nodes()
            self._keep_target(Target())

    async def learn(self) -> None:
        """See :meth:`Gatherer.learn`; what cannot be had now is tried after the next generation."""
        if self._learned == self._target.record:
            return
        self._learned = self._target.record
        try:
            await self._gatherer.learn()
        except UNREADABLE as error:
            self._log.info("chunks_not_learned", reason=error.message)

    def begin_apply(self) -> None:
        """From here on the generation is rolled forward. Blocking."""
        if self._index.note(APPLYING) != str(self._target.number):
            self._index.set_note(APPLYING, str(self._target.number))
        crash_point("before_first_page")

    def give_up_apply(self) -> None:
        """What was applied in part is not there any more. Blocking."""
        self._index.set_note(APPLYING, "")

    def end_apply(self, *, complete: bool, exact: bool) -> Applied:
        """Remember what the mirror has, and let go of what was staged. Blocking.

        The hooks that are due after it are noted in the same transaction, so that a crash before they ran is made good.

        :param complete: ``False``: some content was not there; the next round stages it.
        :raises DiskProblem: the disk refused.
        """
        target = self._target
        self._gatherer.let_go()
        applied = self.applied()
        if complete:
            crash_point("generation_applied")
            exact = exact and not target.partial
            applied = Applied(target.number, target.record, target.root, exact, target.rules)
        with self._index.transaction():
            if complete and self._standing.record != applied.record:
                self._standing.arrived(applied.number, applied.record, applied.tree)
            if complete and self.applied() != applied:
                self._index.set_note(APPLIED, json.dumps(asdict(applied)))
            if self._index.note(APPLYING):
                self._index.set_note(APPLYING, "")
        crash_point("remembered")
        if complete:
            self._refusal = None
            self._gatherer.tidy()
        return applied

    @property
    def target(self) -> Target:
        """The generation that the ``remote`` half of the index describes."""
        return self._target

    def applied(self) -> Applied:
        """Return which generation the mirror has. Blocking."""
        return _noted(Applied(), self._index.note(APPLIED))

    def keeps(self) -> KeptNames:
        """Return the names of staged content that a start must not sweep."""
        return KeptNames(self.tables)

    def missing(self) -> bool:
        """Tell whether staged content was not there when a batch needed it, and forget it."""
        return self._gatherer.take_missing()


async def _exactly(reader: TreeReader, number: int, record: str) -> Commit | None:
    """Return a generation by number and record, ``None`` where the bucket has no such one (any more)."""
    found = await reader.generation(number)
    return found if found is not None and found.digest == record else None


def _seconds(note: str) -> float:
    """Read what :meth:`Checkout._mark_behind` wrote; what is no moment is none."""
    try:
        return float(note)
    except ValueError:
        return 0.0


def _target(note: str) -> Target:
    """Read what :meth:`Checkout._keep_target` wrote; where it is damaged everything is read anew."""
    return _noted(Target(), note)


def _noted(blank: _N, note: str) -> _N:
    """Read a note; ``blank`` where there is none, or where it is damaged: also by a value of another type."""
    try:
        found = replace(blank, **json.loads(note)) if note else blank
    except (ValueError, TypeError, RecursionError):
        return blank
    sound = all(type(getattr(found, name)) is type(value) for name, value in asdict(blank).items())
    return found if sound else blank
