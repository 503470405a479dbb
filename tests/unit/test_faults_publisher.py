"""What a publisher does after something went wrong: it doubts, frees what was left, and goes on."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from syncd import publisher as publishers
from syncd.agenda import Agenda
from syncd.channels import Channels
from syncd.errors import SafetyHalt, StoreFull, StoreTimeout
from syncd.index import Index
from syncd.nodes import digest_of
from syncd.outlet import PushResult, Wish
from syncd.records import read_record
from syncd.signatures import Signer, generate
from syncd.store import memory
from syncd.store.base import HEAD, BucketSpec
from tests.support.clocks import ServerClock
from tests.support.store import get
from tests.unit.test_agenda import Clock, due
from tests.unit.test_commit import Shelf, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from syncd.publisher import Publisher

GRACE = 10.0


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    shelf = Shelf(tmp_path)
    monkeypatch.setattr(memory, "time", ServerClock(lambda: shelf.now))
    shelf.options["grace_seconds"] = GRACE
    return shelf


def lay(shelf: Shelf, layout: str) -> None:
    shelf.options |= {"layout": layout, "bucket": BucketSpec(layout=layout)}


@asynccontextmanager
async def opened(shelf: Shelf) -> AsyncIterator[Publisher]:
    """One publisher for several rounds, as a daemon has it."""
    publisher = shelf.publisher()
    await publisher._open()
    try:
        yield publisher
    finally:
        await publisher._close()


async def look(publisher: Publisher) -> PushResult:
    """One full round."""
    result = PushResult()
    await publisher._round(None, result, Wish())
    return result


async def later(shelf: Shelf, publisher: Publisher, times: int = 4) -> None:
    """Rounds that have nothing to do, more than a grace time apart."""
    for _ in range(times):
        shelf.now += GRACE + 1
        await look(publisher)


async def content(shelf: Shelf) -> set[str]:
    """Names of all contents of the bucket."""
    return {name async for page in shelf.store.bucket("app").list_chunks() for name in page}


@pytest.mark.fault("N5")
async def test_what_a_generation_without_room_left_is_freed_by_a_publisher_that_found_all_clean(shelf: Shelf) -> None:
    """A file of 2 MB does not fit into a bucket of 1 MB and is deleted; one of 600 kB takes its place.

    Later rounds free what the failed commit had sent, and generation 2 is committed.
    """
    shelf.options["bucket"] = BucketSpec(max_bytes=1_000_000)
    write(shelf.source / "a")
    async with opened(shelf) as publisher:
        await look(publisher)
        await later(shelf, publisher)
        write(shelf.source / "enormous", os.urandom(2_000_000))
        with pytest.raises(StoreFull):
            await look(publisher)
        (shelf.source / "enormous").unlink()
        write(shelf.source / "fits", os.urandom(600_000))
        with pytest.raises(StoreFull):
            await look(publisher)
        for _ in range(5):
            shelf.now += GRACE + 1
            try:
                done = await look(publisher)
            except StoreFull:
                continue
            assert done.generation == 2
            break
        else:
            pytest.fail("it never had room again")
    assert await shelf.tree() == shelf.disk()


@pytest.mark.fault("O4")
async def test_what_a_failed_commit_left_is_freed_although_the_source_is_as_before(shelf: Shelf) -> None:
    """A generation's commit is made to time out after its blobs were sent; then the new file is deleted.

    Later rounds free the blobs, although the source is what it was before.
    """
    write(shelf.source / "a")
    async with opened(shelf) as publisher:
        await look(publisher)
        await later(shelf, publisher)
        before = await content(shelf)
        write(shelf.source / "b", os.urandom(300_000))
        shelf.store.faults.fail("commit_generation", StoreTimeout("away"))
        with pytest.raises(StoreTimeout):
            await look(publisher)
        assert await content(shelf) > before
        (shelf.source / "b").unlink()
        await later(shelf, publisher, 6)
    left = {name for name in await content(shelf) - before if shelf.store.blob_payload("app", name)}
    assert left == set()


@pytest.mark.fault("D1")
@pytest.mark.parametrize("layout", ["generations", "objects"])
async def test_what_was_replaced_is_freed_while_deletions_are_held(shelf: Shelf, layout: str) -> None:
    """One file is replaced, then all three are deleted, so that the publisher halts in round after round.

    The content that was replaced is freed meanwhile, with its generation's own blobs, and nothing else is: what is
    held back can be read. So in both layouts.
    """
    lay(shelf, layout)
    shelf.options["keep_generations"] = 1
    for name in "abc":
        write(shelf.source / name, os.urandom(100_000))
    async with opened(shelf) as publisher:
        await look(publisher)
        old, replaced = await content(shelf), await of_one_file(shelf, layout)
        write(shelf.source / "c", os.urandom(100_000))
        await look(publisher)
        held = {name: (shelf.source / name).read_bytes() for name in "abc"}
        newest = await content(shelf) - replaced
        for name in "abc":
            (shelf.source / name).unlink()
        for _ in range(5):
            with pytest.raises(SafetyHalt):
                await look(publisher)
            shelf.now += GRACE + 1
    assert {name for name in old | newest if not shelf.store.blob_payload("app", name)} == replaced
    for name, data in held.items():
        assert await stored(shelf, layout, name) == data


async def of_one_file(shelf: Shelf, layout: str) -> set[str]:
    """What goes when file `c` is replaced in the first version: its content, and the generation's record and root."""
    if layout == "objects":
        info = await shelf.store.bucket("app").get_info("c")
        assert info is not None
        return {info.nuid}
    record = await read_record(shelf.store.bucket("app"), 1)
    assert record is not None
    root = record.generation.root.location.blob
    return {digest_of((shelf.source / "c").read_bytes()), root, record.info.nuid}


