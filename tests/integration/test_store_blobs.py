"""The generations layout on a live server that freezes, dies, lags, refuses or loses acknowledgements."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from syncd.errors import (
    BucketNotFound,
    NotPermitted,
    ObjectGone,
    StoreRejected,
    StoreTimeout,
    SyncdError,
    Unavailable,
    WriteConflict,
)
from syncd.nodes import BLOB_MAX, digest_of
from syncd.store import blobs as blobs_module
from syncd.store import lanes as lanes_module
from syncd.store import transport as transport_module
from syncd.store.base import CHANNELS, GENERATIONS, HEAD, BucketSpec, Link
from syncd.store.bucket import NatsStore
from syncd.store.codec import RAW, Codec
from tests.support.server import NatsServer
from tests.support.store import TWO_ACCOUNTS, as_user, connected, content, get, live_kit, lose_answers, names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping
    from pathlib import Path

    from nats.aio.msg import Msg

    from syncd.store.base import BlobSink, Bucket
    from syncd.store.bucket import NatsBucket
    from syncd.store.transport import End
    from tests.support.store import LiveKit

DEADLINE = 60.0
RECORD = b'{"format":1}'


@pytest.fixture
async def kit(nats_server: NatsServer) -> AsyncIterator[LiveKit]:
    async with live_kit(nats_server.url) as live:
        yield live


@pytest.fixture
async def bucket(kit: LiveKit) -> NatsBucket:
    await kit.store.create_bucket("B", BucketSpec(layout="generations"))
    return kit.store.bucket("B")


async def send(sink: BlobSink, blobs: Iterable[bytes]) -> None:
    for data in blobs:
        await sink.put(digest_of(data), RAW + data)


async def store(bucket: Bucket, *blobs: bytes) -> tuple[int, int]:
    async with bucket.blob_sink() as sink:
        await send(sink, blobs)
        await sink.flush()
        return sink.stored, sink.duplicates


async def fetch(bucket: Bucket, digests: Iterable[str]) -> dict[str, bytes | SyncdError]:
    async with asyncio.timeout(DEADLINE):
        return {digest: data async for digest, data in bucket.get_blobs(list(digests))}


async def commit(bucket: Bucket, number: int, expected: int, *, channel: str = HEAD) -> int:
    async with asyncio.timeout(DEADLINE):
        return await bucket.commit_generation(number, RECORD, {}, channel=channel, expected_seq=expected)


async def subjects(kit: LiveKit, name: str = "B") -> dict[str, int]:
    info = await kit.api(f"STREAM.INFO.OBJ_{name}", {"subjects_filter": f"$O.{name}.C.>"})
    return info["state"].get("subjects") or {}


def in_use(bucket: NatsBucket) -> tuple[int, int]:
    """Bytes and messages that hold a place in the window, and messages under way."""
    return bucket._transport.writing._used, len(bucket._transport._out)


# -- other clients --------------------------------------------------------------------------------------------------


async def test_nats_py_reads_a_generation(kit: LiveKit, bucket: NatsBucket) -> None:
    """The record is an ordinary object; the channel, which nats-py cannot follow, says its name."""
    await store(bucket, content(1000))
    await commit(bucket, 3, 0)
    peer = await kit.other.jetstream().object_store("B")
    link = await asyncio.wait_for(peer.get_info(CHANNELS + HEAD), 10)
    assert link.options is not None
    assert link.options.link is not None
    target = link.options.link.name
    assert target == GENERATIONS + "0000000003"
    found = await asyncio.wait_for(peer.get(target), 10)
    assert found.data == RECORD
    assert found.info.headers == {"Content-Type": ["application/json"]}
    listed = await asyncio.wait_for(peer.list(), 10)
    assert {entry.name for entry in listed} == {target, CHANNELS + HEAD}


async def test_a_bucket_without_atomic_batches_takes_blobs_but_no_commit(
    kit: LiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to do is said before anything is sent, or by the server; once it is done, the next try works."""
    await kit.api("STREAM.CREATE.OBJ_F", foreign := stream_config("F"))
    bucket = kit.store.bucket("F")
    assert await store(bucket, b"x") == (1, 0)
    with monkeypatch.context() as patch:
        patch.setattr(bucket._transport, "publish", None)
        with pytest.raises(StoreRejected, match="allow_atomic"):
            await commit(bucket, 1, 0)
    bucket._stream.atomic = True  # as if it had been switched off meanwhile
    with pytest.raises(StoreRejected, match="allow_atomic"):
        await commit(bucket, 1, 0)
    assert (await bucket.state()).messages == 1
    await kit.api("STREAM.UPDATE.OBJ_F", foreign | {"allow_atomic": True})
    assert await commit(bucket, 1, 0)


