"""What services may rely on, whichever store is behind the Protocols."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING

import pytest

from syncd.errors import (
    BadName,
    BucketNotFound,
    BucketSealed,
    ConfigError,
    ObjectCorrupt,
    ObjectGone,
    StoreFull,
    StoreRejected,
    WriteConflict,
)
from syncd.store.base import (
    CHUNK_SIZE,
    EMPTY,
    EMPTY_BLAKE3,
    EMPTY_SHA256,
    NUID_PREFIX,
    BadMeta,
    BucketSpec,
    Link,
    ObjectInfo,
    ObjectMeta,
)
from tests.support.store import (
    DEADLINE,
    BytesSink,
    BytesSource,
    content,
    digests,
    get,
    listing,
    names,
    put,
    raw_meta,
    sha256,
    small,
)

if TYPE_CHECKING:
    from syncd.store.base import Bucket
    from tests.support.store import Kit


def token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


# -- content ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("O6")
@pytest.mark.parametrize(
    "size",
    [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE - 1, 3 * CHUNK_SIZE, 3 * CHUNK_SIZE + 1],
)
async def test_content_of_every_size_around_whole_chunks_comes_back(bucket: Bucket, size: int) -> None:
    """Contents of 0 and 1 bytes and of one and three whole chunks, a byte more and a byte less, are uploaded.

    They are downloaded byte for byte, with size, number of chunks and both digests.
    """
    data = content(size)
    seq, stored = await put(bucket, "a/file", data)
    assert (digests(data), size) == ((stored.digest, stored.sha256), stored.size)
    assert -(-size // CHUNK_SIZE) == stored.chunks
    info = await bucket.get_info("a/file")
    assert info is not None
    assert (seq, size, stored.chunks, stored.sha256) == (info.seq, info.size, info.chunks, info.sha256)
    sink = BytesSink()
    assert digests(data) == await bucket.download(info, sink)
    assert data == sink.data


async def test_a_source_may_hand_out_odd_pieces(bucket: Bucket) -> None:
    """Short reads make no short chunks."""
    data = content(2 * CHUNK_SIZE + 77)
    stored = await bucket.upload(BytesSource(data, step=50_001))
    assert (3, digests(data)[1]) == (stored.chunks, stored.sha256)


async def test_progress_adds_up_to_the_size_in_both_directions(bucket: Bucket) -> None:
    """Progress counts every byte once."""
    data = content(5 * CHUNK_SIZE + 9)
    sent: list[int] = []
    stored = await bucket.upload(BytesSource(data), progress=sent.append)
    await bucket.put_meta(ObjectMeta("p"), stored, expected_seq=None)
    info = await bucket.get_info("p")
    assert info is not None
    got: list[int] = []
    await bucket.download(info, BytesSink(), progress=got.append)
    assert (len(data), len(data)) == (sum(sent), sum(got))


async def test_nuids_tell_who_made_them(bucket: Bucket) -> None:
    """The sweeper must know its own orphans: every upload's nuid begins with our prefix, and none repeats."""
    nuids = {(await bucket.upload(BytesSource(b"x"))).nuid for _ in range(5)}
    assert len(nuids) == 5
    assert all(nuid.startswith(NUID_PREFIX) for nuid in nuids)


async def test_a_failing_source_fails_the_upload_and_leaves_no_chunks(bucket: Bucket) -> None:
    """The source's own error comes out; what was sent of it is removed."""

    class Broken(BytesSource):
        def read(self, size: int) -> bytes:
            if self.at >= 3 * CHUNK_SIZE:
                raise OSError(5, "Input/output error")
            return super().read(min(size, CHUNK_SIZE))

    before = (await bucket.state()).messages
    with pytest.raises(OSError, match="Input/output"):
        await bucket.upload(Broken(content(9 * CHUNK_SIZE)))
    await eventually_messages(bucket, before)


async def eventually_messages(bucket: Bucket, wanted: int) -> None:
    """A rollup with a TTL of a second is what removes chunks: wait for the count."""
    async with asyncio.timeout(DEADLINE):
        while (await bucket.state()).messages != wanted:
            await asyncio.sleep(0.05)


