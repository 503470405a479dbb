"""Moving channels and adding signatures, on a bucket in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from syncd.channels import MAX_TERM, Channels, next_count, term_of
from syncd.errors import FormatTooNew, ObjectCorrupt, ObjectGone, Untrusted, UsageError, WriteConflict
from syncd.moves import MAX_NEXT_COUNT, move_metadata
from syncd.nodes import Location, Piece, Recipe, Where, digest_of, encode_recipe, encode_record
from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.records import (
    EXPECT_DIGITS,
    check_expected,
    check_vouched,
    generation_to_sign,
    read_record,
    sign_record,
    signature_text,
)
from syncd.rules import Rules
from syncd.signatures import MAX_SIGNATURES, Signer, decode_signatures, encode_signatures, generate
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import CHANNELS, EMPTY, HEAD, BucketSpec, Link, ObjectMeta, SmallPut
from syncd.store.memory import MemoryBucket, MemoryStore
from syncd.trees import TreeReader, generation_name
from syncd.trust import MAX_COUNT, MOVE, SIGNATURES, Move, Seen, Statement, decode_move, judge_offer, seconds_of
from syncd.whole import require_whole
from tests.support.channels import (
    ANN,
    AT,
    BOB,
    NOW,
    TREE,
    fill,
    link_of,
    meanwhile,
    metas,
    move_of,
    move_text,
    offer_of,
    trust_of,
)
from tests.support.signing import sign_generation, sign_move
from tests.support.specs import CHUNK, Builder, Spec, commit
from tests.support.store import get

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def bucket(store: MemoryStore) -> MemoryBucket:
    await store.create_bucket("app", BucketSpec(layout="generations"))
    bucket = store.bucket("app")
    await fill(bucket)
    return bucket


@pytest.fixture
def channels(bucket: MemoryBucket) -> Channels:
    return Channels(bucket, lambda: NOW)


@pytest.fixture(scope="session")
def signers() -> list[Signer]:
    return [Signer(generate()[0]) for _ in range(MAX_SIGNATURES + 1)]


# -- promote --------------------------------------------------------------------------------------------------------


async def test_a_channel_is_made_by_its_first_promotion(bucket: MemoryBucket, channels: Channels) -> None:
    """A link to the generation, and a record of the move: who, when, why, and the digest of what it leads to."""
    moved = await channels.promote(2, "stable", who=ANN, why="tested")
    info = await link_of(bucket, "stable")
    found = await TreeReader(bucket).channel("stable")
    assert found is not None
    assert (info.link, found.generation.number) == (Link("app", generation_name(2)), 2)
    assert await move_of(bucket, "stable") == Move("app", "stable", 1, 2, found.digest, AT, ANN, "tested", "")
    assert SIGNATURES not in info.metadata
    assert (moved.before, moved.number, moved.count, moved.seq, moved.record) == (0, 2, 1, info.seq, found.digest)
    assert (moved.signed_by, moved.signatures, moved.expires) == ("", 0, "")


async def test_moves_are_counted_forward_and_back(bucket: MemoryBucket, channels: Channels) -> None:
    """Each move is one more, also one to where the channel is."""
    for count, (number, before) in enumerate([(1, 0), (3, 1), (2, 3), (2, 2)], 1):
        moved = await channels.promote(number, "stable", who=ANN)
        assert (moved.count, moved.before, (await move_of(bucket, "stable")).count) == (count, before, count)


async def test_a_move_may_end(bucket: MemoryBucket, channels: Channels) -> None:
    """So long after it was made."""
    await channels.promote(1, "stable", who=ANN, valid_seconds=86400)
    assert seconds_of((await move_of(bucket, "stable")).expires) == NOW + 86400


async def test_a_move_is_good_for_as_long_as_the_one_before_unless_it_says(
    bucket: MemoryBucket, channels: Channels
) -> None:
    """Going back in a hurry does not end the watch over a channel; what nobody honest wrote is no measure."""
    for asked, seconds in [(None, 0), (60, 60), (None, 60), (90, 90), (None, 90), (0, 0), (None, 0)]:
        await channels.promote(2, "stable", who=ANN, valid_seconds=asked)
        expires = (await move_of(bucket, "stable")).expires
        assert (seconds_of(expires) or NOW) - NOW == seconds
    await channels.promote(2, "stable", who=ANN, valid_seconds=60)
    await channels.rollback("stable", who=ANN)
    assert seconds_of((await move_of(bucket, "stable")).expires) == NOW + 60
    for at, expires in [(AT, "9999-12-31T23:59:59Z"), ("9999-12-31T23:59:59Z", AT)]:
        forged = {MOVE: move_text(at=at, expires=expires)}
        info = await link_of(bucket, "stable")
        assert 0 <= term_of(replace(info, metadata=forged)) <= MAX_TERM


@pytest.mark.parametrize("name", ["", "a/b", "a b", "-a", ".a", "a.b", "12", "x" * 65, "a\n", "ü", "*", "channels/x"])
async def test_a_name_that_cannot_be_a_channels_is_refused(channels: Channels, name: str) -> None:
    """Digits alone would be a generation for all that takes both."""
    with pytest.raises(UsageError, match="no name of a channel"):
        await channels.promote(1, name, who=ANN)


async def test_the_head_is_not_promoted(bucket: MemoryBucket, channels: Channels) -> None:
    """It moves with commits."""
    before = await link_of(bucket, HEAD)
    with pytest.raises(UsageError, match="follows the commits"):
        await channels.promote(1, HEAD, who=ANN)
    assert await link_of(bucket, HEAD) == before


@pytest.mark.fault("R7")
async def test_a_generation_that_is_not_there_is_refused(bucket: MemoryBucket, channels: Channels) -> None:
    """Generation 1 is deleted as by a collection, 4 never was there; a channel is promoted to each, and back to 1.

    All that is refused, and nothing in the bucket changes.
    """
    await channels.promote(2, "stable", who=ANN)
    await bucket.delete(generation_name(1), expected_seq=None, metadata={})
    before = await metas(bucket)
    for number in (1, 4):
        with pytest.raises(UsageError, match=f"no generation {number}"):
            await channels.promote(number, "stable", who=ANN)
    with pytest.raises(UsageError, match="no generation 1"):
        await channels.rollback("stable", to=1, who=ANN)
    assert await metas(bucket) == before


async def test_a_move_that_cannot_be_recorded_is_refused(bucket: MemoryBucket, channels: Channels) -> None:
    """What readers would refuse is not written."""
    before = await metas(bucket)
    for why in ("x" * 2000, "\ud800"):
        with pytest.raises(UsageError, match="cannot be recorded"):
            await channels.promote(1, "stable", who=ANN, why=why)
    assert await metas(bucket) == before
    assert len((await channels.promote(1, "stable", who="x" * 1000)).who) == 256


@pytest.mark.fault("K7")
async def test_a_record_of_another_folder_is_not_promoted(bucket: MemoryBucket, channels: Channels) -> None:
    """A copy of record 1 is put under generation 8, and under 9 one that names another folder.

    Neither can be promoted or signed: both end with ObjectCorrupt.
    """
    record = await read_record(bucket, 1)
    assert record is not None
    for name, data in (
        (generation_name(8), record.data),
        (generation_name(9), record.data.replace(b'"app"', b'"api"').replace(b'"number":1', b'"number":9')),
    ):
        await bucket.put_many([SmallPut(ObjectMeta(name), data, None, None)])
        with pytest.raises(ObjectCorrupt, match="holds the record of generation"):
            await channels.promote(int(name[-1]), "stable", who=ANN)
        with pytest.raises(ObjectCorrupt, match="holds the record of generation"):
            await sign_generation(bucket, int(name[-1]), Signer(generate()[0]))


# -- two operators ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("R9")
async def test_of_two_operators_the_second_is_told_who_was_first(
    bucket: MemoryBucket, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator promotes a channel; between his reading and his write another one moves it to generation 3.

    He gets WriteConflict, which says who moved it, where to, when and why; the other's move stays.
    """
    await channels.promote(1, "stable", who=ANN)

    async def other() -> None:
        await channels.promote(3, "stable", who=BOB, why="urgent\x1b[2J")

    meanwhile(monkeypatch, other)
    with pytest.raises(WriteConflict) as told:
        await channels.promote(2, "stable", who=ANN)
    assert told.value.message == (f"{BOB} moved channel 'stable' to generation 3 meanwhile, at {AT} (urgent\\x1b[2J)")
    assert "syncd channels app" in told.value.hint
    move = await move_of(bucket, "stable")
    assert (move.number, move.who, move.count) == (3, BOB, 2)