def stream_config(name: str) -> dict[str, Any]:
    """A bucket as nats-py and Go make it: no TTLs, no atomic batches."""
    return {
        "name": f"OBJ_{name}",
        "subjects": [f"$O.{name}.C.>", f"$O.{name}.M.>"],
        "discard": "new",
        "allow_rollup_hdrs": True,
        "allow_direct": True,
    }


async def test_a_stream_without_ttls_frees_blobs_by_purging(kit: LiveKit) -> None:
    """At once; what was learnt wrongly of the stream is learnt anew."""
    await kit.api("STREAM.CREATE.OBJ_F", stream_config("F"))
    bucket = kit.store.bucket("F")
    blobs = [b"%d" % number for number in range(60)]
    await store(bucket, *blobs)
    await bucket.remove_blobs([digest_of(data) for data in blobs[:40]])
    assert set(await subjects(kit, "F")) == {f"$O.F.C.{digest_of(data)}" for data in blobs[40:]}
    bucket._stream.ttl = True
    await bucket.remove_blobs([digest_of(data) for data in blobs[40:]])
    assert await subjects(kit, "F") == {}


async def test_a_mark_keeps_the_whole_configuration(kit: LiveKit) -> None:
    """Another client's bucket becomes ours by name of its layout alone."""
    theirs = stream_config("F") | {"description": "d", "max_age": 3_600_000_000_000, "metadata": {"team": "web"}}
    await kit.api("STREAM.CREATE.OBJ_F", theirs)
    before = (await kit.api("STREAM.INFO.OBJ_F"))["config"]
    await kit.store.bucket("F").set_layout("generations")
    after = (await kit.api("STREAM.INFO.OBJ_F"))["config"]
    assert after.pop("metadata") == before.pop("metadata") | {"syncd.layout": "generations", "syncd.format": "1"}
    assert after == before


# -- the server freezes, dies, comes back -----------------------------------------------------------------------------

MANY = 3000
SIZE = 6000


async def send_through(bucket: NatsBucket, upset: asyncio.Event) -> list[str]:
    """Send many blobs, tell when some of them are acknowledged, and check that each one arrived."""
    blobs = [content(SIZE, number) for number in range(MANY)]
    async with asyncio.timeout(DEADLINE), bucket.blob_sink() as sink:
        for data in blobs:
            await sink.put(digest_of(data), RAW + data)
            if sink.stored > MANY // 4:
                upset.set()
        await sink.flush()
        assert (sink.stored, sink.stored_bytes, sink.duplicates) == (MANY, MANY * (SIZE + 1), 0)
    assert in_use(bucket) == (0, 0)
    found = await fetch(bucket, map(digest_of, blobs))
    assert found == {digest_of(data): data for data in blobs}
    return list(found)


@pytest.mark.fault("N1")
async def test_a_server_killed_under_a_sink_and_restarted_has_every_blob_once(
    nats_server: NatsServer, bucket: NatsBucket
) -> None:
    """nats-server is killed (SIGKILL) and restarted when a quarter of 3,000 blobs is acknowledged.

    What was not acknowledged is sent again, and where it was stored the refusal says so: each is there once.
    """
    upset = asyncio.Event()

    async def kill() -> None:
        await upset.wait()
        await nats_server.arestart(kill=True)

    killer = asyncio.create_task(kill())
    digests = await send_through(bucket, upset)
    await killer
    async with live_kit(nats_server.url) as fresh:
        assert await subjects(fresh) == {f"$O.B.C.{digest}": 1 for digest in digests}