async def test_a_failing_sink_fails_the_download(bucket: Bucket) -> None:
    """A full disk is the caller's to report: its error comes out unchanged."""

    class Full(BytesSink):
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    await put(bucket, "f", content(3 * CHUNK_SIZE))
    info = await bucket.get_info("f")
    assert info is not None
    with pytest.raises(OSError, match="No space"):
        await bucket.download(info, Full())


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("P3 P8")
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "with space",
        "ünïcödé/ファイル",
        "*",
        ">",
        "a.b.*.>",
        "tab\there",
        "new\nline",
        "-rf",
        "%41",
        "\\",
        "😀",
    ],
)
async def test_every_name_is_kept_as_it_is(bucket: Bucket, name: str) -> None:
    """Objects are put whose names hold blanks, tabs, line ends, wildcards, a leading dash, %41, backslashes or emoji.

    Names are text, never a subject: each is listed and read as it is.
    """
    await put(bucket, name, name.encode())
    assert [name] == await names(bucket)
    assert name.encode() == await get(bucket, name)


async def test_a_name_too_long_for_the_connection_is_refused_before_it_is_sent(bucket: Bucket) -> None:
    """nats-server would close the whole connection over one long control line."""
    with pytest.raises(BadName):
        await bucket.put_meta(ObjectMeta("x" * 3100), EMPTY, expected_seq=None)
    with pytest.raises(BadName):
        await bucket.get_info("")
    await put(bucket, "y" * 2800, b"long but fine")
    assert await get(bucket, "y" * 2800) == b"long but fine"


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a\n", "ü", "x" * 300])
async def test_a_bucket_name_that_cannot_be_is_refused(kit: Kit, name: str) -> None:
    """Also one with a newline at its end, which ``$`` in a pattern would let pass."""
    with pytest.raises(ConfigError):
        kit.store.bucket(name)


# -- metadata -------------------------------------------------------------------------------------------------------


async def test_metadata_headers_and_description_come_back(bucket: Bucket) -> None:
    """What a writer says of an object is kept."""
    meta = ObjectMeta("m", "a thing", {"Content-Type": ("text/plain", "x")}, {"syncd-kind": "file", "ключ": "я"})
    await bucket.put_meta(meta, EMPTY, expected_seq=None)
    info = await bucket.get_info("m")
    assert info is not None
    assert meta == ObjectMeta(info.name, info.description, info.headers, info.metadata)
    assert info.nuid
    assert (info.size, info.chunks, info.sha256, info.deleted) == (0, 0, EMPTY_SHA256, False)


async def test_the_time_is_the_servers(bucket: Bucket) -> None:
    """An object's time is that of its metadata message; a later one is later."""
    await put(bucket, "a", b"1")
    first = await bucket.get_info("a")
    await put(bucket, "a", b"2")
    second = await bucket.get_info("a")
    assert first is not None
    assert second is not None
    assert 0 < first.mtime_ns <= second.mtime_ns
    assert first.seq < second.seq


async def test_empty_content_has_no_chunks_and_known_digests(bucket: Bucket) -> None:
    """Empty content needs no upload and verifies like any other."""
    await bucket.put_meta(ObjectMeta("e"), EMPTY, expected_seq=0)
    info = await bucket.get_info("e")
    assert info is not None
    assert await bucket.download(info, BytesSink()) == (EMPTY_BLAKE3, EMPTY_SHA256)
    assert [(info, b"")] == [pair async for pair in bucket.download_many([info])]


async def test_an_overwrite_replaces_and_is_listed_once(bucket: Bucket) -> None:
    """One name, one object."""
    await put(bucket, "n", b"old")
    await put(bucket, "n", b"new")
    assert (await names(bucket), await get(bucket, "n")) == (["n"], b"new")


async def test_two_names_may_share_content(bucket: Bucket) -> None:
    """Identical content is uploaded once and announced twice."""
    _, stored = await put(bucket, "one", b"same")
    await bucket.put_meta(ObjectMeta("two"), stored, expected_seq=0)
    assert (await get(bucket, "one"), await get(bucket, "two")) == (b"same", b"same")
    infos = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    got = {info.name: data async for info, data in bucket.download_many(infos)}
    assert got == {"one": b"same", "two": b"same"}


# -- compare and set ------------------------------------------------------------------------------------------------


async def test_a_write_over_what_somebody_else_wrote_is_refused(bucket: Bucket) -> None:
    """The expected sequence guards against a second writer; nothing changes when it does not hold."""
    seq, stored = await put(bucket, "c", b"first", 0)
    with pytest.raises(WriteConflict):
        await bucket.put_meta(ObjectMeta("c"), stored, expected_seq=0)
    newer = await bucket.put_meta(ObjectMeta("c"), stored, expected_seq=seq)
    with pytest.raises(WriteConflict):
        await bucket.delete("c", expected_seq=seq, metadata={})
    info = await bucket.get_info("c")
    assert info is not None
    assert (newer, False) == (info.seq, info.deleted)


