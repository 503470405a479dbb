"""What may go: generations beyond what is kept, and blobs that no kept generation reaches (mark and sweep).

Rules kept here:
 * a generation goes when it is not among the newest ``keep_generations``, or was replaced more than ``keep_days`` ago;
   never the newest, never one that a channel points at, never within the grace time after it was replaced;
 * a blob goes when nothing kept reaches it, and has reached it for the grace time: a reader in flight is not cut off;
 * ages are counted by the server's clock alone: the publisher's may be wrong, or set right in between;
 * what is removed is forgotten first. A crash in between sends a blob again that is still there, never the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import ObjectGone
from syncd.model import Kind
from syncd.nodes import RECIPE_LEVELS, Node, NodeRef, Where, decode_recipe
from syncd.relayout import is_blob, is_history
from syncd.store.base import CHANNELS, NUID_PREFIX, BadMeta, ObjectInfo
from syncd.trees import TreeReader, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from syncd.index.blobs import Blobs
    from syncd.outlet import PublishOptions
    from syncd.service import FolderThread
    from syncd.store.base import Bucket, BucketState

log = structlog.get_logger()

COLLECT_SECONDS: Final = 3600.0
WALK_AT_ONCE: Final = 64
FREE_AT_ONCE: Final = 500
FREED_SECONDS: Final = 3600.0
"""How long a removal is remembered: until its marker in the stream has expired for certain."""
SPARSE: Final = 0.25
"""A pack of which less than this share is still in use is packed anew."""
MAX_REPACKED_BYTES: Final = 64 * 1024 * 1024
"""Live bytes packed anew in one collection."""
_DAY: Final = 86400.0


@dataclass(slots=True)
class Collected:
    """What a collection found and did.

    :ivar blobs, size: blobs in the bucket before, and its stream's bytes.
    :ivar freed_blobs: removed (or, in a dry run, to be removed, the grace time not counted).
    :ivar size_after: the stream's bytes afterwards; the server frees with some delay.
    :ivar repacked: packs that are packed anew with the next commit.
    """

    blobs: int = 0
    size: int = 0
    freed_blobs: int = 0
    size_after: int = 0
    generations_kept: int = 0
    generations_removed: int = 0
    repacked: int = 0


@dataclass(frozen=True, slots=True)
class Aged:
    """A generation as retention sees it.

    :ivar replaced: when the next one was committed, seconds since the epoch; ``None`` for the newest.
    """

    number: int
    replaced: float | None


def expired(
    generations: Iterable[Aged], held: frozenset[int], *, keep: int, days: float, grace: float, now: float
) -> list[int]:
    """Return the numbers of the generations that may go.

    :param held: numbers that channels point at.
    :param keep: how many of the newest stay at most, 0: all.
    :param days: how long one stays after it was replaced, 0: for ever.
    :param grace: seconds that one stays after it was replaced whatever the other two say.
    """
    gone = []
    for place, one in enumerate(sorted(generations, key=lambda one: -one.number)):
        if one.replaced is None or one.number in held or now - one.replaced < grace:
            continue
        if (keep and place >= keep) or (days and now - one.replaced > days * _DAY):
            gone.append(one.number)
    return sorted(gone)


class Retention:
    """Collects one bucket's garbage."""

    def __init__(
        self,
        options: PublishOptions,
        bucket: Bucket,
        blobs: Blobs,
        thread: FolderThread,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._bucket = bucket
        self._blobs = blobs
        self._thread = thread
        self._clock = clock
        self._log = log.bind(folder=options.folder, role="publish")
        self._next = 0.0
        self._clean: frozenset[int] = frozenset()
        self._loose = 0

    def doubt(self) -> None:
        """Something failed: it may have left blobs that nothing reaches."""
        self._clean = frozenset()

    async def run(self) -> bool:
        """Collect when it is time to, and something can have become loose; tell whether packs are to be packed anew."""
        now = self._clock()
        pause = min(COLLECT_SECONDS, max(1.0, self._options.grace_seconds))
        if not self._next or self._next - now > pause:  # the first time, or the clock was set back
            self._next = now + pause
        if now < self._next:
            return False
        self._next = now + pause
        history = await self._history()
        now = self._time(await self._bucket.state())
        if frozenset(history.generations) == self._clean and not self._expired(history, now):
            return False
        return bool((await self.collect(dry_run=False)).repacked)

    async def collect(self, *, dry_run: bool) -> Collected:
        """Remove what is due.

        :raises ObjectCorrupt, ObjectGone: a kept generation cannot be read: nothing is removed.
        """
        state = await self._bucket.state()
        found = Collected(size=state.size, size_after=state.size)
        history = await self._history()
        now = self._time(state)
        gone = self._expired(history, now)
        found.generations_removed = len(gone)
        found.generations_kept = len(history.generations) - len(gone)
        await self._mark([info for number, info in history.generations.items() if number not in gone])
        due, stray = await self._sweep(found, history, now, dry_run=dry_run)
        if dry_run:
            return found
        now_there = await self._history()  # an operator may have promoted one of these, or written something, meanwhile
        if now_there.held & gone:
            self._log.info("collection_put_off", held=sorted(now_there.held & gone))
            kept = len(now_there.generations)
            return Collected(found.blobs, found.size, size_after=found.size, generations_kept=kept)
        stray = [nuid for nuid in stray if nuid not in now_there.nuids]
        await self._forget(history, gone)
        for nuid in stray:
            await self._bucket.remove_chunks(nuid)
        for start in range(0, len(due), FREE_AT_ONCE):
            some = due[start : start + FREE_AT_ONCE]
            await self._thread.run(partial(self._blobs.free, some, now))
            crash_point("blobs_forgotten")
            await self._bucket.remove_blobs(some)
            crash_point("blobs_freed")
        found.repacked = await self._thread.run(lambda: self._finish(now))
        loose = self._loose - len(due)
        self._clean = frozenset() if loose or gone or stray else frozenset(history.generations)
        found.size_after = (await self._bucket.state()).size
        if found.freed_blobs or gone:
            self._log.info(
                "collected",
                blobs=found.freed_blobs,
                generations=len(gone),
                bytes_before=found.size,
                bytes_after=found.size_after,
            )
        return found

    def _time(self, state: BucketState) -> float:
        """Return what a server's clock shows, seconds since the epoch; ours where it does not say."""
        return state.now_ns / 1e9 if state.now_ns else self._clock()

    # -- generations -------------------------------------------------------------------------------------------------

    async def _history(self) -> _History:
        history = _History({}, set(), set())
        async for page in self._bucket.changes(0):
            for item in page.items:
                if isinstance(item, BadMeta) or item.deleted:
                    continue
                history.nuids.add(item.nuid)
                if not is_history(item):
                    continue
                if item.name.startswith(CHANNELS) and item.link is not None:
                    history.held.add(number_of(item.link.name or ""))
                elif number := number_of(item.name):
                    history.generations[number] = item
        return history

    def _expired(self, history: _History, now: float) -> frozenset[int]:
        numbers = sorted(history.generations)
        after = dict(pairwise(numbers))
        aged = [
            Aged(number, _created(history.generations[after[number]]) if number in after else None)
            for number in numbers
        ]
        options = self._options
        return frozenset(
            expired(
                aged,
                frozenset(history.held),
                keep=options.keep_generations,
                days=options.keep_days,
                grace=options.grace_seconds,
                now=now,
            )
        )

    async def _forget(self, history: _History, gone: frozenset[int]) -> None:
        for number in sorted(gone):
            info = history.generations[number]
            await self._bucket.delete(info.name, expected_seq=info.seq, metadata={})
            crash_point("generation_removed")
            if info.nuid.startswith(NUID_PREFIX):
                await self._bucket.remove_chunks(info.nuid)

    # -- mark --------------------------------------------------------------------------------------------------------

    async def _mark(self, infos: list[ObjectInfo]) -> None:
        """Note every blob that the kept generations reach, newest first; shared directories are read once."""
        reader = TreeReader(self._bucket)
        await self._thread.run(self._blobs.begin_marking)
        for info in sorted(infos, key=lambda info: info.name, reverse=True):
            commit = await reader.generation(number_of(info.name))
            if commit is None:
                raise ObjectGone(f"{info.name} vanished while the bucket was collected")
            stack = await self._thread.run(partial(self._blobs.visit, [commit.generation.root]))
            while stack:
                some = [stack.pop() for _ in range(min(WALK_AT_ONCE, len(stack)))]
                nodes = await reader.nodes(some)
                below, recipes = await self._thread.run(partial(self._mark_nodes, some, nodes))
                stack.extend(below)
                await self._mark_recipes(reader, recipes)

    def _mark_nodes(self, refs: list[NodeRef], nodes: list[Node]) -> tuple[list[NodeRef], dict[str, int]]:
        reached = {ref.location.blob for ref in refs}
        recipes = {ref.location.blob: ref.length for ref in refs if ref.location.where is Where.RECIPE}
        below: list[NodeRef] = []
        for node in nodes:
            for child in node.children():
                where = child.location.where
                if child.entry.kind is Kind.DIR:
                    below.append(NodeRef(child.tree, child.location, child.length))
                elif where is Where.RECIPE:
                    recipes[child.location.blob] = child.entry.size
                elif where is not Where.EMPTY:
                    reached.add(child.location.blob)
        fresh = {digest: size for digest, size in recipes.items() if not self._blobs.is_reached(digest)}
        self._blobs.reach(reached)
        return self._blobs.visit(below), fresh

    async def _mark_recipes(self, reader: TreeReader, recipes: dict[str, int]) -> None:
        """Note recipes and their pieces, a level at a time."""
        for recipe, size in recipes.items():
            levels = [(recipe, size, RECIPE_LEVELS)]
            while levels:
                digest, length, below = levels.pop()
                read = decode_recipe((await reader.blobs({digest}))[digest], size=length, below=below)
                pieces = [piece.digest for piece in read.pieces]
                await self._thread.run(partial(self._blobs.reach, [digest, *pieces]))
                if read.level:
                    levels.extend((piece.digest, piece.length, read.level) for piece in read.pieces)

    # -- sweep -------------------------------------------------------------------------------------------------------

    async def _sweep(
        self, found: Collected, history: _History, now: float, *, dry_run: bool
    ) -> tuple[list[str], list[str]]:
        """Return the blobs that may go now, and nuids of ours that no object names: records of removed generations.

        What is found so for the first time waits for the grace time: it may be on its way in.
        """
        due: list[str] = []
        stray: list[str] = []
        self._loose = 0
        async for page in self._bucket.list_chunks():
            names = [name for name in page if is_blob(name)]
            stray += [name for name in page if name.startswith(NUID_PREFIX) and name not in history.nuids]
            found.blobs += len(names)
            loose = await self._thread.run(partial(self._blobs.unreached, names))
            self._loose += len(loose)
            if dry_run:
                found.freed_blobs += len(loose)
                continue
            since = await self._thread.run(partial(self._blobs.since, loose, now))
            due += [name for name in loose if now - since[name] >= self._options.grace_seconds]
        found.freed_blobs += len(due)
        if dry_run:
            return due, stray
        strays = await self._thread.run(partial(self._blobs.strays_since, stray, now))
        return due, [nuid for nuid, since in strays.items() if now - since >= self._options.grace_seconds]

    def _finish(self, now: float) -> int:
        """Tidy the index, and choose sparse packs to be packed anew."""
        self._blobs.clear_since()
        self._blobs.forget_freed(now - FREED_SECONDS)
        packs, size = [], 0
        for pack, live in self._blobs.sparse_packs(SPARSE):
            size += live
            if size > MAX_REPACKED_BYTES:
                break
            packs.append(pack)
        self._blobs.unlocate_in(packs)
        return len(packs)


@dataclass(frozen=True, slots=True)
class _History:
    """What a bucket's metadata says.

    :ivar held: numbers that channels point at.
    :ivar nuids: of all objects.
    """

    generations: dict[int, ObjectInfo]
    held: set[int]
    nuids: set[str]


def _created(info: ObjectInfo) -> float:
    """Return when the server stored a generation object, seconds since the epoch: nobody's clock but its own."""
    return info.mtime_ns / 1e9
