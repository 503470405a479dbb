"""What a publisher signs, when somebody without a key may write whatever he likes to its bucket."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from syncd.channels import Channels
from syncd.errors import SafetyHalt, Untrusted
from syncd.moves import MAX_JUMP, MAX_NEXT_COUNT, read_move
from syncd.nodes import Generation, encode_record
from syncd.outlet import PublishOptions, PushResult, Wish
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.signatures import Signer, generate
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import CHANNELS, HEAD
from syncd.store.codec import Codec
from syncd.trees import TreeReader, generation_name
from syncd.trust import MOVE, Trust, decode_move, encode_move
from tests.support.generations import Builder, Forge, Tree, file, folder
from tests.unit.test_guard import HOUR, Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture
def unprivileged() -> Iterator[Fleet]:
    """A fleet whose publisher is not root, who reads everything."""
    directory = Path(tempfile.mkdtemp(prefix="syncd-test-"))
    root = os.geteuid() == 0
    if root:
        os.chown(directory, 65534, 65534)
        os.seteuid(65534)
    try:
        yield Fleet(directory)
    finally:
        if root:
            os.seteuid(0)
        else:
            for path in directory.rglob("*"):
                path.chmod(0o700)
        shutil.rmtree(directory)


async def forge(fleet: Fleet, number: int, tree: Tree) -> None:
    """Commit an unsigned generation, in the publisher's name."""
    builder = Builder(Forge())
    root = builder.directory("", tree)
    async with fleet.bucket.blob_sink() as sink:
        for digest, data in builder.blobs.items():
            await sink.put(digest, Codec().encode(data))
        await sink.flush()
    record = encode_record(
        Generation("app", number, root, "2026-01-01T00:00:00Z", "here:/source", files=builder.files, size=builder.size)
    )
    info = await fleet.bucket.get_info(CHANNELS + HEAD)
    assert info is not None
    await fleet.bucket.commit_generation(number, record, {}, channel=HEAD, expected_seq=info.seq)


def publisher(fleet: Fleet) -> Publisher:
    options = PublishOptions("app", fleet.source, Rules(), "here:/source", **fleet.publish)
    status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
    return Publisher(options, fleet.store, fleet.tmp / "publish-app.db", status=status, clock=lambda: fleet.now)


async def points_at(fleet: Fleet) -> int:
    head = await TreeReader(fleet.bucket).channel(HEAD)
    assert head is not None
    return head.generation.number


# -- the head ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("K2 K4")
@pytest.mark.parametrize("expire", [0.0, 24 * HOUR])
@pytest.mark.parametrize("beside", ["its own move", "the present move"])
async def test_k2_a_head_that_was_put_back_is_not_renewed(fleet: Fleet, expire: float, beside: str) -> None:
    """Without a key the head's link is put back to generation 1, with its old move or the newest one beside it.

    Hosts refuse it, and the publisher does not renew but restores the head.
    """
    fleet.publish["expire_seconds"] = expire
    await fleet.push("vulnerable")
    old = await fleet.head()
    await fleet.pull()
    fleet.now += 20 * HOUR
    await fleet.push("mended")
    await fleet.pull()
    await fleet.point(1, old if beside == "its own move" else await fleet.head())
    with pytest.raises(Untrusted):
        await fleet.pull()
    fleet.now += 13 * HOUR
    with capture_logs() as logs:
        await fleet.push("mended")
    assert [entry["event"] for entry in logs if entry["event"].startswith("head_")] == ["head_restored"]
    assert (await points_at(fleet), (await fleet.pull()).generation, fleet.has()) == (2, 2, "mended")
    assert decode_move((await fleet.head())[MOVE].encode()).why == "restored"


@pytest.mark.fault("K2")
async def test_k2_a_running_publisher_restores_the_head(fleet: Fleet) -> None:
    """Without a key the head's link is put back to generation 1 twice, under a running publisher.

    It restores the head in its next round, once for each forgery.
    """
    fleet.publish["expire_seconds"] = 24 * HOUR
    await fleet.push("vulnerable")
    old = await fleet.head()
    await fleet.push("mended")
    service = publisher(fleet)
    await service._open()
    try:
        with capture_logs() as logs:
            for put_back in (False, True, False, True, False):
                if put_back:
                    await fleet.point(1, old)
                fleet.now += HOUR
                await service._round(None, PushResult(), Wish())
                assert await points_at(fleet) == 2
    finally:
        await service._close()
    assert [entry["event"] for entry in logs].count("head_restored") == 2


@pytest.mark.fault("K2 K4")
async def test_k2_a_publisher_without_memory_renews_only_what_its_source_is(fleet: Fleet) -> None:
    """The publisher's index is deleted and an old head put back, while the source is what was committed last.

    It never renews that head, and hosts follow what it commits.
    """
    fleet.publish["expire_seconds"] = 24 * HOUR
    await fleet.push("vulnerable")
    old = await fleet.head()
    await fleet.push("mended")
    await fleet.pull()
    await fleet.point(1, old)
    (fleet.tmp / "publish-app.db").unlink()
    fleet.now += 20 * HOUR
    with capture_logs() as logs:
        for _ in range(2):
            await fleet.push("mended")
    assert "head_renewed" not in [entry["event"] for entry in logs]
    (fleet.source / "g").touch()
    await fleet.push("mended")
    assert ((await fleet.pull()).generation, fleet.has()) == (3, "mended")