async def test_a_name_that_was_deleted_has_a_sequence_to_expect(bucket: Bucket) -> None:
    """A tombstone is what is there: 0 does not match it, its own sequence does."""
    await put(bucket, "d", b"x", 0)
    tombstone = await bucket.delete("d", expected_seq=None, metadata={"why": "test"})
    with pytest.raises(WriteConflict):
        await put(bucket, "d", b"y", 0)
    await put(bucket, "d", b"y", tombstone)
    assert await get(bucket, "d") == b"y"


# -- listing and catching up ----------------------------------------------------------------------------------------


@pytest.mark.fault("O8")
async def test_an_empty_bucket_lists_as_nothing(bucket: Bucket) -> None:
    """A bucket is listed, and asked for a name and for its chunks, before anything was written into it.

    No objects is an answer, not an error.
    """
    assert await listing(bucket) == []
    assert await bucket.get_info("nothing") is None
    assert [page async for page in bucket.list_chunks()] == []


@pytest.mark.fault("O8")
async def test_a_bucket_in_which_all_is_deleted_lists_tombstones(bucket: Bucket) -> None:
    """Two objects are put and deleted again, and the bucket is listed.

    Both are listed as deleted, of size 0, with what the deleter said.
    """
    for name in ("a", "b"):
        await put(bucket, name, b"x")
        await bucket.delete(name, expected_seq=None, metadata={"syncd-publisher": "me"})
    items = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    assert [(item.name, item.deleted) for item in items] == [("a", True), ("b", True)]
    assert [dict(item.metadata) for item in items] == [{"syncd-publisher": "me"}] * 2
    assert [item.size for item in items] == [0, 0]


async def test_catching_up_yields_only_what_is_newer(bucket: Bucket) -> None:
    """After a sequence come exactly the names written since, in order, each with its newest state."""
    for name in "abc":
        await put(bucket, name, name.encode())
    pages = [page async for page in bucket.changes(0)]
    position = pages[-1].last_seq
    assert await listing(bucket, position) == []
    await put(bucket, "b", b"changed")
    await put(bucket, "d", b"new")
    await put(bucket, "b", b"again")
    items = [item for item in await listing(bucket, position) if isinstance(item, ObjectInfo)]
    assert [item.name for item in items] == ["d", "b"]
    assert sha256(b"again") == items[-1].sha256


async def test_a_listing_of_many_pages_holds_every_name_once(bucket: Bucket) -> None:
    """Pages are bounded, the listing is not."""
    wanted = [f"dir/{number:05d}" for number in range(2100)]
    for start in range(0, len(wanted), 500):
        results = await bucket.put_many([small(name, None, stored=EMPTY) for name in wanted[start : start + 500]])
        assert [None] * len(results) == [result.error for result in results]
    pages = [page async for page in bucket.changes(0)]
    assert len(pages) > 1
    assert wanted == [item.name for page in pages for item in page.items if isinstance(item, ObjectInfo)]
    assert sorted(page.last_seq for page in pages) == [page.last_seq for page in pages]


async def test_a_forged_hint_ends_in_bounded_time(bucket: Bucket) -> None:
    """A sequence that never comes does not hold the catch-up for long."""
    await put(bucket, "a", b"x")
    async with asyncio.timeout(DEADLINE):
        items = [item async for page in bucket.changes(0, at_least=10**12) for item in page.items]
    assert len(items) == 1


@pytest.mark.fault("O1 O5")
async def test_metadata_that_cannot_be_read_does_not_stop_a_listing(kit: Kit, bucket: Bucket) -> None:
    """Ten broken metadata messages are written between two good objects, past the store.

    No JSON, a list, nothing, wrong types and sizes, a wildcard as nuid, wrong subjects, 100,000 brackets: each is
    reported by itself, and both good objects are listed.
    """
    await put(bucket, "good", b"x")
    bad = {
        "bm90IGpzb24=": b"{",
        "bGlzdA==": b"[1, 2]",
        "ZW1wdHk=": b"",
        "dHlwZXM=": raw_meta("types", b"x", "n", size="3"),
        "aHVnZQ==": raw_meta("huge", b"x", "n", size=10**30),
        "bmVnYXRpdmU=": raw_meta("negative", b"x", "n", size=-1),
        "bnVpZA==": raw_meta("nuid", b"x", "a.*.>"),
        "bm9uZQ==": raw_meta("other name", b"x", "n"),
        "%%%": raw_meta("not base64", b"x", "n"),
        "ZGVlcA==": b"[" * 100_000,
    }
    for at, payload in bad.items():
        await kit.inject_meta(bucket.name, at, payload)
    await put(bucket, "later", b"x")
    items = await listing(bucket)
    assert [item.name for item in items if isinstance(item, ObjectInfo)] == ["good", "later"]
    assert len(bad) == sum(isinstance(item, BadMeta) for item in items)
    with pytest.raises(ObjectCorrupt):
        await bucket.get_info("types")


