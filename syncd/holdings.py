"""What a bucket of the objects layout holds, as its publisher knows it: catch-up, audit, and replaced content."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import FolderTaken, SyncdError
from syncd.outlet import Claim
from syncd.paths import is_usable, printable
from syncd.store.base import NUID_PREFIX, BadMeta
from syncd.store.mapping import PUBLISHER, remote_row, stored_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from syncd.index import Index, RemoteRow
    from syncd.outlet import PublishOptions, Wish
    from syncd.service import FolderThread
    from syncd.store.base import Bucket, ObjectInfo, Store

log = structlog.get_logger()

AUDIT_SECONDS = 3600.0
AUDIT_FACTOR = 20
"""Doubt brings an audit forward, but at most some 5 % of the time is spent on audits."""
MIN_AUDIT_SECONDS = 1.0
RESERVE_BYTES = 128 * 1024
RESERVE_SHARE = 16
"""What puts leave free of a limited bucket, at most this part of it: a tombstone needs room before it makes room."""
MAX_AUDITED_NUIDS = 500_000
STORED = "stored"
"""The note of the highest sequence that we have read or written at the end of a round."""
LEAVING_SECONDS = 5.0
"""How long freed chunks may still be listed: a TTL of a second, which nats-server 2.15 looks at each second or two."""


class Holdings:
    """The ``remote`` half of a publisher's index, and the bucket it describes.

    :ivar last_seq: the highest sequence that we read or wrote: a hint beyond it is somebody else's write.
    """

    def __init__(
        self,
        options: PublishOptions,
        store: Store,
        bucket: Bucket,
        index: Index,
        thread: FolderThread,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._bucket = bucket
        self._claim = Claim(options, store, bucket)
        self._index = index
        self._thread = thread
        self._clock = clock
        self._log = log.bind(folder=options.folder, role="publish")
        self._next_audit = 0.0
        self._earliest_audit = 0.0
        self._began = False
        self._twice = True  # an audit that sees freed chunks cannot know whether they go: a second one can
        self._limited = False
        self.last_seq = 0

    def wrote(self, *seqs: int) -> None:
        """Take note of sequences that are accounted for."""
        self.last_seq = max((self.last_seq, *seqs))

    def doubt(self) -> None:
        """Nobody knows what the server has stored: audit soon.

        A write failed; or the server was away: one that was killed may bring back content that was freed just before
        (nats-server 2.15: acknowledged messages survive, removals only once they are flushed).
        """
        self._next_audit = min(self._next_audit, self._earliest_audit)
        self._twice = True

    async def catch_up(self, wish: Wish) -> None:
        """Read into the index what the bucket announces, making the bucket where there is none.

        :raises FolderTaken, LayoutMismatch, BucketSealed: see :class:`syncd.outlet.Claim`.
        """
        state = await self._claim.hold(wish)
        self._limited = state.max_bytes is not None
        position = await self._thread.run(lambda: self._position(state.created, state.last_seq))
        if self._clock() < self._next_audit:
            await self._read(position, after=position)
        if self._clock() >= self._next_audit:  # the timer, or what was just read
            started = self._clock()
            await self._thread.run(self._index.begin_listing)
            await self._read(0, after=position)
            await self._thread.run(self._index.drop_unlisted)
            leaving = await self._audit()
            now = self._clock()
            again, self._twice = leaving and self._twice, False
            self._next_audit = now + (LEAVING_SECONDS if again else AUDIT_SECONDS)
            self._earliest_audit = now + max(MIN_AUDIT_SECONDS, AUDIT_FACTOR * (now - started))
        self._began = True

    async def _read(self, begin: int, *, after: int) -> None:
        """Read metas from ``begin`` (0: all of them) into the index.

        :param after: where the last catch-up ended: only what is newer tells of another publisher at work.
        :raises FolderTaken: another publisher wrote since we began.
        """
        async for page in self._bucket.changes(begin):
            other = await self._thread.run(
                partial(self._remember_page, page.items, page.last_seq, after=after, listed=begin == 0)
            )
            self.wrote(page.last_seq)
            if other and self._began:
                raise FolderTaken(
                    f"another publisher ({printable(other)}) writes to folder {self._options.folder!r}",
                    hint="stop one of the two, then restart this one",
                )
            if other:
                self._log.warning("publisher_changed", before=other)

    def _position(self, created: str, last_seq: int) -> int:
        """Return the sequence to catch up from; 0, and an empty memory, where the bucket is another one.

        So it is where it ends before what we have read or written: it was restored from an old backup.
        """
        position = int(self._index.note("position", "0"))
        least = max(position, int(self._index.note(STORED, "0")), self.last_seq)
        if self._index.note("bucket") == created and least <= last_seq:
            return position
        if self._index.note("bucket"):
            self._log.warning("bucket_replaced", bucket=self._options.folder)
        with self._index.transaction():
            self._index.clear_remote()
            self._index.set_note("bucket", created)
            self._index.set_note("position", "0")
            self._index.set_note(STORED, "0")
        self.last_seq = 0
        self._next_audit = 0.0
        return 0

    def _remember_page(self, items: Iterable[ObjectInfo | BadMeta], last_seq: int, *, after: int, listed: bool) -> str:
        """Store one page of metas; return another publisher's identity if one wrote any newer than ``after``."""
        rows: list[RemoteRow] = []
        gone: list[str] = []
        other = ""
        for item in items:
            if isinstance(item, BadMeta) or not is_usable(item.name):
                continue  # no path of a source can be called so: not ours, and not in our way
            who = item.metadata.get(PUBLISHER, "")
            if who and who != self._options.publisher and item.seq > after:
                other = who
            if not listed and self._leaves_doubt(item):
                self._next_audit = 0.0
            if item.deleted or item.link is not None:
                gone.append(item.name)
                continue
            try:
                rows.append(remote_row(item))
            except SyncdError:
                gone.append(item.name)  # an object that we would not have written: ours goes over it
        with self._index.transaction():
            self._index.drop_remote(gone)
            self._index.put_remote(rows, listed=listed)
            self._index.set_note("position", str(last_seq))
        return other

    def _leaves_doubt(self, item: ObjectInfo) -> bool:
        """Tell whether another client did what the metas that changed do not tell.

        One that overwrites or deletes an object purges its chunks, though other names may share them; one that renames
        an object gives its nuid a second name and purges the first one's metadata without a tombstone.
        """
        row = self._index.remote(item.name)
        if row is not None and row.nuid == item.nuid and not item.deleted:
            return False
        replaced = row is not None and bool(row.publisher) and row.chunks > 0
        renamed = not item.deleted and item.chunks > 0 and bool(self._index.nuids([item.nuid]))
        return replaced or renamed

    async def room(self) -> int | None:
        """Return the bytes that puts may take now; ``None``: as many as they like."""
        if not self._limited:
            return None
        state = await self._bucket.state()
        if state.max_bytes is None:
            return None
        return state.max_bytes - min(RESERVE_BYTES, state.max_bytes // RESERVE_SHARE) - state.size

    async def _audit(self) -> bool:
        """Find chunks that nothing announces (freed later), and announcements whose chunks are gone (put again).

        :returns: whether chunks were seen that are freed: they are on their way, or a server that was killed has
            brought them back.
        """
        counts: dict[str, int] = {}
        async for page in self._bucket.list_chunks():
            counts.update(page)
            if len(counts) > MAX_AUDITED_NUIDS:
                self._log.warning("audit_skipped", reason="too many objects", limit=MAX_AUDITED_NUIDS)
                break
        else:
            orphans, damaged, leaving = await self._thread.run(lambda: self._compare_chunks(counts))
            if orphans or damaged:
                self._log.info("bucket_audited", orphans=orphans, damaged=damaged)
            return leaving
        return False

    def _compare_chunks(self, counts: dict[str, int]) -> tuple[int, int, bool]:
        self._index.drop_left(self._clock(), LEAVING_SECONDS)
        ours = [nuid for nuid in counts if nuid.startswith(NUID_PREFIX)]
        known = self._index.nuids(ours) | self._index.garbage_nuids(ours)
        orphans = [nuid for nuid in ours if nuid not in known]
        damaged = [
            (row.path, row.nuid)
            for row in self._index.iter_remote()
            if row.publisher and row.chunks and counts.get(row.nuid, 0) != row.chunks
        ]
        remains = {nuid for _, nuid in damaged if nuid.startswith(NUID_PREFIX) and nuid in counts}
        with self._index.transaction():
            for nuid in [*orphans, *remains]:
                self._index.add_garbage(nuid, self._clock(), None)
            # Forgetting the rows makes the next diff put the content again, under a nuid of its own.
            self._index.drop_remote([path for path, _ in damaged])
        return len(orphans), len(damaged), bool(self._index.left_nuids(ours))

    async def free_garbage(self) -> None:
        """Free chunks whose grace time is over.

        What they hold is forgotten first: a crash in between leaves chunks that are freed again, never a memory of
        chunks that are gone, which the next put of the same content would announce. Until the server has let go of
        them, they are no orphans: an audit that had them freed again would keep alive what removes them.
        """
        freed = 0
        await self._thread.run(self._end_round)
        while due := await self._thread.run(self._take_due):
            await self._thread.run(self._index.sync)  # a power cut must not bring that memory back either
            try:
                for nuid in due:
                    await self._bucket.remove_chunks(nuid)
            except SyncdError:
                self.doubt()
                raise
            crash_point("garbage_freed")
            await self._thread.run(partial(self._index.leave_garbage, due, self._clock() + LEAVING_SECONDS))
            freed += len(due)
        if freed:
            self._log.info("chunks_freed", nuids=freed)

    def _end_round(self) -> None:
        with self._index.transaction():
            self._index.drop_left(self._clock(), LEAVING_SECONDS)
            if self.last_seq > int(self._index.note(STORED, "0")):
                self._index.set_note(STORED, str(self.last_seq))

    def _take_due(self) -> list[str]:
        """Return some chunks to free, whose content is forgotten."""
        with self._index.transaction():
            while due := self._index.due_garbage(self._clock() - self._options.grace_seconds):
                used = self._index.nuids(due)
                self._index.drop_garbage(used)
                free = [nuid for nuid in due if nuid not in used]
                self._index.forget_content(free)
                if free:
                    return free
        return []

    def discard(self, replaced: Iterable[RemoteRow]) -> None:
        """Let the content of replaced or deleted objects go after the grace time, if no other name has it."""
        rows = [row for row in replaced if row.chunks and row.nuid.startswith(NUID_PREFIX)]
        used = self._index.nuids([row.nuid for row in rows])
        for row in rows:
            if row.nuid not in used:
                self._index.add_garbage(row.nuid, self._clock(), stored_of(row))