@pytest.mark.fault("K2")
@pytest.mark.parametrize("left", ["an old move", "no move", "no head"])
async def test_k2_a_publisher_without_memory_counts_beyond_what_hosts_saw(fleet: Fleet, left: str) -> None:
    """The publisher's index is deleted, and the head is left with an old move, with none, or removed.

    The next commit is counted beyond what hosts have seen, so that they follow it.
    """
    await fleet.push("one")
    old = await fleet.head()
    for text in ("two", "three"):
        await fleet.push(text)
    await fleet.pull()
    if left == "no head":
        await fleet.bucket.delete(CHANNELS + HEAD, expected_seq=None, metadata={})
    else:
        await fleet.point(1, old if left == "an old move" else {})
    (fleet.tmp / "publish-app.db").unlink()
    await fleet.push("four")
    await fleet.pull()
    assert fleet.has() == "four"


@pytest.mark.fault("K4")
async def test_k4_a_publisher_without_memory_goes_on_renewing(fleet: Fleet) -> None:
    """The publisher's index is deleted, and 13 of the 24 hours of the head's move pass with the source unchanged.

    Its next rounds renew the head, with the next count.
    """
    fleet.publish["expire_seconds"] = 24 * HOUR
    for text in ("one", "two"):
        await fleet.push(text)
    (fleet.tmp / "publish-app.db").unlink()
    fleet.now += 13 * HOUR
    for _ in range(2):
        await fleet.push("two")
    move = read_move((await fleet.head())[MOVE])
    assert move is not None
    assert (move.number, move.count, move.why) == (2, 3, "renewed")


async def test_what_a_person_did_stands(fleet: Fleet) -> None:
    """A rollback by another key, by the publisher's own, or by none is not undone."""
    for text in ("one", "two"):
        await fleet.push(text)
    channels = Channels(fleet.bucket, lambda: fleet.now)
    for signer in (fleet.other, fleet.signer, None):
        await channels.rollback(HEAD, to=1, who="somebody", signer=signer)
        await fleet.push("two")
        assert await points_at(fleet) == 1
        await fleet.push("two, again" if signer is None else f"two for {signer.public}")
        await fleet.push("two")


@pytest.mark.fault("K3")
@pytest.mark.parametrize("lead", [MAX_JUMP + 2, MAX_NEXT_COUNT - 1, MAX_NEXT_COUNT])
async def test_k3_a_count_that_somebody_made_up_is_not_signed(fleet: Fleet, lead: int) -> None:
    """Without a key the head's move is overwritten by one with a count just too far ahead, or one of the highest.

    The next commit is counted on from the honest one, and hosts follow it.
    """
    await fleet.push("one")
    await fleet.pull()
    head = await fleet.head()
    forged = encode_move(replace(decode_move(head[MOVE].encode()), count=lead)).decode()
    await fleet.point(1, head | {MOVE: forged})
    await fleet.push("two")
    assert decode_move((await fleet.head())[MOVE].encode()).count == 2
    await fleet.pull()
    assert fleet.has() == "two"


@pytest.mark.fault("K3")
async def test_k3_a_persons_moves_are_counted_on_from(fleet: Fleet) -> None:
    """Between two commits an operator with a trusted key of his own rolls the head back, with a count of a million.

    Such a count is the way out after a forged one. The next commit counts on from his move, and hosts follow it.
    """
    for text in ("one", "two"):
        await fleet.push(text)
    fleet.trust = Trust(frozenset({fleet.signer.public, fleet.other.public}), 1)
    channels = Channels(fleet.bucket, lambda: fleet.now)
    await channels.rollback(HEAD, to=1, who="somebody", signer=fleet.other, count=MAX_JUMP)
    await fleet.pull()
    await fleet.push("three")
    assert decode_move((await fleet.head())[MOVE].encode()).count == MAX_JUMP + 1
    await fleet.pull()
    assert fleet.has() == "three"


async def test_counts_of_its_own_are_believed_however_large(fleet: Fleet) -> None:
    """The index is lost, and the publisher's own moves were many."""
    await fleet.push("one")
    await fleet.push("two")
    many = MAX_JUMP * 3
    await Channels(fleet.bucket, lambda: fleet.now).rollback(HEAD, to=1, who="x", signer=fleet.signer, count=many)
    (fleet.tmp / "publish-app.db").unlink()
    await fleet.push("three")
    assert decode_move((await fleet.head())[MOVE].encode()).count > many


# -- what the next generation follows ----------------------------------------------------------------------------------


