"""Replacing trusted keys, on a bucket in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from syncd.errors import ObjectCorrupt, UsageError, WriteConflict
from syncd.keysets import KeyChange, KeySets, read_keys
from syncd.nodes import digest_of
from syncd.records import sign_record
from syncd.signatures import MAX_SIGNATURES, Signer, generate
from syncd.store.base import BucketSpec, ObjectMeta, SmallPut
from syncd.store.memory import MemoryBucket, MemoryStore
from syncd.trust import Trust, decode_keys, follow, keys_name
from tests.support.channels import AT, NOW, fill, metas, trust_of
from tests.support.store import raw_meta

if TYPE_CHECKING:
    from syncd.store.base import Bucket


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def bucket(store: MemoryStore) -> MemoryBucket:
    await store.create_bucket("app", BucketSpec(layout="generations"))
    bucket = store.bucket("app")
    await fill(bucket)
    return bucket


@pytest.fixture(scope="session")
def signers() -> list[Signer]:
    return [Signer(generate()[0]) for _ in range(MAX_SIGNATURES + 1)]


def plain(records: Any) -> dict[int, tuple[bytes, str]]:
    return {version: (one.data, one.signatures) for version, one in records.items()}


async def trusted(bucket: Bucket, configured: Trust) -> Trust:
    """What a subscriber with this configuration trusts."""
    return follow(configured, plain(await read_keys(bucket)), folder=bucket.name).trust


def add(*signers: Signer, drop: tuple[Signer, ...] = (), threshold: int = 0, why: str = "") -> KeyChange:
    return KeyChange(tuple(one.public for one in signers), tuple(one.public for one in drop), threshold, why)


@pytest.mark.fault("K9")
async def test_keys_are_replaced_by_those_before(bucket: MemoryBucket, signers: list[Signer]) -> None:
    """A new key comes in by the old one's signature; then the old one is dropped by the new one's.

    Hosts follow both; a change that the dropped key signs is refused.
    """
    one, two, three = signers[:3]
    sets = KeySets(bucket, lambda: NOW)
    configured = trust_of(one)
    done = await sets.change(configured, add(two, why="new laptop"), [one])
    assert (done.version, done.keys, done.threshold) == (1, tuple(sorted((one.public, two.public))), 1)
    assert (done.signatures, done.needed) == (1, 1)
    record = decode_keys((await read_keys(bucket))[1].data)
    assert (record.folder, record.parent, record.at, record.why) == ("app", "", AT, "new laptop")
    assert (await trusted(bucket, configured)).keys == {one.public, two.public}
    assert (await sets.change(configured, add(drop=(one,)), [two])).version == 2
    assert (await trusted(bucket, configured)).keys == {two.public}
    with pytest.raises(UsageError, match="none of the keys that are trusted now"):
        await sets.change(configured, add(three), [one])
    assert (await sets.change(trust_of(two), add(three, threshold=2), [two])).version == 3
    shown = await sets.show(configured)
    assert [(state.version, state.trusted, state.threshold) for state in shown] == [
        (1, True, 1),
        (2, True, 1),
        (3, True, 2),
    ]
    assert shown[0].signers == (one.public,)
    assert not any(state.trusted for state in await sets.show(None))
    info = await bucket.get_info(keys_name(3))
    assert info is not None
    assert info.metadata["syncd-kind"] == "keys"


@pytest.mark.fault("K8")
async def test_a_key_set_waits_for_its_signatures(bucket: MemoryBucket, signers: list[Signer]) -> None:
    """Two of two have to sign: one holder writes a key set and signs it twice, later the other signs.

    Hosts follow it only after the other one's signature.
    """
    one, two, three = signers[:3]
    configured = trust_of(one, two, threshold=2)
    sets = KeySets(bucket, lambda: NOW)
    done = await sets.change(configured, add(three), [one, one])
    assert (done.signatures, done.needed) == (1, 2)
    assert (await trusted(bucket, configured)).version == 0
    assert [state.trusted for state in await sets.show(configured)] == [False]
    assert await sign_record(bucket, await sets.to_sign(1), two)
    assert not await sign_record(bucket, await sets.to_sign(1), two)
    assert (await trusted(bucket, configured)).version == 1
    with pytest.raises(UsageError, match="no key set 2"):
        await sets.to_sign(2)


@pytest.mark.fault("R9")
async def test_of_two_who_change_keys_the_second_is_told(
    bucket: MemoryBucket, signers: list[Signer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two holders write key set 1 at the same moment; later the second tries again while the first one's waits.

    Both times the second gets WriteConflict; only on purpose (`instead`) the second one's takes its place.
    """
    one, two, three, four = signers[:4]
    configured = trust_of(one, two, threshold=2)
    sets = KeySets(bucket, lambda: NOW)
    results = await asyncio.gather(
        sets.change(configured, add(three), [one]), sets.change(configured, add(four), [two]), return_exceptions=True
    )
    assert isinstance(results[1], WriteConflict)
    assert "somebody else wrote key set 1 meanwhile" in results[1].message
    with pytest.raises(WriteConflict, match="there is a key set 1 already, which lacks signatures"):
        await sets.change(configured, add(four), [two])
    done = await sets.change(configured, add(four), [one, two], instead=True)
    assert (done.version, done.signatures) == (1, 2)
    assert (await trusted(bucket, configured)).keys == {one.public, two.public, four.public}


