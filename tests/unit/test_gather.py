"""Gathering the content of a generation: what is believed of what is here, and what becomes of a half-done run."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import struct
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd import gather as gathering
from syncd import subscriber as subscribers
from syncd.checkout import Checkout
from syncd.errors import DiskProblem, ObjectCorrupt, ObjectGone
from syncd.gather import ROOM, SPARE_PARTS, Gatherer
from syncd.mirror import Mirror
from syncd.mirror.assembly import Assembly
from syncd.mirror.root import disk_problem
from syncd.nodes import digest_of
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.codec import RAW
from syncd.store.memory import MemoryBucket, MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support.generations import CHUNK, Forge, Publisher, Tree, expected, file, folder, found
from tests.support.mirror import litter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

RANDOM = random.Random(17)
MIDDLE = RANDOM.randbytes(100_000)
"""Too large for a pack: a blob of its own."""
LARGE = RANDOM.randbytes(20 * CHUNK)
OTHER = RANDOM.randbytes(20 * CHUNK)
OLD: Tree = {"a": file("hello"), "large": file(LARGE), "middle": file(MIDDLE)}


class World:
    """One bucket in memory, its publisher, one mirror; what is asked of the bucket is counted.

    :ivar lost: blobs that the store leaves out of its answers without a word.
    """

    def __init__(self, tmp: Path) -> None:
        self.store = MemoryStore()
        self.publisher = Publisher(self.store)
        self.mirror = tmp / "mirror"
        self.index = tmp / "mirror.db"
        self.stage = self.mirror / ".syncd/stage"
        self.asked: list[str] = []
        self.requests = 0
        self.lost: set[str] = set()
        self.status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)

    async def pull(self) -> Any:
        self.asked.clear()
        options = SubscribeOptions("app", self.mirror, Rules())
        return await Subscriber(options, self.store, self.index, status=self.status).pull()

    async def have(self, tree: Tree) -> None:
        """Commit a tree, and bring the mirror to it."""
        await self.publisher.commit(tree)
        await self.pull()
        assert found(self.mirror) == expected(tree)

    def codes(self) -> list[str]:
        return [problem.code for problem in self.status.now.problems]

    def parts(self) -> set[str]:
        return {path.name for path in self.stage.glob("part-*")}

    def damage(self, digest: str) -> None:
        """Store something else under a blob's digest."""
        self.store.write_raw_chunks("app", digest, [RAW + b"something else"])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    real = MemoryBucket.get_blobs

    async def get_blobs(self: MemoryBucket, digests: Sequence[str]) -> AsyncIterator[Any]:
        world.asked.extend(digests)
        world.requests += 1
        async for digest, data in real(self, digests):
            if digest not in world.lost:
                yield digest, data

    monkeypatch.setattr(MemoryBucket, "get_blobs", get_blobs)
    return world


