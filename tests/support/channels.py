"""A bucket of three generations, and what the tests of channels and keys ask of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from syncd import channels as channels_module
from syncd.records import read_record
from syncd.store.base import CHANNELS, ObjectInfo
from syncd.trust import MOVE, SIGNATURES, Move, Offer, Trust, decode_move, encode_move
from tests.support.specs import CHUNK, Spec, commit

if TYPE_CHECKING:
    import pytest

    from syncd.signatures import Signer
    from syncd.store.base import Bucket

NOW = 1_800_000_000.25
AT = "2027-01-15T08:00:00.250000Z"
ANN = "ann@build"
BOB = "bob@desk"
TREE: Spec = {"dir": {"one": b"1", "deep": {"two": b"22"}}, "large": bytes(range(256)) * (CHUNK // 128), "link": "dir"}


def trust_of(*signers: Signer, threshold: int = 1) -> Trust:
    return Trust(frozenset(signer.public for signer in signers), threshold)


async def link_of(bucket: Bucket, channel: str) -> ObjectInfo:
    info = await bucket.get_info(CHANNELS + channel)
    assert info is not None
    return info


async def move_of(bucket: Bucket, channel: str) -> Move:
    return decode_move((await link_of(bucket, channel)).metadata[MOVE].encode())


async def offer_of(bucket: Bucket, channel: str) -> Offer:
    """What a subscriber reads."""
    info = await link_of(bucket, channel)
    assert info.link is not None
    number = int((info.link.name or "").rpartition("/")[2])
    record = await read_record(bucket, number)
    assert record is not None
    return Offer(
        bucket.name,
        channel,
        number,
        record.data,
        record.info.metadata.get(SIGNATURES, ""),
        info.metadata.get(MOVE, ""),
        info.metadata.get(SIGNATURES, ""),
    )


async def metas(bucket: Bucket) -> list[Any]:
    return [item async for page in bucket.changes(0) for item in page.items]


def meanwhile(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Awaitable[object]]) -> None:
    """Let something happen once between the reading of a channel and its move."""
    real = channels_module.require_whole
    done: list[bool] = []

    async def interfere(*arguments: Any) -> None:
        if not done:
            done.append(True)
            await what()
        await real(*arguments)

    monkeypatch.setattr(channels_module, "require_whole", interfere)


def move_text(**changes: Any) -> str:
    fields: dict[str, Any] = {
        "folder": "app",
        "channel": "stable",
        "count": 1,
        "number": 1,
        "record": "0" * 64,
        "at": AT,
    }
    return encode_move(Move(**(fields | changes))).decode()


async def fill(bucket: Bucket) -> None:
    """Three generations, which share nothing but the link."""
    for number in (1, 2, 3):
        await commit(bucket, number, TREE | {"number": b"%d" % number})