@pytest.mark.fault("K1 K9")
async def test_a_forged_chain_of_keys_is_not_gone_on_from(bucket: MemoryBucket, signers: list[Signer]) -> None:
    """A thief who may write to the bucket names the operator's key beside his own: the operator must not sign that."""
    operator, thief, fresh = signers[:3]
    configured = trust_of(operator)
    sets = KeySets(bucket, lambda: NOW)
    await sets.change(trust_of(thief), add(operator), [thief])
    await sets.change(trust_of(thief), add(fresh), [thief])
    assert (await trusted(bucket, configured)).version == 0
    with pytest.raises(WriteConflict, match="lacks signatures"):
        await sets.change(configured, add(fresh), [operator])
    done = await sets.change(configured, add(fresh), [operator], instead=True)
    assert (done.version, set(done.keys)) == (1, {operator.public, fresh.public})
    assert (await trusted(bucket, configured)).keys == {operator.public, fresh.public}


@pytest.mark.fault("K5 K7")
async def test_a_key_set_that_follows_another_one_is_not_signed(bucket: MemoryBucket, signers: list[Signer]) -> None:
    """As key set 2 one is planted with another parent, folder or version, or the first one once more.

    It is not handed out to be signed: ObjectCorrupt.
    """
    one, two = signers[:2]
    sets = KeySets(bucket, lambda: NOW)
    await sets.change(trust_of(one), add(two), [one])
    first = (await read_keys(bucket))[1].data
    for changed in (
        first.replace(b'"version":1', b'"version":2').replace(b'"parent":""', b'"parent":"%s"' % (b"0" * 64)),
        first.replace(b'"folder":"app"', b'"folder":"api"')
        .replace(b'"version":1', b'"version":2')
        .replace(b'"parent":""', b'"parent":"%s"' % digest_of(first).encode()),
        first.replace(b'"version":1', b'"version":3').replace(
            b'"parent":""', b'"parent":"%s"' % digest_of(first).encode()
        ),
        first,
    ):
        await bucket.put_many([SmallPut(ObjectMeta(keys_name(2)), changed, None, None)])
        with pytest.raises(ObjectCorrupt, match="key set 2 is another folder's, or does not follow"):
            await sets.to_sign(2)


async def test_key_sets_that_cannot_be_read_are_shown_and_not_followed(
    store: MemoryStore, bucket: MemoryBucket, signers: list[Signer]
) -> None:
    """Nor does one fetch what is too large to be one; a missing one ends the chain."""
    one, two = signers[:2]
    sets = KeySets(bucket, lambda: NOW)
    await sets.change(trust_of(one), add(two), [one])
    await sets.change(trust_of(one), add(drop=(two,)), [one])
    info = await bucket.get_info(keys_name(2))
    assert info is not None
    store.write_raw_chunks("app", info.nuid, [])
    assert [bool(state.problem) for state in await sets.show(trust_of(one))] == [False, True]
    assert (await trusted(bucket, trust_of(one))).version == 1
    store.write_raw_meta("app", "a2V5cy8wMDAwMDAwMDAy", raw_meta(keys_name(2), b"", "n", size=1 << 30, chunks=8192))
    store.faults.calls.clear()
    assert (await read_keys(bucket))[2].data == b""
    assert "download_many" in store.faults.calls
    assert len([call for call in store.faults.calls if call == "download_many"]) == 1
    await bucket.delete(keys_name(1), expected_seq=None, metadata={})
    assert await read_keys(bucket) == {}
    assert list(await read_keys(bucket, after=1)) == [2]


async def test_a_change_that_makes_no_sense_is_refused(bucket: MemoryBucket, signers: list[Signer]) -> None:
    """And writes nothing."""
    one, two = signers[:2]
    sets = KeySets(bucket, lambda: NOW)
    configured = trust_of(one)
    before = await metas(bucket)
    for change, by, said in (
        (add(one), [one], "is trusted already"),
        (add(drop=(two,)), [one], "none of the keys"),
        (add(drop=(one,)), [one], "0 keys"),
        (add(*signers[1:]), [one], f"{MAX_SIGNATURES + 1} keys"),
        (add(two, threshold=3), [one], "3 of 2 keys can never sign"),
        (add(two), [], "needs the signature"),
        (add(two), [two], "none of the keys"),
        (KeyChange(("UABC",)), [one], "no public key of a user"),
        (add(two, why="x" * 2000), [one], "cannot be recorded"),
    ):
        with pytest.raises(UsageError, match=said):
            await sets.change(configured, change, by)
    assert await metas(bucket) == before
