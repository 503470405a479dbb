"""A publisher whose clock is wrong by a year, beside a server and hosts whose clocks are right."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from syncd.channels import Channels
from syncd.errors import Untrusted
from syncd.index import Index
from syncd.index.blobs import Blobs
from syncd.outlet import PublishOptions, PushResult, Wish
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.signatures import Signer, generate
from syncd.status import FolderStatus, StatusKeeper
from syncd.store import memory
from syncd.store.base import BucketSpec
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trees import TreeReader
from syncd.trust import Trust
from tests.support.clocks import ServerClock
from tests.support.trees import difference

if TYPE_CHECKING:
    from pathlib import Path

    from syncd.retention import Collected
    from syncd.upstream import PullResult

HOUR = 3600.0
YEAR = 365 * 24 * HOUR

BOTH = pytest.mark.parametrize("off", [YEAR, -YEAR], ids=["a year ahead", "a year behind"])


class Site:
    """One publisher, a server and a host; ``off`` is what the publisher's clock is wrong by."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.now = time.time()
        self.off = 0.0
        self.store = MemoryStore()
        self.source = tmp / "source"
        self.source.mkdir()
        self.mirror = tmp / "mirror"
        self.publish: dict[str, Any] = {}
        self.trust: Trust | None = None
        self.codes: list[str] = []
        (tmp / "state").mkdir()

    def publisher(self) -> Publisher:
        spec = BucketSpec(layout=self.publish.get("layout", "generations"))
        options = PublishOptions("app", self.source, Rules(), "here:/source", bucket=spec, **self.publish)
        status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
        wrong = self.now + self.off
        return Publisher(options, self.store, self.tmp / "publish.db", status=status, clock=lambda: wrong)

    async def push(self, text: str | None = None) -> int:
        if text is not None:
            (self.source / "f").write_text(text)
        return (await self.publisher().push(allow_delete=True)).generation

    async def collect(self) -> Collected:
        return await self.publisher().collect()

    async def pull(self) -> PullResult:
        options = SubscribeOptions("app", self.mirror, Rules(), trust=self.trust)
        status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
        index = self.tmp / "state" / "index.db"
        subscriber = Subscriber(options, self.store, index, status=status, clock=lambda: self.now)
        result = await subscriber.pull(allow_delete=True)
        self.codes = [problem.code for problem in result.problems]
        return result

    def has(self) -> str:
        return (self.mirror / "f").read_text()

    async def numbers(self) -> list[int]:
        """The generations that are there."""
        reader = TreeReader(self.store.bucket("app"))
        return [number for number in range(1, 10) if await reader.generation(number) is not None]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path)
    monkeypatch.setattr(memory, "time", ServerClock(lambda: site.now))
    return site


@pytest.mark.parametrize("layout", ["objects", "generations"])
@pytest.mark.fault("N9")
async def test_a_clock_that_leaps_to_and_fro_leads_nobody_back(site: Site, layout: str) -> None:
    """The publisher's clock leaps by a year, ahead and back, between six pushes, in both layouts.

    After each the mirror has what was written last, and files keep their own times.
    """
    site.publish = {"layout": layout}
    for number, off in enumerate((0.0, YEAR, -YEAR, 0.0, -YEAR, YEAR)):
        site.off = off
        site.now += 1
        await site.push(f"version {number}")
        assert (await site.pull()).problems == []
        assert site.has() == f"version {number}"
        assert difference(site.source, site.mirror) == {}


@BOTH
@pytest.mark.fault("N9")
async def test_a_signed_folder_is_followed_whatever_its_publishers_clock_says(site: Site, off: float) -> None:
    """A publisher signs with its clock a year ahead or behind; between, an operator with a right clock rolls back.

    Every move is followed, in the order of their counts.
    """
    signer = Signer(generate()[0])
    site.publish, site.trust = {"signer": signer}, Trust(frozenset({signer.public}), 1)
    site.off = off
    await site.push("one")
    await site.push("two")
    assert ((await site.pull()).generation, site.has()) == (2, "two")
    operator = Channels(site.store.bucket("app"), lambda: site.now)
    await operator.rollback("head", to=1, who="operator", why="", signer=signer)
    assert ((await site.pull()).generation, site.has()) == (1, "one")
    await site.push("three")
    assert ((await site.pull()).generation, site.has()) == (3, "three")


# -- what may go -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0.0, YEAR, -YEAR], ids=["right", "a year ahead", "a year behind"])
@pytest.mark.fault("N9")
async def test_generations_age_by_the_servers_clock(site: Site, off: float) -> None:
    """The publisher's clock is right, a year ahead or a year behind, while the server's goes on by 31 days.

    Only by the server's clock generations go: too many after the grace time, too old after keep_days.
    """
    site.publish = {"keep_generations": 3, "keep_days": 30.0, "grace_seconds": 60.0}
    site.off = off
    for number in range(4):
        await site.push(f"version {number}" * 100)
        site.now += 5
    await site.collect()
    assert await site.numbers() == [1, 2, 3, 4]
    site.now += 60
    await site.collect()
    assert await site.numbers() == [2, 3, 4]
    site.now += 29 * 24 * HOUR
    await site.collect()
    assert await site.numbers() == [2, 3, 4]
    site.now += 2 * 24 * HOUR
    await site.collect()
    assert await site.numbers() == [4]
    assert (await site.pull()).generation == 4


