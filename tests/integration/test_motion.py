"""Things that change while they are read, published or applied, and a filesystem that says nothing about it."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import watchfiles

from syncd import agenda, subscriber
from syncd.checkout import NoGeneration
from syncd.errors import BucketNotFound, ObjectGone
from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import BucketSpec
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trees import TreeReader
from syncd.watch import PathWatcher
from tests.support import generations
from tests.support.generations import Tree, expected, file, folder, found
from tests.support.store import BytesSink
from tests.support.trees import difference, root_digest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

DEADLINE = 90.0
NEVER = 3600.0
MODES = pytest.mark.parametrize("mode", ["mirror", "release"])


class Head(NamedTuple):
    """Where the head points."""

    number: int = 0
    root: str = ""


class Site:
    """A source, a store in memory, and any number of mirrors."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.store = MemoryStore()
        self.source = tmp / "source"
        self.source.mkdir()
        self.statuses: dict[str, FolderStatus] = {}

    def status(self, role: Any, name: str) -> StatusKeeper:
        def report(now: FolderStatus) -> None:
            self.statuses[name] = now

        return StatusKeeper(FolderStatus(role, "app", "/"), clock=time.time, report=report)

    def publisher(self, **options: Any) -> Publisher:
        layout = options.setdefault("layout", "generations")
        chosen = PublishOptions(
            "app",
            self.source,
            Rules(),
            "here:/source",
            bucket=BucketSpec(layout=layout),
            max_delete_percent=100.0,
            **options,
        )
        return Publisher(chosen, self.store, self.tmp / "publish.db", status=self.status("publish", "publisher"))

    def subscriber(self, mode: Any = "mirror", name: str = "mirror", **options: Any) -> Subscriber:
        rollout = RolloutOptions(mode=mode, **options.pop("rollout", {}))
        chosen = SubscribeOptions("app", self.tmp / name, Rules(), rollout=rollout, **options)
        index = self.tmp / f"{name}-state" / "index.db"
        index.parent.mkdir(exist_ok=True)
        return Subscriber(chosen, self.store, index, status=self.status("subscribe", name))

    def tree(self, mode: str, name: str = "mirror") -> Path:
        """Where readers of a mirror look."""
        return self.tmp / name / "current" if mode == "release" else self.tmp / name

    async def head(self) -> Head:
        """Number and tree digest of the newest generation; nothing before there is one."""
        try:
            commit = await TreeReader(self.store.bucket("app")).channel("head")
        except BucketNotFound:
            commit = None
        return Head() if commit is None else Head(commit.generation.number, commit.generation.root.tree)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@asynccontextmanager
