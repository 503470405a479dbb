"""Channels and keys on a live server: fences, lost acknowledgements, and what other clients see."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from syncd.channels import Channels
from syncd.errors import ObjectGone, WriteConflict
from syncd.keysets import KeyChange, KeySets, read_keys
from syncd.nodes import digest_of
from syncd.records import read_record
from syncd.signatures import Signer, generate
from syncd.store.base import CHANNELS, HEAD, BucketSpec, Link
from syncd.trees import generation_name
from syncd.trust import MOVE, SIGNATURES, Offer, Seen, Trust, decode_move, follow, judge_offer, keys_name
from tests.support.signing import sign_generation, sign_move
from tests.support.specs import CHUNK, Spec, commit
from tests.support.store import live_kit, lose_answers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from syncd.store.base import Bucket
    from syncd.store.bucket import NatsBucket
    from tests.support.server import NatsServer
    from tests.support.store import LiveKit

DEADLINE = 60.0
TREE: Spec = {"dir": {"one": b"1", "two": b"22"}, "large": bytes(range(256)) * (CHUNK // 128)}


@pytest.fixture
async def kit(nats_server: NatsServer) -> AsyncIterator[LiveKit]:
    async with live_kit(nats_server.url) as live:
        yield live


@pytest.fixture
async def bucket(kit: LiveKit) -> NatsBucket:
    await kit.store.create_bucket("app", BucketSpec(layout="generations"))
    bucket: NatsBucket = kit.store.bucket("app")
    for number in (1, 2, 3):
        await commit(bucket, number, TREE | {"number": b"%d" % number})
    return bucket


def channels_of(bucket: Bucket) -> Channels:
    return Channels(bucket, time.time)


async def offer_of(bucket: Bucket, channel: str) -> Offer:
    """What a subscriber reads."""
    info = await bucket.get_info(CHANNELS + channel)
    assert info is not None
    assert info.link is not None
    number = int((info.link.name or "").rpartition("/")[2])
    record = await read_record(bucket, number)
    assert record is not None
    signatures = record.info.metadata.get(SIGNATURES, "")
    return Offer(
        "app", channel, number, record.data, signatures, info.metadata[MOVE], info.metadata.get(SIGNATURES, "")
    )


async def test_a_signed_channel_goes_all_the_way(bucket: NatsBucket) -> None:
    """Promoted, signed by two, rolled back; keys replaced; each step followed, the old one refused."""
    one, two = (Signer(generate()[0]) for _ in range(2))
    channels, sets = channels_of(bucket), KeySets(bucket, time.time)
    trust = Trust(frozenset((one.public,)), 1)
    async with asyncio.timeout(DEADLINE):
        for number in (2, 3):
            assert await sign_generation(bucket, number, one)
        await channels.promote(3, "stable", who="ann@desk", why="tested", signer=one)
        seen = judge_offer(trust, Seen(), await offer_of(bucket, "stable")).seen
        await channels.rollback("stable", who="bob@desk", signer=one)
        assert await sign_move(channels, "stable", two)
        accepted = judge_offer(trust, seen, await offer_of(bucket, "stable"))
        assert (accepted.move.number, accepted.move.count, accepted.move.who) == (2, 2, "bob@desk")
        await sets.change(trust, KeyChange((two.public,), (one.public,)), [one])
        records = {version: (found.data, found.signatures) for version, found in (await read_keys(bucket)).items()}
        assert follow(trust, records, folder="app").trust.keys == {two.public}
        shown = {state.name: state for state in await channels.show()}
        assert (shown["stable"].number, shown["stable"].count, shown["stable"].problem) == (2, 2, "")
        assert shown["stable"].signers == tuple(sorted((one.public, two.public)))


@pytest.mark.fault("R9")
async def test_operators_at_once_have_one_winner(bucket: NatsBucket) -> None:
    """Three operators promote three generations to one new channel at once, on a live server.

    The server's fence decides, and each of the two others is told who won with what.
    """
    moves = [channels_of(bucket).promote(number, "stable", who=f"host{number}") for number in (1, 2, 3)]
    async with asyncio.timeout(DEADLINE):
        results = await asyncio.gather(*moves, return_exceptions=True)
    lost = [result for result in results if isinstance(result, WriteConflict)]
    assert len(lost) == 2
    move = decode_move((await offer_of(bucket, "stable")).move.encode())
    assert move.count == 1
    assert all(f"{move.who} moved channel 'stable' to generation {move.number}" in error.message for error in lost)


async def test_a_lost_acknowledgement_is_no_conflict_with_oneself(
    bucket: NatsBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's answer to a first move, to a later one and to a removal is dropped in the client; nobody is killed.

    Each is done once, and none is a conflict with itself.
    """
    channels = channels_of(bucket)
    for number in (1, 2):
        lost = lose_answers(monkeypatch, bucket, 1)
        async with asyncio.timeout(DEADLINE):
            moved = await channels.promote(number, "stable", who="ann")
        info = await bucket.get_info(CHANNELS + "stable")
        assert info is not None
        assert (len(lost), moved.count, info.seq) == (1, number, moved.seq)
        monkeypatch.undo()
    lost = lose_answers(monkeypatch, bucket, 1)
    async with asyncio.timeout(DEADLINE):
        await channels.remove("stable")
    assert len(lost) == 1
    assert [state.name for state in await channels.show()] == [HEAD]


