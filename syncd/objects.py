"""A bucket of the objects layout, as a mirror sees it: each object stands for itself, and is staged with its batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from syncd.announced import Announced
from syncd.fetch import Fetcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from syncd.index import Index
    from syncd.mirror import Mirror
    from syncd.modes import ModePolicy
    from syncd.problems import ProblemBook
    from syncd.progress import Meter
    from syncd.rules import Rules
    from syncd.service import FolderThread
    from syncd.store.base import Bucket, BucketState, Store
    from syncd.upstream import Fetch, Pages, PullResult, Row

REFUSED = {"bad_metadata", "bad_object"}
"""Problems of an object that is there and cannot be had: the version before stays in the mirror."""


class Objects:
    """See :class:`syncd.upstream.Upstream`."""

    def __init__(
        self,
        store: Store,
        bucket: Bucket,
        index: Index,
        mirror: Mirror,
        rules: Rules,
        thread: FolderThread,
        *,
        modes: ModePolicy,
    ) -> None:
        self._index = index
        self._mirror = mirror
        self._announced = Announced(store, bucket, index, rules, thread, modes)
        self._fetcher = Fetcher(store, index, mirror, thread)
        self._thread = thread

    @property
    def problems(self) -> ProblemBook:
        """Objects that are refused."""
        return self._announced.problems

    @property
    def in_doubt(self) -> bool:
        """See :attr:`Announced.in_doubt`."""
        return self._announced.in_doubt

    @property
    def listing_wanted(self) -> bool:
        """See :attr:`Announced.listing_wanted`."""
        return self._announced.listing_wanted

    async def catch_up(self, state: BucketState, *, full: bool, hinted: int) -> set[str] | None:
        """See :meth:`Announced.catch_up`."""
        return await self._announced.catch_up(state, full=full, hinted=hinted)

    def refuses(self, path: str) -> bool:
        """See :class:`syncd.upstream.Upstream`."""
        return self.problems.code(path) in REFUSED

    def explains(self, path: str) -> bool:
        """See :class:`syncd.upstream.Upstream`."""
        return path in self._announced.explained_removals

    def allows(self, path: str) -> bool:
        """See :class:`syncd.upstream.Upstream`."""
        return path in self._announced.allowed_removals

    def forget_removals(self) -> None:
        """See :class:`syncd.upstream.Upstream`."""
        self._announced.forget_removals()

    async def gather(
        self, pages: Pages, result: PullResult, meter: Meter, overtaken: Callable[[], Awaitable[bool]]
    ) -> None:
        """See :class:`syncd.upstream.Upstream`: a failure belongs to its path, so there is nothing to wait for."""

    async def fetch(self, rows: list[Row], result: PullResult, meter: Meter) -> dict[str, Fetch]:
        """Stage the content of one batch; a failure of one object is noted in its fetch."""
        fetches = await self._thread.run(lambda: self._fetcher.find_local(rows, result))
        missing = [fetch for fetch in fetches.values() if not fetch.staged and not fetch.in_place]
        await self._fetcher.download(missing, result, meter)
        return fetches

    def batch_ended(self) -> None:
        """See :class:`syncd.upstream.Upstream`."""
        self._mirror.discard_staged()

    def begin(self) -> None:
        """The bucket has this layout from now on: read all of it, and forget another layout's rows. Blocking."""
        with self._index.transaction():
            self._index.clear_remote()
            self._index.set_note("bucket", "")
            self._index.set_note("position", "0")
