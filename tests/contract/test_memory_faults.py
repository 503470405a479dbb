"""The twin in memory fails as it is told to, and only then."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from syncd.errors import StoreTimeout, Unavailable
from syncd.store.base import CHUNK_SIZE, BucketSpec, ObjectInfo
from syncd.store.memory import MemoryStore
from tests.support.store import DEADLINE, BytesSink, BytesSource, content, listing, names, put, small

if TYPE_CHECKING:
    from syncd.store.memory import MemoryBucket


@pytest.fixture
async def store() -> MemoryStore:
    store = MemoryStore()
    await store.create_bucket("B", BucketSpec())
    return store


@pytest.fixture
def bucket(store: MemoryStore) -> MemoryBucket:
    return store.bucket("B")


async def test_an_ordered_failure_happens_once(store: MemoryStore, bucket: MemoryBucket) -> None:
    """The named call fails, the next one works; nothing was done by the failed one."""
    store.faults.fail("put_meta", Unavailable("away"))
    with pytest.raises(Unavailable):
        await put(bucket, "n", b"x")
    assert await names(bucket) == []
    await put(bucket, "n", b"x")
    assert await names(bucket) == ["n"]


async def test_an_upload_can_fail_in_the_middle(store: MemoryStore, bucket: MemoryBucket) -> None:
    """What was stored of it is removed."""
    store.faults.fail("upload_chunk", Unavailable("away"))
    with pytest.raises(Unavailable):
        await bucket.upload(BytesSource(content(3 * CHUNK_SIZE)))
    assert [page async for page in bucket.list_chunks()] == []


async def test_a_stall_ends_by_resuming_or_in_silence(store: MemoryStore, bucket: MemoryBucket) -> None:
    """A frozen server either thaws or is given up."""
    store.faults.stall()
    store.faults.silence_seconds = 0.05
    with pytest.raises(StoreTimeout):
        await bucket.state()
    store.faults.silence_seconds = DEADLINE
    waiting = asyncio.create_task(bucket.state())
    await asyncio.sleep(0)
    assert not waiting.done()
    store.faults.resume()
    assert (await waiting).messages == 0


async def test_hints_can_be_lost_and_a_reconnect_still_wakes(store: MemoryStore, bucket: MemoryBucket) -> None:
    """As with a notification that is sent at most once."""
    store.faults.lose_hints = True
    async with bucket.hints() as hints:
        await put(bucket, "n", b"x")
        assert await hints.wait(0.02) == 0
        store.disconnect()
        async with asyncio.timeout(DEADLINE):
            assert await hints.wait(DEADLINE) == 0


async def test_answers_can_come_in_another_order(store: MemoryStore, bucket: MemoryBucket) -> None:
    """Nobody may rely on the order of downloads."""
    await bucket.put_many([small(f"s/{number}", b"x") for number in range(3)])
    infos = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    store.faults.reorder = True
    assert [info.name async for info, _ in bucket.download_many(infos)] == ["s/2", "s/1", "s/0"]


async def test_a_download_can_fail_in_the_middle(store: MemoryStore, bucket: MemoryBucket) -> None:
    """After some content was written already."""
    await put(bucket, "n", content(3 * CHUNK_SIZE))
    info = await bucket.get_info("n")
    assert info is not None
    store.faults.fail("download_chunk", StoreTimeout("silent"))
    sink = BytesSink()
    with pytest.raises(StoreTimeout):
        await bucket.download(info, sink)
    assert 0 < len(sink.data) < info.size
