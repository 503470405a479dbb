"""The live store when the network, the server, other clients or permissions do not behave."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from nats.js.errors import ObjectNotFoundError

from syncd.errors import (
    BucketNotFound,
    NotPermitted,
    ObjectCorrupt,
    ObjectGone,
    StoreTimeout,
    SyncdError,
    Unavailable,
)
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store import hints as hints_module
from syncd.store import lanes as lanes_module
from syncd.store import transport as transport_module
from syncd.store.base import CHUNK_SIZE, EMPTY, BucketSpec, ObjectInfo, ObjectMeta
from syncd.store.bucket import NatsStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support.server import NatsServer
from tests.support.store import (
    TWO_ACCOUNTS,
    BytesSink,
    BytesSource,
    as_user,
    connected,
    content,
    get,
    listing,
    live_kit,
    lose_answers,
    names,
    put,
    raw_meta,
    small,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from nats.aio.msg import Msg

    from syncd.store.base import Hints
    from syncd.store.bucket import NatsBucket
    from tests.support.store import LiveKit

DEADLINE = 60.0
MANY_CHUNKS = 24 * 1024 * 1024


class HookedSource(BytesSource):
    """Calls back, in the reading thread, when it has handed out so many bytes."""

    def __init__(self, data: bytes, at: int, hook: Callable[[], None]) -> None:
        super().__init__(data, step=CHUNK_SIZE)
        self.hook: Callable[[], None] | None = hook
        self.when = at

    def read(self, size: int) -> bytes:
        if self.hook is not None and self.at >= self.when:
            hook, self.hook = self.hook, None
            hook()
        return super().read(size)


class HookedSink(BytesSink):
    """Calls back, in the writing thread, when it has taken so many bytes."""

    def __init__(self, at: int, hook: Callable[[], None]) -> None:
        super().__init__()
        self.taken = 0
        self.hook: Callable[[], None] | None = hook
        self.when = at

    def write(self, data: bytes) -> None:
        super().write(data)
        self.taken += len(data)
        if self.hook is not None and self.taken >= self.when:
            hook, self.hook = self.hook, None
            hook()


@pytest.fixture
async def kit(nats_server: NatsServer) -> AsyncIterator[LiveKit]:
    async with live_kit(nats_server.url) as live:
        yield live


@pytest.fixture
async def bucket(kit: LiveKit) -> NatsBucket:
    await kit.store.create_bucket("B", BucketSpec())
    return kit.store.bucket("B")


async def foreign_bucket(kit: LiveKit, name: str = "F", **config: Any) -> NatsBucket:
    """A bucket as nats-py and Go make it: no republish, no TTLs, no atomic batches."""
    await kit.api(
        f"STREAM.CREATE.OBJ_{name}",
        {
            "name": f"OBJ_{name}",
            "subjects": [f"$O.{name}.C.>", f"$O.{name}.M.>"],
            "discard": "new",
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            **config,
        },
    )
    return kit.store.bucket(name)


async def chunk_count(kit: LiveKit, bucket: str) -> int:
    info = await kit.api(f"STREAM.INFO.OBJ_{bucket}", {"subjects_filter": f"$O.{bucket}.C.>"})
    return sum((info["state"].get("subjects") or {}).values())


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE):
        while True:
            value = condition()
            if await value if asyncio.iscoroutine(value) else value:
                return
            await asyncio.sleep(0.05)


# -- other clients --------------------------------------------------------------------------------------------------


async def test_nats_py_reads_what_we_write(kit: LiveKit, bucket: NatsBucket) -> None:
    """The ordinary client lists and gets our objects, of every size and by every way of writing."""
    wanted = {"empty": b"", "ünï/one": b"x", "three": content(2 * CHUNK_SIZE + 1), "a *.> b": b"wild"}
    for name, data in wanted.items():
        await put(bucket, name, data)
    await bucket.put_many([small("many/1", b"1"), small("many/0", None, stored=EMPTY)])
    await bucket.delete("three", expected_seq=None, metadata={})
    peer = await kit.other.jetstream().object_store("B")
    for name, data in (wanted | {"many/1": b"1", "many/0": b""}).items():
        if name == "three":
            with pytest.raises(ObjectNotFoundError):
                await peer.get(name)
        else:
            assert (await asyncio.wait_for(peer.get(name), 10)).data == data
    listed = {entry.name for entry in await asyncio.wait_for(peer.list(ignore_deletes=True), 10)}
    assert listed == {"empty", "ünï/one", "a *.> b", "many/1", "many/0"}


async def test_we_read_what_nats_py_writes(kit: LiveKit) -> None:
    """Its objects, overwrites and tombstones, in a bucket that it made."""
    peer = await kit.other.jetstream().create_object_store("P")
    wanted = {"empty": b"", "ünï/one": b"x", "three": content(2 * CHUNK_SIZE + 1)}
    for name, data in wanted.items():
        await peer.put(name, data)
    await peer.put("gone", b"x")
    await peer.delete("gone")
    bucket = kit.store.bucket("P")
    items = {item.name: item for item in await listing(bucket) if isinstance(item, ObjectInfo)}
    assert {name for name, item in items.items() if item.deleted} == {"gone"}
    assert {name: await get(bucket, name) for name in wanted} == wanted
    one = [items["empty"], items["ünï/one"], items["three"]]
    got = {info.name: data async for info, data in bucket.download_many(one)}
    assert (got["empty"], got["ünï/one"]) == (b"", b"x")
    assert isinstance(got["three"], ObjectCorrupt)


async def test_a_bucket_of_another_client_takes_all_our_writes(kit: LiveKit) -> None:
    """Without atomic batches and TTLs everything works by other means: one by one, and by purge."""
    bucket = await foreign_bucket(kit)
    results = await bucket.put_many([small(f"s/{number}", content(50, number)) for number in range(100)])
    assert [result.error for result in results] == [None] * 100
    _, stored = await put(bucket, "big", content(3 * CHUNK_SIZE))
    infos = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    assert [info.seq for info in infos[:100]] == [result.seq for result in results]
    await bucket.remove_chunks(stored.nuid)
    assert await chunk_count(kit, "F") == 100
    items = [small(f"s/{number}", content(60, number), expected=0 if number == 7 else None) for number in range(20)]
    results = await bucket.put_many(items)
    assert [number for number, result in enumerate(results) if result.error] == [7]


async def test_metadata_written_without_rollup_counts_by_the_last(kit: LiveKit, bucket: NatsBucket) -> None:
    """The JavaScript client writes links and updates so: several messages per name, the newest is the object."""
    for size in (1, 2, 3):
        await kit.publish("$O.B.M.bg==", raw_meta("n", bytes(size), "nuid"))
    items = await listing(bucket)
    assert [(item.size, item.seq) for item in items if isinstance(item, ObjectInfo)] == [(3, 3)]
    info = await bucket.get_info("n")
    assert info is not None
    assert info.size == 3


async def test_adopting_a_bucket_adds_only_what_it_lacks(kit: LiveKit) -> None:
    """Flags that cost nothing are added; what somebody configured stays."""
    bucket = await foreign_bucket(kit, description="theirs", max_age=3_600_000_000_000)
    state = await kit.store.create_bucket("F", BucketSpec(description="ours"))
    assert (state.description, state.republished, state.atomic, state.ttl_messages) == ("theirs", True, True, True)
    info = await kit.api("STREAM.INFO.OBJ_F")
    assert info["config"]["max_age"] == 3_600_000_000_000
    assert "syncd.layout" not in (info["config"].get("metadata") or {})
    assert await names(bucket) == []


async def test_a_stream_that_is_no_bucket_is_left_alone(kit: LiveKit) -> None:
    """A name clash is reported, not adopted."""
    await kit.api("STREAM.CREATE.OBJ_X", {"name": "OBJ_X", "subjects": ["x.>"]})
    with pytest.raises(SyncdError, match="no Object Store bucket"):
        await kit.store.create_bucket("X", BucketSpec())


# -- reading while things change ------------------------------------------------------------------------------------


@pytest.mark.fault("O2")
@pytest.mark.parametrize("how", ["purge", "rollup"])
async def test_chunks_removed_in_mid_read_end_it(kit: LiveKit, bucket: NatsBucket, how: str) -> None:
    """When the first chunk of 24 MiB has been read, the object's chunks are purged, or removed as syncd does it.

    The reader is told that the object is gone, in bounded time, whichever way the chunks went.
    """
    await put(bucket, "f", content(MANY_CHUNKS))
    info = await bucket.get_info("f")
    assert info is not None
    loop = asyncio.get_running_loop()

    async def remove() -> None:
        if how == "purge":
            await kit.api("STREAM.PURGE.OBJ_B", {"filter": f"$O.B.C.{info.nuid}"})
        else:
            await bucket.remove_chunks(info.nuid)

    sink = HookedSink(CHUNK_SIZE, lambda: asyncio.run_coroutine_threadsafe(remove(), loop).result(20))
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(ObjectGone):
            await bucket.download(info, sink)


@pytest.mark.fault("O3 O4")
async def test_an_overwrite_storm_never_yields_a_wrong_byte(bucket: NatsBucket) -> None:
    """For 4 s one name is overwritten without a pause, its old chunks removed, under 20 readers.

    Each read is one whole version, or is told to look again.
    """
    stop = time.monotonic() + 4
    versions = {number: content(3 * CHUNK_SIZE + number, number) for number in range(8)}
    await put(bucket, "n", versions[0])
    good = gone = 0

    async def write() -> None:
        number = 0
        while time.monotonic() < stop:
            number = (number + 1) % len(versions)
            before = await bucket.get_info("n")
            await put(bucket, "n", versions[number])
            assert before is not None
            await bucket.remove_chunks(before.nuid)

    async def read() -> None:
        nonlocal good, gone
        while time.monotonic() < stop:
            info = await bucket.get_info("n")
            assert info is not None
            sink = BytesSink()
            try:
                async with asyncio.timeout(DEADLINE):
                    await bucket.download(info, sink)
            except ObjectGone:
                gone += 1
            else:
                assert sink.data in versions.values()
                good += 1

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        for _ in range(20):
            tasks.create_task(read())
    assert good


@pytest.mark.fault("O5")
async def test_an_object_that_says_it_is_small_is_not_read_beyond_that(kit: LiveKit, bucket: NatsBucket) -> None:
    """20 chunks of 800 kB take the place of the one of an object whose metadata says 1,000 bytes.

    It is corrupt, and not a byte of it is handed out.
    """
    await put(bucket, "f", content(1000))
    info = await bucket.get_info("f")
    assert info is not None
    await kit.inject_chunks("B", info.nuid, [content(800_000, number) for number in range(20)])
    sink = BytesSink()
    with pytest.raises(ObjectCorrupt):
        await bucket.download(info, sink)
    assert sink.data == b""


# -- the server freezes, dies, comes back -----------------------------------------------------------------------------


@pytest.mark.fault("N1")
async def test_a_server_frozen_in_mid_upload_and_thawed_loses_nothing(
    nats_server: NatsServer, kit: LiveKit, bucket: NatsBucket
) -> None:
    """nats-server is stopped (SIGSTOP) for 2 s after a quarter of an upload of 24 MiB.

    The upload goes on where it was, and each chunk is there once.
    """
    loop = asyncio.get_running_loop()

    def freeze() -> None:
        nats_server.freeze()
        loop.call_soon_threadsafe(loop.call_later, 2, nats_server.thaw)

    data = content(MANY_CHUNKS)
    stored = await bucket.upload(HookedSource(data, MANY_CHUNKS // 4, freeze))
    await bucket.put_meta(ObjectMeta("f"), stored, expected_seq=0)
    assert await get(bucket, "f") == data
    assert await chunk_count(kit, "B") == stored.chunks


@pytest.mark.fault("N1")
async def test_a_server_frozen_in_mid_download_and_thawed_loses_nothing(
    nats_server: NatsServer, bucket: NatsBucket
) -> None:
    """nats-server is stopped (SIGSTOP) for 2 s when the first chunk of 24 MiB has been read.

    The download goes on where it was.
    """
    loop = asyncio.get_running_loop()
    data = content(MANY_CHUNKS)
    await put(bucket, "f", data)
    info = await bucket.get_info("f")
    assert info is not None

    def freeze() -> None:
        nats_server.freeze()
        loop.call_soon_threadsafe(loop.call_later, 2, nats_server.thaw)

    sink = HookedSink(CHUNK_SIZE, freeze)
    await bucket.download(info, sink)
    assert sink.data == data


@pytest.mark.fault("N1")
async def test_a_server_killed_in_mid_upload_and_restarted_stores_each_chunk_once(
    nats_server: NatsServer, kit: LiveKit, bucket: NatsBucket
) -> None:
    """nats-server is killed (SIGKILL) and restarted half-way through an upload of 24 MiB.

    What was not acknowledged is sent again, in order, and the server drops the doubles.
    """
    data = content(MANY_CHUNKS)
    source = HookedSource(data, MANY_CHUNKS // 2, lambda: nats_server.restart(kill=True))
    async with asyncio.timeout(DEADLINE):
        stored = await bucket.upload(source)
    await bucket.put_meta(ObjectMeta("f"), stored, expected_seq=0)
    assert await get(bucket, "f") == data
    async with live_kit(nats_server.url) as fresh:
        assert await chunk_count(fresh, "B") == stored.chunks


@pytest.mark.fault("N1")
async def test_a_server_killed_in_mid_download_and_restarted_is_read_on(
    nats_server: NatsServer, bucket: NatsBucket
) -> None:
    """nats-server is killed (SIGKILL) and restarted when the first chunk of 24 MiB has been read.

    The page that was lost is asked for again.
    """
    data = content(MANY_CHUNKS)
    await put(bucket, "f", data)
    info = await bucket.get_info("f")
    assert info is not None
    sink = HookedSink(CHUNK_SIZE, lambda: nats_server.restart(kill=True))
    async with asyncio.timeout(DEADLINE):
        await bucket.download(info, sink)
    assert sink.data == data


@pytest.mark.fault("N1")
async def test_a_server_killed_under_small_objects_stores_or_names_each(
    nats_server: NatsServer, bucket: NatsBucket
) -> None:
    """nats-server is killed (SIGKILL) and restarted three times while batches of 200 small objects are put.

    What is said to be stored is stored, under the sequence that is said; the rest has an error of ours.
    """
    stop = asyncio.Event()

    async def kill() -> None:
        for _ in range(3):
            await asyncio.sleep(0.3)
            await nats_server.arestart(kill=True)
        stop.set()

    killer = asyncio.create_task(kill())
    said: dict[str, int] = {}
    number = 0
    while not stop.is_set():
        items = [small(f"s/{number + index}", content(3000, number + index), expected=0) for index in range(200)]
        results = await bucket.put_many(items)
        for item, result in zip(items, results, strict=True):
            if result.error is None:
                said[item.meta.name] = result.seq
            else:
                assert isinstance(result.error, SyncdError)
        number += 200
    await killer
    stored = {item.name: item.seq for item in await listing(bucket) if isinstance(item, ObjectInfo)}
    assert len(said) > 200
    assert {name: stored.get(name) for name in said} == said


@pytest.mark.fault("N1")
async def test_while_a_server_is_gone_a_write_waits_once(
    nats_server: NatsServer, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server is killed (SIGKILL) and stays away while objects are put; 1 s is allowed for a reconnect.

    Both writes are Unavailable within 8 s: what became of them is not asked of a server that is not there.
    """
    monkeypatch.setattr(transport_module, "OFFLINE_SECONDS", 1.0)
    await bucket.put_many([small("before", b"1")])
    await nats_server.astop(kill=True)
    began = time.monotonic()
    (many,) = await bucket.put_many([small("x", b"1")])
    with pytest.raises(Unavailable):
        await bucket.put_meta(ObjectMeta("g"), EMPTY, expected_seq=None)
    assert isinstance(many.error, Unavailable)
    assert time.monotonic() - began < 8
    await nats_server.astart()