async def test_what_other_clients_leave_out_gets_defaults(kit: Kit, bucket: Bucket) -> None:
    """Unknown fields are ignored, absent ones have a meaning."""
    payload = b'{"name":"foreign","nuid":"abc","size":1,"chunks":1,"future":{"x":[1]},"headers":null,"options":null}'
    await kit.inject_meta(bucket.name, token("foreign"), payload)
    info = await bucket.get_info("foreign")
    assert info is not None
    assert (
        info.size,
        info.chunks,
        info.sha256,
        dict(info.headers),
        dict(info.metadata),
        info.chunk_size,
    ) == (1, 1, "", {}, {}, CHUNK_SIZE)
    with pytest.raises(ObjectCorrupt):
        await bucket.download(info, BytesSink())


async def test_links_are_read_and_written(bucket: Bucket) -> None:
    """A link names an object of some bucket, or a bucket as a whole."""
    await bucket.put_link("to-object", Link("other", "some/name"))
    await bucket.put_link("to-bucket", Link("other", None))
    items = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    assert [Link("other", "some/name"), Link("other", None)] == [item.link for item in items]
    with pytest.raises(ObjectCorrupt):
        await bucket.download(items[0], BytesSink())


async def test_a_link_has_metadata_of_its_own(bucket: Bucket) -> None:
    """Whatever script; what the link before had is not kept, and the sequence is that of the message."""
    metadata = {"syncd-move": '{"a":1}', "ключ": "я \U0001f600"}
    seq = await bucket.put_link("l", Link("other", "name"), metadata=metadata)
    info = await bucket.get_info("l")
    assert info is not None
    assert (info.seq, info.link, dict(info.metadata)) == (seq, Link("other", "name"), metadata)
    assert [item.metadata for item in await listing(bucket) if isinstance(item, ObjectInfo)] == [metadata]
    await bucket.put_link("l", Link("other", "name"))
    info = await bucket.get_info("l")
    assert info is not None
    assert (dict(info.metadata), info.size, info.chunks, info.sha256) == ({}, 0, 0, EMPTY_SHA256)


async def test_the_state_tells_the_servers_time(bucket: Bucket) -> None:
    """A link is put between two looks at the bucket's state; no clock is changed.

    The state tells the clock that objects are dated by: the link's time lies between the two.
    """
    before = await bucket.state()
    await bucket.put_link("l", Link("b", "one"))
    after = await bucket.state()
    info = await bucket.get_info("l")
    assert info is not None
    assert before.now_ns <= info.mtime_ns <= after.now_ns


@pytest.mark.fault("R9")
async def test_a_link_over_what_somebody_else_wrote_is_refused(bucket: Bucket) -> None:
    """A link that was moved is written expecting 0, its first or a later sequence; then a deleted one, expecting 0.

    Each is a WriteConflict and changes nothing; the sequence that was read, also a tombstone's, is accepted.
    """
    first = await bucket.put_link("l", Link("b", "one"), expected_seq=0, metadata={"n": "1"})
    second = await bucket.put_link("l", Link("b", "two"), expected_seq=first, metadata={"n": "2"})
    before = await bucket.state()
    for expected in (0, first, second + 1):
        with pytest.raises(WriteConflict):
            await bucket.put_link("l", Link("b", "three"), expected_seq=expected, metadata={"n": "3"})
    info = await bucket.get_info("l")
    assert info is not None
    assert (info.seq, info.link, dict(info.metadata)) == (second, Link("b", "two"), {"n": "2"})
    assert await bucket.state() == before
    gone = await bucket.delete("l", expected_seq=second, metadata={})
    with pytest.raises(WriteConflict):
        await bucket.put_link("l", Link("b", "four"), expected_seq=0)
    await bucket.put_link("l", Link("b", "four"), expected_seq=gone)
    await bucket.put_link("l", Link("b", "five"))  # unfenced: over whatever is there
    info = await bucket.get_info("l")
    assert info is not None
    assert info.link == Link("b", "five")