@pytest.mark.fault("N9")
async def test_a_clock_that_is_set_back_delays_no_collection(site: Site) -> None:
    """A running publisher's clock is a year ahead for one round, then set right.

    What is too many is collected 61 s later, when the grace time is over, not a year later.
    """
    site.publish = {"keep_generations": 1, "keep_days": 0.0, "grace_seconds": 60.0}
    for number in range(2):
        await site.push(f"version {number}")
    site.off = YEAR
    publisher = site.publisher()
    publisher._clock = lambda: site.now + site.off
    await publisher._open()
    try:
        for seconds, off in [(0, YEAR), (0, 0.0), (61, 0.0)]:
            site.now, site.off = site.now + seconds, off
            await publisher._round(None, PushResult(), Wish())
    finally:
        await publisher._close()
    assert await site.numbers() == [2]


@pytest.mark.fault("N9")
def test_what_a_clock_ahead_noted_is_counted_from_now(tmp_path: Path) -> None:
    """Loose blobs are noted in the index by a clock that is a year ahead, then asked for by the right one.

    They count as loose from that moment on.
    """
    index = Index(tmp_path / "index.db")
    blobs = Blobs(index)
    try:
        for now, since in [(1000.0 + YEAR, 1000.0 + YEAR), (1000.0, 1000.0), (1030.0, 1000.0)]:
            assert blobs.since(["ab" * 32], now) == {"ab" * 32: since}
            assert blobs.strays_since(["nuid"], now) == {"nuid": since}
    finally:
        index.close()


@BOTH
@pytest.mark.fault("N9")
async def test_a_clock_that_is_set_right_neither_hurries_nor_stops_the_collection(site: Site, off: float) -> None:
    """A collection runs while the publisher's clock is a year ahead or behind, later ones after it was set right.

    Loose blobs go a grace time after they were found, as the server counts it: not yet after 30 s, but after 61.
    """
    site.publish = {"keep_generations": 1, "keep_days": 0.0, "grace_seconds": 60.0, "compress": False}
    for number in range(2):
        await site.push(f"version {number}" * 100)
    site.now += 61
    site.off = off
    assert (await site.collect()).freed_blobs == 0  # first it is noted since when they are loose
    site.off = 0.0
    site.now += 30
    assert (await site.collect()).freed_blobs == 0
    site.now += 31
    assert (await site.collect()).freed_blobs > 0
    assert await site.numbers() == [2]


@BOTH
@pytest.mark.fault("N9")
async def test_replaced_objects_keep_their_grace_time(site: Site, off: float) -> None:
    """In the objects layout a file is replaced by a publisher whose clock is a year ahead or behind.

    The old content is still there after 59 s and freed after 61: the grace time is 60.
    """
    site.publish = {"layout": "objects", "grace_seconds": 60.0}
    site.off = off
    bucket = site.store.bucket("app")

    async def contents() -> int:
        return sum([len(page) async for page in bucket.list_chunks()])

    await site.push("one")
    await site.push("two")
    for seconds, left in ((59, 2), (2, 1)):
        site.now += seconds
        await site.push()
        assert await contents() == left
    await site.pull()
    assert site.has() == "two"


# -- what ends ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(site: Site) -> Site:
    """A signed folder whose moves are good for a day."""
    signer = Signer(generate()[0])
    site.publish = {"signer": signer, "expire_seconds": 24 * HOUR}
    site.trust = Trust(frozenset({signer.public}), 1)
    return site


@pytest.mark.fault("N9", "K4")
async def test_a_clock_a_year_behind_is_named_and_mended_by_the_right_one(fresh: Site) -> None:
    """A publisher whose clock is a year behind signs a move that is good for a day.

    The host refuses it as not fresh and names the clocks; pushed again with the right clock it is followed.
    """
    await fresh.push("one")
    await fresh.pull()
    fresh.off = -YEAR
    await fresh.push("two")
    with pytest.raises(Untrusted, match="not fresh") as caught:
        await fresh.pull()
    assert "clock" in caught.value.hint
    assert fresh.has() == "one"
    fresh.off = 0.0
    await fresh.push()
    assert ((await fresh.pull()).generation, fresh.has(), fresh.codes) == (2, "two", [])


@pytest.mark.parametrize(("minutes", "good"), [(4, True), (6, False)])
@pytest.mark.fault("N9", "K4")
async def test_some_minutes_are_forgiven(fresh: Site, minutes: int, good: bool) -> None:
    """A publisher whose clock is 4 or 6 minutes behind signs a move that ends after a second.

    With 4 minutes the host follows it, with 6 it is refused as not fresh.
    """
    fresh.publish["expire_seconds"] = 1.0
    fresh.off = -minutes * 60.0
    await fresh.push("one")
    if good:
        await fresh.pull()
        assert (fresh.has(), fresh.codes) == ("one", [])
    else:
        with pytest.raises(Untrusted, match="not fresh"):
            await fresh.pull()


@pytest.mark.fault("N9", "K4")
async def test_a_clock_a_year_ahead_does_not_silence_the_alarm_for_a_year(fresh: Site) -> None:
    """A publisher signs with its clock a year ahead, once more with the right one, and then nothing for 25 hours.

    The host says `stale` then: what counts is the end that the right clock has set.
    """
    fresh.off = YEAR
    await fresh.push("one")
    await fresh.pull()
    assert (fresh.has(), fresh.codes) == ("one", [])
    fresh.off = 0.0
    await fresh.push()
    await fresh.pull()
    assert fresh.codes == []
    fresh.now += 25 * HOUR
    await fresh.pull()
    assert fresh.codes == ["stale"]