@pytest.mark.fault("R7")
async def test_collected_blobs_are_found_missing(bucket: NatsBucket) -> None:
    """A blob of generation 1 is removed from the bucket, and a channel promoted to it once the server lists it no more.

    The error says that blobs of it were collected, and the channel is not made.
    """
    record = await read_record(bucket, 1)
    assert record is not None
    await bucket.remove_blobs([digest_of(b"1")])
    async with asyncio.timeout(DEADLINE):
        while [page async for page in bucket.list_chunks() if digest_of(b"1") in page]:
            await asyncio.sleep(0.05)
        with pytest.raises(ObjectGone, match="blobs of generation 1 were collected"):
            await channels_of(bucket).promote(1, "stable", who="ann")
    assert await bucket.get_info(CHANNELS + "stable") is None


async def test_other_clients_read_what_is_written(kit: LiveKit, bucket: NatsBucket) -> None:
    """A channel is a link with metadata, a key set an ordinary object, a signed generation what it was before."""
    signer = Signer(generate()[0])
    await channels_of(bucket).promote(2, "stable", who="ann", signer=signer)
    await sign_generation(bucket, 2, signer)
    trust = Trust(frozenset((signer.public,)), 1)
    await KeySets(bucket, time.time).change(trust, KeyChange((Signer(generate()[0]).public,)), [signer])
    peer = await kit.other.jetstream().object_store("app")
    async with asyncio.timeout(DEADLINE):
        link = await peer.get_info(CHANNELS + "stable")
        assert link.options is not None
        assert link.options.link is not None
        assert (link.options.link.bucket, link.options.link.name) == ("app", generation_name(2))
        record = await read_record(bucket, 2)
        assert record is not None
        assert (await peer.get(generation_name(2))).data == record.data
        keys = await read_keys(bucket)
        assert (await peer.get(keys_name(1))).data == keys[1].data
        assert {info.name for info in await peer.list()} >= {CHANNELS + "stable", keys_name(1), generation_name(2)}


async def test_a_channel_that_another_client_wrote_is_moved_on(kit: LiveKit, bucket: NatsBucket) -> None:
    """A plain link counts as no move; JavaScript's has neither nuid nor digest."""
    payload = b'{"name":"channels/stable","bucket":"app","options":{"link":{"bucket":"app","name":"%s"}}}'
    await kit.inject_meta("app", "Y2hhbm5lbHMvc3RhYmxl", payload % generation_name(3).encode())
    info = await bucket.get_info(CHANNELS + "stable")
    assert info is not None
    assert info.link == Link("app", generation_name(3))
    async with asyncio.timeout(DEADLINE):
        moved = await channels_of(bucket).rollback("stable", who="ann")
    assert (moved.before, moved.number, moved.count) == (3, 2, 1)