@pytest.mark.fault("R9")
async def test_links_that_race_have_one_winner(bucket: Bucket) -> None:
    """Eight writes of one link, each of which expects that there is none, are sent at once.

    One of them is what is there, and the seven others are told WriteConflict.
    """
    moves = [bucket.put_link("l", Link("b", str(number)), expected_seq=0) for number in range(8)]
    async with asyncio.timeout(DEADLINE):
        results = await asyncio.gather(*moves, return_exceptions=True)
    won = [(number, seq) for number, seq in enumerate(results) if isinstance(seq, int)]
    assert [type(result) for result in results if not isinstance(result, int)] == [WriteConflict] * 7
    info = await bucket.get_info("l")
    assert info is not None
    assert (info.seq, info.link) == (won[0][1], Link("b", str(won[0][0])))


async def test_a_link_whose_metadata_is_too_large_is_refused_before_it_is_sent(bucket: Bucket) -> None:
    """The server would refuse it, or worse."""
    with pytest.raises(StoreRejected):
        await bucket.put_link("l", Link("b", "n"), metadata={"k": "x" * (1 << 20)})
    assert await bucket.get_info("l") is None


async def test_a_link_of_the_javascript_client_is_read(kit: Kit, bucket: Bucket) -> None:
    """It has no nuid and no digest."""
    payload = b'{"name":"l","size":0,"chunks":0,"bucket":"b","options":{"link":{"bucket":"b2","name":"x"}}}'
    await kit.inject_meta(bucket.name, token("l"), payload)
    info = await bucket.get_info("l")
    assert info is not None
    assert Link("b2", "x") == info.link


async def test_a_limit_marker_is_a_tombstone(kit: Kit, bucket: Bucket) -> None:
    """The server's marker for an expired object is an empty message with a reason."""
    await kit.inject_meta(bucket.name, token("old"), b"", {"Nats-Marker-Reason": "MaxAge"})
    items = await listing(bucket)
    assert [(item.name, item.deleted) for item in items if isinstance(item, ObjectInfo)] == [("old", True)]


# -- many small objects ---------------------------------------------------------------------------------------------


async def test_many_small_objects_come_back_with_their_sequences(bucket: Bucket) -> None:
    """One result per item, in order; the sequence is the one that compare-and-set wants."""
    wanted = {f"s/{number}": content(number % 2000, number) for number in range(300)}
    results = await bucket.put_many([small(name, data) for name, data in wanted.items()])
    assert [result.error for result in results] == [None] * 300
    infos = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    assert {info.name: info.seq for info in infos} == {
        name: result.seq for name, result in zip(wanted, results, strict=True)
    }
    for info, result in zip(infos, results, strict=True):
        assert result.stored is not None
        assert (info.nuid, info.size, info.sha256) == (result.stored.nuid, result.stored.size, result.stored.sha256)
    got = {info.name: data async for info, data in bucket.download_many(infos)}
    assert wanted == got


async def test_a_conflict_belongs_to_its_item(bucket: Bucket) -> None:
    """299 of 300 are stored, the one that somebody else wrote is not, and its content is no orphan."""
    await put(bucket, "s/150", b"somebody else's")
    before = {nuid async for page in bucket.list_chunks() for nuid in page}
    items = [small(f"s/{number}", content(100, number), expected=0) for number in range(300)]
    results = await bucket.put_many(items)
    assert [number for number, result in enumerate(results) if result.error is not None] == [150]
    assert isinstance(results[150].error, WriteConflict)
    assert await get(bucket, "s/150") == b"somebody else's"
    infos = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    assert len(infos) == 300
    async with asyncio.timeout(DEADLINE):
        while True:
            nuids = {nuid async for page in bucket.list_chunks() for nuid in page} - before
            if len(nuids) == 299:
                break
            await asyncio.sleep(0.05)
    got = {info.name: data async for info, data in bucket.download_many(infos) if info.name != "s/150"}
    assert {f"s/{number}": content(100, number) for number in range(300) if number != 150} == got


async def test_small_objects_may_announce_what_is_stored_already(bucket: Bucket) -> None:
    """Content under another name, empty content and new content go in one call."""
    _, stored = await put(bucket, "first", b"shared")
    results = await bucket.put_many(
        [small("second", None, stored=stored), small("empty", None, stored=EMPTY), small("third", b"new")]
    )
    assert [result.error for result in results] == [None, None, None]
    assert (
        await get(bucket, "second"),
        await get(bucket, "empty"),
        await get(bucket, "third"),
    ) == (b"shared", b"", b"new")