@pytest.mark.fault("R9")
async def test_operators_at_once_have_one_winner(bucket: MemoryBucket, channels: Channels) -> None:
    """Three operators promote one channel at the same moment: first while it is new, then once it exists.

    Each time two get WriteConflict, and one move is counted.
    """
    for before in (0, 1):
        results = await asyncio.gather(
            *(Channels(bucket, lambda: NOW).promote(number, "stable", who=ANN) for number in (1, 2, 3)),
            return_exceptions=True,
        )
        assert sum(isinstance(result, WriteConflict) for result in results) == 2
        assert (await move_of(bucket, "stable")).count == before + 1


@pytest.mark.fault("R9")
async def test_a_channel_removed_under_an_operator_is_told(
    bucket: MemoryBucket, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between an operator's reading and his write the channel is removed; then its bare link is moved elsewhere.

    Both promotions end with WriteConflict, which says what happened meanwhile.
    """
    await channels.promote(1, "stable", who=ANN)
    meanwhile(monkeypatch, lambda: channels.remove("stable"))
    with pytest.raises(WriteConflict, match="somebody else removed channel 'stable' meanwhile"):
        await channels.promote(2, "stable", who=ANN)
    await channels.promote(1, "stable", who=ANN)
    meanwhile(monkeypatch, lambda: bucket.put_link(CHANNELS + "stable", Link("app", generation_name(3))))
    with pytest.raises(WriteConflict, match="somebody else moved channel 'stable' to generation 3 meanwhile"):
        await channels.promote(2, "stable", who=ANN)


@pytest.mark.fault("R9")
async def test_a_commit_wins_over_a_rollback_of_the_head(
    bucket: MemoryBucket, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation 4 is committed between an operator's look at the head and his rollback of it.

    The rollback ends with WriteConflict, and the head stays at generation 4.
    """
    meanwhile(monkeypatch, lambda: commit(bucket, 4, {"good": b"x"}))
    with pytest.raises(WriteConflict, match="generation 4 meanwhile"):
        await channels.rollback(HEAD, who=ANN)
    assert (await link_of(bucket, HEAD)).link == Link("app", generation_name(4))


# -- collected blobs --------------------------------------------------------------------------------------------------


class Layered(Builder):
    """Large contents get a recipe of recipes."""

    def _content(self, data: bytes, *, lie: bytes | None) -> Location:
        location = super()._content(data, lie=lie)
        if location.where is not Where.RECIPE:
            return location
        return Location(Where.RECIPE, self._blob(encode_recipe(Recipe(1, (Piece(location.blob, len(data)),)))))


def blobs_of(spec: Spec) -> dict[str, bytes]:
    builder = Layered()
    builder.tree(spec)
    return builder.blobs


async def layered(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> MemoryBucket:
    monkeypatch.setattr("tests.support.specs.Builder", Layered)
    await store.create_bucket("app", BucketSpec(layout="generations"))
    bucket = store.bucket("app")
    await commit(bucket, 1, TREE)
    await commit(bucket, 2, {"small": b"s"})
    return bucket


@pytest.mark.fault("R7")
@pytest.mark.parametrize("place", range(len(blobs_of(TREE))))
async def test_a_generation_without_one_of_its_blobs_is_refused(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """One blob of generation 1 is removed in each case: content, chunk, recipe, recipe of recipes or node.

    Promoting and rolling back to it end with ObjectGone, and no channel moves.
    """
    bucket = await layered(store, monkeypatch)
    channels = Channels(bucket, lambda: NOW)
    await channels.promote(2, "stable", who=ANN)
    before = await metas(bucket)
    blob = sorted(blobs_of(TREE))[place]
    await bucket.remove_blobs([blob])
    store.set_blob_payload("app", blob, None)
    with pytest.raises(
        ObjectGone, match=r"blobs of generation 1 were collected: blob \w+ (is gone|was removed)"
    ) as told:
        await channels.promote(1, "stable", who=ANN)
    assert "keep_generations" in told.value.hint
    with pytest.raises(ObjectGone):
        await channels.rollback(HEAD, who=ANN)
    assert await metas(bucket) == before


@pytest.mark.fault("R7")
async def test_a_damaged_node_is_refused(store: MemoryStore, bucket: MemoryBucket, channels: Channels) -> None:
    """The root node of generation 1 is overwritten with garbage in the bucket.

    Promoting a new channel or one that exists to it ends with ObjectCorrupt, and no channel is made or moved.
    """
    record = await read_record(bucket, 1)
    assert record is not None
    await channels.promote(2, "stable", who=ANN)
    store.set_blob_payload("app", record.generation.root.location.blob, b"\0garbage")
    before = await metas(bucket)
    for name in ("stable", "canary"):
        with pytest.raises(ObjectCorrupt, match="generation 1 cannot be read"):
            await channels.promote(1, name, who=ANN)
    assert await metas(bucket) == before


async def test_contents_are_looked_for_and_not_fetched(
    store: MemoryStore, bucket: MemoryBucket, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched are nodes and recipes, each once, however many files share them."""
    spec: Spec = {"a": TREE, "b": TREE, **{f"copy{number}": TREE["large"] for number in range(20)}}
    await commit(bucket, 4, spec)
    builder = Builder()
    builder.tree(spec)
    contents = {digest_of(b"1"), digest_of(b"22")}
    chunks = {digest_of(TREE["large"][at : at + CHUNK]) for at in range(0, len(TREE["large"]), CHUNK)}
    asked: list[str] = []
    real = MemoryBucket.get_blobs

    def get_blobs(self: MemoryBucket, digests: Any) -> Any:
        asked.extend(digests)
        return real(self, digests)

    monkeypatch.setattr(MemoryBucket, "get_blobs", get_blobs)
    looked: list[str] = []
    nodes = TreeReader.nodes

    async def look(self: TreeReader, refs: Any) -> Any:
        looked.extend(ref.tree for ref in refs)
        return await nodes(self, refs)

    monkeypatch.setattr(TreeReader, "nodes", look)
    await channels.promote(4, "stable", who=ANN)
    assert len(looked) == len(set(looked)) == 4
    assert not contents.intersection(asked)
    assert not chunks.intersection(asked)
    assert sorted(asked) == sorted(set(builder.blobs) - contents - chunks)


async def test_a_blob_that_the_listing_missed_is_asked_for(
    bucket: MemoryBucket, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing is no moment in time: what was sent meanwhile is no reason to refuse."""

    async def nothing(_: MemoryBucket) -> AsyncIterator[dict[str, int]]:
        yield {}

    monkeypatch.setattr(MemoryBucket, "list_chunks", nothing)
    assert (await channels.promote(1, "stable", who=ANN)).number == 1


async def test_the_walk_leaves_no_thread_and_no_database(bucket: MemoryBucket) -> None:
    """Also when it is cancelled or fails."""
    record = await read_record(bucket, 1)
    assert record is not None
    await require_whole(bucket, record.generation)
    task = asyncio.create_task(require_whole(bucket, record.generation))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("whole-")]


@pytest.mark.fault("R7")
async def test_a_generation_collected_during_the_move_is_told(
    bucket: MemoryBucket, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation 1 is deleted right before the channel's link to it is written.

    The promotion ends with ObjectGone: the channel may point at nothing, and whoever moved it has to know.
    """
    real = MemoryBucket.put_link

    async def collected(self: MemoryBucket, *arguments: Any, **options: Any) -> int:
        await self.delete(generation_name(1), expected_seq=None, metadata={})
        return await real(self, *arguments, **options)

    monkeypatch.setattr(MemoryBucket, "put_link", collected)
    with pytest.raises(ObjectGone, match="generation 1 was collected while channel 'stable' was moved to it"):
        await channels.promote(1, "stable", who=ANN)


@pytest.mark.fault("R7 X4")
async def test_a_channel_holds_its_generation_against_collection(tmp_path: Path) -> None:
    """Three generations are pushed with keep_generations=1, `stable` is put on the first, and ten days later gc runs.

    Generation 2 is collected and can be promoted no more; 1 is whole and can be promoted and gone back to.
    """
    store = MemoryStore()
    source = tmp_path / "source"
    source.mkdir()
    now = [NOW]
    options = PublishOptions(
        "app", source, Rules(), "here:/source", layout="generations", keep_generations=1, grace_seconds=0
    )
    status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=lambda: now[0], report=lambda _: None)

    def publisher() -> Publisher:
        return Publisher(options, store, tmp_path / "publish.db", status=status, clock=lambda: now[0])

    channels = Channels(store.bucket("app"), lambda: NOW)
    for number in (1, 2, 3):
        (source / "file").write_bytes(b"%d" % number * 5000)
        assert (await publisher().push()).generation == number
        if number == 1:
            await channels.promote(1, "stable", who=ANN)
    now[0] += 10 * 86400
    assert (await publisher().collect(dry_run=False)).generations_removed == 1
    with pytest.raises(UsageError, match="no generation 2"):
        await channels.promote(2, "stable", who=ANN)
    assert (await channels.promote(1, "canary", who=ANN)).number == 1
    assert (await channels.rollback(HEAD, who=ANN)).number == 1


# -- rollback ---------------------------------------------------------------------------------------------------------


async def test_rollback_goes_to_the_newest_that_is_older(bucket: MemoryBucket, channels: Channels) -> None:
    """Of those that there still are; then there is none."""
    await commit(bucket, 4, {"x": b"4"})
    await channels.promote(4, "stable", who=ANN)
    await bucket.delete(generation_name(3), expected_seq=None, metadata={})
    moved = [await channels.rollback("stable", who=BOB, why="broken") for _ in range(2)]
    assert [(one.before, one.number, one.count) for one in moved] == [(4, 2, 2), (2, 1, 3)]
    assert (await move_of(bucket, "stable")).why == "broken"
    with pytest.raises(UsageError, match="points at generation 1, and there is none older"):
        await channels.rollback("stable", who=BOB)


async def test_rollback_to_a_number_goes_back_only(bucket: MemoryBucket, channels: Channels) -> None:
    """Forward is promotion, and there is nothing to do for where it is."""
    await channels.promote(2, "stable", who=ANN)
    with pytest.raises(UsageError, match="3 is newer") as told:
        await channels.rollback("stable", to=3, who=ANN)
    assert "syncd promote app 3 --channel stable" in told.value.hint
    with pytest.raises(UsageError, match="points at generation 2 already"):
        await channels.rollback("stable", to=2, who=ANN)
    assert (await channels.rollback("stable", to=1, who=ANN)).count == 2


async def test_the_head_goes_back_and_forward_again(bucket: MemoryBucket, channels: Channels) -> None:
    """By moves that are counted like any others; numbers of commits stay what they are."""
    assert (await channels.rollback(HEAD, who=ANN)).number == 2
    assert (await channels.rollback(HEAD, to=1, who=ANN)).count == 2
    assert (await channels.rollback(HEAD, to=3, who=ANN)).count == 3
    with pytest.raises(UsageError, match="no generation 4"):
        await channels.rollback(HEAD, to=4, who=ANN)
    head = await TreeReader(bucket).channel(HEAD)
    assert head is not None
    assert head.generation.number == 3


async def test_a_channel_that_is_not_there_is_named_with_those_that_are(channels: Channels) -> None:
    """Before anything else."""
    await channels.promote(1, "stable", who=ANN)
    for name in ("", "canary", "a b"):
        with pytest.raises(UsageError, match="has no channel") as told:
            await channels.rollback(name, who=ANN)
        assert told.value.hint == "channels: head, stable"


async def test_a_channel_that_points_nowhere_is_put_right_by_a_number(bucket: MemoryBucket, channels: Channels) -> None:
    """At a generation that is gone, at another folder, at no generation: the default knows no "before"."""
    for number, target in enumerate((Link("other", generation_name(1)), Link("app", "readme"), Link("app", None)), 1):
        await bucket.put_link(CHANNELS + "stable", target)
        with pytest.raises(UsageError, match="points at no generation of this folder"):
            await channels.rollback("stable", who=ANN)
        assert (await channels.promote(number, "stable", who=ANN)).before == 0
    await bucket.put_link(CHANNELS + "stable", Link("app", generation_name(7)))
    assert (await channels.rollback("stable", who=ANN)).number == 3


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("K3 K10")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not readable"),
        (move_text() + " ", "is not readable"),
        (move_text(channel="canary"), "is that of channel 'canary'"),
        (move_text(folder="api"), "of 'api'"),
        (move_text(count=MAX_COUNT), "nobody honest counted up to"),
        (move_text(count=MAX_NEXT_COUNT), "nobody honest counted up to"),
    ],
)
async def test_a_count_that_cannot_be_believed_is_asked_for(
    bucket: MemoryBucket, channels: Channels, text: str, said: str
) -> None:
    """The channel's link is written with a move that is not readable, is another's, or has the highest counts.

    A promotion is refused and changes nothing until a person names a count; moves are counted on from there.
    """
    await bucket.put_link(CHANNELS + "stable", Link("app", generation_name(1)), metadata={MOVE: text})
    before = await link_of(bucket, "stable")
    with pytest.raises(ObjectCorrupt, match=said) as told:
        await channels.promote(2, "stable", who=ANN)
    assert "--count N" in told.value.hint
    assert await link_of(bucket, "stable") == before
    assert (await channels.promote(2, "stable", who=ANN, count=8)).count == 8
    assert (await channels.rollback("stable", who=ANN)).count == 9


async def test_a_count_goes_on_from_whatever_is_plausible(bucket: MemoryBucket) -> None:
    """No record is no move; the last plausible count has a next one, which readers take."""
    assert next_count(None, folder="app", channel="stable") == 1
    assert next_count(await link_of(bucket, HEAD), folder="app", channel=HEAD) == 1
    await bucket.put_link("l", Link("app", "x"), metadata={MOVE: move_text(count=MAX_NEXT_COUNT - 1)})
    info = await bucket.get_info("l")
    count = next_count(info, folder="app", channel="stable")
    assert decode_move(move_text(count=count).encode()).count == MAX_NEXT_COUNT


@pytest.mark.fault("U3")
async def test_a_move_of_a_newer_version_is_not_written_over(bucket: MemoryBucket, channels: Channels) -> None:
    """The channel's link is written with a move of format 2, and the channel is promoted.

    The promotion ends with FormatTooNew, as it means what this version does not know, and the link stays as it is.
    """
    text = move_text().replace('"format":1', '"format":2')
    await bucket.put_link(CHANNELS + "stable", Link("app", generation_name(1)), metadata={MOVE: text})
    before = await metas(bucket)
    with pytest.raises(FormatTooNew):
        await channels.promote(2, "stable", who=ANN)
    assert await metas(bucket) == before


async def test_a_channel_that_is_not_readable_is_written_over_on_a_persons_word(
    store: MemoryStore, bucket: MemoryBucket, channels: Channels
) -> None:
    """With a count of one's own; it is shown meanwhile."""
    await channels.promote(1, "stable", who=ANN)
    token = "Y2hhbm5lbHMvc3RhYmxl"
    store.write_raw_meta("app", token, b"{")
    with pytest.raises(ObjectCorrupt):
        await channels.promote(2, "stable", who=ANN)
    (shown,) = [one for one in await channels.show() if one.name == "stable"]
    assert (shown.number, shown.problem) == (0, "metadata is not JSON")
    assert (await channels.promote(2, "stable", who=ANN, count=2)).count == 2
    assert [one.problem for one in await channels.show()] == ["", ""]


# -- removing and showing ---------------------------------------------------------------------------------------------


@pytest.mark.fault("K2")
async def test_a_channel_that_was_removed_goes_on_counting(
    bucket: MemoryBucket, channels: Channels, signers: list[Signer]
) -> None:
    """A signed channel is promoted, followed, removed and promoted anew; then its first move is offered again.

    The new move is counted 2 and followed, the old one is refused as replay.
    """
    trust = trust_of(signers[0])
    for number in (1, 2):
        await sign_generation(bucket, number, signers[0])
    await channels.promote(1, "stable", who=ANN, signer=signers[0])
    old = await offer_of(bucket, "stable")
    seen = judge_offer(trust, Seen(), old).seen
    await channels.remove("stable")
    with pytest.raises(UsageError, match="no channel 'stable'"):
        await channels.remove("stable")
    assert [one.name for one in await channels.show()] == [HEAD]
    assert (await channels.promote(2, "stable", who=ANN, signer=signers[0])).count == 2
    seen = judge_offer(trust, seen, await offer_of(bucket, "stable")).seen
    with pytest.raises(Untrusted, match="rollback or replay"):
        judge_offer(trust, seen, old)


async def test_the_head_is_not_removed(channels: Channels) -> None:
    with pytest.raises(UsageError, match="cannot be removed"):
        await channels.remove(HEAD)


@pytest.mark.fault("R9")
async def test_a_removal_is_fenced(bucket: MemoryBucket, channels: Channels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another operator promotes the channel right before the delete of its removal reaches the bucket.

    The removal ends with WriteConflict, which names the other one, and the channel is where that one moved it.
    """
    await channels.promote(1, "stable", who=ANN)
    real = MemoryBucket.delete

    async def late(self: MemoryBucket, *arguments: Any, **options: Any) -> int:
        await channels.promote(2, "stable", who=BOB)
        return await real(self, *arguments, **options)

    monkeypatch.setattr(MemoryBucket, "delete", late)
    with pytest.raises(WriteConflict, match=f"{BOB} moved channel 'stable' to generation 2"):
        await channels.remove("stable")
    info, move = await link_of(bucket, "stable"), await move_of(bucket, "stable")
    assert (info.deleted, info.link) == (False, Link("app", generation_name(2)))
    assert (move.number, move.who, move.count) == (2, BOB, 2)


async def test_channels_are_shown_as_they_are(bucket: MemoryBucket, channels: Channels, signers: list[Signer]) -> None:
    """The head first; what is wrong with one is said, and others are none the worse."""
    await channels.promote(1, "stable", who=ANN, why="good", signer=signers[0], valid_seconds=60)
    await bucket.put_link(CHANNELS + "plain", Link("app", generation_name(2)))
    await bucket.put_link(CHANNELS + "gone", Link("app", generation_name(7)), metadata={MOVE: "{"})
    await bucket.put_link(CHANNELS + "else", Link("other", generation_name(1)))
    await bucket.put_link(CHANNELS + "forged", Link("app", generation_name(2)), metadata={MOVE: move_text()})
    await bucket.put_link(CHANNELS + "torn", Link("app", generation_name(2)), metadata={MOVE: "{"})
    await bucket.put_meta(ObjectMeta(CHANNELS + "object"), EMPTY, expected_seq=None)
    found = {one.name: one for one in await channels.show()}
    assert list(found) == [HEAD, "else", "forged", "gone", "object", "plain", "stable", "torn"]
    stable = found["stable"]
    assert (stable.number, stable.behind, stable.count, stable.who, stable.why) == (1, 2, 1, ANN, "good")
    assert (stable.at, seconds_of(stable.expires), stable.signers) == (AT, NOW + 60, (signers[0].public,))
    assert (found[HEAD].number, found[HEAD].behind, found[HEAD].count, found[HEAD].problem) == (3, 0, 0, "")
    assert {name: one.problem for name, one in found.items() if one.problem} == {
        "else": "it is no link to a generation of this folder",
        "forged": "its move is that of channel 'stable' to generation 1",
        "gone": "it points at generation 7, which is gone",
        "object": "it is no link to a generation of this folder",
        "torn": "its move is not readable: a channel's move is not JSON",
    }


# -- signatures -------------------------------------------------------------------------------------------------------


async def test_a_signed_move_to_a_signed_generation_is_followed(
    bucket: MemoryBucket, channels: Channels, signers: list[Signer]
) -> None:
    """Two of three keys, each added by its holder; a co-signature is no new move."""
    trust = trust_of(*signers[:3], threshold=2)
    moved = await channels.promote(1, "stable", who=ANN, signer=signers[0])
    assert (moved.signed_by, moved.signatures) == (signers[0].public, 0)
    assert await sign_generation(bucket, 1, signers[0])
    with pytest.raises(Untrusted, match="1 good signatures by trusted keys where 2 are needed"):
        judge_offer(trust, Seen(), await offer_of(bucket, "stable"))
    assert await sign_move(channels, "stable", signers[1])
    assert await sign_generation(bucket, 1, signers[2])
    accepted = judge_offer(trust, Seen(), await offer_of(bucket, "stable"))
    assert (accepted.move.number, accepted.seen.count) == (1, 1)
    assert await sign_move(channels, "stable", signers[2])
    again = judge_offer(trust, accepted.seen, await offer_of(bucket, "stable"))
    assert (again.seen.move, again.seen.count) == (accepted.seen.move, 1)
    assert (await channels.promote(1, "stable", who=ANN, signer=signers[0])).signatures == 2


async def test_a_signature_changes_nothing_else(
    bucket: MemoryBucket, channels: Channels, signers: list[Signer]
) -> None:
    """The record, its metadata, the link and its move are what they were; a second time is nothing at all."""
    await channels.promote(1, "stable", who=ANN)
    content = await get(bucket, generation_name(1))
    ways: list[tuple[str, Callable[[], Awaitable[bool]]]] = [
        (generation_name(1), lambda: sign_generation(bucket, 1, signers[0])),
        (CHANNELS + "stable", lambda: sign_move(channels, "stable", signers[0])),
    ]
    for name, sign in ways:
        before = await bucket.get_info(name)
        assert before is not None
        assert await sign()
        after = await bucket.get_info(name)
        assert after is not None
        assert {**after.metadata, SIGNATURES: ""} == {**before.metadata, SIGNATURES: ""}
        fields = ("link", "nuid", "size", "chunks", "digest", "headers", "chunk_size")
        kept = fields if before.link is None else ("link", "size")
        assert [getattr(after, field) for field in kept] == [getattr(before, field) for field in kept]
        assert not await sign()
        assert await bucket.get_info(name) == after
    assert await get(bucket, generation_name(1)) == content
    assert await TreeReader(bucket).channel("stable") is not None


@pytest.mark.fault("K8")
def test_only_good_signatures_are_kept_beside_a_new_one(signers: list[Signer]) -> None:
    """A signature is added to a list that holds a good one, one over something else, or to text that is no list.

    Only the good one stays beside the new one.
    """
    data = b"record"
    good = signature_text(Statement.MOVE, data, signers[0])
    both = signature_text(Statement.MOVE, data, signers[1], before=good)
    assert {one.key for one in decode_signatures(both)} == {signers[0].public, signers[1].public}
    assert signature_text(Statement.MOVE, data, signers[1], before=both) == both
    other = signature_text(Statement.GENERATION, data, signers[2])
    for junk in (other, "[", "[]", good + " ", signature_text(Statement.MOVE, b"other", signers[2])):
        alone = signature_text(Statement.MOVE, data, signers[1], before=junk)
        assert [one.key for one in decode_signatures(alone)] == [signers[1].public]
    assert signature_text(Statement.MOVE, data) == ""


@pytest.mark.fault("K8")
def test_there_are_so_many_signatures_and_no_more(signers: list[Signer]) -> None:
    """A signature is added to a list of as many as there may be, then to one of as many zeroed ones.

    The first is refused with UsageError; in the second the new one takes the place of all the junk.
    """
    data = b"record"
    full = signature_text(Statement.MOVE, data, *signers[:MAX_SIGNATURES])
    with pytest.raises(UsageError, match="which is the most"):
        signature_text(Statement.MOVE, data, signers[-1], before=full)
    assert signature_text(Statement.MOVE, data, signers[0], before=full) == full
    junk = encode_signatures([one._replace(sig=bytes(64)) for one in decode_signatures(full)])
    assert len(decode_signatures(signature_text(Statement.MOVE, data, signers[-1], before=junk))) == 1


@pytest.mark.fault("K5 K7")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channel": "canary"}, "the move is that of channel 'canary'"),
        ({"folder": "api"}, "of folder 'api'"),
        ({"number": 2}, "the move leads to generation 2"),
        ({"record": "1" * 64}, "the move leads to another generation 1"),
    ],
)
async def test_a_move_that_is_not_what_the_channel_does_is_not_signed(
    bucket: MemoryBucket, channels: Channels, signers: list[Signer], changes: dict[str, Any], said: str
) -> None:
    """The channel's link bears the move of another channel, folder, generation or record, one in each case.

    Signing it is refused, and the link stays as it was.
    """
    record = await read_record(bucket, 1)
    assert record is not None
    text = move_text(**({"record": digest_of(record.data)} | changes))
    await bucket.put_link(CHANNELS + "stable", Link("app", generation_name(1)), metadata={MOVE: text})
    before = await link_of(bucket, "stable")
    with pytest.raises(Untrusted, match=said):
        await sign_move(channels, "stable", signers[0])
    assert await link_of(bucket, "stable") == before


@pytest.mark.fault("K1")
async def test_a_record_is_judged_before_it_is_signed(bucket: MemoryBucket, signers: list[Signer]) -> None:
    """A record is to be signed under wrong or short digests, unsigned, with signers nobody trusts, and after a change.

    Each is refused; half of its digest is enough to name it.
    """
    one, two = signers[:2]
    record = await generation_to_sign(bucket, 1)
    for expected in (record.digest, record.digest[:EXPECT_DIGITS]):
        check_expected(record, expected)
    for expected in ("", record.digest[: EXPECT_DIGITS - 1], record.digest[1:], record.digest + "0"):
        with pytest.raises(Untrusted, match="not what --expect names"):
            check_expected(record, expected)
    await sign_generation(bucket, 1, one)
    with pytest.raises(Untrusted, match="no good signature"):
        check_vouched(record, {one.public})  # as it was read
    signed = await generation_to_sign(bucket, 1)
    check_vouched(signed, {one.public, two.public})
    for keys in ({two.public}, set()):
        with pytest.raises(Untrusted, match="no good signature"):
            check_vouched(signed, keys)
    with pytest.raises(Untrusted, match="not known which keys are trusted"):
        check_vouched(signed, None)
    with pytest.raises(WriteConflict):
        await sign_record(bucket, record, two)  # it is not as it was read any more


async def test_what_has_no_move_cannot_be_signed(
    bucket: MemoryBucket, channels: Channels, signers: list[Signer]
) -> None:
    """Nor what is not there."""
    with pytest.raises(UsageError, match="no recorded move"):
        await sign_move(channels, HEAD, signers[0])
    with pytest.raises(UsageError, match="no channel"):
        await sign_move(channels, "stable", signers[0])
    with pytest.raises(UsageError, match="no generation 9"):
        await sign_generation(bucket, 9, signers[0])
    await channels.promote(1, "stable", who=ANN)
    await bucket.delete(generation_name(1), expected_seq=None, metadata={})
    with pytest.raises(ObjectGone, match="generation 1, which is gone"):
        await sign_move(channels, "stable", signers[0])


@pytest.mark.fault("R9")
async def test_signatures_added_at_once_are_not_lost(
    bucket: MemoryBucket, channels: Channels, signers: list[Signer]
) -> None:
    """Two holders sign one generation, then one move, at the same moment.

    The second gets WriteConflict and signs again; both signatures are there and count.
    """
    await channels.promote(1, "stable", who=ANN)
    ways: list[Callable[[Signer], Awaitable[bool]]] = [
        lambda one: sign_generation(bucket, 1, one),
        lambda one: sign_move(channels, "stable", one),
    ]
    for sign in ways:
        results = await asyncio.gather(sign(signers[0]), sign(signers[1]), return_exceptions=True)
        assert [type(result) for result in results] == [bool, WriteConflict]
        assert await sign(signers[1])
    offer = await offer_of(bucket, "stable")
    trust = trust_of(signers[0], signers[1], threshold=2)
    assert judge_offer(trust, Seen(), offer).move.number == 1


async def test_the_publisher_records_moves_in_the_same_way(bucket: MemoryBucket, signers: list[Signer]) -> None:
    """Of the head, with the commit: what it says is what readers check."""
    record = await read_record(bucket, 3)
    assert record is not None
    head = await link_of(bucket, HEAD)
    count = next_count(head, folder="app", channel=HEAD)
    data = encode_record(record.generation)
    move = Move("app", HEAD, count, 3, digest_of(data), AT, ANN)
    await bucket.put_link(head.name, head.link or Link("", None), metadata=move_metadata(move, signers[0]))
    await sign_generation(bucket, 3, signers[0])
    assert judge_offer(trust_of(signers[0]), Seen(), await offer_of(bucket, HEAD)).move == move
    assert SIGNATURES not in move_metadata(move, None)