@pytest.mark.fault("N1 N4")
async def test_a_server_that_stays_frozen_ends_every_call(
    nats_server: NatsServer, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server is stopped (SIGSTOP) for good; then come an upload, metadata, a listing, a look and small objects.

    Silence is bounded: with limits of 2 s each call ends within 30 s, as a time-out or unavailable.
    """
    monkeypatch.setattr(lanes_module, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(transport_module, "PAGE_TRIES", 1)
    await put(bucket, "f", content(1000))
    info = await bucket.get_info("f")
    assert info is not None
    nats_server.freeze()
    began = time.monotonic()
    results = await asyncio.gather(
        bucket.upload(BytesSource(content(4 * CHUNK_SIZE))),
        bucket.put_meta(ObjectMeta("g"), EMPTY, expected_seq=None),
        listing(bucket),
        bucket.get_info("f"),
        return_exceptions=True,
    )
    (many,) = await bucket.put_many([small("x", b"1")])
    assert time.monotonic() - began < 30
    for result in [*results, many.error]:
        assert isinstance(result, StoreTimeout | Unavailable), result
    nats_server.thaw()


@pytest.mark.fault("N5")
async def test_a_bucket_deleted_in_mid_upload_is_named_soon(kit: LiveKit, bucket: NatsBucket) -> None:
    """Another client deletes the bucket when the first chunk of an upload of 24 MiB has been read.

    Nobody answers on its subjects then: BucketNotFound within 15 s, told apart from a leader election.
    """
    loop = asyncio.get_running_loop()

    def delete() -> None:
        asyncio.run_coroutine_threadsafe(kit.delete_bucket("B"), loop).result(10)

    began = time.monotonic()
    with pytest.raises(BucketNotFound):
        await bucket.upload(HookedSource(content(MANY_CHUNKS), CHUNK_SIZE, delete))
    assert time.monotonic() - began < 15


async def test_a_closed_connection_is_our_error_in_every_call(nats_server: NatsServer) -> None:
    """Our connection is closed; then ten calls of store and bucket are made.

    Each is Unavailable: no exception of the client library crosses the border.
    """
    async with connected(nats_server.url) as conn:
        store = NatsStore(conn)
        await store.create_bucket("B", BucketSpec())
        bucket = store.bucket("B")
        await put(bucket, "f", b"x")
        info = await bucket.get_info("f")
        assert info is not None
    calls = [
        bucket.state(),
        listing(bucket),
        bucket.get_info("f"),
        bucket.upload(BytesSource(b"x")),
        bucket.put_meta(ObjectMeta("g"), EMPTY, expected_seq=None),
        bucket.delete("f", expected_seq=None, metadata={}),
        bucket.download(info, BytesSink()),
        bucket.remove_chunks(info.nuid),
        store.list_buckets(),
        store.create_bucket("C", BucketSpec()),
    ]
    async with asyncio.timeout(DEADLINE):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * len(calls)


# -- lost acknowledgements --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [0, None])
async def test_a_lost_acknowledgement_of_metadata_is_resolved(
    bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch, expected: int | None
) -> None:
    """The message is sent again; the double is recognised as ours, with the sequence of the first."""
    await put(bucket, "other", b"x")
    lost = lose_answers(monkeypatch, bucket, 1)
    seq = await bucket.put_meta(ObjectMeta("n"), EMPTY, expected_seq=expected)
    info = await bucket.get_info("n")
    assert info is not None
    assert (len(lost), info.seq) == (1, seq)


async def test_a_lost_acknowledgement_of_a_batch_is_resolved(
    bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is not sent again: reading back shows what became of it."""
    await put(bucket, "other", b"x")
    monkeypatch.setattr(lanes_module, "SILENCE_SECONDS", 1.5)
    lose_answers(monkeypatch, bucket, 1)
    before = await bucket.state()
    results = await bucket.put_many([small(f"s/{number}", b"x%d" % number, expected=0) for number in range(50)])
    assert [result.error for result in results] == [None] * 50
    infos = [item for item in await listing(bucket) if isinstance(item, ObjectInfo)]
    assert [info.seq for info in infos[1:]] == [result.seq for result in results]
    assert (await bucket.state()).last_seq == before.last_seq + 100


@pytest.mark.fault("O4")
async def test_a_chunk_sent_twice_is_stored_once(
    kit: LiveKit, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's acknowledgements of five chunks of an upload are dropped in the client, which sends them again.

    The server drops the doubles by their message ids, and the content is right.
    """
    await put(bucket, "other", b"x")
    lost = lose_answers(monkeypatch, bucket, 5)
    data = content(20 * CHUNK_SIZE)
    stored = await bucket.upload(BytesSource(data))
    assert (len(lost), await chunk_count(kit, "B")) == (5, 20 + 1)
    await bucket.put_meta(ObjectMeta("f"), stored, expected_seq=0)
    assert await get(bucket, "f") == data


async def test_a_chunk_stored_twice_fails_the_upload(kit: LiveKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client's bucket may forget message ids too soon: a doubled last chunk is found by counting."""
    bucket = await foreign_bucket(kit, duplicate_window=100_000_000)
    await put(bucket, "other", b"x")
    lose_answers(monkeypatch, bucket, 1)
    with pytest.raises(StoreTimeout, match="stored twice"):
        await bucket.upload(BytesSource(content(CHUNK_SIZE)))
    assert await chunk_count(kit, "F") == 1


async def test_chunks_stored_out_of_order_fail_the_upload(kit: LiveKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that had to be sent again behind its successors would be read at the wrong place."""
    bucket = await foreign_bucket(kit, duplicate_window=100_000_000)
    await put(bucket, "other", b"x")
    lose_answers(monkeypatch, bucket, 1)
    with pytest.raises(StoreTimeout, match="out of order"):
        await bucket.upload(BytesSource(content(8 * CHUNK_SIZE)))
    assert await chunk_count(kit, "F") == 1


# -- hints ------------------------------------------------------------------------------------------------------------


async def wait_for_hint(hints: Hints, seq: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while await hints.wait(1) < seq:
            pass


async def calm(hints: Hints, mode: Callable[[], bool] = lambda: True) -> None:
    """Wait until the subscription stands and what it had to say at its beginning is said."""
    async with asyncio.timeout(DEADLINE):
        while not mode():
            await hints.wait(0.1)
        began = time.monotonic()
        while time.monotonic() - began < 0.5:
            await hints.wait(0.1)


async def test_a_foreign_bucket_gets_hints_through_a_consumer(kit: LiveKit) -> None:
    """Where the stream does not republish, an ephemeral consumer wakes; it is gone soon after we are."""
    bucket = await foreign_bucket(kit)
    async with bucket.hints() as hints:
        await calm(hints, lambda: hints._mode == "consumer")
        assert (await kit.api("STREAM.INFO.OBJ_F"))["state"]["consumer_count"] == 1
        peer = await kit.other.jetstream().object_store("F")
        await peer.put("n", b"x")
        await wait_for_hint(hints, 2)


@pytest.mark.fault("N1 N2")
async def test_a_foreign_bucket_gets_hints_again_after_a_restart(nats_server: NatsServer, kit: LiveKit) -> None:
    """nats-server is killed (SIGKILL) and restarted, and with it dies the consumer in its memory that brings hints.

    A new one is made, and a write that comes then wakes.
    """
    bucket = await foreign_bucket(kit)
    async with bucket.hints() as hints:
        await calm(hints, lambda: hints._mode == "consumer")
        epoch = kit.conn.epoch
        await nats_server.arestart(kill=True)
        async with asyncio.timeout(DEADLINE):
            await kit.conn.wait_epoch(epoch, DEADLINE)
        began = time.monotonic()
        async with live_kit(nats_server.url) as other:
            await until(lambda: hints._push is not None)
            await calm(hints)
            await put(other.store.bucket("F"), "n", b"x")
        await wait_for_hint(hints, 2)
        assert time.monotonic() - began < 10


@pytest.mark.fault("N2")
async def test_a_consumer_that_died_silently_is_replaced(kit: LiveKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client deletes the consumer that brings our hints: nothing but missing heartbeats tells of it.

    Another one is made, and a write that comes then wakes.
    """
    monkeypatch.setattr(hints_module, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(hints_module, "LOST_SECONDS", 2.5)
    bucket = await foreign_bucket(kit)
    async with bucket.hints() as hints:
        await calm(hints, lambda: hints._mode == "consumer")
        (consumer,) = (await kit.api("CONSUMER.NAMES.OBJ_F"))["consumers"]
        await kit.api(f"CONSUMER.DELETE.OBJ_F.{consumer}")
        began = time.monotonic()
        while time.monotonic() - began < DEADLINE:
            await hints.wait(0.2)
            consumers = (await kit.api("CONSUMER.NAMES.OBJ_F"))["consumers"] or []
            if consumers and consumers != [consumer]:
                break
        seq, _ = await put(bucket, "n", b"x")
        await wait_for_hint(hints, seq)


@pytest.mark.fault("N5")
async def test_hints_follow_a_bucket_that_is_created_again(kit: LiveKit) -> None:
    """Another client deletes the bucket that brings us hints, and makes one of the same name, of another make.

    The new one is listened to as well: a write into it wakes.
    """
    bucket = await foreign_bucket(kit)
    async with bucket.hints() as hints:
        await calm(hints, lambda: hints._mode == "consumer")
        await kit.delete_bucket("F")
        bucket = await foreign_bucket(kit, description="another")
        created = (await bucket.state()).created
        async with asyncio.timeout(DEADLINE):
            while hints._created != created or hints._push is None:
                await hints.wait(0.2)
        await calm(hints)
        seq, _ = await put(bucket, "n", b"x")
        await wait_for_hint(hints, seq)


@pytest.mark.fault("N8")
async def test_forged_and_doubled_hints_do_no_harm(kit: LiveKit, bucket: NatsBucket) -> None:
    """Another client publishes junk as notifications, with impossible and future sequences, and a true one twice more.

    Each only wakes: a listing is as before, and after a future one the true one is still told with its own sequence.
    """
    true: list[Msg] = []

    async def record(message: Msg) -> None:
        true.append(message)

    async with bucket.hints() as hints:
        await calm(hints)
        for headers in (
            {"Nats-Sequence": "99999999999999999999999"},
            {"Nats-Sequence": "x"},
            None,
            {"Nats-Sequence": "5"},
        ):
            await kit.other.publish("syncd.B.meta.x", b"junk", headers=headers)
        await kit.other.flush()
        await wait_for_hint(hints, 5)
        assert await listing(bucket) == []
        recording = await kit.other.subscribe("syncd.B.meta.>", cb=record)
        await kit.other.flush()
        seq, _ = await put(bucket, "n", b"x")
        assert seq < 5
        assert await hints.wait(DEADLINE) == seq
        await until(lambda: true)
        await recording.unsubscribe()
        before = await bucket.state()
        for _ in range(2):
            await kit.other.publish(true[0].subject, true[0].data, headers=true[0].headers)
            await kit.other.flush()
            assert await hints.wait(DEADLINE) == seq
        assert await hints.wait(0.3) == 0
        assert await names(bucket) == ["n"]
        assert (await bucket.state()).last_seq == before.last_seq


@pytest.mark.fault("N2")
async def test_what_no_hint_tells_is_found_by_the_timer(kit: LiveKit, tmp_path: Path) -> None:
    """A mirror's consumer, the only one that its bucket allows, is deleted, and another client takes the place.

    Nobody tells of what is written then; the mirror has it before the silence is noticed, by its timer.
    """
    bucket = await foreign_bucket(kit, max_consumers=1)
    status = StatusKeeper(FolderStatus("subscribe", "F", "/"), clock=time.time, report=lambda _: None)
    options = SubscribeOptions("F", tmp_path / "mirror", Rules(), rescan_seconds=1.0)
    mirror = asyncio.create_task(Subscriber(options, kit.store, tmp_path / "index", status=status).run())
    ours: list[str] = []

    async def listens() -> bool:
        ours[:] = (await kit.api("CONSUMER.NAMES.OBJ_F"))["consumers"] or []
        return bool(ours)

    async def rests() -> bool:
        """All that its start gave it to do is done: the next round is the timer's."""
        before = status.now.last_sync
        await asyncio.sleep(0.5)
        return bool(before) and status.now.last_sync == before

    try:
        await until(listens)
        await put(bucket, "first", b"x")
        await until((tmp_path / "mirror/first").exists)
        await until(rests)
        await kit.api(f"CONSUMER.DELETE.OBJ_F.{ours[0]}")
        taken = {"name": "taken", "durable_name": "taken", "ack_policy": "explicit"}
        await kit.api("CONSUMER.CREATE.OBJ_F.taken", {"stream_name": "OBJ_F", "config": taken})
        await put(bucket, "n", b"x")
        async with asyncio.timeout(hints_module.LOST_SECONDS - 2):
            while not (tmp_path / "mirror/n").exists():
                await asyncio.sleep(0.05)
        assert (await kit.api("CONSUMER.NAMES.OBJ_F"))["consumers"] == ["taken"]
    finally:
        mirror.cancel()
        await asyncio.gather(mirror, return_exceptions=True)


# -- permissions ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("guarded"), TWO_ACCOUNTS)
    await server.astart()
    try:
        async with connected(server.url, user="admin", password="pw") as conn:
            await NatsStore(conn).create_bucket("B", BucketSpec())
        yield server
    finally:
        await server.astop()


@pytest.mark.fault("K12 K13")
async def test_a_host_without_jetstream_reads_through_imports(guarded: NatsServer) -> None:
    """A host in an account without JetStream, with imports alone, reads a bucket, and tries to upload and announce.

    State, listing, content and hints arrive; both writes are refused by name, and the bucket is as it was.
    """
    async with (
        connected(guarded.url, **as_user("publisher")) as publisher,
        connected(guarded.url, **as_user("host")) as host,
    ):
        theirs = NatsStore(publisher).bucket("B")
        ours = NatsStore(host).bucket("B")
        assert (await ours.state()).republished
        async with ours.hints() as hints:
            await calm(hints)
            results = await theirs.put_many([small(f"s/{number}", content(500, number)) for number in range(50)])
            assert [result.error for result in results] == [None] * 50
            seq, _ = await put(theirs, "big", content(5 * CHUNK_SIZE))
            await wait_for_hint(hints, seq)
        infos = [item for item in await listing(ours) if isinstance(item, ObjectInfo)]
        assert len(infos) == 51
        assert await get(ours, "big") == content(5 * CHUNK_SIZE)
        got = {info.name: data async for info, data in ours.download_many(infos[:-1])}
        assert got == {f"s/{number}": content(500, number) for number in range(50)}
        with pytest.raises(NotPermitted, match=r"\$O\.B\.C\.\*"):
            await ours.upload(BytesSource(b"x"))
        with pytest.raises(NotPermitted, match=r"\$O\.B\.M\.\*"):
            await ours.put_meta(ObjectMeta("evil"), EMPTY, expected_seq=None)
        assert (await theirs.state()).last_seq == seq


async def test_a_publisher_needs_no_right_to_delete(guarded: NatsServer) -> None:
    """Writing, replacing, deleting and freeing content works with the two subjects of the bucket and two requests."""
    async with connected(guarded.url, **as_user("publisher")) as conn:
        bucket = NatsStore(conn).bucket("B")
        seq, stored = await put(bucket, "f", content(3 * CHUNK_SIZE), 0)
        await put(bucket, "f", b"new", seq)
        await bucket.remove_chunks(stored.nuid)
        await bucket.delete("f", expected_seq=None, metadata={})
        results = await bucket.put_many([small("a", b"1"), small("b", b"2")])
        assert [result.error for result in results] == [None, None]

        async def freed() -> bool:
            return stored.nuid not in {nuid async for page in bucket.list_chunks() for nuid in page}

        await until(freed)


@pytest.mark.fault("K12")
async def test_a_missing_right_is_named_at_once_in_every_write(guarded: NatsServer) -> None:
    """A user who may only read uploads, deletes, puts small objects, creates a bucket and seals one.

    Each is NotPermitted, all within 8 s: a violation is no silence, nobody waits for a deadline.
    """
    async with connected(guarded.url, **as_user("reader")) as conn:
        bucket = NatsStore(conn).bucket("B")
        began = time.monotonic()
        with pytest.raises(NotPermitted):
            await bucket.upload(BytesSource(content(20 * CHUNK_SIZE)))
        with pytest.raises(NotPermitted):
            await bucket.delete("x", expected_seq=None, metadata={})
        results = await bucket.put_many([small("a", b"1"), small("b", b"2")])
        assert [type(result.error) for result in results] == [NotPermitted] * 2
        with pytest.raises(NotPermitted):
            await NatsStore(conn).create_bucket("C", BucketSpec())
        with pytest.raises(NotPermitted):
            await bucket.seal()
        assert time.monotonic() - began < 8
        async with bucket.hints() as hints:
            assert await hints.wait(0.5) == 0