async def test_an_item_that_cannot_be_sent_fails_alone(bucket: Bucket) -> None:
    """A bad name or too much content is that item's failure."""
    results = await bucket.put_many(
        [small("", b"x"), small("ok", b"x"), small("big", bytes(CHUNK_SIZE + 1)), small("none", None)]
    )
    assert [result.error is None for result in results] == [False, True, False, False]
    assert await names(bucket) == ["ok"]


async def test_the_same_name_twice_in_one_call_ends_as_the_later_one(bucket: Bucket) -> None:
    """Order is kept, as with one put after the other."""
    results = await bucket.put_many([small("n", b"1"), small("m", b"x"), small("n", b"2")])
    assert [result.error for result in results] == [None] * 3
    assert await get(bucket, "n") == b"2"


async def test_no_items_is_no_request(bucket: Bucket) -> None:
    """Empty calls return empty answers."""
    assert await bucket.put_many([]) == []
    assert [pair async for pair in bucket.download_many([])] == []


@pytest.mark.fault("O1")
async def test_what_is_wrong_with_one_small_object_is_yielded_in_its_place(kit: Kit, bucket: Bucket) -> None:
    """Of 20 small objects one loses its chunk, one gets other bytes for it, and two get chunks of another size.

    Those four are gone or corrupt, each in its place; the other 16 arrive.
    """
    await bucket.put_many([small(f"s/{number}", content(100, number)) for number in range(20)])
    infos = {item.name: item for item in await listing(bucket) if isinstance(item, ObjectInfo)}
    await kit.inject_chunks(bucket.name, infos["s/1"].nuid, [])
    await kit.inject_chunks(bucket.name, infos["s/2"].nuid, [content(100, 77)])
    await kit.inject_chunks(bucket.name, infos["s/3"].nuid, [content(99, 3)])
    await kit.inject_chunks(bucket.name, infos["s/4"].nuid, [content(500_000, 4)])
    got = {info.name: data async for info, data in bucket.download_many(list(infos.values()))}
    kinds = {name: type(value) for name, value in got.items() if not isinstance(value, bytes)}
    assert {"s/1": ObjectGone, "s/2": ObjectCorrupt, "s/3": ObjectCorrupt, "s/4": ObjectCorrupt} == kinds
    assert {f"s/{number}": content(100, number) for number in range(20) if number not in {1, 2, 3, 4}} == {
        name: value for name, value in got.items() if isinstance(value, bytes)
    }


# -- content that does not match --------------------------------------------------------------------------------------


@pytest.mark.fault("O1 O5")
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ("flipped", ObjectCorrupt),
        ("missing", ObjectGone),
        ("all missing", ObjectGone),
        ("extra", ObjectCorrupt),
        ("truncated", ObjectCorrupt),
        ("reordered", ObjectCorrupt),
        ("endless", ObjectCorrupt),
    ],
)
async def test_damaged_content_is_never_taken(kit: Kit, bucket: Bucket, damage: str, error: type[Exception]) -> None:
    """An object's four chunks are replaced: a bit flipped, one or all missing, one more, cut, swapped, or eightfold.

    Its download ends as corrupt or gone in bounded time, and hands out no more bytes than the metadata says.
    """
    chunks = [content(CHUNK_SIZE, number) for number in range(4)]
    await put(bucket, "f", b"".join(chunks))
    info = await bucket.get_info("f")
    assert info is not None
    damaged = {
        "flipped": [chunks[0], chunks[1], bytes([chunks[2][0] ^ 1]) + chunks[2][1:], chunks[3]],
        "missing": [chunks[0], chunks[1], chunks[3]],
        "all missing": [],
        "extra": [*chunks, b"x"],
        "truncated": [*chunks[:3], chunks[3][:-1]],
        "reordered": [chunks[1], chunks[0], chunks[2], chunks[3]],
        "endless": chunks * 8,
    }[damage]
    await kit.inject_chunks(bucket.name, info.nuid, damaged)
    sink = BytesSink()
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(error):
            await bucket.download(info, sink)
    assert len(sink.data) <= info.size