@pytest.mark.fault("N1")
async def test_a_server_frozen_under_a_sink_and_thawed_has_every_blob_once(
    nats_server: NatsServer, kit: LiveKit, bucket: NatsBucket
) -> None:
    """nats-server is stopped (SIGSTOP) for 2 s when a quarter of 3,000 blobs is acknowledged.

    The pipeline waits and goes on: each is there once.
    """
    upset = asyncio.Event()

    async def freeze() -> None:
        await upset.wait()
        nats_server.freeze()
        await asyncio.sleep(2)
        nats_server.thaw()

    freezer = asyncio.create_task(freeze())
    digests = await send_through(bucket, upset)
    await freezer
    assert await subjects(kit) == {f"$O.B.C.{digest}": 1 for digest in digests}


async def test_a_frozen_server_stops_the_producer(nats_server: NatsServer, bucket: NatsBucket) -> None:
    """Memory holds the window's bytes and no more; a cancelled put leaves none of them taken."""
    data = content(BLOB_MAX)
    await store(bucket, b"x")
    nats_server.freeze()
    put = 0
    async with bucket.blob_sink() as sink:
        try:
            async with asyncio.timeout(2):
                while True:
                    await sink.put(f"{put:064x}", RAW + data)
                    put += 1
        except TimeoutError:
            pass
        assert 1 <= put <= bucket._transport.writing.limit // BLOB_MAX + 1
        assert in_use(bucket) != (0, 0)
    assert in_use(bucket) == (0, 0)
    nats_server.thaw()
    assert await store(bucket, b"y") == (1, 0)


@pytest.mark.fault("N1")
async def test_a_server_killed_under_a_reader_is_read_on(nats_server: NatsServer, bucket: NatsBucket) -> None:
    """nats-server is killed (SIGKILL) and restarted when 10 of 1,000 blobs have been read.

    Each blob comes exactly once, and right.
    """
    blobs = [content(20_000, number) for number in range(1000)]
    await store(bucket, *blobs)
    found: dict[str, bytes | SyncdError] = {}
    async with asyncio.timeout(DEADLINE):
        async for digest, data in bucket.get_blobs(list(map(digest_of, blobs))):
            if len(found) == 10:
                await nats_server.arestart(kill=True)
            assert digest not in found
            found[digest] = data
    assert found == {digest_of(data): data for data in blobs}


