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
    """What is written last is the newest, whatever its publisher took for the time; files keep their own times."""
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
    """Moves are told apart by their count, not by their time: an operator with the right clock moves it, too."""
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
    """Within the grace time nothing goes, after it what is too many, after the days that are set what is too old."""
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
    """A service that was told by a clock a year ahead when to collect next does so when the grace time is over."""
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
    """An index of before ages were the server's, or of before its clock was set right."""
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
    """Blobs that were found loose under the wrong time go a grace time later, as the server counts it."""
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
    """In the objects layout it is counted from when we replaced them, by one and the same clock."""
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
    """Its moves have ended before they are made: refused, with the clocks as a reason; the right time brings them."""
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
    """A move that ended a few minutes ago by our clock may still be good by its publisher's."""
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
    """Once it is right again the next round says when the head's word really ends: silence is noticed after a day."""
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