async def test_removed_chunks_are_gone_for_readers(bucket: Bucket) -> None:
    """A reader that comes too late is told to look at the metadata again; the nuid is listed no more."""
    _, stored = await put(bucket, "f", content(3 * CHUNK_SIZE))
    await put(bucket, "small", b"small")
    infos = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    counts = {nuid: count async for page in bucket.list_chunks() for nuid, count in page.items()}
    assert counts[stored.nuid] == 3
    for info in infos:
        await bucket.remove_chunks(info.nuid)
    for info in reversed(infos):  # the small one while what replaces its chunk is still there
        with pytest.raises(ObjectGone):
            await bucket.download(info, BytesSink())
    assert [ObjectGone] == [type(data) async for _, data in bucket.download_many([infos[1]])]
    async with asyncio.timeout(DEADLINE):
        while [page async for page in bucket.list_chunks()]:
            await asyncio.sleep(0.05)


async def test_a_claim_is_no_object_and_no_content(bucket: Bucket) -> None:
    """Neither a listing nor the search for orphans meets it."""
    await bucket.claim("one:/srv")
    assert await listing(bucket) == []
    assert [page async for page in bucket.list_chunks()] == []


# -- buckets ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("N5")
async def test_a_missing_bucket_is_named_by_every_call(kit: Kit) -> None:
    """Ten calls, of every kind, are made at once on a bucket that was never created.

    Each of them raises BucketNotFound, soon.
    """
    bucket = kit.store.bucket("missing")
    info = ObjectInfo("missing", "n", "nuid", 1, 1, "SHA-256=" + "A" * 43 + "=", False, 0, 1)
    calls = {
        "state": bucket.state(),
        "changes": listing(bucket),
        "get_info": bucket.get_info("n"),
        "upload": bucket.upload(BytesSource(b"x")),
        "put_meta": bucket.put_meta(ObjectMeta("n"), EMPTY, expected_seq=None),
        "delete": bucket.delete("n", expected_seq=None, metadata={}),
        "link": bucket.put_link("n", Link("b", None)),
        "download": bucket.download(info, BytesSink()),
        "remove": bucket.remove_chunks("n"),
        "seal": bucket.seal(),
    }
    async with asyncio.timeout(DEADLINE):
        results = await asyncio.gather(*calls.values(), return_exceptions=True)
    assert dict.fromkeys(calls, BucketNotFound) == dict(zip(calls, map(type, results), strict=True))


async def test_creating_a_bucket_twice_adopts_it(kit: Kit, bucket: Bucket) -> None:
    """The second creator gets the same bucket, with what is in it."""
    await put(bucket, "n", b"x")
    before = await bucket.state()
    after = await kit.store.create_bucket(bucket.name, BucketSpec(description="another"))
    assert (before.created, "contract", 2) == (after.created, after.description, after.messages)
    assert (after.republished, after.ttl_messages, after.atomic) == (True, True, True)
    assert after.metadata["syncd.layout"] == "objects"
    assert bucket.name in await kit.store.list_buckets()


@pytest.mark.fault("N5")
async def test_a_bucket_that_is_created_again_is_another_one(kit: Kit, bucket: Bucket) -> None:
    """A bucket with an object is deleted and created again under its name.

    In between it is not found; the new one has another creation time, begins at sequence 0 and is empty.
    """
    await put(bucket, "n", b"x")
    before = await bucket.state()
    await kit.delete_bucket(bucket.name)
    with pytest.raises(BucketNotFound):
        await bucket.state()
    await kit.store.create_bucket(bucket.name, BucketSpec())
    after = await bucket.state()
    assert before.created != after.created
    assert (before.last_seq, after.last_seq) == (2, 0)
    assert await listing(bucket) == []


@pytest.mark.fault("N5")
async def test_a_sealed_bucket_refuses_every_write_and_still_reads(bucket: Bucket) -> None:
    """A bucket with an object is sealed; then content, metadata, a delete, a link and small objects are written.

    Each write is refused as sealed, which is for ever and no reason to try again; the object is still read.
    """
    await put(bucket, "n", b"x")
    await bucket.seal()
    assert (await bucket.state()).sealed
    with pytest.raises(BucketSealed):
        await bucket.upload(BytesSource(b"y"))
    with pytest.raises(BucketSealed):
        await bucket.put_meta(ObjectMeta("m"), EMPTY, expected_seq=None)
    with pytest.raises(BucketSealed):
        await bucket.delete("n", expected_seq=None, metadata={})
    with pytest.raises(BucketSealed):
        await bucket.put_link("l", Link("b", None), expected_seq=0, metadata={"k": "v"})
    results = await bucket.put_many([small("a", b"1"), small("b", b"2")])
    assert [BucketSealed, BucketSealed] == [type(result.error) for result in results]
    assert await get(bucket, "n") == b"x"


