"""What the publishers of both layouts share: options, results, the claim on the bucket, the guard of deletions."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import structlog

from syncd.errors import BucketNotFound, BucketSealed, FolderTaken, LayoutMismatch, NotPermitted
from syncd.paths import printable
from syncd.plan import publish_halt
from syncd.store.base import BadMeta, BucketSpec
from syncd.trees import Layout, layout_of
from syncd.trust import WHO_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from syncd.errors import StoreFull
    from syncd.model import Problem
    from syncd.progress import Progress
    from syncd.rules import Rules
    from syncd.signatures import Signer
    from syncd.store.base import Bucket, BucketState, Store

log = structlog.get_logger()

HALT_WINDOW_SECONDS = 600.0
"""Deletes are judged against the most paths published within this time: ``rm -r`` arrives in pieces."""


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """One ``[[publish]]`` as plain values.

    :ivar publisher: who we are in the bucket, stable across restarts: ``host:/path``.
    :ivar settle_seconds: how long a changed path must be quiet before it is read.
    :ivar grace_seconds: how long replaced content stays readable.
    :ivar metadata: the folder's own key/values, on every object.
    :ivar compress: whether blobs are compressed where that is worth it (generations layout).
    :ivar keep_generations, keep_days: what is kept at most beside what channels point at, 0: no limit.
    :ivar signer: signs generations and moves of the head; ``None``: they are unsigned.
    :ivar expire_seconds: for how long a move of the head counts as fresh; it is renewed in time. 0: for ever.
    """

    folder: str
    path: Path
    rules: Rules
    publisher: str
    layout: Layout = "generations"
    bucket: BucketSpec = field(default_factory=BucketSpec)
    symlinks: Literal["inside", "all", "skip"] = "inside"
    settle_seconds: float = 0.02
    rescan_seconds: float = 60.0
    max_delete_percent: float = 50.0
    grace_seconds: float = 600.0
    metadata: Mapping[str, str] = field(default_factory=dict)
    compress: bool = True
    keep_generations: int = 50
    keep_days: float = 30.0
    signer: Signer | None = None
    expire_seconds: float = 0.0


@dataclass(slots=True)
class PushResult:
    """What one or more rounds did.

    :ivar again: paths that could not be read or written this time and are tried again soon.
    :ivar conflict: somebody else wrote to the bucket: look at everything again.
    :ivar full: there was no room for some content.
    :ivar generation: the newest generation, 0 in the objects layout or where there is none.
    :ivar root: its tree digest.
    :ivar committed: whether it was committed by this.
    """

    puts: int = 0
    deletes: int = 0
    uploaded_bytes: int = 0
    reused_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    again: set[str] = field(default_factory=set)
    conflict: bool = False
    full: StoreFull | None = None
    generation: int = 0
    root: str = ""
    committed: bool = False

    def add(self, more: PushResult) -> None:
        """Add a later round."""
        self.puts += more.puts
        self.deletes += more.deletes
        self.uploaded_bytes += more.uploaded_bytes
        self.reused_bytes += more.reused_bytes
        self.again = more.again
        self.conflict = more.conflict
        self.generation, self.root = more.generation, more.root
        self.committed = self.committed or more.committed


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person asks of a push.

    :ivar allow_delete: hold nothing back.
    :ivar take_over: become the folder's publisher, whoever was before.
    :ivar change_layout: give the bucket the configured layout; the content in the other one goes.
    :ivar note: text for the generation.
    """

    allow_delete: bool = False
    take_over: bool = False
    change_layout: bool = False
    note: str = ""