async def running(service: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(service)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(claim: Callable[[], bool], *, beside: asyncio.Task[None] | None = None) -> None:
    """Wait for a claim; a service that ended meanwhile is a failure."""
    async with asyncio.timeout(DEADLINE):
        while not await asyncio.to_thread(claim):
            assert beside is None or not beside.done(), beside
            await asyncio.sleep(0.01)


# -- R6: a newer generation while one is being applied -----------------------------------------------------------------


def numbered(number: int) -> Tree:
    """A tree of which every path differs from one number to the next."""
    return {
        f"d{number % 2}": folder({"inner": file(f"{number}")}),
        "every": folder({f"f{each}": file(f"{number} {each}", mtime_ns=number) for each in range(20)}),
        "kind": folder() if number % 2 else file("a file"),
        f"only{number}": file("x"),
    }


class Meanwhile:
    """Commits the next generation when a subscriber's thread passes a named point, and notes where it arrives."""

    def __init__(self, site: Site, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.committer = generations.Publisher(site.store)
        self.arrived: list[dict[str, Any]] = []
        self._tree = partial(site.tree, mode)
        self._loop = asyncio.get_running_loop()
        self._at, self._left = "", 0
        self.happened = False
        self._numbers = itertools.count(1)
        for name, module in list(sys.modules.items()):
            if name.startswith("syncd.") and hasattr(module, "crash_point"):
                monkeypatch.setattr(module, "crash_point", self._passed)

    async def commit(self) -> None:
        await self.committer.commit(numbered(next(self._numbers)))

    def at(self, point: str, passage: int) -> None:
        self._at, self._left = point, passage

    def _passed(self, point: str) -> None:
        if point == "generation_applied":
            self.arrived.append(found(self._tree()))
        if point == self._at:
            self._left -= 1
            if self._left == 0:
                asyncio.run_coroutine_threadsafe(self.commit(), self._loop).result(DEADLINE)
                self.happened = True


POINTS = [
    ("mirror", "before_first_page", 1), ("mirror", "journal_durable", 1), ("mirror", "after_each_step", 7),
    ("mirror", "before_dir_meta", 1), ("mirror", "batch_applied", 1), ("mirror", "batch_applied", 2),
    ("mirror", "generation_applied", 1), ("mirror", "remembered", 1),
    ("release", "release_building", 5), ("release", "release_built", 1), ("release", "before_switch", 1),
    ("release", "after_switch", 1), ("release", "release_switched", 1), ("release", "remembered", 1),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "point", "passage"), POINTS)
@pytest.mark.fault("R6")
async def test_a_newer_generation_during_an_apply_comes_after_it(
    site: Site, mode: str, point: str, passage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer generation is committed while a subscriber stands at a named point of applying one; 14 points.

    What was begun is ended whole, then the newer one is applied: no hint of it is lost, no tree is a mixture.
    """
    monkeypatch.setattr(subscriber, "BATCH_PATHS", 10)
    monkeypatch.setattr(agenda, "MIN_QUIET_SECONDS", NEVER)
    meanwhile = Meanwhile(site, mode, monkeypatch)
    await meanwhile.commit()
    service = site.subscriber(mode, rescan_seconds=NEVER)
    async with running(service.run()) as task:
        await until(lambda: site.statuses["mirror"].generation == 1, beside=task)
        meanwhile.at(point, passage)
        await meanwhile.commit()
        await until(lambda: site.statuses["mirror"].generation == 3, beside=task)
    assert meanwhile.happened
    assert meanwhile.arrived == [expected(numbered(number)) for number in (1, 2, 3)]
    assert found(site.tree(mode)) == expected(numbered(3))


@MODES
@pytest.mark.parametrize("which", ["check", "apply", "health"])
@pytest.mark.fault("R6")
async def test_a_newer_generation_during_a_hook_waits_for_its_end(site: Site, mode: str, which: str) -> None:
    """A newer generation is pushed while a real check, apply or health hook of the one before still waits.

    That hook has its own generation before it to its end; the newer one's runs after it.
    """
    log, go = site.tmp / "log", site.tmp / "go"
    where = '"$SYNCD_STAGED"' if which == "check" else '"$SYNCD_PATH"'
    script = f"""
        echo "begin $SYNCD_GENERATION $(cat {where}/*)" >> "{log}"
        test "$SYNCD_GENERATION" != 2 || while [ ! -e "{go}" ]; do sleep 0.01; done
        echo "end $SYNCD_GENERATION $(cat {where}/*)" >> "{log}"
    """
    hooks = {which: ("/bin/sh", "-c", script), "timeout": DEADLINE}

    def told() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    async def push(number: int) -> None:
        for name in "ab":
            (site.source / name).write_text(f"{number}")
        assert (await site.publisher().push()).generation == number

    await push(1)
    async with running(site.subscriber(mode, rescan_seconds=NEVER, rollout=hooks).run()) as task:
        await until(lambda: len(told()) == 2, beside=task)
        await push(2)
        await until(lambda: len(told()) == 3, beside=task)
        await push(3)
        go.touch()
        await until(lambda: len(told()) == 6, beside=task)
        await until(lambda: site.statuses["mirror"].generation == 3, beside=task)
    assert told() == [f"{word} {number} {number}{number}" for number in (1, 2, 3) for word in ("begin", "end")]
    assert difference(site.source, site.tree(mode)) == {}


# -- O3: an overwrite storm on one name -------------------------------------------------------------------------------

MIRRORS, READERS = 4, 46
VERSIONS = 12


def version(number: int) -> bytes:
    """One content of the storm; some are large enough for chunks of their own."""
    size = 600_000 if number in {3, 8} else 2_000 + 97 * number
    return random.Random(number).randbytes(size)


class Storm:
    """One file that is overwritten; what was replaced is freed without any grace."""

    def __init__(self, site: Site, layout: str) -> None:
        self.site = site
        self.layout = layout
        self.bucket = site.store.bucket("app")
        self.numbers = {version(number): number for number in range(VERSIONS)}
        self.over = False
        self.good = self.gone = 0

    async def write(self) -> None:
        for number in range(VERSIONS):
            (self.site.source / "f").write_bytes(version(number))
            options = {"layout": self.layout, "grace_seconds": 0.0, "keep_generations": 1}
            await self.site.publisher(**options).push()
            if self.layout == "generations":
                await self.site.publisher(**options).collect()
        self.over = True

    async def follow(self, get: Callable[[], Coroutine[Any, Any, bytes]]) -> None:
        """Get it again and again, until it is the last version."""
        last = -1
        while last < VERSIONS - 1:
            was_over = self.over
            try:
                now = self.numbers[await get()]
            except (BucketNotFound, ObjectGone):  # not there yet, or replaced while it was read
                assert not was_over
                self.gone += 1
                await asyncio.sleep(0.005)
                continue
            assert last <= now
            assert now == VERSIONS - 1 or not was_over
            self.good += now > last
            last = now
            await asyncio.sleep(0)

    async def read(self) -> bytes:
        """Read it from the bucket, as ``syncd cat`` does."""
        if self.layout == "objects":
            info = await self.bucket.get_info("f")
            if info is None:
                raise ObjectGone("not yet")
            sink = BytesSink()
            await self.bucket.download(info, sink)
            return sink.data
        reader = TreeReader(self.bucket)
        commit = await reader.channel("head")
        if commit is None:
            raise ObjectGone("not yet")
        [node] = await reader.nodes([commit.generation.root])
        [child] = node.children()
        parts = reader.content(child.location, child.entry.size, child.entry.digest)
        return b"".join([part async for part in parts])

    async def pull(self, name: str) -> bytes:
        """Read it from a mirror."""
        try:
            await self.site.subscriber(name=name).pull()
        except NoGeneration as error:
            raise ObjectGone("not yet") from error
        try:
            return await asyncio.to_thread((self.site.tmp / name / "f").read_bytes)
        except FileNotFoundError as error:
            raise ObjectGone("not yet") from error


@pytest.mark.parametrize("layout", ["objects", "generations"])
@pytest.mark.fault("O3")
async def test_fifty_readers_of_a_storm_on_one_name(site: Site, layout: str) -> None:
    """One file is overwritten twelve times, its old content freed at once, under 46 bucket readers and 4 mirrors.

    Each version that they get is whole and no older than the one before; all reach the last.
    """
    storm = Storm(site, layout)
    async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as tasks:
        tasks.create_task(storm.write())
        for _ in range(READERS):
            tasks.create_task(storm.follow(storm.read))
        for number in range(MIRRORS):
            tasks.create_task(storm.follow(partial(storm.pull, f"m{number}")))
    assert storm.good > 2 * (READERS + MIRRORS)  # they did follow


# -- S4: a checkout of thousands of files ------------------------------------------------------------------------------

FILES = 1500
FEW = 5


def checkout(source: Path, text: str, *, seconds: float = 0.0) -> None:
    """Do to files what git does: each is removed, created anew and written, one after the other."""
    begun = time.monotonic()
    for number in range(FILES):
        path = source / f"d{number % 30}/e{number % 7}/f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(f"{text} {number}" * 20)
        time.sleep(max(0.0, begun + seconds * number / FILES - time.monotonic()))


@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["as fast as it goes", "two seconds"])
@pytest.mark.fault("S4")
async def test_a_checkout_is_a_few_generations(site: Site, seconds: float) -> None:
    """1,500 files are removed, made anew and written one by one under a running publisher, at once or in two seconds.

    Into an empty source, and over what is there: five generations at most for each.
    """
    async with running(site.publisher(rescan_seconds=NEVER).run()) as task:
        before = 0
        for text in ("", "one", "two"):
            if text:
                await asyncio.to_thread(checkout, site.source, text, seconds=seconds)
            async with asyncio.timeout(DEADLINE):
                while (await site.head()).root != await asyncio.to_thread(root_digest, site.source):
                    assert not task.done()
                    await asyncio.sleep(0.05)
            made, before = (await site.head()).number - before, (await site.head()).number
            assert made <= FEW, text


# -- W7: a filesystem that tells nothing -------------------------------------------------------------------------------


def silent(*_: object, stop_event: threading.Event, **__: object) -> Iterator[set[object]]:
    """What watchfiles does where events never come: it begins, and says nothing."""
    while not stop_event.is_set():
        yield set()
        stop_event.wait(0.05)


@MODES
@pytest.mark.fault("W7")
async def test_without_events_the_timer_finds_what_changed(
    site: Site, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """watchfiles is replaced by one that never says anything; files are made, changed and removed.

    At the source they are found by the timer, and drift in the mirror is repaired by it.
    """
    monkeypatch.setattr(watchfiles, "watch", silent)
    monkeypatch.setattr(agenda, "MIN_QUIET_SECONDS", 0.1)
    (site.source / "f").write_text("one")
    (site.source / "gone").write_text("x")
    tree = site.tree(mode)

    def equal() -> bool:
        return tree.exists() and difference(site.source, tree) == {}

    async with (
        running(site.publisher(rescan_seconds=0.3).run()) as publisher,
        running(site.subscriber(mode, rescan_seconds=0.3).run()) as mirror,
    ):
        await until(equal, beside=mirror)
        assert site.statuses["publisher"].watching == "events"
        (site.source / "d").mkdir()
        (site.source / "d/new").write_text("new")
        (site.source / "f").write_text("two")
        (site.source / "gone").unlink()
        await until(equal, beside=publisher)
        (tree / "d/new").unlink()
        (tree / "f").write_text("somebody else's")
        await until(equal, beside=mirror)


@contextmanager
def overlay(tmp: Path) -> Iterator[tuple[Path, Path]]:
    """A directory, and the one beneath it: what is written there shows in it, and raises no event, as on NFS."""
    beneath, merged = tmp / "beneath", tmp / "merged"
    for directory in (beneath, merged, tmp / "upper", tmp / "work"):
        directory.mkdir()
    (beneath / "f").write_text("one")
    options = f"lowerdir={beneath},upperdir={tmp / 'upper'},workdir={tmp / 'work'}"
    command: list[str | Path] = ["mount", "-t", "overlay", "-o", options, "none", merged]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    try:
        yield merged, beneath
    finally:
        subprocess.run(["umount", "-l", merged], check=True)


@pytest.mark.fault("W7")
async def test_on_a_filesystem_without_events_changes_are_published_by_the_timer(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are written beneath an overlay mount that is the source, for which the kernel raises no event.

    The publisher's timer finds them, and a pull brings them.
    """
    monkeypatch.setattr(agenda, "MIN_QUIET_SECONDS", 0.1)
    with overlay(site.tmp) as (site.source, beneath):
        async with running(site.publisher(rescan_seconds=1.0).run()) as publisher:
            await until(lambda: site.statuses["publisher"].generation == 1, beside=publisher)
            (beneath / "f").write_text("two")
            (beneath / "new").write_text("x")
            await until(lambda: site.statuses["publisher"].generation == 2, beside=publisher)
        await site.subscriber().pull()
        assert (site.tmp / "mirror/f").read_text() == "two"
        assert (site.tmp / "mirror/new").exists()


@pytest.mark.parametrize("polls", [False, True], ids=["events", "polling"])
@pytest.mark.fault("W7")
async def test_polling_can_be_forced_where_events_do_not_come(
    tmp_path: Path, polls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is written beneath a watched overlay mount, for which the kernel raises no event.

    With watchfiles' own variables for polling it is hinted; without them nothing is.
    """
    if polls:
        monkeypatch.setenv("WATCHFILES_FORCE_POLLING", "true")
        monkeypatch.setenv("WATCHFILES_POLL_DELAY_MS", "50")
    with overlay(tmp_path) as (merged, beneath):
        watcher = PathWatcher(merged, on_mode=lambda _mode, _reason: None)
        async with watcher:
            assert (await watcher.next(DEADLINE)).rescan
            (beneath / "new").write_text("x")  # not "f": polling knows whole seconds only
            hints = await watcher.next(DEADLINE if polls else 0.5)
            assert "new" in hints.paths if polls else not (hints.paths or hints.rescan)