async def test_a_reader_that_a_new_connection_left_behind_asks_again(
    bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read's first request is dropped, and the client told of a new connection that nobody has looked at yet.

    It is asked again; noticing that must not occupy the event loop, or its owner never hears of it.
    """
    await store(bucket, b"x")
    lost = asyncio.Event()
    original = transport_module.send

    async def send(client: Any, subject: str, payload: bytes, **options: Any) -> None:
        if lost.is_set():
            await original(client, subject, payload, **options)
        lost.set()

    monkeypatch.setattr(transport_module, "send", send)
    reading = asyncio.create_task(fetch(bucket, [digest_of(b"x")]))
    async with asyncio.timeout(DEADLINE):
        await lost.wait()
        bucket._transport._client, bucket._transport._epoch = None, 0  # renewed, and nobody has looked yet
        began = time.monotonic()
        assert await reading == {digest_of(b"x"): b"x"}
    assert time.monotonic() - began < 10


@pytest.mark.fault("N1 N4")
async def test_a_server_that_stays_frozen_ends_every_call(
    nats_server: NatsServer, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server is stopped (SIGSTOP) for good; blobs are stored, read and removed, and a generation committed.

    With limits of 2 s each call ends within 40 s, as a time-out or unavailable.
    """
    monkeypatch.setattr(lanes_module, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(transport_module, "PAGE_TRIES", 1)
    monkeypatch.setattr(blobs_module, "CHUNK_SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(blobs_module, "COMMIT_SECONDS", 2.0)
    await store(bucket, b"x")
    await bucket.state()
    nats_server.freeze()
    began = time.monotonic()
    results = await asyncio.gather(
        store(bucket, b"y"),
        fetch(bucket, [digest_of(b"x")]),
        bucket.remove_blobs([digest_of(b"x")]),
        commit(bucket, 1, 0),
        return_exceptions=True,
    )
    assert time.monotonic() - began < 40
    for result in results:
        assert isinstance(result, StoreTimeout | Unavailable), result
    nats_server.thaw()


@pytest.mark.fault("N5")
async def test_a_bucket_deleted_under_a_sink_is_named_soon(kit: LiveKit, bucket: NatsBucket) -> None:
    """Another client deletes the bucket under an open sink: nobody answers on its subjects then.

    Puts, flushes and a commit raise BucketNotFound, all within 15 s.
    """
    began = time.monotonic()
    async with bucket.blob_sink() as sink:
        await send(sink, [b"first"])
        await sink.flush()
        await kit.delete_bucket("B")
        await sink.put(digest_of(b"second"), RAW + b"second")
        with pytest.raises(BucketNotFound):
            await sink.flush()
        with pytest.raises(BucketNotFound):
            await send(sink, [b"third"])
    with pytest.raises(BucketNotFound):
        await commit(bucket, 1, 0)
    assert time.monotonic() - began < 15


async def test_a_closed_connection_is_our_error_in_every_call(nats_server: NatsServer) -> None:
    """Our connection is closed; then every call of the layout is made.

    Each is Unavailable: no exception of the client library crosses the border.
    """
    async with connected(nats_server.url) as conn:
        nats_store = NatsStore(conn)
        await nats_store.create_bucket("B", BucketSpec())
        bucket = nats_store.bucket("B")
        await store(bucket, b"x")
    calls = [
        store(bucket, b"y"),
        fetch(bucket, [digest_of(b"x")]),
        bucket.remove_blobs([digest_of(b"x")]),
        commit(bucket, 1, 0),
        bucket.set_layout("generations"),
    ]
    async with asyncio.timeout(DEADLINE):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * len(calls)


# -- lost acknowledgements --------------------------------------------------------------------------------------------


async def test_a_blob_sent_twice_is_stored_once_and_is_no_duplicate(
    kit: LiveKit, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal of the double is the acknowledgement of the first."""
    await store(bucket, b"other")
    lost = lose_answers(monkeypatch, bucket, 5)
    blobs = [content(3000, number) for number in range(40)]
    assert await store(bucket, *blobs) == (40, 0)
    assert (len(lost), len(await subjects(kit))) == (5, 41)


async def test_a_replaced_blob_sent_twice_is_stored_once(
    kit: LiveKit, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollup takes its own double away."""
    await store(bucket, b"other")
    lost = lose_answers(monkeypatch, bucket, 3)
    async with bucket.blob_sink() as sink:
        for number in range(10):
            await sink.put(digest_of(b"%d" % number), RAW + b"%d" % number, replace=True)
        await sink.flush()
        assert (sink.stored, sink.duplicates, len(lost)) == (10, 0, 3)
    assert set((await subjects(kit)).values()) == {1}


async def committed_once(bucket: NatsBucket, seq: int, number: int = 1) -> None:
    link = await bucket.get_info(CHANNELS + HEAD)
    assert link is not None
    assert (link.seq, link.link) == (seq, Link("B", f"{GENERATIONS}{number:010d}"))
    assert await get(bucket, f"{GENERATIONS}{number:010d}") == RECORD


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "SILENCE_SECONDS", 1.5)


@pytest.mark.usefixtures("short_silence")
async def test_a_lost_acknowledgement_of_a_commit_is_resolved(
    bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading back tells that it is stored, and where; it is not stored twice."""
    await store(bucket, b"other")
    lost = lose_answers(monkeypatch, bucket, 1)
    seq = await commit(bucket, 1, 0)
    assert len(lost) == 1
    await committed_once(bucket, seq)
    assert (await bucket.state()).last_seq == seq == 4


@pytest.mark.usefixtures("short_silence")
async def test_a_commit_that_cannot_be_read_back_is_sent_again_and_recognised(
    bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own expectations refuse the second one, a replica that is behind hides the first for a while."""
    await store(bucket, b"other")
    lose_answers(monkeypatch, bucket, 1)
    behind = 3
    read_back = bucket._stream.read_back

    async def stale(written: Iterable[tuple[str, bytes]]) -> dict[str, int] | None:
        nonlocal behind
        behind -= 1
        return (None if behind else {}) if behind >= 0 else await read_back(written)

    monkeypatch.setattr(bucket._stream, "read_back", stale)
    seq = await commit(bucket, 1, 0)
    await committed_once(bucket, seq)
    assert (behind, (await bucket.state()).last_seq, seq) == (-1, 4, 4)


@pytest.mark.usefixtures("short_silence")
async def test_a_commit_stored_unnoticed_and_overtaken_is_still_ours(
    kit: LiveKit, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generation object shows it, though the channel has moved on since; the next commit meets the conflict."""
    await store(bucket, b"other")
    on_ack = bucket._transport._on_ack
    moved: list[asyncio.Task[int]] = []

    def move(out: Any, message: Msg) -> None:
        if moved:
            on_ack(out, message)
        else:
            moved.append(asyncio.create_task(bucket.put_link(CHANNELS + HEAD, Link("B", "elsewhere"))))

    monkeypatch.setattr(bucket._transport, "_on_ack", move)
    seq = await commit(bucket, 1, 0)
    newest = await moved[0]
    assert (seq, newest) == (4, 5)
    with pytest.raises(WriteConflict, match="moved channel"):
        await commit(bucket, 2, seq)


@pytest.mark.fault("C4 N1")
async def test_a_server_that_dies_with_the_acknowledgement_has_the_commit_once(
    nats_server: NatsServer, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The acknowledgement of a commit is dropped in the client, and nats-server killed (SIGKILL) and restarted with it.

    The batch was stored before we heard of it: the commit finds it, and it is there once.
    """
    await store(bucket, b"other")
    on_ack = bucket._transport._on_ack
    restarts: list[asyncio.Task[None]] = []

    def kill(out: Any, message: Msg) -> None:
        if restarts:
            on_ack(out, message)
        else:
            restarts.append(asyncio.create_task(nats_server.arestart(kill=True)))

    monkeypatch.setattr(bucket._transport, "_on_ack", kill)
    seq = await commit(bucket, 1, 0)
    assert len(restarts) == 1
    await restarts[0]
    await committed_once(bucket, seq)
    assert (await bucket.state()).messages == 4


@pytest.mark.fault("C4 N1")
async def test_a_server_that_dies_before_it_reads_the_commit_gets_it_again(
    nats_server: NatsServer, bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server is stopped (SIGSTOP), killed with the batch of a commit in its socket, and restarted.

    Nothing of it was stored, and the second try is, once.
    """
    await store(bucket, b"other")
    await bucket.state()
    sent = asyncio.Event()
    original = transport_module.send

    async def send(client: Any, subject: str, payload: bytes, **options: Any) -> None:
        await original(client, subject, payload, **options)
        if (options.get("headers") or {}).get("Nats-Batch-Commit"):
            sent.set()

    monkeypatch.setattr(transport_module, "send", send)
    nats_server.freeze()
    committing = asyncio.create_task(commit(bucket, 1, 0))
    async with asyncio.timeout(DEADLINE):
        await sent.wait()
    await nats_server.arestart(kill=True)
    seq = await committing
    await committed_once(bucket, seq)
    assert (await bucket.state()).messages == 4


async def test_a_commit_refused_for_a_moment_is_sent_again(bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lost a part of the batch, or sheds load, stored nothing of it."""
    await store(bucket, b"other")
    on_ack = bucket._transport._on_ack
    refusals = [
        b'{"error":{"code":400,"err_code":10176,"description":"batch is incomplete"}}',
        b'{"error":{"code":400,"err_code":10164,"description":"wrong last sequence"}}',
        b'{"error":{"code":429,"err_code":10210,"description":"too many batches"}}',
    ]
    send_again = bucket._transport._send

    async def lose(client: Any, out: Any) -> None:
        if not refusals:
            await send_again(client, out)
            return
        refusal = type("Refusal", (), {"data": refusals.pop(0), "headers": None})()
        asyncio.get_running_loop().call_soon(on_ack, out, refusal)

    monkeypatch.setattr(bucket._transport, "_send", lose)
    seq = await commit(bucket, 1, 0)
    assert (refusals, seq) == ([], 4)
    await committed_once(bucket, seq)


# -- replicas that are behind, answers that are wrong -----------------------------------------------------------------


async def test_a_replica_that_is_behind_is_asked_again(bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """First it has nothing, then it has what a removal left, then it has the blob."""
    await store(bucket, b"x", b"y")
    collect = bucket._transport.collect
    asked = 0

    async def behind(subject: str, request: Mapping[str, Any], silence: float) -> tuple[list[Msg], End]:
        nonlocal asked
        asked += 1
        messages, end = await collect(subject, request, silence)
        if asked == 1:
            return [], end
        if asked == 2:
            for message in messages:
                message.data = b""
        return messages, end

    monkeypatch.setattr(bucket._transport, "collect", behind)
    digests = [digest_of(b"x"), digest_of(b"y")]
    assert await fetch(bucket, digests) == {digests[0]: b"x", digests[1]: b"y"}
    assert asked == 3


async def test_messages_of_other_subjects_and_doubles_are_ignored(
    bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not asked for is nothing, whoever answers."""
    await store(bucket, b"x", b"y")
    collect = bucket._transport.collect

    async def chatty(subject: str, request: Mapping[str, Any], silence: float) -> tuple[list[Msg], End]:
        names = [f"$O.B.C.{digest_of(data)}" for data in (b"x", b"y")]
        everything, end = await collect(subject, {**request, "multi_last": names}, silence)
        return everything * 2, end

    monkeypatch.setattr(bucket._transport, "collect", chatty)
    wanted = digest_of(b"x")
    assert [item async for item in bucket.get_blobs([wanted])] == [(wanted, b"x")]


async def test_what_is_decoded_waits_for_who_reads_it(bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow reader of blobs that expand a thousandfold does not fill the memory."""
    codec = Codec()
    digests = []
    async with bucket.blob_sink() as sink:
        for number in range(400):
            data = b"%08d" % number * (BLOB_MAX // 8)
            digests.append(digest_of(data))
            await sink.put(digests[-1], codec.encode(data))
        await sink.flush()
    decoded = 0
    decode = blobs_module.decode

    def counted(payload: bytes, digest: str) -> bytes:
        nonlocal decoded
        decoded += 1
        return decode(payload, digest)

    monkeypatch.setattr(blobs_module, "decode", counted)
    outcomes = bucket.get_blobs(digests)
    await anext(outcomes)
    before = -1
    async with asyncio.timeout(DEADLINE):
        while before != decoded:  # until nothing moves any more
            before = decoded
            await asyncio.sleep(0.5)
    assert decoded * BLOB_MAX <= 24 * 1024 * 1024
    assert len([outcome async for outcome in outcomes]) == 399


# -- permissions ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("K12")
async def test_least_rights_are_enough_and_what_lacks_is_named(tmp_path: Path) -> None:
    """A publisher, a host without JetStream and a reader with least rights work on a real server, and go beyond them.

    What they need works; the publisher's change of the stream, and the reader's writes, are NotPermitted.
    """
    server = await NatsServer(tmp_path / "nats", TWO_ACCOUNTS).astart()
    try:
        async with connected(server.url, user="admin", password="pw") as conn:
            await NatsStore(conn).create_bucket("B", BucketSpec(layout="generations"))
        async with connected(server.url, **as_user("publisher")) as conn:
            publisher = NatsStore(conn).bucket("B")
            assert await store(publisher, b"x", b"gone") == (2, 0)
            await publisher.remove_blobs([digest_of(b"gone")])
            assert await commit(publisher, 1, 0)
            with pytest.raises(NotPermitted):
                await publisher.set_layout("objects")
        async with connected(server.url, **as_user("host")) as conn:
            host = NatsStore(conn).bucket("B")
            found = await fetch(host, [digest_of(b"x"), digest_of(b"gone")])
            assert found.pop(digest_of(b"x")) == b"x"
            assert isinstance(found.pop(digest_of(b"gone")), ObjectGone)
            assert await names(host) == [GENERATIONS + "0000000001", CHANNELS + HEAD]
        async with connected(server.url, **as_user("reader")) as conn:
            reader = NatsStore(conn).bucket("B")
            for call in (store(reader, b"y"), commit(reader, 2, 0), reader.remove_blobs([digest_of(b"x")])):
                with pytest.raises(NotPermitted):
                    await call
    finally:
        await server.astop()