class Outlet(Protocol):
    """How a source's state gets into a bucket: one implementation per layout."""

    @property
    def last_seq(self) -> int:
        """The highest sequence that we read or wrote: a hint beyond it is somebody else's write."""
        ...

    def wrote(self, *seqs: int) -> None:
        """Take note of sequences that are accounted for."""
        ...

    def doubt(self) -> None:
        """Nobody knows what the server has stored: look soon."""
        ...

    async def catch_up(self, wish: Wish) -> None:
        """Bring the index up to the bucket, making the bucket where there is none.

        :raises FolderTaken, LayoutMismatch, BucketSealed, FormatTooNew: it is not for us to write to.
        """
        ...

    async def publish(
        self,
        touched: Collection[str] | None,
        result: PushResult,
        wish: Wish,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """Bring the bucket up to the index for ``touched`` (``None``: for all).

        :raises SafetyHalt: deletes are held.
        """
        ...

    async def tidy(self) -> None:
        """Free what is due."""
        ...


class DeletionGuard:
    """Judges deletes against what was published within the last minutes."""

    def __init__(self, max_delete_percent: float, clock: Callable[[], float] = time.time) -> None:
        self._limit = max_delete_percent
        self._clock = clock
        self._published: deque[tuple[float, int]] = deque()

    def judge(self, deletes: int, published: int) -> str:
        """Return why deletes must be held, "" if they need not; to be told also of rounds without any.

        :param published: paths that the bucket announces as ours now.
        """
        peak = self._peak(published)
        return publish_halt(peak - (published - deletes), peak, self._limit) if deletes else ""

    def forget(self) -> None:
        """A person allowed what is gone: judge against what is there from now on."""
        self._published.clear()

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


class Claim:
    """Our right to write to a bucket: it exists, is not sealed, has our layout, and no other publisher."""

    def __init__(self, options: PublishOptions, store: Store, bucket: Bucket) -> None:
        self._options = options
        self._store = store
        self._bucket = bucket
        self._log = log.bind(folder=options.folder, role="publish")
        self._began = False

    async def hold(self, wish: Wish) -> BucketState:
        """Make sure of it; make the bucket where there is none.

        :raises FolderTaken: it has another publisher.
        :raises LayoutMismatch: it has content in another layout, and nobody asked for the change.
        :raises FormatTooNew: a newer version wrote it.
        """
        state = await self._state()
        folder = self._options.folder
        if state.sealed:
            raise BucketSealed(
                f"bucket {folder!r} is sealed", hint="publish to another folder name, or delete the bucket"
            )
        await self._check_layout(state, wish)
        holder = await self._bucket.claim(self._options.publisher, take_over=wish.take_over)
        if holder != self._options.publisher:
            raise FolderTaken(
                f"folder {folder!r} is published by {printable(holder[:WHO_MAX])}",
                hint=f"if that publisher is retired: syncd push {folder} --take-over",
            )
        self._began = True
        return state

    async def _state(self) -> BucketState:
        folder, spec = self._options.folder, self._options.bucket
        try:
            state = await self._bucket.state()
        except BucketNotFound:
            state = await self._store.create_bucket(folder, spec)
            self._log.info("bucket_created", bucket=folder)
            return state
        if not self._began and not state.sealed:
            # Made by another client, or by an older version: add what it lacks, where we may.
            state = await self._store.create_bucket(folder, spec)
        return state

    async def _check_layout(self, state: BucketState, wish: Wish) -> None:
        wanted = self._options.layout
        layout = await layout_of(self._bucket, state)
        if layout == wanted and state.metadata.get("syncd.layout") == wanted:
            return
        if layout != wanted and not wish.change_layout and await _has_content(self._bucket):
            raise LayoutMismatch(
                f"bucket {self._options.folder!r} has the {layout} layout, the configuration says {wanted}",
                hint=f'set layout = "{layout}", or change it: syncd push {self._options.folder} --change-layout',
            )
        if wanted == "generations" or (layout != wanted and not wish.change_layout):
            await self._mark(wanted)  # subscribers of generations wait for the first one from here on

    async def _mark(self, layout: Layout) -> None:
        try:
            await self._bucket.set_layout(layout)
        except NotPermitted as error:
            self._log.info("bucket_not_marked", layout=layout, reason=error.message)


async def _has_content(bucket: Bucket) -> bool:
    async for page in bucket.changes(0):
        if any(isinstance(item, BadMeta) or not item.deleted for item in page.items):
            return True
    return False
