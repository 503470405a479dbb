"""A publisher and a subscriber as services of the test's own process: soon there, and their constants patchable."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from structlog.testing import capture_logs

from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.status import FolderState, FolderStatus, StatusKeeper
from syncd.store.address import ConnectionOptions
from syncd.store.base import BucketSpec
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support.trees import difference, equal_trees

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from syncd.store.base import Store

SECONDS = 30.0
STUCK = {FolderState.WAITING, FolderState.FAILED}


class Side:
    """One of the two, with a connection of its own.

    :ivar history: every status that it has had.
    """

    def __init__(self, role: Any, folder: str, url: str, **connection: Any) -> None:
        self.connection = Connection(ConnectionOptions(servers=(url,), name=role, **connection))
        self.store = NatsStore(self.connection)
        self.history: list[FolderStatus] = []
        self.status = StatusKeeper(FolderStatus(role, folder, "/"), clock=time.time, report=self.history.append)
        self.service: Publisher | Subscriber
        self.task: asyncio.Task[None]

    async def is_(self, claim: Callable[[FolderStatus], bool], seconds: float = SECONDS) -> FolderStatus:
        """Wait for a status; return it."""
        deadline = time.monotonic() + seconds
        while not claim(self.status.now):
            assert not self.task.done(), self.task.exception()
            assert time.monotonic() < deadline, self.status.now
            await asyncio.sleep(0.01)
        return self.status.now

    async def complains(self, text: str, seconds: float = SECONDS) -> FolderStatus:
        """Wait until it says, as the reason why it does not go on, some text."""
        return await self.is_(lambda now: now.state in STUCK and text in f"{now.error} {now.hint}", seconds)

    async def looks_again(self, times: int = 2) -> None:
        """Wait until it has found everything as it must be so many times."""
        for _ in range(times):
            before = self.status.now.last_sync
            await self.is_(lambda now, before=before: now.last_sync != before)  # type: ignore[misc]


def keeper(role: Any) -> StatusKeeper:
    return StatusKeeper(FolderStatus(role, "", "/"), clock=time.time, report=lambda _: None)


def publisher_of(
    store: Store,
    source: Path,
    folder: str = "app",
    index: Path | None = None,
    status: StatusKeeper | None = None,
    **options: Any,
) -> Publisher:
    """Make one.

    :param options: fields of PublishOptions.
    """
    layout = options.setdefault("layout", "generations")
    options.setdefault("bucket", BucketSpec(layout=layout))
    chosen = PublishOptions(folder, source, Rules(), "test:/source", **options)
    return Publisher(chosen, store, index, status=status or keeper("publish"))


def subscriber_of(
    store: Store,
    mirror: Path,
    folder: str = "app",
    index: Path | None = None,
    status: StatusKeeper | None = None,
    **options: Any,
) -> Subscriber:
    """Make one.

    :param options: fields of SubscribeOptions.
    """
    chosen = SubscribeOptions(folder, mirror, Rules(), **options)
    return Subscriber(chosen, store, index, status=status or keeper("subscribe"))


class Pair:
    """What :func:`pair` gives.

    :ivar logs: what both have logged.
    """

    def __init__(self, directory: Path, folder: str, publisher: Side, subscriber: Side, logs: list[Any]) -> None:
        self.directory = directory
        self.folder = folder
        self.source = directory / "source"
        self.mirror = directory / "mirror"
        self.publisher = publisher
        self.subscriber = subscriber
        self.logs = logs

    async def equal(self, seconds: float = SECONDS) -> None:
        """Wait until the mirror is what the source is, and both still run."""
        try:
            await equal_trees(self.source, self.mirror, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error} {self.publisher.status.now} {self.subscriber.status.now}") from None
        assert not self.publisher.task.done()
        assert not self.subscriber.task.done()

    async def whole(self, name: str = "fresh", seconds: float = SECONDS) -> None:
        """Wait until a mirror made anew gets everything that the source has: nothing is missing in the bucket."""
        deadline = time.monotonic() + seconds
        for number in range(1_000_000):
            fresh = self.directory / f"{name}{number}"
            try:
                await subscriber_of(self.subscriber.store, fresh, self.folder).pull()
            except Exception:
                if time.monotonic() > deadline:
                    raise
            else:
                wrong = difference(self.source, fresh)
                if not wrong:
                    return
                assert time.monotonic() < deadline, wrong
            await asyncio.sleep(0.1)

    def events(self, name: str, role: str = "") -> list[Any]:
        """What was logged under a name, by one of the two or both."""
        return [one for one in self.logs if one["event"] == name and role in {"", one.get("role", "")}]

    async def logged(self, name: str, role: str = "", *, count: int = 1, seconds: float = SECONDS) -> None:
        """Wait until something was logged."""
        deadline = time.monotonic() + seconds
        while len(self.events(name, role)) < count:
            assert time.monotonic() < deadline, (name, self.publisher.status.now, self.subscriber.status.now)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def pair(
    directory: Path,
    url: str,
    layout: Any = "generations",
    *,
    folder: str = "app",
    rescan: float = 0.5,
    logs: list[Any] | None = None,
    publish: dict[str, Any] | None = None,
    publisher: dict[str, Any] | None = None,
    subscriber: dict[str, Any] | None = None,
    **connection: Any,
) -> AsyncIterator[Pair]:
    """Run a publisher of ``source`` and a subscriber to ``mirror`` in a directory.

    :param rescan: seconds after which both look at everything.
    :param logs: those of another pair, around this one.
    :param publish: fields of PublishOptions.
    :param publisher, subscriber, connection: fields of ConnectionOptions, of one or of both; ``url`` for ``servers``.
    """
    chosen = {"layout": layout, "settle_seconds": 0.01, "rescan_seconds": rescan, "max_delete_percent": 100.0}
    with capture_logs() if logs is None else nullcontext(logs) as events:
        ours = Side("publish", folder, **{"url": url, **connection, **(publisher or {})})
        theirs = Side("subscribe", folder, **{"url": url, **connection, **(subscriber or {})})
        found = Pair(directory, folder, ours, theirs, events)
        found.source.mkdir(parents=True, exist_ok=True)
        ours.service = publisher_of(
            ours.store, found.source, folder, directory / "publish.db", ours.status, **chosen | (publish or {})
        )
        theirs.service = subscriber_of(
            theirs.store, found.mirror, folder, directory / "subscribe.db", theirs.status, rescan_seconds=rescan
        )
        for side in (ours, theirs):
            await side.connection.start()
            side.task = asyncio.create_task(side.service.run(), name=f"pair-{folder}")
        try:
            yield found
        finally:
            for side in (ours, theirs):
                side.task.cancel()
            ended = await asyncio.gather(ours.task, theirs.task, return_exceptions=True)
            for side in (ours, theirs):
                await side.connection.close()
    for one in ended:
        assert isinstance(one, asyncio.CancelledError), one