@pytest.mark.fault("N5 X1")
async def test_a_full_bucket_says_so_and_takes_again_when_there_is_room(kit: Kit) -> None:
    """Into a bucket limited to 1 MiB, 2 MiB are uploaded, then 20 objects of 100 kB in one call.

    What does not fit is StoreFull and leaves no chunks; what was there and what was acknowledged is listed.
    """
    name = f"full-{kit.kind}"
    await kit.store.create_bucket(name, BucketSpec(max_bytes=1024 * 1024))
    bucket = kit.store.bucket(name)
    await put(bucket, "n", content(300_000))
    with pytest.raises(StoreFull):
        await bucket.upload(BytesSource(content(2 * 1024 * 1024)))
    await eventually_messages(bucket, 4)
    results = await bucket.put_many([small(f"s/{number}", content(100_000, number)) for number in range(20)])
    kinds = {type(result.error) for result in results}
    assert {StoreFull, type(None)} == kinds
    stored = [f"s/{number}" for number, result in enumerate(results) if result.error is None]
    assert {"n", *stored} == set(await names(bucket))
    assert content(300_000) == await get(bucket, "n")


# -- hints ------------------------------------------------------------------------------------------------------------


async def test_a_write_wakes_those_who_listen(bucket: Bucket) -> None:
    """A hint names the sequence, so that the catch-up knows what to expect."""
    async with bucket.hints() as hints:
        while await hints.wait(0.3):  # what it says at the beginning
            pass
        seq, _ = await put(bucket, "n", b"x")
        async with asyncio.timeout(DEADLINE):
            while await hints.wait(1) < seq:
                pass
        assert await hints.wait(0.2) == 0


async def test_hints_work_before_the_bucket_exists(kit: Kit) -> None:
    """A subscriber may be started before its publisher."""
    name = f"later-{kit.kind}"
    bucket = kit.store.bucket(name)
    async with bucket.hints() as hints:
        assert await hints.wait(0.2) == 0
        await kit.store.create_bucket(name, BucketSpec())
        seq, _ = await put(bucket, "n", b"x")
        async with asyncio.timeout(DEADLINE):
            while await hints.wait(1) < seq:
                pass


async def test_nothing_is_left_running(kit: Kit, bucket: Bucket) -> None:
    """After every call, also cancelled ones, no task of the store is left."""
    await put(bucket, "first", b"x")
    assert await get(bucket, "first") == b"x"  # by now the connection has all its own subscriptions
    before = asyncio.all_tasks()
    async with bucket.hints() as hints:
        await hints.wait(0.05)
    upload = asyncio.create_task(bucket.upload(BytesSource(content(40 * CHUNK_SIZE), step=CHUNK_SIZE)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    await put(bucket, "n", content(20 * CHUNK_SIZE))
    info = await bucket.get_info("n")
    assert info is not None
    download = asyncio.create_task(bucket.download(info, BytesSink()))
    for _ in range(5):
        await asyncio.sleep(0)
    download.cancel()
    with pytest.raises(asyncio.CancelledError):
        await download
    async with asyncio.timeout(DEADLINE):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.05)


# -- who publishes ------------------------------------------------------------------------------------------------


@pytest.mark.fault("C5")
async def test_the_first_claim_stands_until_it_is_taken_over(bucket: Bucket) -> None:
    """Two hosts claim one bucket in turn, the second at first without and then with take-over.

    The first claim stands against the other until that one asks to replace it; then the second one's does.
    """
    assert await bucket.claim("a:/srv") == "a:/srv"
    assert await bucket.claim("b:/srv") == "a:/srv"
    assert await bucket.claim("a:/srv") == "a:/srv"
    assert await bucket.claim("b:/srv", take_over=True) == "b:/srv"
    assert await bucket.claim("a:/srv") == "b:/srv"
    assert [page async for page in bucket.changes(0)] == []


@pytest.mark.fault("C5")
async def test_of_two_claims_at_once_one_stands(bucket: Bucket) -> None:
    """Eight hosts claim one bucket at the same time.

    All are told one and the same holder.
    """
    async with asyncio.timeout(DEADLINE):
        holders = await asyncio.gather(*(bucket.claim(f"host{number}:/srv") for number in range(8)))
    assert len(set(holders)) == 1
