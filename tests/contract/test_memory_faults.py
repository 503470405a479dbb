"""The twin in memory fails as it is told to, and only then."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from syncd.errors import ObjectCorrupt, ObjectGone, StoreTimeout, SyncdError, Unavailable
from syncd.nodes import digest_of
from syncd.store.base import CHUNK_SIZE, BucketSpec, Link, ObjectInfo
from syncd.store.codec import RAW
from syncd.store.memory import MemoryStore
from tests.support.store import DEADLINE, BytesSink, BytesSource, content, listing, names, put, small

if TYPE_CHECKING:
    from syncd.store.base import BlobSink
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


# -- the generations layout -----------------------------------------------------------------------------------------

GOOD = b"some text"


async def send(sink: BlobSink, *blobs: bytes) -> None:
    for data in blobs:
        await sink.put(digest_of(data), RAW + data)


async def fetch(bucket: MemoryBucket, *digests: str) -> list[tuple[str, bytes | SyncdError]]:
    return [outcome async for outcome in bucket.get_blobs(digests)]


async def test_a_sink_can_fail_in_the_middle(store: MemoryStore, bucket: MemoryBucket) -> None:
    """The next call tells it, as with a pipeline; what was stored before stays, what comes after is refused."""
    async with bucket.blob_sink() as sink:
        await send(sink, b"a", b"b")
        store.faults.fail("put_blob", StoreTimeout("silent"))
        await send(sink, b"c")
        with pytest.raises(StoreTimeout):
            await send(sink, b"d")
        with pytest.raises(StoreTimeout):
            await sink.flush()
        assert sink.stored == 2
    assert [page async for page in bucket.list_chunks()] == [{digest_of(b"a"): 1, digest_of(b"b"): 1}]


@pytest.mark.parametrize("call", ["get_blobs", "commit_generation", "remove_blobs", "set_layout", "put_link"])
async def test_a_call_of_the_generations_layout_can_fail(store: MemoryStore, bucket: MemoryBucket, call: str) -> None:
    """Before it does anything; the next one works."""
    async with bucket.blob_sink() as sink:
        await send(sink, GOOD)

    async def run() -> object:
        if call == "get_blobs":
            return await fetch(bucket, digest_of(GOOD))
        if call == "commit_generation":
            return await bucket.commit_generation(1, b"{}", {}, channel="head", expected_seq=0)
        if call == "remove_blobs":
            return await bucket.remove_blobs([digest_of(GOOD)])
        if call == "put_link":
            return await bucket.put_link("channels/stable", Link("B", "n"), expected_seq=0, metadata={"k": "v"})
        return await bucket.set_layout("generations")

    before = await bucket.state()
    store.faults.fail(call, Unavailable("away"))
    with pytest.raises(Unavailable):
        await run()
    assert await bucket.state() == before
    await run()


async def test_blobs_are_damaged_swapped_and_removed_behind_our_back(store: MemoryStore, bucket: MemoryBucket) -> None:
    """What a test does to a blob, a reader meets."""
    one, two = digest_of(b"one"), digest_of(b"two")
    async with bucket.blob_sink() as sink:
        await send(sink, b"one", b"two")
    payload = store.blob_payload("B", one)
    assert payload == RAW + b"one"
    store.set_blob_payload("B", two, payload)
    store.set_blob_payload("B", one, None)
    assert store.blob_payload("B", one) is None
    assert [(digest, type(data)) for digest, data in await fetch(bucket, one, two)] == [
        (one, ObjectGone),
        (two, ObjectCorrupt),
    ]
    store.faults.reorder = True
    assert [digest for digest, _ in await fetch(bucket, one, two)] == [two, one]