def edited(data: bytes, at: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def chunk(data: bytes, number: int) -> str:
    """The digest of a large content's chunk."""
    return digest_of(data[number * CHUNK : (number + 1) * CHUNK])


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def overtakes(monkeypatch: pytest.MonkeyPatch, after: int, commit: Any) -> None:
    """Let a newer generation be announced when it is asked for the nth time."""
    calls = 0

    async def overtaken(self: Checkout, hinted: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == after:
            await commit()
        return calls == after

    monkeypatch.setattr(Checkout, "overtaken", overtaken)


# -- what is here already ----------------------------------------------------------------------------------------------


@pytest.mark.fault("C6")
async def test_a_lost_index_believes_what_is_there_by_its_content_alone(world: World) -> None:
    """The index is deleted; files of the right name and size hold other bytes, or are a link to the right ones."""
    tree = OLD | {"link": file(OTHER[:100_000]), "same": file(edited(MIDDLE)), "short": file(edited(MIDDLE, 7))}
    await world.have(tree)
    world.index.unlink()
    (world.mirror / "middle").write_bytes(edited(MIDDLE, 99_999))
    (world.mirror / "short").write_bytes(edited(MIDDLE, 7)[:-1])
    (world.mirror / "link").rename(world.mirror.parent / "elsewhere")
    (world.mirror / "link").symlink_to(world.mirror.parent / "elsewhere")
    result = await world.pull()
    assert found(world.mirror) == expected(tree)
    assert {digest_of(MIDDLE), tree_digest_of(tree, "short"), tree_digest_of(tree, "link")} <= set(world.asked)
    assert not {tree_digest_of(tree, "same"), chunk(LARGE, 0)} & set(world.asked)
    assert result.reused_bytes == len(LARGE) + len(MIDDLE) + len("hello")


def tree_digest_of(tree: Tree, name: str) -> str:
    return digest_of(tree[name].data or b"")


@pytest.mark.fault("L3")
async def test_nothing_is_opened_to_adopt_what_cannot_be_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At wanted paths, without an index: a huge file, and a link whose text is as long as the file must be."""
    world.mirror.mkdir()
    (world.mirror / "middle").write_bytes(MIDDLE * 3)
    (world.mirror / "a").symlink_to("x" * len("hello"))
    read: list[str] = []
    real = Mirror.read_digests

    def spy(self: Mirror, path: str, *, sha256: bool = True) -> Any:
        read.append(path)
        return real(self, path, sha256=sha256)

    monkeypatch.setattr(Mirror, "read_digests", spy)
    await world.have(OLD)
    await world.have(OLD | {"middle": file(edited(MIDDLE))})  # nor what the index knows to be something else
    assert read == []


@pytest.mark.fault("C6 X2")
async def test_what_cannot_be_read_is_not_adopted_and_is_fetched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is lost, and the disk cannot give back a file that is there: it is fetched, as if it were not."""
    await world.have(OLD)
    world.index.unlink()
    real = Mirror.read_digests

    def failing(self: Mirror, path: str, *, sha256: bool = True) -> Any:
        if path == "middle":
            raise DiskProblem("cannot read middle")
        return real(self, path, sha256=sha256)

    monkeypatch.setattr(Mirror, "read_digests", failing)
    await world.pull()
    assert digest_of(MIDDLE) in world.asked
    assert found(world.mirror) == expected(OLD)


async def test_a_copy_of_what_changed_meanwhile_is_fetched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that has the content by the index is written over between the check and the copy."""
    await world.have(OLD)
    await world.publisher.commit(OLD | {"copy": file(MIDDLE)})
    real = subscribers.Subscriber._count

    def count(self: Subscriber, touched: Any) -> Any:  # after the drift check
        (world.mirror / "middle").write_bytes(edited(MIDDLE))
        return real(self, touched)

    monkeypatch.setattr(subscribers.Subscriber, "_count", count)
    await world.pull()
    assert digest_of(MIDDLE) in world.asked
    assert (world.mirror / "copy").read_bytes() == MIDDLE


@pytest.mark.fault("X1 X2")
@pytest.mark.parametrize(("number", "fetched"), [(errno.EIO, True), (errno.ENOSPC, False)])
async def test_a_copy_that_the_disk_refuses(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, fetched: bool
) -> None:
    """EIO on the file to copy from: its content is had elsewhere; no space: that is told, and asks for nothing."""
    await world.have(OLD)
    wanted = OLD | {"copy": file(MIDDLE)}
    await world.publisher.commit(wanted)

    def refuse(self: Mirror, path: str, entry: Any) -> str:
        error = OSError(number, os.strerror(number))
        raise disk_problem(error, f"cannot copy {path}") from error

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "stage_copy", refuse)
        if fetched:
            await world.pull()
        else:
            with pytest.raises(DiskProblem, match="cannot copy middle"):
                await world.pull()
            assert found(world.mirror) == expected(OLD)
    assert (digest_of(MIDDLE) in world.asked) == fetched
    await world.pull()
    assert found(world.mirror) == expected(wanted)


@pytest.mark.fault("X2")
async def test_a_chunk_that_the_disk_cannot_give_back_is_fetched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO on the version before, of which most chunks are wanted: they are had from the bucket."""
    await world.have(OLD)
    wanted = OLD | {"large": file(edited(LARGE, len(LARGE) - 1))}
    await world.publisher.commit(wanted)
    source = (world.mirror / "large").stat().st_ino
    real = os.pread

    def pread(fd: int, size: int, at: int) -> bytes:
        if os.fstat(fd).st_ino == source:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, size, at)

    monkeypatch.setattr(os, "pread", pread)
    await world.pull()
    assert chunk(LARGE, 0) in world.asked
    assert found(world.mirror) == expected(wanted)


async def test_what_is_staged_for_a_path_serves_no_other_content(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overtaken by a generation with as many other bytes at the same path: those that are staged are not taken."""
    newer = {"middle": file(edited(MIDDLE))}
    monkeypatch.setattr("syncd.gather.STAGE_FILES", 1)
    overtakes(monkeypatch, 2, lambda: world.publisher.commit(newer))  # when it is staged
    await world.publisher.commit({"middle": file(MIDDLE)})
    await world.pull()
    assert {digest_of(MIDDLE), digest_of(edited(MIDDLE))} <= set(world.asked)
    assert found(world.mirror) == expected(newer)
    assert litter(world.mirror) == []


@pytest.mark.fault("O7")
@pytest.mark.parametrize("here", [False, True])
async def test_only_the_content_that_a_path_must_have_is_placed_there(
    world: World, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """The notes of what is staged, or of what was found in place, are mixed up between two paths of one size."""
    wanted = {"x": file(MIDDLE), "y": file(edited(MIDDLE))}
    await world.publisher.commit(wanted)
    if here:
        world.mirror.mkdir()
        (world.mirror / "x").write_bytes(MIDDLE)
        (world.mirror / "y").write_bytes(edited(MIDDLE))
    real = Gatherer.staged

    def staged(self: Gatherer, rows: Any) -> Any:
        other = {"x": "y", "y": "x"}
        if here:
            places = self._tables.adopted(other)
            self._tables.put_adopted(place._replace(path=other[path]) for path, place in places.items())
        else:
            known = self._tables.staged(other)
            self._tables.drop_staged(other)
            self._tables.put_staged((other[path], one) for path, one in known.items())
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Gatherer, "staged", staged)
        with pytest.raises(DiskProblem, match="vanished"):
            await world.pull()
    assert {path.read_bytes() for path in world.mirror.glob("[xy]")} == ({MIDDLE, edited(MIDDLE)} if here else set())
    await world.pull()
    assert found(world.mirror) == expected(wanted)


@pytest.fixture
async def interrupted(world: World, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A tree of three files, the first of which is staged when the last one cannot be had."""
    monkeypatch.setattr("syncd.gather.STAGE_FILES", 1)
    monkeypatch.setattr("syncd.gather.WINDOW_BLOBS", 1)
    contents = sorted((RANDOM.randbytes(100_000) for _ in range(3)), key=digest_of)  # which is how they are asked for
    tree = {name: file(data) for name, data in zip(("x", "y", "z"), contents, strict=True)}
    await world.publisher.commit(tree)
    world.lost = {digest_of(contents[2])}
    with pytest.raises(ObjectGone):
        await world.pull()
    assert contents[0] in {path.read_bytes() for path in world.stage.iterdir()}
    world.lost.clear()
    return tree


@pytest.mark.fault("X1")
async def test_what_is_staged_for_nothing_any_more_does_not_outlive_a_start(world: World, interrupted: Tree) -> None:
    """Interrupted, then overtaken by what cannot be had: the start after that sweeps what was staged for the first."""
    staged = interrupted["x"].data or b""
    await world.publisher.commit(interrupted | {"x": file(edited(staged))})
    world.lost = {digest_of(edited(staged))}
    for _ in range(2):
        with pytest.raises(ObjectGone):
            await world.pull()
    assert staged not in {path.read_bytes() for path in world.stage.iterdir()}


async def test_what_an_earlier_run_staged_is_read_once(
    world: World, interrupted: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to believe it; when it is placed, this run has verified it."""
    read: list[str] = []
    real = Mirror.refit_staged

    def refit(self: Mirror, name: str, entry: Any, *, reread: bool) -> bool:
        read.extend([name] * reread)
        return real(self, name, entry, reread=reread)

    monkeypatch.setattr(Mirror, "refit_staged", refit)
    await world.pull()
    assert len(read) == len(set(read)) > 0
    assert digest_of(interrupted["x"].data or b"") not in world.asked
    assert found(world.mirror) == expected(interrupted)


@pytest.mark.fault("X2")
async def test_staged_content_that_is_gone_before_its_twins_are_copied_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody empties the staging directory between a large content and the copy for another path that has it."""
    await world.have(OLD)
    wanted = OLD | {"one": file(OTHER), "two": file(OTHER, mode=0o600)}
    await world.publisher.commit(wanted)
    real = Gatherer._copy_staged

    def emptied(self: Gatherer, tally: Any) -> None:
        for path in world.stage.iterdir():
            path.unlink()
        real(self, tally)

    with monkeypatch.context() as patch:
        patch.setattr(Gatherer, "_copy_staged", emptied)
        with pytest.raises(DiskProblem, match="the staged content of two is gone"):
            await world.pull()
    assert found(world.mirror) == expected(OLD)
    await world.pull()
    assert found(world.mirror) == expected(wanted)


async def test_nothing_is_kept_of_what_was_staged_when_a_generation_is_in_place(
    world: World, interrupted: Tree
) -> None:
    """Neither files nor notes, also of what was never placed; chunks are known of what the mirror has."""
    assert interrupted.keys() == {"x", "y", "z"}
    await world.have({"large": file(LARGE)})
    assert litter(world.mirror) == []
    await world.have({"large": file(OTHER)})
    with closing(sqlite3.connect(world.index)) as db:
        assert db.execute("SELECT count(*) FROM staged").fetchone() == (0,)
        assert db.execute("SELECT DISTINCT content FROM chunk").fetchall() == [(bytes.fromhex(digest_of(OTHER)),)]


class Crash(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.fault("C2 O7")
async def test_what_is_staged_is_read_again_before_a_later_start_applies_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two pages of an apply, then staged files torn as by a power cut: they are fetched, not placed."""
    tree: Tree = {"d": folder({f"f{number:02}": file(RANDOM.randbytes(70_000)) for number in range(12)})}
    await world.have(OLD)
    await world.publisher.commit(tree | OLD)

    def point(at: str) -> None:
        if at == "between_pages":
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(subscribers, "BATCH_PATHS", 5)
        patch.setattr(subscribers, "crash_point", point)
        with pytest.raises(Crash):
            await world.pull()
    assert 0 < len(list((world.mirror / "d").iterdir())) < 12
    torn = [path for path in sorted(world.stage.iterdir()) if path.stat().st_size == 70_000][:3]
    assert len(torn) == 3
    for path in torn:
        path.write_bytes(bytes(70_000))
    await world.pull()
    assert len(world.asked) == 3
    assert found(world.mirror) == expected(tree | OLD)
    assert litter(world.mirror) == []


@pytest.mark.fault("O7")
async def test_a_large_content_is_verified_as_it_is_on_the_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of the staged file flips after its good chunks were written: nothing changes, and it is fetched again."""
    await world.have(OLD)
    await world.publisher.commit(OLD | {"large": file(OTHER)})
    real = Assembly.advance

    def advance(self: Assembly, to: int) -> None:
        (part,) = world.stage.glob("part-*")
        with part.open("r+b") as spoiled:
            spoiled.write(bytes([OTHER[0] ^ 1]))
        real(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Assembly, "advance", advance)
        with pytest.raises(ObjectCorrupt, match="does not match its BLAKE3 digest"):
            await world.pull()
    assert (found(world.mirror), world.codes(), world.parts()) == (expected(OLD), ["bad_content"], set())
    await world.pull()
    assert found(world.mirror) == expected(OLD | {"large": file(OTHER)})


# -- what the bucket gives ---------------------------------------------------------------------------------------------


@pytest.mark.fault("O1 O2")
@pytest.mark.parametrize(
    ("name", "lost", "text"),
    [
        ("fresh", digest_of(edited(MIDDLE)), "its blob was not delivered"),
        ("large", chunk(OTHER, 7), "a chunk was not delivered"),
    ],
    ids=["blob", "chunk"],
)
async def test_what_a_store_leaves_out_of_its_answer_is_gone(world: World, name: str, lost: str, text: str) -> None:
    """The answer ends without a blob, and without a word of it: nothing changes, and the reason is told."""
    await world.have(OLD)
    wanted = OLD | {"fresh": file(edited(MIDDLE)), "large": file(OTHER)}
    await world.publisher.commit(wanted)
    world.lost = {lost}
    with pytest.raises(ObjectGone, match=f"{name}: {text}"):
        await world.pull()
    assert (found(world.mirror), world.codes()) == (expected(OLD), ["content_gone"])
    world.lost.clear()
    await world.pull()
    assert found(world.mirror) == expected(wanted)


def with_lengths(first: int, second: int) -> Forge:
    """A recipe of 20 chunks that lies about the lengths of the first two."""

    def lie(data: bytes) -> bytes:
        head, digest = 10, 32
        at, size = head + digest, digest + 8
        lengths = struct.pack("<Q", first), struct.pack("<Q", second)
        return data[:at] + lengths[0] + data[at + 8 : at + size] + lengths[1] + data[at + size + 8 :]

    return Forge(recipe=lie)


@pytest.mark.fault("O1")
@pytest.mark.parametrize("here", [False, True])
async def test_a_chunk_is_as_long_as_its_recipe_says(world: World, here: bool) -> None:
    """A recipe lies about two lengths that add up, of chunks from the bucket or of the version that is here."""
    await world.have(OLD)
    data = LARGE[: 2 * CHUNK] + OTHER[2 * CHUNK :] if here else OTHER
    await world.publisher.commit(OLD | {"large": file(data)}, with_lengths(CHUNK - 1, CHUNK + 1))
    with pytest.raises(ObjectCorrupt, match="large: a chunk is not as long as its recipe says"):
        await world.pull()
    assert (found(world.mirror), world.codes()) == (expected(OLD), ["bad_content"])
    assert world.parts() == {f"part-{digest_of(data)}"}  # what is right of it serves the next try


@pytest.mark.fault("C6 O1")
async def test_a_content_without_a_place_is_refused_in_words(world: World) -> None:
    """A damaged index says of a file that has bytes that they are stored nowhere."""
    await world.have(OLD)
    with closing(sqlite3.connect(world.index)) as db, db:
        db.execute("UPDATE remote SET nuid = '' WHERE key = CAST('middle' AS BLOB)")
    (world.mirror / "middle").unlink()
    with pytest.raises(ObjectCorrupt, match="middle: its content is stored nowhere"):
        await world.pull()
    assert found(world.mirror).keys() == {"a", "large"}


# -- room --------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("X1")
async def test_what_is_half_made_needs_no_room_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of a large file on a disk that is nearly full: what it has on disk is counted."""
    wanted = OLD | {"large": file(OTHER)}
    await world.have(OLD)
    await world.publisher.commit(wanted)
    world.lost = {chunk(OTHER, 19)}
    monkeypatch.setattr("syncd.gather.WINDOW_PIECES", 5)
    with pytest.raises(ObjectGone):
        await world.pull()
    world.lost.clear()
    (part,) = world.stage.glob("part-*")
    there = part.stat().st_blocks * 512
    assert there >= 15 * CHUNK
    for free, enough in ((len(OTHER) + ROOM - there - 1, False), (len(OTHER) + ROOM - there, True)):
        monkeypatch.setattr(Mirror, "free_bytes", lambda _, free=free: free)
        if not enough:
            with pytest.raises(DiskProblem, match="no space for the generation"):
                await world.pull()
            assert not {chunk(OTHER, 0), chunk(OTHER, 19)} & set(world.asked)
    await world.pull()
    assert found(world.mirror) == expected(wanted)


@pytest.mark.fault("X1")
@pytest.mark.parametrize("spare", [0, -1])
async def test_some_room_must_stay(world: World, monkeypatch: pytest.MonkeyPatch, spare: int) -> None:
    """A disk with exactly the room that is needed, and with one byte less."""
    await world.have(OLD)
    await world.publisher.commit(OLD | {"fresh": file(edited(MIDDLE))})
    monkeypatch.setattr(Mirror, "free_bytes", lambda _: len(MIDDLE) + ROOM + spare)
    if spare < 0:
        with pytest.raises(DiskProblem, match=rf"it needs {len(MIDDLE)} bytes, {len(MIDDLE) + ROOM - 1} are free"):
            await world.pull()
        assert digest_of(edited(MIDDLE)) not in world.asked
    else:
        await world.pull()
        assert (world.mirror / "fresh").read_bytes() == edited(MIDDLE)


@pytest.mark.fault("X1")
async def test_half_made_files_of_what_was_overtaken_do_not_pile_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation after generation is overtaken in the middle of a large file: the newest few are kept, as sources."""
    wanted = OLD | {"large": file(OTHER)}
    await world.have(OLD)
    await world.publisher.commit(wanted)
    monkeypatch.setattr("syncd.gather.WINDOW_PIECES", 5)
    world.lost = {chunk(OTHER, 19)}
    with pytest.raises(ObjectGone):
        await world.pull()
    old = [f"part-{digest_of(b'%d' % number)}" for number in range(SPARE_PARTS + 3)]

    async def interrupted() -> None:
        for number, name in enumerate(old):
            (world.stage / name).write_bytes(b"half made")
            os.utime(world.stage / name, (time.time() + 60 + number,) * 2)

    overtakes(monkeypatch, 1, interrupted)
    with pytest.raises(ObjectGone):
        await world.pull()
    assert world.parts() == {f"part-{digest_of(OTHER)}", *old[-SPARE_PARTS:]}
    assert chunk(OTHER, 0) not in world.asked  # the oldest of them is the one that is wanted, and goes on
    world.lost.clear()
    await world.pull()
    assert (found(world.mirror), litter(world.mirror)) == (expected(wanted), [])


async def test_large_files_that_are_done_do_not_count_among_those_that_are_open(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many of them, one after the other: what is asked for at once does not shrink to a chunk."""
    monkeypatch.setattr("syncd.gather.WINDOW_ASSEMBLIES", 2)
    wanted = {f"f{number}": file(RANDOM.randbytes(10 * CHUNK)) for number in range(8)}
    await world.have(wanted)
    assert world.requests < 20  # the root's node, and for each file its recipe and about one window


# -- descriptors -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("X2")
@pytest.mark.parametrize("outcome", ["good", "a chunk is missing", "a chunk is damaged", "the whole is wrong"])
async def test_no_run_leaves_a_descriptor_open(world: World, monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    """Several large files at once, from each other's chunks and the bucket's, again and again; some runs fail."""
    names = ("large", "more", "other")
    old = OLD | {"more": file(OTHER), "other": file(LARGE[CHUNK:])}
    await world.have(old)
    monkeypatch.setattr("syncd.gather.WINDOW_PIECES", 8)
    monkeypatch.setattr("syncd.gather.SOURCES_OPEN", 1)
    before = descriptors()
    for number in range(4):
        sources = (LARGE, OTHER, LARGE[CHUNK:])
        wanted = old | {
            name: file(RANDOM.randbytes(CHUNK) + OTHER[: 9 * CHUNK] + data[9 * CHUNK :] + b"%d" % number)
            for name, data in zip(names, sources, strict=True)
        }
        forge = Forge()
        if outcome == "the whole is wrong":
            forge.recipe = lambda data: data[:10] + data[50:90] + data[10:50] + data[90:]  # the wrong way round
        await world.publisher.commit(wanted, forge)
        if outcome == "a chunk is missing":
            world.lost = {chunk(wanted["other"].data or b"", 0)}
        elif outcome == "a chunk is damaged":
            world.damage(chunk(wanted["other"].data or b"", 0))
        if outcome == "good":
            await world.pull()
            assert found(world.mirror) == expected(wanted)
        else:
            with pytest.raises((ObjectGone, ObjectCorrupt)):
                await world.pull()
            assert found(world.mirror) == expected(old)
    assert descriptors() == before


# -- many files of one content, or in one blob -------------------------------------------------------------------------


@pytest.mark.fault("X3 O5")
@pytest.mark.parametrize("equal", [False, True], ids=["one pack", "one content"])
async def test_however_many_files_lie_in_a_blob_few_are_held_and_it_is_fetched_once(
    world: World, monkeypatch: pytest.MonkeyPatch, equal: bool
) -> None:
    """Forty files lie in one pack, or are equal, and four may be held at once: still one fetch, each file right."""
    monkeypatch.setattr(gathering, "WINDOW_FILES", 4)
    largest = 0
    real = gathering._windows

    def windows(files: Any) -> Any:
        nonlocal largest
        for window in real(files):
            largest = max(largest, sum(map(len, window.values())))
            yield window

    monkeypatch.setattr(gathering, "_windows", windows)
    tree: Tree = {f"{number:02}": file(MIDDLE if equal else f"content {number}") for number in range(40)}
    await world.publisher.commit(tree)
    result = await world.pull()
    assert found(world.mirror) == expected(tree)
    assert largest == 4
    assert len(set(world.asked)) == len(world.asked), "no blob was fetched twice"
    assert result.downloaded_bytes < 2 * len(MIDDLE)


@pytest.mark.fault("X3")
async def test_equal_large_files_are_put_together_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty large files of two contents, one looked at after the other: two are put together, the others copied."""
    monkeypatch.setattr(gathering, "RECIPES_AT_ONCE", 1)
    monkeypatch.setattr(gathering, "WINDOW_PIECES", 4)
    monkeypatch.setattr(gathering, "STAGE_FILES", 4)
    assembled = []
    real = Mirror.assemble

    def assemble(mirror: Mirror, entry: Any) -> Assembly:
        assembled.append(entry.digest)
        return real(mirror, entry)

    monkeypatch.setattr(Mirror, "assemble", assemble)
    tree: Tree = {f"{number:02}": file((LARGE, OTHER)[number % 2]) for number in range(30)}
    await world.publisher.commit(tree)
    result = await world.pull()
    assert found(world.mirror) == expected(tree)
    assert result.reused_bytes == 28 * len(LARGE)
    assert sorted(assembled) == sorted({digest_of(LARGE), digest_of(OTHER)})
    assert len({(world.mirror / path).stat().st_ino for path in tree}) == len(tree)
    assert litter(world.mirror) == []