async def stored(shelf: Shelf, layout: str, name: str) -> bytes:
    """A file's content as the bucket has it."""
    if layout == "objects":
        return await get(shelf.store.bucket("app"), name)
    return bytes((await shelf.tree())[name][3])


@pytest.mark.fault("N1 O2")
@pytest.mark.parametrize("layout", ["generations", "objects"])
async def test_what_a_server_lost_while_it_was_away_is_sent_again_after_a_reconnect(shelf: Shelf, layout: str) -> None:
    """The largest content is taken out of the store under a running publisher, then its connection is cut.

    It is sent again after the reconnect, although the timer is an hour away.
    """
    lay(shelf, layout)
    shelf.options |= {"rescan_seconds": 3600.0, "settle_seconds": 0.01}
    write(shelf.source / "a", os.urandom(300_000))
    running = asyncio.create_task(shelf.publisher().run())
    try:
        async with asyncio.timeout(20):
            while "app" not in shelf.store._streams or not shelf.store.stream("app").metas:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            chunks = shelf.store.stream("app").chunks
            largest = max(chunks, key=lambda name: sum(len(message.payload) for message in chunks[name]))
            size = len(chunks)
            shelf.store.write_raw_chunks("app", largest, [])
            shelf.now += 60
            shelf.store.disconnect()
            while len(shelf.store.stream("app").chunks) < size:
                assert not running.done()
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.fault("N8")
async def test_hints_of_writes_that_nobody_made_cost_one_look_and_deafen_nobody(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher is handed hints with sequences far ahead, falling, doubled and old, and later a small new one.

    The false ones cost one full round; after the next look at everything the small one counts again.
    """
    monkeypatch.setattr(publishers, "HINT_GRACE_SECONDS", 0.0)
    write(shelf.source / "a")
    looks: list[str] = []

    class Told(Agenda):
        def full(self) -> None:
            looks.append("full")

        def wake(self) -> None:
            looks.append("wake")

    class Hints:
        def __init__(self, seqs: list[int]) -> None:
            self.seqs = seqs

        async def wait(self, max_seconds: float) -> int:
            assert max_seconds
            if not self.seqs:
                raise asyncio.CancelledError
            return self.seqs.pop(0)

    async with opened(shelf) as publisher:
        await look(publisher)
        last = publisher._outlet.last_seq
        hints = Hints([last, 10**9, 10**9 - 1, 10**9 - 2, 10**9, 0, last - 1, last + 1, last + 1])
        with pytest.raises(asyncio.CancelledError):
            await publisher._feed_bucket(hints, Told(settle=0.0, rescan=60.0))
    assert looks == ["full", "wake", "full"]


async def test_content_that_is_in_use_is_never_freed_whatever_the_list_of_garbage_says(shelf: Shelf) -> None:
    """An undone change, a crash between two notes: what is announced stays, and what is not goes."""
    lay(shelf, "objects")
    shelf.options["grace_seconds"] = 0.0
    write(shelf.source / "a", os.urandom(100_000))
    write(shelf.source / "b", os.urandom(100_000))
    await shelf.push()
    assert shelf.index is not None
    index = Index(shelf.index)
    rows = {row.path: row for row in index.iter_remote()}
    with index.transaction():
        index.add_garbage(rows["a"].nuid, 1.0, None)
    index.close()
    write(shelf.source / "b", os.urandom(100_000))
    shelf.now += 1
    await shelf.push()
    names = await content(shelf)
    assert rows["a"].nuid in names
    assert rows["b"].nuid not in names


async def test_a_head_that_somebody_moved_is_looked_into_once(shelf: Shelf) -> None:
    """Which generation is the newest costs a listing of all of them: not in each round, for as long as it stays so."""
    signer = Signer(generate()[0])
    shelf.options["signer"] = signer
    for text in ("one", "two"):
        write(shelf.source / "a", text)
        await shelf.push()
    async with opened(shelf) as publisher:
        await look(publisher)
        operator = Channels(shelf.store.bucket("app"), lambda: shelf.now)
        await operator.rollback(HEAD, to=1, who="somebody", signer=Signer(generate()[0]))
        shelf.options["expire_seconds"] = 0.0
        await look(publisher)
        shelf.store.faults.calls.clear()
        for _ in range(3):
            await look(publisher)
        assert shelf.store.faults.calls.count("changes") == 0


# -- when to look ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def ready(clock: Clock, settle: float) -> Agenda:
    agenda = Agenda(settle=settle, rescan=3600.0, now=clock)
    assert await due(agenda) is None
    agenda.done(3600.0)
    return agenda


async def takes(agenda: Agenda, clock: Clock, names: list[str], apart: float, step: float = 0.005) -> list[int]:
    """Hint at paths one after the other; return how many were due each time that some were."""
    taken: list[int] = []
    for name in names:
        agenda.hint([name])
        left = apart
        while left > step / 2:
            clock.now += step
            left -= step
            found = await due(agenda)
            if isinstance(found, frozenset):
                taken.append(len(found))
    return taken


@pytest.mark.fault("S4")
async def test_a_slow_checkout_is_a_burst_however_short_the_settle_time(clock: Clock) -> None:
    """200 paths are hinted at, 20 ms apart, with a settle time of 5 ms.

    Fewer than ten times some are due, while nobody can know; the rest is due all at once.
    """
    agenda = await ready(clock, 0.005)
    taken = await takes(agenda, clock, [f"f{number}" for number in range(200)], 0.02)
    assert len(taken) < 10
    clock.now += 2
    rest = await due(agenda)
    assert isinstance(rest, frozenset)
    assert sum(taken) + len(rest) == 200


@pytest.mark.fault("S4")
async def test_a_second_checkout_of_the_same_files_is_a_burst_too(clock: Clock) -> None:
    """The same 200 paths are hinted at twice, 10 ms apart, with a minute between.

    Each time nothing is due until it is quiet, then all at once.
    """
    agenda = await ready(clock, 0.05)
    names = [f"f{number}" for number in range(200)]
    for _ in range(2):
        assert await takes(agenda, clock, names, 0.01) == []
        clock.now += 2
        assert await due(agenda) == frozenset(names)
        clock.now += 60


async def test_what_is_remembered_of_hints_is_bounded(clock: Clock) -> None:
    """A tree in which something changes all the time costs no more memory tomorrow."""
    agenda = await ready(clock, 0.05)
    for number in range(5000):
        agenda.hint([f"f{number}"])
        clock.now += 0.01
    assert len(agenda._burst._seen) <= 102


@pytest.mark.fault("S4")
async def test_a_full_round_ends_a_burst(clock: Clock) -> None:
    """A path is hinted at and a full round takes it; 100 s later 200 paths are hinted at, 10 ms apart.

    None is due before it is quiet, then all at once: the first hint does not make the burst an old one.
    """
    agenda = await ready(clock, 0.05)
    agenda.hint(["before"])
    clock.now += 0.01
    agenda.full()
    clock.now += 1
    assert await due(agenda) is None
    agenda.done(3600.0)
    clock.now += 100
    names = [f"f{number}" for number in range(200)]
    assert await takes(agenda, clock, names, 0.01) == []
    clock.now += 2
    assert await due(agenda) == frozenset(names)
