"""What the bucket announces: brings the ``remote`` half of a subscriber's index up to the bucket, links included."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import structlog

from syncd.errors import BadName, BucketNotFound, ObjectCorrupt, ObjectGone, SyncdError
from syncd.model import Kind, Problem
from syncd.paths import ancestors, check_path, object_name
from syncd.problems import ProblemBook
from syncd.store.base import NUID_PREFIX, BadMeta
from syncd.store.mapping import ALLOWED, remote_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from syncd.index import Index, RemoteRow
    from syncd.modes import ModePolicy
    from syncd.rules import Rules
    from syncd.service import FolderThread
    from syncd.store.base import Bucket, BucketState, Link, ObjectInfo, Store

log = structlog.get_logger()

DOUBT_SECONDS = 30.0
"""How long a replaced bucket must be quiet before what it lacks is taken for deleted."""
MAX_LINKS = 10_000


class Announced:
    """One bucket as a mirror sees it.

    :ivar problems: objects that are refused.
    :ivar listing_wanted: an object was renamed, which leaves no tombstone under its old name.
    :ivar allowed_removals: names whose tombstones say that a person allowed the deletion at the publisher.
    """

    def __init__(
        self,
        store: Store,
        bucket: Bucket,
        index: Index,
        rules: Rules,
        thread: FolderThread,
        modes: ModePolicy,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._bucket = bucket
        self._index = index
        self._rules = rules
        self._modes = modes
        self._thread = thread
        self._log = log.bind(folder=bucket.name, role="subscribe")
        self.problems = ProblemBook(self._log, "object_refused")
        self.allowed_removals: set[str] = set()
        self.explained_removals: set[str] = set()
        self._now = now
        self._doubt_until = 0.0
        self._links: dict[str, Link] = {}
        self.listing_wanted = False
        self._had_links = True  # those of an earlier run, until the first look

    async def catch_up(self, state: BucketState, *, full: bool, hinted: int) -> set[str] | None:
        """Read what the bucket announces into the index; return the paths that may have changed, ``None`` for all.

        A full listing is needed when the bucket is another one than before, when it lies behind what we saw (restored
        from a backup), and now and then, because tombstones do not live for ever.

        :param state: the bucket's, as it is now.
        :param hinted: the highest sequence that a hint named; a replica that is behind it is asked again.
        """
        known = await self._thread.run(lambda: self._index.note("bucket"))
        position = int(await self._thread.run(lambda: self._index.note("position", "0")))
        if known != state.created or position > state.last_seq:
            if known:
                # Deleted and made again, or restored: its publisher may still be filling it.
                self._log.warning("bucket_replaced", bucket=self._bucket.name)
                self._doubt_until = self._now() + DOUBT_SECONDS
                await self._thread.run(self._index.forget_sequences)
            full = True
        touched: set[str] = set()
        at_least = min(hinted, state.last_seq)  # a forged hint must not keep us waiting
        if full:
            await self._list(state.created, at_least)
        else:
            async for page in self._bucket.changes(position, at_least=at_least):
                touched |= await self._thread.run(partial(self._take_page, page.items, page.last_seq))
        if touched and self.in_doubt:
            self._doubt_until = self._now() + DOUBT_SECONDS
        touched |= await self._follow_links()
        return None if full else touched

    @property
    def in_doubt(self) -> bool:
        """Whether the bucket was replaced and has not been quiet since: what it lacks may still come."""
        return self._now() < self._doubt_until

    def forget_removals(self) -> None:
        """A round went through: what was explained and allowed is done."""
        self.allowed_removals.clear()
        self.explained_removals.clear()

    async def _list(self, created: str, at_least: int) -> None:
        """Read the whole bucket; names that it no longer has are forgotten once the listing is complete."""
        await self._thread.run(self._index.begin_listing)
        self.listing_wanted = False
        self.problems.begin()
        self._links.clear()
        last = 0
        async for page in self._bucket.changes(0, at_least=at_least):
            last = page.last_seq
            await self._thread.run(partial(self._take_page, page.items, last, listed=True))

        def finish() -> None:
            with self._index.transaction():
                self._index.drop_unlisted()
                self._index.set_note("bucket", created)
                self._index.set_note("position", str(last))

        await self._thread.run(finish)

    def _take_page(self, items: Iterable[ObjectInfo | BadMeta], last_seq: int, *, listed: bool = False) -> set[str]:
        """Store one page of metas; return the paths they are about."""
        rows: list[RemoteRow] = []
        gone: list[str] = []
        touched: set[str] = set()
        for item in items:
            if isinstance(item, BadMeta):
                self.problems.note(Problem(object_name(item.subject), "bad_metadata", item.reason))
                continue
            try:
                check_path(item.name)
            except BadName as error:
                # Never into the index: its keys are paths.
                if not item.deleted:
                    self.problems.note(Problem(item.name, "bad_name", error.message))
                continue
            touched.update((item.name, *ancestors(item.name)))
            self._links.pop(item.name, None)
            if item.deleted:
                gone.append(item.name)
                self.explained_removals.add(item.name)
                self.problems.clear(item.name)
                if ALLOWED in item.metadata:
                    self.allowed_removals.add(item.name)
                continue
            if item.link is not None:
                self._note_link(item.name, item.link)
                gone.append(item.name)
                continue
            row = self._row(item)
            if row is None:
                gone.append(item.name)  # it does not take part, or is refused: then what is in the mirror stays
                self.explained_removals.add(item.name)
            else:
                self.problems.clear(item.name)
                rows.append(row)
        if not listed:
            self.listing_wanted = self.listing_wanted or self._any_renamed(rows)
        with self._index.transaction():
            self._index.drop_remote(gone)
            self._index.put_remote(rows, listed=listed)
            if not listed:
                self._index.set_note("position", str(last_seq))
        return touched

    def _any_renamed(self, rows: Iterable[RemoteRow]) -> bool:
        """Tell whether another client gave an object a new name: its nuid stays, its old metadata is purged.

        syncd itself announces one content under several names, and deletes with tombstones.
        """
        foreign = {row.nuid: row.path for row in rows if row.chunks and not row.nuid.startswith(NUID_PREFIX)}
        for nuid in self._index.nuids(foreign):
            here = self._index.remote(foreign[nuid])
            if here is None or here.nuid != nuid:
                return True
        return False

    def _row(self, item: ObjectInfo, path: str | None = None, via: str = "") -> RemoteRow | None:
        """Read an object as a row; ``None`` where it does not take part or is refused (and reported)."""
        where = item.name if path is None else path
        try:
            row = remote_row(item, path=path, via=via)
        except BadName as error:
            self.problems.note(Problem(where, "bad_name", error.message))
            return None
        except ObjectCorrupt as error:
            self.problems.note(Problem(where, "bad_object", error.message))
            return None
        if not self._rules.takes(row.path, is_dir=row.entry.kind is Kind.DIR):
            return None
        return row._replace(entry=self._modes.apply(row.entry))

    # -- links -----------------------------------------------------------------------------------------------------

    def _note_link(self, name: str, link: Link) -> None:
        if len(self._links) >= MAX_LINKS:
            self.problems.note(Problem(name, "too_many_links", f"more than {MAX_LINKS} links in the bucket"))
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
                self.problems.note(Problem(name, "dead_link", error.message))
                if not isinstance(error, BucketNotFound | ObjectGone | ObjectCorrupt):
                    raise
                rows = []
            else:
                self.problems.clear(name)
            touched |= await self._thread.run(partial(self._index.replace_via, name, rows))
        for gone in await self._thread.run(self._index.vias) - set(self._links):
            touched |= await self._thread.run(partial(self._index.replace_via, gone, ()))
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
