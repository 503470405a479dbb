"""What services may rely on in the generations layout, whichever store is behind the Protocols."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import zstandard
from blake3 import blake3

from syncd.errors import (
    BucketNotFound,
    BucketSealed,
    ObjectCorrupt,
    ObjectGone,
    StoreFull,
    StoreRejected,
    SyncdError,
    WriteConflict,
)
from syncd.nodes import BLOB_MAX
from syncd.store.base import CHANNELS, CHUNK_SIZE, GENERATIONS, HEAD, BucketSpec, Link, ObjectInfo
from syncd.store.codec import RAW, ZSTD, Codec
from tests.support.store import DEADLINE, content, get, listing, names, sha256

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from syncd.store.base import BlobSink, Bucket
    from tests.support.store import Kit


def digest_of(data: bytes) -> str:
    return blake3(data).hexdigest()


def texts(count: int, size: int = 200) -> list[bytes]:
    return [content(size, number) for number in range(count)]


async def send(sink: BlobSink, blobs: Iterable[bytes], *, replace: bool = False) -> None:
    codec = Codec()
    for data in blobs:
        await sink.put(digest_of(data), codec.encode(data), replace=replace)


async def store(bucket: Bucket, *blobs: bytes, replace: bool = False) -> tuple[int, int, int]:
    """Send blobs; how many were stored, their bytes, and how many were there."""
    async with bucket.blob_sink() as sink:
        await send(sink, blobs, replace=replace)
        await sink.flush()
        return sink.stored, sink.stored_bytes, sink.duplicates


async def fetch(bucket: Bucket, *digests: str) -> dict[str, bytes | SyncdError]:
    found: dict[str, bytes | SyncdError] = {}
    async with asyncio.timeout(DEADLINE):
        async for digest, data in bucket.get_blobs(digests):
            assert digest not in found
            found[digest] = data
    return found


# -- blobs up -------------------------------------------------------------------------------------------------------


async def test_a_blob_is_stored_once_and_the_second_time_counts_as_a_duplicate(bucket: Bucket) -> None:
    """The refusal by the expected sequence is the dedup hit; only what was stored counts as sent."""
    one, two = b"text " * 1000, content(3000)
    assert await store(bucket, one, two, one) == (2, len(Codec().encode(one)) + 1 + 3000, 1)
    assert await store(bucket, two) == (0, 0, 1)
    assert (await bucket.state()).messages == 2
    assert await fetch(bucket, digest_of(one), digest_of(two)) == {digest_of(one): one, digest_of(two): two}


async def test_flushing_nothing_and_flushing_twice_are_fine(bucket: Bucket) -> None:
    """A round without new content opens a sink, too."""
    async with bucket.blob_sink() as sink:
        await sink.flush()
        await send(sink, texts(3))
        await sink.flush()
        await sink.flush()
        assert (sink.stored, sink.duplicates) == (3, 0)


async def test_many_blobs_are_on_their_way_at_once(bucket: Bucket) -> None:
    """A thousand blobs of every compressibility arrive; an empty one is a blob like any other."""
    blobs = [b"", *texts(500), *(b"%d " % number * 300 for number in range(500))]
    assert (await store(bucket, *blobs))[0] == 1001
    found = await fetch(bucket, *map(digest_of, blobs))
    assert set(found.values()) == set(blobs)


async def test_the_largest_blob_fits_a_message(bucket: Bucket) -> None:
    """Incompressible bytes of the largest size, with the codec byte before them."""
    data = content(BLOB_MAX)
    assert await store(bucket, data) == (1, BLOB_MAX + 1, 0)
    assert await fetch(bucket, digest_of(data)) == {digest_of(data): data}


async def test_a_sink_that_is_left_forgets_what_is_under_way(bucket: Bucket) -> None:
    """An exception in the middle leaves neither tasks nor a window that stays taken."""
    blobs = texts(300, 5000)

    async def fail() -> None:
        async with bucket.blob_sink() as sink:
            await send(sink, blobs)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    stored, _, duplicates = await store(bucket, *blobs)
    assert stored + duplicates == 300
    assert len(await fetch(bucket, *map(digest_of, blobs))) == 300


async def test_a_cancelled_sink_ends_at_once_and_the_next_one_works(bucket: Bucket) -> None:
    """Cancellation passes through, wherever it strikes."""
    blobs = texts(400, 5000)
    started = asyncio.Event()

    async def upload() -> None:
        async with bucket.blob_sink() as sink:
            for number, data in enumerate(blobs):
                await sink.put(digest_of(data), RAW + data)
                if number == 20:
                    started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(upload())
    async with asyncio.timeout(DEADLINE):
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    stored, _, duplicates = await store(bucket, *blobs)
    assert stored + duplicates == 400


@pytest.mark.fault("N5 X1")
async def test_a_full_bucket_ends_the_sink(kit: Kit) -> None:
    """Eight blobs of 15 kB are put into a bucket limited to 20 kB that holds one of 10 kB; then a commit of 12 kB.

    StoreFull comes out of the flush and of every later put, nothing of the commit appears, and a blob that is there
    needs no room.
    """
    await kit.store.create_bucket("full", BucketSpec(max_bytes=20_000))
    bucket = kit.store.bucket("full")
    small, *large = content(10_000), *texts(8, 15_000)
    assert (await store(bucket, small))[0] == 1
    async with bucket.blob_sink() as sink:
        with suppress(StoreFull):
            await send(sink, large)
        with pytest.raises(StoreFull):
            await sink.flush()
        with pytest.raises(StoreFull):
            await sink.put(digest_of(small), RAW + small)
        with pytest.raises(StoreFull):
            await sink.flush()
        assert sink.stored == 0
    assert await store(bucket, small) == (0, 0, 1)
    with pytest.raises(StoreFull):
        await bucket.commit_generation(1, b"x" * 12_000, {}, channel=HEAD, expected_seq=0)
    assert await names(bucket) == []
    assert (await bucket.state()).messages == 1


@pytest.mark.fault("N5")
async def test_a_sealed_bucket_takes_nothing(bucket: Bucket) -> None:
    """A bucket that holds a blob is sealed; then the same blob is put and removed, and a generation committed.

    All three are refused as sealed; the blob is still read.
    """
    data = content(1000)
    await store(bucket, data)
    await bucket.seal()
    with pytest.raises(BucketSealed):
        await store(bucket, data)
    with pytest.raises(BucketSealed):
        await bucket.commit_generation(1, b"{}", {}, channel=HEAD, expected_seq=0)
    with pytest.raises(BucketSealed):
        await bucket.remove_blobs([digest_of(data)])
    assert await fetch(bucket, digest_of(data)) == {digest_of(data): data}


@pytest.mark.fault("N5")
async def test_a_bucket_that_is_gone_is_named(kit: Kit, bucket: Bucket) -> None:
    """The bucket is deleted behind the store's back; then every call of the layout is made.

    Each of them raises BucketNotFound.
    """
    await kit.delete_bucket(bucket.name)
    with pytest.raises(BucketNotFound):
        await store(bucket, b"x")
    with pytest.raises(BucketNotFound):
        await fetch(bucket, digest_of(b"x"))
    with pytest.raises(BucketNotFound):
        await bucket.remove_blobs([digest_of(b"x")])
    with pytest.raises(BucketNotFound):
        await bucket.commit_generation(1, b"{}", {}, channel=HEAD, expected_seq=0)
    with pytest.raises(BucketNotFound):
        await bucket.set_layout("generations")


@pytest.mark.parametrize("name", ["", "*", ">", "a.b", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n", "publisher"])
async def test_what_is_no_digest_is_refused(bucket: Bucket, name: str) -> None:
    """It would be a subject of any kind, a wildcard included."""
    async with bucket.blob_sink() as sink:
        with pytest.raises(StoreRejected, match="no digest"):
            await sink.put(name, RAW)
    with pytest.raises(StoreRejected, match="no digest"):
        await fetch(bucket, name)
    with pytest.raises(StoreRejected, match="no digest"):
        await bucket.remove_blobs([name])


# -- blobs down -----------------------------------------------------------------------------------------------------

GOOD = b"some text, some text, some text, some text, some text"


def zstd(data: bytes, **options: bool) -> bytes:
    return ZSTD + zstandard.ZstdCompressor(**options).compress(data)


def claiming(size: int) -> bytes:
    """A zstd frame whose header tells of so many bytes."""
    head = bytearray(zstd(bytes(1 << 20)))
    assert head[5] >> 6 == 2  # a four-byte content size, without a window byte
    at = 6 if head[5] & 0x20 else 7
    head[at : at + 4] = size.to_bytes(4, "little")
    return bytes(head)


@pytest.mark.fault("O1 O5")
@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(RAW + GOOD[:-1], id="truncated"),
        pytest.param(RAW + GOOD + b"x", id="longer"),
        pytest.param(RAW + GOOD[:-1] + b"X", id="one byte differs"),
        pytest.param(RAW, id="nothing but a codec"),
        pytest.param(zstd(GOOD)[:-3], id="truncated frame"),
        pytest.param(ZSTD, id="no frame"),
        pytest.param(ZSTD + b"\xff" * 40, id="garbage"),
        pytest.param(ZSTD + GOOD, id="raw, said to be compressed"),
        pytest.param(zstd(b"other content"), id="swapped"),
        pytest.param(zstd(GOOD) + b"x", id="bytes after the frame"),
        pytest.param(ZSTD + b"\x50\x2a\x4d\x18\x04\0\0\0skip", id="skippable frame"),
        pytest.param(zstd(GOOD, write_content_size=False), id="no size"),
        pytest.param(zstd(bytes(BLOB_MAX + 1)), id="bomb"),
        pytest.param(zstd(bytes(64 << 20)), id="large bomb"),
        pytest.param(claiming(5), id="more than it says"),
        pytest.param(claiming(0xFFFFFFF0), id="gigabytes"),
        pytest.param(b"\2" + GOOD, id="unknown codec"),
        pytest.param(b"\xff", id="codec alone"),
        pytest.param(RAW + bytes(BLOB_MAX + 1), id="too large"),
    ],
)
async def test_a_blob_that_is_not_what_its_digest_says_is_corrupt(kit: Kit, bucket: Bucket, payload: bytes) -> None:
    """Another payload is stored under a blob's digest: cut, changed, swapped, a broken frame, a bomb, an unknown codec.

    It is ObjectCorrupt, whatever it is; five good blobs that are fetched with it arrive.
    """
    others = texts(5)
    await store(bucket, *others)
    await kit.inject_chunks(bucket.name, digest_of(GOOD), [payload])
    found = await fetch(bucket, digest_of(GOOD), *map(digest_of, others))
    assert isinstance(found.pop(digest_of(GOOD)), ObjectCorrupt)
    assert found == {digest_of(data): data for data in others}


@pytest.mark.fault("O5")
async def test_a_blob_that_hides_a_bomb_by_its_true_digest_is_corrupt(kit: Kit, bucket: Bucket) -> None:
    """One byte more than a blob may hold is stored under its own true digest, compressed and raw.

    It is ObjectCorrupt although the digest is right.
    """
    data = bytes(BLOB_MAX + 1)
    for payload in (zstd(data), RAW + data):
        await kit.inject_chunks(bucket.name, digest_of(data), [payload])
        assert isinstance((await fetch(bucket, digest_of(data)))[digest_of(data)], ObjectCorrupt)


async def test_both_codecs_are_read_whatever_we_would_have_written(kit: Kit, bucket: Bucket) -> None:
    """Raw although it compresses, and compressed although it grows."""
    for data, payload in ((GOOD, RAW + GOOD), (b"x", zstd(b"x")), (b"", RAW)):
        await kit.inject_chunks(bucket.name, digest_of(data), [payload])
        assert await fetch(bucket, digest_of(data)) == {digest_of(data): data}


async def test_the_newest_message_of_a_blob_counts(kit: Kit, bucket: Bucket) -> None:
    """Whoever repaired it without a rollup."""
    await kit.inject_chunks(bucket.name, digest_of(GOOD), [b"\7broken", RAW + GOOD])
    assert await fetch(bucket, digest_of(GOOD)) == {digest_of(GOOD): GOOD}


async def test_missing_blobs_are_gone_and_nothing_asked_is_nothing_got(bucket: Bucket) -> None:
    """Each digest has one answer."""
    assert await fetch(bucket) == {}
    there, gone = texts(3), [digest_of(b"gone %d" % number) for number in range(300)]
    await store(bucket, *there)
    found = await fetch(bucket, *gone[:150], *map(digest_of, there), *gone[150:])
    assert {digest for digest, data in found.items() if isinstance(data, ObjectGone)} == set(gone)
    assert len(found) == 303


async def test_many_more_blobs_than_fit_one_request_are_fetched(bucket: Bucket) -> None:
    """Requests are split by number of subjects, answers into pages by size."""
    blobs = texts(1500, 900) + texts(20, BLOB_MAX)
    await store(bucket, *blobs)
    found = await fetch(bucket, *map(digest_of, blobs))
    assert found == {digest_of(data): data for data in blobs}


async def test_blobs_that_expand_a_lot_are_yielded_as_they_are_decoded(bucket: Bucket) -> None:
    """A page of some kilobytes may hold hundreds of megabytes: not all at once."""
    blobs = [b"%05d" % number * (BLOB_MAX // 5) for number in range(60)]
    await store(bucket, *blobs)
    left = set(map(digest_of, blobs))
    async for digest, data in bucket.get_blobs(list(left)):
        assert isinstance(data, bytes)
        left.remove(digest)
    assert left == set()


async def test_a_reader_may_stop_early(bucket: Bucket) -> None:
    """Requests under way end with it."""
    blobs = texts(800, 2000)
    await store(bucket, *blobs)
    before = len(asyncio.all_tasks())
    outcomes: AsyncIterator[tuple[str, bytes | SyncdError]] = bucket.get_blobs(list(map(digest_of, blobs)))
    async for _ in outcomes:
        break
    await outcomes.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(DEADLINE):
        while len(asyncio.all_tasks()) > before + 1:  # the transport's minder ends by itself
            await asyncio.sleep(0.05)
    assert len(await fetch(bucket, *map(digest_of, blobs))) == 800


# -- removing -------------------------------------------------------------------------------------------------------


async def test_a_removed_blob_is_gone_until_it_is_put_again(bucket: Bucket) -> None:
    """At once, and for good; others stay. To put it again means to replace it."""
    keep, drop = texts(2)
    await store(bucket, keep, drop)
    await bucket.remove_blobs([digest_of(drop)])
    found = await fetch(bucket, digest_of(keep), digest_of(drop))
    assert found[digest_of(keep)] == keep
    assert isinstance(found[digest_of(drop)], ObjectGone)
    assert (await store(bucket, drop, replace=True))[0] == 1
    assert (await fetch(bucket, digest_of(drop)))[digest_of(drop)] == drop
    async with asyncio.timeout(DEADLINE):  # what the removal left for a moment does not take the new one with it
        await asyncio.sleep(1.5)
    assert (await fetch(bucket, digest_of(drop)))[digest_of(drop)] == drop


async def test_what_a_removal_leaves_vanishes_and_the_blob_is_new_then(bucket: Bucket) -> None:
    """For a moment there is an empty message, which counts as a duplicate: hence ``replace``."""
    blobs = texts(50)
    await store(bucket, *blobs)
    await bucket.remove_blobs(list(map(digest_of, blobs)))
    assert await store(bucket, blobs[0]) == (0, 0, 1)
    await eventually_messages(bucket, 0)
    assert await store(bucket, blobs[0]) == (1, 201, 0)


async def eventually_messages(bucket: Bucket, wanted: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while (await bucket.state()).messages != wanted:
            await asyncio.sleep(0.05)


async def test_a_damaged_blob_is_replaced(kit: Kit, bucket: Bucket) -> None:
    """A publisher that finds one broken writes it anew."""
    await kit.inject_chunks(bucket.name, digest_of(GOOD), [b"\7broken"])
    assert await store(bucket, GOOD) == (0, 0, 1)
    assert (await store(bucket, GOOD, replace=True))[0] == 1
    assert await fetch(bucket, digest_of(GOOD)) == {digest_of(GOOD): GOOD}
    assert (await bucket.state()).messages == 1


async def test_blobs_are_listed_beside_chunks(bucket: Bucket) -> None:
    """The publisher learns after a crash what the bucket has."""
    blobs = texts(30)
    await store(bucket, *blobs)
    listed: dict[str, int] = {}
    async for page in bucket.list_chunks():
        listed |= page
    assert listed == {digest_of(data): 1 for data in blobs}


# -- committing -----------------------------------------------------------------------------------------------------

RECORD = b'{"format":1,"number":1}'


async def commit(bucket: Bucket, number: int, expected: int, *, channel: str = HEAD, record: bytes = RECORD) -> int:
    return await bucket.commit_generation(number, record, {"k": str(number)}, channel=channel, expected_seq=expected)


async def test_a_commit_is_an_ordinary_object_and_a_link_to_it(bucket: Bucket) -> None:
    """Any client of ADR-20 reads both."""
    seq = await commit(bucket, 7, 0)
    link, info = await bucket.get_info(CHANNELS + HEAD), await bucket.get_info(GENERATIONS + "0000000007")
    assert link is not None
    assert info is not None
    assert (link.seq, link.link) == (seq, Link(bucket.name, info.name))
    assert (info.size, info.chunks, info.sha256) == (len(RECORD), 1, sha256(RECORD))
    assert info.metadata == {"k": "7"}
    assert info.headers == {"Content-Type": ("application/json",)}
    assert await get(bucket, info.name) == RECORD
    assert [data async for _, data in bucket.download_many([info])] == [RECORD]


async def test_a_commit_says_of_its_channel_what_it_is_told_to(bucket: Bucket) -> None:
    """The link's metadata goes with the batch, apart from the generation's; the next commit brings its own, or none."""
    seq = await bucket.commit_generation(
        1, RECORD, {"of": "it"}, channel=HEAD, expected_seq=0, link_metadata={"syncd-move": "{}", "ü": "ß"}
    )
    link, info = await bucket.get_info(CHANNELS + HEAD), await bucket.get_info(GENERATIONS + "0000000001")
    assert link is not None
    assert info is not None
    assert (link.seq, dict(link.metadata), dict(info.metadata)) == (seq, {"syncd-move": "{}", "ü": "ß"}, {"of": "it"})
    with pytest.raises(WriteConflict):
        await bucket.commit_generation(2, RECORD, {}, channel=HEAD, expected_seq=0, link_metadata={"k": "lost"})
    assert await bucket.get_info(CHANNELS + HEAD) == link
    await commit(bucket, 2, seq)
    link = await bucket.get_info(CHANNELS + HEAD)
    assert link is not None
    assert dict(link.metadata) == {}


async def test_a_channel_of_its_own_is_moved_beside_commits(bucket: Bucket) -> None:
    """A link to a generation is a channel, whoever writes it; each is fenced by its own sequence."""
    seq = await commit(bucket, 1, 0)
    target = Link(bucket.name, GENERATIONS + "0000000001")
    stable = await bucket.put_link(CHANNELS + "stable", target, expected_seq=0, metadata={"k": "v"})
    await commit(bucket, 2, seq)
    info = await bucket.get_info(CHANNELS + "stable")
    assert info is not None
    assert (info.seq, info.link, dict(info.metadata)) == (stable, target, {"k": "v"})


async def test_the_next_commit_moves_the_channel_and_keeps_the_generation_before(bucket: Bucket) -> None:
    """One message per channel, whatever the number of commits."""
    seq = 0
    for number in range(1, 6):
        seq = await commit(bucket, number, seq, record=b"record %d" % number)
    link = await bucket.get_info(CHANNELS + HEAD)
    assert link is not None
    assert (link.seq, link.link) == (seq, Link(bucket.name, GENERATIONS + "0000000005"))
    assert [await get(bucket, f"{GENERATIONS}{number:010d}") for number in (1, 5)] == [b"record 1", b"record 5"]
    assert (await bucket.state()).messages == 5 * 2 + 1


@pytest.mark.fault("C5")
async def test_of_two_publishers_the_second_changes_nothing(bucket: Bucket) -> None:
    """Generation 2 is committed over another sequence of the channel than generation 1 left: 0, one less, one more.

    Each is a WriteConflict, and neither record nor generation appears; over the right one it is stored.
    """
    seq = await commit(bucket, 1, 0)
    state, items = await bucket.state(), await listing(bucket)
    for expected in (0, seq - 1, seq + 1):
        with pytest.raises(WriteConflict, match="moved channel"):
            await commit(bucket, 2, expected)
    assert await bucket.state() == state
    assert await listing(bucket) == items
    assert await commit(bucket, 2, seq) > seq


async def test_a_generation_that_exists_is_not_written_over(bucket: Bucket) -> None:
    """Not even a deleted one: numbers only grow."""
    seq = await commit(bucket, 1, 0)
    state = await bucket.state()
    with pytest.raises(WriteConflict, match="generation 1 exists"):
        await commit(bucket, 1, seq)
    with pytest.raises(WriteConflict, match="generation 1 exists"):
        await commit(bucket, 1, 0, channel="stable")
    assert await bucket.state() == state
    await bucket.delete(GENERATIONS + "0000000001", expected_seq=None, metadata={})
    with pytest.raises(WriteConflict, match="generation 1 exists"):
        await commit(bucket, 1, seq)


async def test_commits_that_race_have_one_winner(bucket: Bucket) -> None:
    """Whatever is under way at once, the channel moves once."""
    results = await asyncio.gather(*(commit(bucket, number, 0) for number in range(1, 9)), return_exceptions=True)
    won = [(number, seq) for number, seq in enumerate(results, 1) if isinstance(seq, int)]
    assert len(won) == 1
    assert all(isinstance(result, int | WriteConflict) for result in results)
    link = await bucket.get_info(CHANNELS + HEAD)
    assert link is not None
    assert (link.seq, link.link) == (won[0][1], Link(bucket.name, f"{GENERATIONS}{won[0][0]:010d}"))
    assert len(await names(bucket)) == 2


async def test_a_deleted_channel_comes_back_by_its_sequence(bucket: Bucket) -> None:
    """A tombstone counts as what the channel last was."""
    await commit(bucket, 1, 0)
    gone = await bucket.delete(CHANNELS + HEAD, expected_seq=None, metadata={})
    with pytest.raises(WriteConflict):
        await commit(bucket, 2, 0)
    assert await commit(bucket, 2, gone) > gone


async def test_a_commit_wakes_whoever_watches(bucket: Bucket) -> None:
    """With the sequence of the channel."""
    async with bucket.hints() as hints:
        seq = await commit(bucket, 1, 0)
        seen = 0
        async with asyncio.timeout(DEADLINE):
            while seen < seq:
                seen = await hints.wait(DEADLINE)
    items = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    assert [item.name for item in items] == [GENERATIONS + "0000000001", CHANNELS + HEAD]


@pytest.mark.parametrize("record", [b"", bytes(CHUNK_SIZE + 1)])
async def test_a_record_that_no_reader_takes_is_refused(bucket: Bucket, record: bytes) -> None:
    """Before anything is sent."""
    with pytest.raises(StoreRejected):
        await commit(bucket, 1, 0, record=record)
    assert (await bucket.state()).messages == 0


# -- the mark -------------------------------------------------------------------------------------------------------


async def test_a_new_bucket_says_its_layout_and_format(kit: Kit) -> None:
    """Whoever opens it knows before reading anything else."""
    for layout in ("objects", "generations"):
        await kit.store.create_bucket(f"new-{layout}", BucketSpec(layout=layout, metadata={"team": "web"}))
        metadata = (await kit.store.bucket(f"new-{layout}").state()).metadata
        wanted = {"team": "web", "syncd.layout": layout, "syncd.format": "1"}
        assert wanted == {key: metadata[key] for key in wanted}


async def test_the_layout_is_changed_and_nothing_else(kit: Kit) -> None:
    """An adopted bucket keeps its mark until it is told another one."""
    spec = BucketSpec(description="d", max_bytes=1_000_000, metadata={"team": "web"})
    await kit.store.create_bucket("marked", spec)
    bucket = kit.store.bucket("marked")
    await store(bucket, b"x")
    before = await bucket.state()
    await bucket.set_layout("generations")
    await bucket.set_layout("generations")
    after = await kit.store.create_bucket("marked", BucketSpec(layout="objects"))
    assert after.metadata["syncd.layout"] == "generations"
    assert after.metadata["team"] == "web"
    assert (after.created, after.messages, after.max_bytes) == (before.created, 1, 1_000_000)
    await bucket.set_layout("objects")
    assert (await bucket.state()).metadata["syncd.layout"] == "objects"