@pytest.mark.fault("K1")
@pytest.mark.parametrize("closed", ["a file", "a directory", "a file below"])
@pytest.mark.parametrize("lost", [False, True])
async def test_k1_nothing_of_a_forged_generation_is_signed(unprivileged: Fleet, closed: str, lost: bool) -> None:
    """While a file or its directory cannot be read, an unsigned generation that changes the file is put there.

    The publisher, with its index or without, signs nothing; mirrors keep the old content until it can be read.
    """
    fleet = unprivileged
    directory = fleet.source / "etc"
    directory.mkdir()
    (directory / "other").write_text("other")
    secret = directory / "sshd_config"
    secret.write_text("PermitRootLogin no")
    await fleet.push("one")
    await fleet.pull()
    (directory if closed == "a directory" else secret).chmod(0)
    await fleet.push("two")
    await fleet.pull()
    assert (fleet.mirror / "etc/sshd_config").read_text() == "PermitRootLogin no"
    stat = (fleet.source / "etc").stat()
    other = (directory / "other").stat() if closed != "a directory" else stat
    evil: Tree = {
        "f": file("two"),
        "etc": folder(
            {
                "sshd_config": file("PermitRootLogin yes"),
                "other": file("other", mode=other.st_mode & 0o7777, mtime_ns=other.st_mtime_ns),
            },
            mode=stat.st_mode & 0o7777,
            mtime_ns=stat.st_mtime_ns,
        ),
    }
    await forge(fleet, 3, evil)
    if lost:
        (fleet.tmp / "publish-app.db").unlink()
    for text in ("two", "three", "three"):
        with pytest.raises(Untrusted, match="cannot be read now, and the newest generation"):
            await fleet.push(text)
    with pytest.raises(Untrusted):
        await fleet.pull()
    assert (fleet.mirror / "etc/sshd_config").read_text() == "PermitRootLogin no"
    directory.chmod(0o755)
    secret.chmod(0o644)
    await fleet.push("four")
    await fleet.pull()
    assert (fleet.has(), (fleet.mirror / "etc/sshd_config").read_text()) == ("four", "PermitRootLogin no")
    secret.chmod(0)
    await fleet.push("five")
    await fleet.pull()
    assert (fleet.has(), (fleet.mirror / "etc/sshd_config").read_text()) == ("five", "PermitRootLogin no")


@pytest.mark.fault("K2")
async def test_k2_an_older_generation_is_not_kept_from_either(unprivileged: Fleet) -> None:
    """The newest generation is deleted and the head put back to the signed one before, while a file cannot be read.

    The publisher commits nothing until it can be; then hosts get what the file really holds.
    """
    fleet = unprivileged
    secret = fleet.source / "secret"
    secret.write_text("vulnerable")
    await fleet.push("one")
    old = await fleet.head()
    secret.write_text("mended")
    await fleet.push("two")
    await fleet.pull()
    await fleet.bucket.delete(generation_name(2), expected_seq=None, metadata={})
    await fleet.point(1, old)
    secret.chmod(0)
    with pytest.raises(Untrusted, match="older than its last one"):
        await fleet.push("three")
    secret.chmod(0o600)
    await fleet.push("three")
    await fleet.pull()
    assert (fleet.mirror / "secret").read_text() == "mended"


@pytest.mark.fault("K1")
@pytest.mark.parametrize("copied", [False, True])
async def test_k1_a_forged_generation_that_equals_the_source_is_committed_over(fleet: Fleet, copied: bool) -> None:
    """An unsigned generation that equals the source is put there, made by a stranger or copied from a signed one.

    The publisher commits its own over it, once, and hosts follow that one.
    """
    await fleet.push("one")
    if copied:
        (fleet.source / "f").chmod(0o600)
        await fleet.push("one")  # nothing but a node, which is built the same way again
        ours = await TreeReader(fleet.bucket).channel(HEAD)
        assert ours is not None
        record = encode_record(replace(ours.generation, number=3, parent=ours.digest))
        await fleet.bucket.commit_generation(3, record, {}, channel=HEAD, expected_seq=ours.seq)
    else:
        stat = (fleet.source / "f").stat()
        await forge(fleet, 2, {"f": file("one", mode=stat.st_mode & 0o7777, mtime_ns=stat.st_mtime_ns)})
    with capture_logs() as logs:
        assert await fleet.push("one") == 3 + copied
    assert "head_not_ours" in [entry["event"] for entry in logs]
    await fleet.pull()
    assert fleet.has() == "one"
    assert await fleet.push("one") == 3 + copied


@pytest.mark.fault("D1")
@pytest.mark.parametrize("forged", [True, False])
async def test_deletes_are_held_against_a_forged_generation_too(fleet: Fleet, forged: bool) -> None:
    """The only file is deleted, with the index lost, under a generation that nobody or that another key has signed.

    The push ends with SafetyHalt, and the head stays where it is.
    """
    await fleet.push("one")
    if forged:
        stat = (fleet.source / "f").stat()
        await forge(fleet, 2, {"f": file("one", mode=stat.st_mode & 0o7777, mtime_ns=stat.st_mtime_ns)})
    else:
        fleet.publish = {"signer": Signer(generate()[0])}
    before = await fleet.bucket.get_info(CHANNELS + HEAD)
    (fleet.tmp / "publish-app.db").unlink()
    (fleet.source / "f").unlink()
    with pytest.raises(SafetyHalt):
        await publisher(fleet).push()
    assert await fleet.bucket.get_info(CHANNELS + HEAD) == before
