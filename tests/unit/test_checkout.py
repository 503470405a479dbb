"""A subscriber of the generations layout on the memory twin: what is fetched, what is refused, what is remembered."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import struct
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from syncd.checkout import Checkout, NoGeneration
from syncd.errors import DiskProblem, FormatTooNew, ObjectCorrupt, ObjectGone, SafetyHalt, StoreTimeout, UsageError
from syncd.gather import Gatherer
from syncd.mirror import Mirror
from syncd.model import Kind
from syncd.modes import ModePolicy
from syncd.nodes import BLOB_MAX, Child, Location, Where, digest_of
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.status import FolderState, FolderStatus, StatusKeeper
from syncd.store.base import BucketSpec, ObjectMeta, SmallPut
from syncd.store.codec import RAW, ZSTD
from syncd.store.memory import MemoryBucket, MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support.generations import CHUNK, T0, Forge, Publisher, Tree, expected, file, folder, found, link
from tests.support.trees import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

RANDOM = random.Random(3)
LARGE = RANDOM.randbytes(20 * CHUNK + 123)
MIDDLE = RANDOM.randbytes(200_000)


def tree() -> Tree:
    return {
        "a": file("hello"),
        "b": folder({f"f{number}": file(f"content {number}") for number in range(20)}),
        "d": folder({"e": folder({"deep": file("deep", mode=0o600)}, mode=0o700), "twin": file(MIDDLE)}),
        "empty": file(""),
        "large": file(LARGE),
        "link": link("d/e/deep"),
        "middle": file(MIDDLE),
        "void": folder(),
    }


class World:
    """One bucket, its publisher, one mirror; what is asked of the bucket is counted."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.store = MemoryStore()
        self.publisher = Publisher(self.store)
        self.mirror = tmp / "mirror"
        self.asked: list[str] = []
        self.options: dict[str, Any] = {}
        self.status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)

    def subscriber(self) -> Subscriber:
        options = SubscribeOptions("app", self.mirror, **{"rules": Rules(), **self.options})
        return Subscriber(options, self.store, self.tmp / "mirror.db", status=self.status)

    async def pull(self, **arguments: Any) -> Any:
        self.asked.clear()
        return await self.subscriber().pull(**arguments)

    async def commit(self, wanted: Tree, forge: Forge | None = None, **fields: Any) -> Any:
        return await self.publisher.commit(wanted, forge, **fields)

    def damage(self, digest: str, payload: bytes) -> None:
        self.store.write_raw_chunks("app", digest, [payload] if payload else [])

    def tables(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.tmp / "mirror.db")) as db:
            return db.execute(sql).fetchall()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    real = MemoryBucket.get_blobs

    def spy(self: MemoryBucket, digests: Sequence[str]) -> AsyncIterator[Any]:
        world.asked.extend(digests)
        return real(self, digests)

    monkeypatch.setattr(MemoryBucket, "get_blobs", spy)
    return world


# -- what arrives, and what it costs -----------------------------------------------------------------------------------


async def test_a_generation_arrives_whole_and_is_reported(world: World) -> None:
    """Kinds, contents, modes, nanoseconds and link texts; number and tree digest are in result and status."""
    generation = await world.commit(tree())
    result = await world.pull()
    assert found(world.mirror) == expected(tree())
    assert (result.generation, result.root, result.problems) == (1, generation.root.tree, [])
    now = world.status.now
    assert (now.generation, now.root, now.exact) == (1, generation.root.tree, True)


async def test_nothing_new_asks_for_no_blob(world: World) -> None:
    """The second round reads the channel and nothing else, also with a new process."""
    await world.commit(tree())
    await world.pull()
    result = await world.pull()
    assert (world.asked, result.placed, result.removed, result.generation) == ([], 0, 0, 1)


async def test_each_blob_is_asked_for_once(world: World) -> None:
    """Packs that hold many files, and contents that several paths have, too."""
    await world.commit(tree())
    await world.pull()
    assert len(world.asked) == len(set(world.asked))


async def test_only_nodes_that_differ_are_read(world: World) -> None:
    """An edit deep down costs the nodes on its path and the content."""
    wide = {f"d{number}": folder({"x": file(f"x{number}"), "y": folder({"z": file("z")})}) for number in range(30)}
    await world.commit(wide)
    await world.pull()
    wide["d7"] = folder({"x": file("x7"), "y": folder({"z": file("changed")})})
    await world.commit(wide)
    await world.pull()
    assert len(world.asked) == 4  # root, d7, d7/y, z
    assert found(world.mirror) == expected(wide)


async def test_renames_reverts_and_copies_fetch_no_content(world: World) -> None:
    """What the mirror has under any name is not fetched; nor is what a revert brings back under another."""
    await world.commit(tree())
    await world.pull()
    moved = tree()
    moved["else"] = folder({"large": moved.pop("large"), "a": moved.pop("a"), "b": moved.pop("b")})
    await world.commit(moved)
    assert (await world.pull()).downloaded_bytes == 0
    assert found(world.mirror) == expected(moved)
    await world.commit(tree())
    assert (await world.pull()).downloaded_bytes == 0
    assert found(world.mirror) == expected(tree())


async def test_a_new_time_or_mode_keeps_the_file_and_fetches_nothing(world: World) -> None:
    """Metadata is set in place."""
    await world.commit(tree())
    await world.pull()
    inode = (world.mirror / "large").stat().st_ino
    await world.commit(tree() | {"large": file(LARGE, mode=0o640, mtime_ns=T0 + 77)})
    result = await world.pull()
    assert (result.downloaded_bytes, result.reused_bytes) == (0, 0)
    assert (world.mirror / "large").stat().st_ino == inode
    assert found(world.mirror)["large"][1:3] == (0o640, T0 + 77)


async def test_what_is_gone_is_removed_wherever_it_stood(world: World) -> None:
    """First, last and only child of a directory; a directory with all below it; names that begin alike."""
    await world.commit(tree() | {"b!": file("x"), "b0": folder({"y": file("y")}), "zz": folder({"z": file("z")})})
    await world.pull()
    left = tree() | {"b": folder({"f5": file("content 5")}), "d": folder({"e": folder()}), "b0": folder()}
    for name in ("a", "void", "large"):
        del left[name]
    await world.commit(left)
    await world.pull()
    assert found(world.mirror) == expected(left)


@pytest.mark.parametrize("at", [0, 10 * CHUNK + 5, len(LARGE) - 1])
async def test_an_edit_of_a_large_file_fetches_the_chunks_it_touches(world: World, at: int) -> None:
    """Recipe, and one chunk; the rest comes from the version before."""
    await world.commit(tree())
    await world.pull()
    edited = bytearray(LARGE)
    edited[at] ^= 1
    await world.commit(tree() | {"large": file(bytes(edited))})
    result = await world.pull()
    assert found(world.mirror)["large"][3] == digest_of(bytes(edited))
    assert result.downloaded_bytes <= CHUNK + 48 * 22
    assert result.reused_bytes >= len(LARGE) - CHUNK


async def test_a_moved_chunk_is_found_where_it_was(world: World) -> None:
    """Chunks are known by digest, not by offset: one put in front of the others is all that is fetched."""
    await world.commit(tree())
    await world.pull()
    front = RANDOM.randbytes(CHUNK)
    await world.commit(tree() | {"large": file(front + LARGE)})
    assert (await world.pull()).downloaded_bytes <= CHUNK + 48 * 23
    assert found(world.mirror)["large"][3] == digest_of(front + LARGE)


async def test_chunks_are_learned_of_files_that_came_otherwise(world: World) -> None:
    """A large file that was there before its generation is adopted; its next edit costs one chunk all the same."""
    world.mirror.mkdir()
    (world.mirror / "large").write_bytes(LARGE)
    await world.commit(tree())
    assert (await world.pull()).reused_bytes >= len(LARGE)
    edited = LARGE[:-1] + b"!"
    await world.commit(tree() | {"large": file(edited)})
    assert (await world.pull()).downloaded_bytes <= CHUNK + 48 * 22


async def test_a_chunk_source_that_changed_is_not_believed(world: World) -> None:
    """The version before was edited here meanwhile: what does not hash is fetched."""
    await world.commit(tree())
    await world.pull()
    edited = bytearray(LARGE)
    edited[0] ^= 1
    await world.commit(tree() | {"large": file(bytes(edited))})
    subscriber = world.subscriber()
    real = subscriber._count

    def count(touched: Any) -> Any:  # after the drift check
        (world.mirror / "large").write_bytes(b"\0" * len(LARGE))
        return real(touched)

    subscriber._count = count  # type: ignore[method-assign]
    result = await subscriber.pull()
    assert result.downloaded_bytes >= len(LARGE)
    assert found(world.mirror)["large"][3] == digest_of(bytes(edited))


async def test_content_that_repeats_within_a_file_and_among_files(world: World) -> None:
    """A run of zeros is one chunk; three paths of one large content are fetched once."""
    zeros = bytes(30 * CHUNK)
    wanted = {"x": file(zeros), "y": file(zeros, mode=0o600), "z": folder({"z": file(zeros, mtime_ns=T0 + 9)})}
    await world.commit(wanted)
    result = await world.pull()
    assert result.downloaded_bytes <= CHUNK + 48 * 31
    assert found(world.mirror) == expected(wanted)


async def test_an_edit_in_a_huge_directory_fetches_the_chunks_of_its_node_that_changed(world: World) -> None:
    """A node of some megabytes is stored in chunks, which the index keeps."""
    many = {f"file-{number:06}": file(str(number)) for number in range(12_000)}
    await world.commit({"d": folder(many)})
    await world.pull()
    many["file-006000"] = file("6001", mtime_ns=T0 + 5)
    await world.commit({"d": folder(many, mtime_ns=T0 + 6)})
    await world.pull()
    assert len(world.asked) <= 6  # root, recipe, one or two chunks of the node; the content is there
    assert found(world.mirror) == expected({"d": folder(many, mtime_ns=T0 + 6)})
    [(kept,)] = world.tables("SELECT count(*) FROM cached")
    [(needed,)] = world.tables("SELECT length / 65536 + 2 FROM node WHERE place = 2")
    assert kept <= needed


async def test_new_locations_alone_change_nothing_on_disk(world: World) -> None:
    """Repacking: rows follow, so that content is found later although its old blob is gone."""
    await world.commit(tree())
    await world.pull()

    def alone(path: str, child: Child) -> Child:
        if child.entry.kind is Kind.FILE and child.location.where is Where.PACK:
            return changed(child, location=Location(Where.BLOB, child.entry.digest))
        return child

    before = dict(world.tables("SELECT key, nuid FROM remote"))
    await world.commit(tree(), Forge(child=alone))
    result = await world.pull()
    assert (result.placed, result.removed, result.generation) == (0, 0, 2)
    after = dict(world.tables("SELECT key, nuid FROM remote"))
    assert before != after
    assert {text[:1] for text in after.values()} == {"", "b", "r"}


# -- what is refused ---------------------------------------------------------------------------------------------------


def changed(value: Any, **fields: Any) -> Any:
    """A copy of a word of the format with other fields, whichever kind of class it is."""
    return value._replace(**fields) if hasattr(value, "_replace") else replace(value, **fields)


def on(path: str, change: Callable[[Child], Child]) -> Forge:
    return Forge(child=lambda where, child: change(child) if where == path else child)


def bomb(data: bytes) -> bytes:
    return ZSTD + zstandard.ZstdCompressor().compress(bytes(BLOB_MAX * 64))


NEW = RANDOM.randbytes(10 * CHUNK)
FRESH = RANDOM.randbytes(300_000)
CHUNK_DIGEST = digest_of(NEW[3 * CHUNK : 4 * CHUNK])
PACKED = b"".join(f"fresh {number}".encode() for number in range(5))


def newer() -> Tree:
    """Another tree: a fresh whole blob, a fresh pack, a fresh large content, something removed and edited."""
    wanted = tree() | {
        "fresh": file(FRESH),
        "new": file(NEW),
        "pack": folder({f"p{number}": file(f"fresh {number}") for number in range(5)}),
    }
    del wanted["middle"]
    wanted["b"] = folder({"f1": file("edited")})
    return wanted


def with_blob(digest: str, payload: Callable[[bytes], bytes | None]) -> Forge:
    return Forge(blob=lambda one, data, sent: payload(data) if one == digest else sent)


def recipes(change: Callable[[bytes], bytes]) -> Forge:
    return Forge(recipe=lambda data: change(data) if len(data) < 10 + 40 * 12 else data)  # NEW's, not LARGE's


def names(path: str, change: Callable[[list[bytes]], list[bytes]]) -> Forge:
    return Forge(identities=lambda where, parts: change(parts) if where == path else parts)


def renamed(part: bytes, name: bytes) -> bytes:
    (size,) = struct.unpack_from("<H", part)
    return struct.pack("<H", len(name)) + part[2:21] + name + part[21 + size :]


FAULTS: dict[str, tuple[Forge, str]] = {
    # contents
    "a blob is missing": (with_blob(digest_of(FRESH), lambda data: None), "content_gone"),
    "a blob is damaged": (with_blob(digest_of(FRESH), lambda data: RAW + data[:-1] + b"!"), "bad_content"),
    "a blob is another one": (with_blob(digest_of(FRESH), lambda data: RAW + MIDDLE), "bad_content"),
    "a blob is cut off": (with_blob(digest_of(FRESH), lambda data: RAW + data[:-1]), "bad_content"),
    "a blob has an unknown codec": (with_blob(digest_of(FRESH), lambda data: b"\7" + data), "bad_content"),
    "a blob is a compression bomb": (with_blob(digest_of(FRESH), bomb), "bad_content"),
    "a pack is missing": (with_blob(digest_of(PACKED), lambda data: None), "content_gone"),
    "a pack is damaged": (with_blob(digest_of(PACKED), lambda data: RAW + data[::-1]), "bad_content"),
    "a chunk is missing": (with_blob(CHUNK_DIGEST, lambda data: None), "content_gone"),
    "a chunk is damaged": (with_blob(CHUNK_DIGEST, lambda data: RAW + data[::-1]), "bad_content"),
    "a location ends beyond its pack": (
        on("pack/p4", lambda child: changed(child, location=changed(child.location, offset=len(PACKED) - 3))),
        "bad_content",
    ),
    "a location yields other content": (
        on("pack/p4", lambda child: changed(child, location=changed(child.location, offset=0))),
        "bad_content",
    ),
    "a location names another pack": (
        on("pack/p4", lambda child: changed(child, location=changed(child.location, blob=digest_of(FRESH)))),
        "bad_content",
    ),
    "a size is larger than its blob": (
        on("fresh", lambda child: changed(child, entry=changed(child.entry, size=len(FRESH) + 1))),
        "bad_content",
    ),
    "a size is smaller than its blob": (
        on("fresh", lambda child: changed(child, entry=changed(child.entry, size=len(FRESH) - 1))),
        "bad_content",
    ),
    "an empty file has a digest of its own": (
        on("empty", lambda child: changed(child, entry=changed(child.entry, digest=digest_of(b"x")))),
        "bad_tree",
    ),
    # recipes
    "a recipe is missing": (
        Forge(blob=lambda one, data, sent: None if data[:2] == b"\1\0" and len(data) == 10 + 400 else sent),
        "content_gone",
    ),
    "a recipe's pieces are longer than its content": (
        recipes(lambda data: data[:10] + data[10:42] + struct.pack("<Q", 1 << 40) + data[50:]),
        "bad_content",
    ),
    "a recipe lists two chunks the wrong way round": (
        recipes(lambda data: data[:10] + data[50:90] + data[10:50] + data[90:]),
        "bad_content",
    ),
    "a recipe lies about lengths that add up": (
        recipes(
            lambda data: (
                data[:42] + struct.pack("<Q", CHUNK - 1) + data[50:82] + struct.pack("<Q", CHUNK + 1) + data[90:]
            )
        ),
        "bad_content",
    ),
    "a recipe is cut off": (recipes(lambda data: data[:-1]), "bad_content"),
    "a recipe claims to list recipes": (recipes(lambda data: data[:1] + b"\3" + data[2:]), "bad_content"),
    "a recipe is nested too deep": (recipes(lambda data: data[:1] + b"\4" + data[2:]), "bad_content"),
    "a recipe lists no chunks": (recipes(lambda data: data[:10]), "bad_content"),
    # nodes
    "a node is missing": (
        Forge(blob=lambda one, data, sent: None if b"p0" in data and b"p1" in data else sent),
        "bad_tree",
    ),
    "a node names an entry twice": (names("pack", lambda parts: [parts[0], parts[0], *parts[2:]]), "bad_tree"),
    "a node is not sorted": (names("pack", lambda parts: parts[::-1]), "bad_tree"),
    "a node names its parent": (names("pack", lambda parts: [renamed(parts[0], b".."), *parts[1:]]), "bad_tree"),
    "a node names itself": (names("pack", lambda parts: [renamed(parts[0], b"."), *parts[1:]]), "bad_tree"),
    "a name has a slash": (names("pack", lambda parts: [renamed(parts[0], b"../x"), *parts[1:]]), "bad_tree"),
    "a name has a NUL": (names("pack", lambda parts: [renamed(parts[0], b"a\0b"), *parts[1:]]), "bad_tree"),
    "a name is empty": (names("pack", lambda parts: [renamed(parts[0], b""), *parts[1:]]), "bad_tree"),
    "a name is no UTF-8": (names("pack", lambda parts: [renamed(parts[0], b"\xff"), *parts[1:]]), "bad_tree"),
    "a name is ours": (names("", lambda parts: [renamed(parts[0], b".syncd"), *parts[1:]]), "bad_tree"),
    "a node counts wrong": (
        Forge(node=lambda path, data: data[:1] + b"\xff\xff" + data[3:] if path == "pack" else data),
        "bad_tree",
    ),
    "a node's entries reach into its locations": (
        Forge(node=lambda path, data: data[:5] + b"\xff\xff\xff\x7f" + data[9:] if path == "pack" else data),
        "bad_tree",
    ),
    "a node has bytes too many": (
        Forge(node=lambda path, data: data + b"\0" if path == "pack" else data),
        "bad_tree",
    ),
    "a node is another one than its digest says": (
        Forge(child=lambda path, child: changed(child, tree=digest_of(b"no")) if path == "pack" else child),
        "bad_tree",
    ),
    "a node's length lies": (
        on("pack", lambda child: changed(child, length=child.length - 1)),
        "bad_tree",
    ),
    "a node is said to be huge": (on("pack", lambda child: changed(child, length=0xFFFFFFFF)), "bad_tree"),
    # records
    "the tree holds more than the record says": (
        Forge(record=lambda generation: replace(generation, files=3)),
        "bad_tree",
    ),
    "the content is larger than the record says": (
        Forge(record=lambda generation: replace(generation, size=1000)),
        "bad_tree",
    ),
    "the record is another folder's": (
        Forge(record=lambda generation: replace(generation, folder="other")),
        "bad_generation",
    ),
    "the record has another number": (
        Forge(record=lambda generation: replace(generation, number=77)),
        "bad_generation",
    ),
    "the root is another one than its digest says": (
        Forge(record=lambda generation: replace(generation, root=changed(generation.root, tree=digest_of(b"no")))),
        "bad_tree",
    ),
}


@pytest.mark.fault("O1 P1 P2 P6")
@pytest.mark.parametrize("name", FAULTS)
async def test_a_generation_that_lies_is_refused_whole(world: World, name: str) -> None:
    """One blob, chunk, recipe, node, name or record of a new generation is missing, changed, cut, misplaced or lies.

    The mirror stays as it was, one problem says why, and the next good generation is applied.
    """
    forge, code = FAULTS[name]
    await world.commit(tree())
    await world.pull()
    await world.commit(newer(), forge)
    subscriber = world.subscriber()
    with pytest.raises((ObjectCorrupt, ObjectGone, FormatTooNew)):
        await subscriber.pull()
    assert found(world.mirror) == expected(tree())
    assert [problem.code for problem in world.status.now.problems] == [code]
    assert world.status.now.generation == 1
    good = newer() | {"good": file("good")}
    await world.commit(good, Forge())  # blobs are put over what was damaged
    result = await world.pull()
    assert (result.problems, result.generation) == ([], 3)
    assert found(world.mirror) == expected(good)


@pytest.mark.fault("P1")
async def test_a_path_that_is_too_long_refuses_the_generation(world: World) -> None:
    """A generation nests fifteen directories with names of 200 bytes, each fine by itself.

    It is refused, and the mirror stays as it was.
    """
    await world.commit(tree())
    await world.pull()
    deep = file("x")
    for _ in range(15):
        deep = folder({"n" * 200: deep})
    await world.commit(tree() | {"deep": deep})
    with pytest.raises(ObjectCorrupt, match="longer than"):
        await world.pull()
    assert found(world.mirror) == expected(tree())


async def test_a_tree_that_names_one_directory_ever_again_ends_early(world: World, monkeypatch: Any) -> None:
    """A small bucket may describe more entries than there are atoms."""
    monkeypatch.setattr("syncd.checkout.MAX_ENTRIES", 1000)
    bomb = folder({"x": folder()})
    for _ in range(12):
        bomb = folder({"a": bomb, "b": bomb})
    await world.commit({"bomb": bomb})
    with pytest.raises(ObjectCorrupt, match="more than its generation's record"):
        await world.pull()
    assert found(world.mirror) == {}


async def test_a_format_of_the_future_is_named_and_changes_nothing(world: World) -> None:
    """The bucket says its version; the mirror stays."""
    await world.commit(tree())
    await world.pull()
    stream = world.store.stream("app")
    stream.spec = replace(stream.spec, metadata={"syncd.format": "2"})
    real = MemoryBucket.state

    async def state(self: MemoryBucket) -> Any:
        return replace(await real(self), metadata={"syncd.layout": "generations", "syncd.format": "2"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryBucket, "state", state)
        with pytest.raises(FormatTooNew, match="does not know"):
            await world.pull()
    assert found(world.mirror) == expected(tree())


async def test_a_folder_without_a_generation_is_waited_for(world: World) -> None:
    """Nothing is changed, and it is no failure."""
    await world.publisher.create()
    world.mirror.mkdir()
    (world.mirror / "mine").write_text("x")
    with pytest.raises(NoGeneration) as caught:
        await world.pull()
    assert caught.value.transient
    assert [path.name for path in world.mirror.iterdir() if path.name != ".syncd"] == ["mine"]


async def test_no_room_for_all_of_it_changes_nothing(world: World, monkeypatch: Any) -> None:
    """It is known before anything is fetched."""
    await world.commit(tree())
    await world.pull()
    await world.commit(newer())
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "free_bytes", lambda self: 1000)
        with pytest.raises(DiskProblem, match="no space for the generation"):
            await world.pull()
    assert digest_of(FRESH) not in world.asked
    assert found(world.mirror) == expected(tree())
    await world.pull()
    assert found(world.mirror) == expected(newer())


async def test_a_disk_that_refuses_in_the_middle_changes_nothing(world: World, monkeypatch: Any) -> None:
    """What was staged stays for the next try."""
    await world.commit(tree())
    await world.pull()
    await world.commit(newer())
    real = Mirror.stage_bytes

    def stage(self: Mirror, items: Any) -> Any:
        return [DiskProblem("no space") for _ in items] if items else real(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "stage_bytes", stage)
        with pytest.raises(DiskProblem, match="no space"):
            await world.pull()
    assert found(world.mirror) == expected(tree())
    await world.pull()
    assert found(world.mirror) == expected(newer())


async def test_staged_content_that_vanished_is_staged_again(world: World, monkeypatch: Any) -> None:
    """The generation does not count as applied before."""
    await world.commit(tree())
    await world.pull()
    await world.commit(newer())
    real = Gatherer.staged

    def staged(self: Gatherer, rows: Any) -> Any:
        self._tables.drop_staged(["fresh"])
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Gatherer, "staged", staged)
        with pytest.raises(DiskProblem, match="vanished"):
            await world.pull()
    assert world.status.now.generation == 1
    assert (await world.pull()).generation == 2
    assert found(world.mirror) == expected(newer())


# -- which generation --------------------------------------------------------------------------------------------------


async def test_a_generation_can_be_asked_for_by_number(world: World) -> None:
    """Older ones too; without a number the channel decides again."""
    await world.commit(tree())
    await world.commit(newer())
    assert (await world.pull()).generation == 2
    assert (await world.pull(generation=1)).generation == 1
    assert found(world.mirror) == expected(tree())
    assert (await world.pull()).generation == 2
    assert found(world.mirror) == expected(newer())
    with pytest.raises(ObjectGone, match="generation 9"):
        await world.pull(generation=9)
    assert found(world.mirror) == expected(newer())


async def test_a_channel_that_is_moved_back_is_followed(world: World) -> None:
    """Only because the move itself is newer than what was seen."""
    await world.commit(tree())
    await world.commit(newer())
    await world.pull()
    await world.publisher.move(1)
    assert (await world.pull()).generation == 1
    assert found(world.mirror) == expected(tree())
    [(note,)] = world.tables("SELECT value FROM note WHERE key = 'target'")
    assert (json.loads(note)["number"], json.loads(note)["highest"]) == (1, 2)


@pytest.mark.fault("K2")
async def test_a_read_older_than_what_was_seen_is_ignored(world: World) -> None:
    """The head's message of generation 1 is put back into the bucket after 2 was pulled, as a late replica shows it.

    It is ignored: the mirror stays at 2.
    """
    await world.commit(tree())
    stream = world.store.stream("app")
    subject = next(subject for subject, message in stream.metas.items() if message.seq == world.publisher.seq)
    before = stream.metas[subject]
    await world.commit(newer())
    await world.pull()
    stream.metas[subject] = before
    result = await world.pull()
    assert (result.generation, result.placed, result.removed) == (2, 0, 0)
    assert found(world.mirror) == expected(newer())


@pytest.mark.fault("K2")
async def test_a_generation_asked_for_by_number_makes_nobody_forget_how_far_the_channel_was(world: World) -> None:
    """Generation 1 is pulled by its number, then the head's message of 2 is put back where 3 was seen.

    That one is old and ignored; with the newest head, 3 is gone to.
    """
    await world.commit(tree())
    await world.commit({"between": file("b")} | tree())
    stream = world.store.stream("app")
    subject = next(subject for subject, message in stream.metas.items() if message.seq == world.publisher.seq)
    before = stream.metas[subject]
    await world.commit(newer())
    await world.pull()
    assert (await world.pull(generation=1)).generation == 1
    now, stream.metas[subject] = stream.metas[subject], before
    assert (await world.pull()).generation == 1
    assert found(world.mirror) == expected(tree())
    stream.metas[subject] = now
    assert (await world.pull()).generation == 3


@pytest.mark.fault("K4 R8")
async def test_a_pinned_host_says_nothing_of_a_channel_that_it_does_not_follow(world: World) -> None:
    """The head's message of before is put back, and the note of since when that is so is set to long ago.

    Who follows the channel is told that it is behind; who asks for a number is not.
    """
    await world.commit(tree())
    stream = world.store.stream("app")
    subject = next(subject for subject, message in stream.metas.items() if message.seq == world.publisher.seq)
    before = stream.metas[subject]
    await world.commit(newer())
    await world.pull()
    stream.metas[subject] = before
    await world.pull()
    with closing(sqlite3.connect(world.tmp / "mirror.db")) as db, db:
        assert db.execute("UPDATE note SET value = '1.0' WHERE key = 'behind'").rowcount == 1
    assert [problem.code for problem in (await world.pull()).problems] == ["channel_behind"]
    assert (await world.pull(generation=2)).problems == []


@pytest.mark.fault("N5")
async def test_a_generation_asked_for_in_a_bucket_made_again_does_not_carry_the_old_sequence_over(world: World) -> None:
    """The bucket is deleted and published anew, with lower sequences, and generation 1 is pulled by its number.

    The channel is followed later, and does not look old.
    """
    for number in range(6):
        await world.commit(tree() | {"n": file(str(number))})
    await world.pull()
    seen = world.publisher.seq
    world.store.delete_bucket("app")
    world.publisher = Publisher(world.store)
    await world.commit(tree())
    await world.commit(newer())
    assert (await world.pull(generation=1)).generation == 1
    stream = world.store.stream("app")
    while stream.last_seq <= seen:  # others write, and the channel stays where it is
        world.damage(digest_of(b"of no interest"), b"x")
    assert (await world.pull()).generation == 2
    assert found(world.mirror) == expected(newer())


@pytest.mark.fault("R6 R8")
async def test_what_is_pinned_is_not_overtaken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a generation is gathered by its number, hints of newer ones come at every look (replaced).

    It is gone on with, and the bucket is not asked for a newer one.
    """
    await world.commit(tree())
    await world.commit(newer())
    subscriber = world.subscriber()
    subscriber._hinted = 1_000_000
    real = Checkout.overtaken
    said: list[bool] = []

    async def overtaken(self: Checkout, hinted: int) -> bool:
        said.append(await real(self, 1_000_000 + len(said)))
        return said[-1]

    monkeypatch.setattr(Checkout, "overtaken", overtaken)
    assert (await subscriber.pull(generation=1)).generation == 1
    assert (len(said) > 1, any(said)) == (True, False)
    asked = [call for call in world.store.faults.calls if call == "get_info"]
    assert len(asked) <= 2  # the layout, and the generation's record


async def test_a_bucket_that_was_made_again_is_followed(world: World) -> None:
    """Its numbers begin anew; content that is here is not fetched."""
    await world.commit(tree())
    await world.commit(newer())
    await world.pull()
    world.store.delete_bucket("app")
    world.publisher = Publisher(world.store)
    await world.commit(tree())
    result = await world.pull()
    assert result.generation == 1
    assert found(world.mirror) == expected(tree())


async def test_an_overtaken_generation_is_dropped_while_it_is_gathered(world: World, monkeypatch: Any) -> None:
    """The newest is gone to at once; what was staged serves it."""
    await world.commit(tree())
    subscriber = world.subscriber()
    real = Checkout.overtaken
    seen: list[bool] = []

    async def overtaken(self: Checkout, hinted: int) -> bool:
        if not seen:
            await world.commit(newer())
        seen.append(await real(self, world.publisher.seq))
        return seen[-1]

    monkeypatch.setattr(Checkout, "overtaken", overtaken)
    result = await subscriber.pull()
    assert seen[0] is True
    assert result.generation == 2
    assert found(world.mirror) == expected(newer())


async def test_what_was_staged_for_an_overtaken_generation_is_not_fetched_again(world: World, monkeypatch: Any) -> None:
    """Small files by their path, large ones by their chunks, also where the file is another one by then."""
    await world.commit(tree())
    calls = 0

    async def overtaken(self: Checkout, hinted: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == 3:  # after the small ones, and the first window of the large one
            edited = bytearray(LARGE)
            edited[-1] ^= 1
            await world.commit(tree() | {"large": file(bytes(edited))})
            return True
        return False

    monkeypatch.setattr(Checkout, "overtaken", overtaken)
    monkeypatch.setattr("syncd.gather.WINDOW_PIECES", 15)
    await world.pull()
    sent = [digest for digest in world.asked if digest == digest_of(LARGE[:CHUNK])]
    assert (calls > 3, len(sent), world.asked.count(digest_of(MIDDLE))) == (True, 1, 1)
    assert found(world.mirror)["large"][3] == digest_of(LARGE[:-1] + bytes([LARGE[-1] ^ 1]))


# -- layouts, rules, halts ---------------------------------------------------------------------------------------------


async def test_a_folder_may_change_its_layout_and_back(world: World) -> None:
    """Nothing is fetched again: the content is known by its digest."""
    spec = BucketSpec(layout="objects")
    await world.store.create_bucket("app", spec)
    bucket = world.store.bucket("app")
    for name, data in (("a", b"hello"), ("o", b"o")):
        await bucket.put_many([SmallPut(ObjectMeta(name), data, None, None)])
    await world.pull()
    assert (world.mirror / "a").read_bytes() == b"hello"
    await bucket.set_layout("generations")
    with pytest.raises(NoGeneration):
        await world.pull()
    assert (world.mirror / "o").read_bytes() == b"o"
    world.publisher.create = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    await world.commit({"a": file("hello"), "n": file("new")})
    result = await world.pull()
    assert (result.generation, result.reused_bytes) == (1, 5)
    assert found(world.mirror) == expected({"a": file("hello"), "n": file("new")})
    await bucket.set_layout("objects")
    await bucket.put_many([SmallPut(ObjectMeta("n"), b"new", None, None)])
    for name in ("channels/head", "generations/0000000001"):
        await bucket.delete(name, expected_seq=None, metadata={})
    result = await world.pull()
    assert (result.generation, result.downloaded_bytes) == (0, len(b"o"))
    assert (world.status.now.generation, world.status.now.root) == (0, "")
    assert sorted(path.name for path in world.mirror.iterdir()) == [".syncd", "a", "n", "o"]


async def test_the_layout_is_recognised_without_metadata(world: World, monkeypatch: Any) -> None:
    """A bucket whose publisher may not mark its stream: the channel tells."""
    await world.commit(tree())
    real = MemoryBucket.state

    async def state(self: MemoryBucket) -> Any:
        return replace(await real(self), metadata={})

    monkeypatch.setattr(MemoryBucket, "state", state)
    assert (await world.pull()).generation == 1
    assert found(world.mirror) == expected(tree())


async def test_generations_are_asked_for_where_there_are_none(world: World) -> None:
    """A usage error, and nothing is touched."""
    await world.store.create_bucket("app", BucketSpec(layout="objects"))
    with pytest.raises(UsageError, match="no generations"):
        await world.pull(generation=3)


async def test_rules_take_a_part_and_may_change(world: World) -> None:
    """A mirror of a part says so; other rules are applied to the same generation by the next process."""
    await world.commit(tree())
    world.options["rules"] = Rules(include=["d/e/", "a"])
    await world.pull()
    assert sorted(found(world.mirror)) == ["a", "d", "d/e", "d/e/deep"]
    assert (world.status.now.generation, world.status.now.exact) == (1, False)
    assert digest_of(LARGE[:CHUNK]) not in world.asked
    world.options["rules"] = Rules(exclude=["large"])
    await world.pull()
    assert found(world.mirror) == expected({path: item for path, item in tree().items() if path != "large"})
    world.options["rules"] = Rules()
    await world.pull()
    assert found(world.mirror) == expected(tree())
    assert world.status.now.exact


async def test_a_part_stays_a_part_where_only_the_rest_was_read(world: World) -> None:
    """What the rules leave out lies in a directory that did not change, and so was not read: still not exact."""
    wanted = tree()
    await world.commit(wanted)
    world.options["rules"] = Rules(exclude=["d/e/"])
    await world.pull()
    assert not world.status.now.exact
    for number in range(2):
        wanted["b"] = folder({"f1": file(f"edited {number}")})
        await world.commit(wanted)
        await world.pull()
        assert (world.status.now.generation, world.status.now.exact) == (2 + number, False)
    world.options["rules"] = Rules(exclude=["no-such-thing/"])
    await world.pull()
    assert (world.status.now.generation, world.status.now.exact) == (3, True)
    assert found(world.mirror) == expected(wanted)


@pytest.mark.parametrize(("left_out", "exact"), [("a", False), ("fresh", True), ("nothing", True)])
async def test_a_kept_release_of_a_part_is_no_more_than_that(world: World, left_out: str, exact: bool) -> None:
    """Gone back to by its number, without reading a node: it has what its rules left of it, not the later one's."""
    world.options |= {"rules": Rules(exclude=[left_out]), "rollout": RolloutOptions(mode="release")}
    await world.commit(tree())
    await world.pull()
    assert world.status.now.exact == exact
    await world.commit(newer())
    await world.pull()
    assert world.status.now.exact == (left_out == "nothing")
    result = await world.pull(generation=1)
    assert (result.generation, world.asked, world.status.now.exact) == (1, [], exact)


async def test_mapped_modes_make_a_mirror_inexact(world: World) -> None:
    """Its trees have other modes than the generation; a mapping that changes nothing is none."""
    await world.commit({"a": file("hello", mode=0o644)})
    for files, exact in ((0o600, False), (0o644, True)):
        world.options["rollout"] = RolloutOptions(modes=ModePolicy(files=files))
        await world.pull()
        assert (world.mirror / "a").stat().st_mode & 0o7777 == files
        assert world.status.now.exact == exact


@pytest.mark.fault("D1")
async def test_a_generation_without_anything_is_held_unless_its_publisher_allowed_it(world: World) -> None:
    """An empty tree is committed over a mirror that holds files.

    It is held and the mirror stays, until one comes whose record says that a person allowed it.
    """
    await world.commit(tree())
    await world.pull()
    await world.commit({})
    with pytest.raises(SafetyHalt, match="would remove all"):
        await world.pull()
    assert found(world.mirror) == expected(tree())
    await world.commit({}, allowed=True)
    await world.pull()
    assert found(world.mirror) == {}


async def test_drift_that_is_kept_makes_a_mirror_inexact(world: World) -> None:
    """It has the generation, and says that it is not quite that."""
    await world.commit(tree())
    await world.pull()
    world.options["drift"] = "keep"
    (world.mirror / "a").write_text("mine")
    await world.pull()
    assert (world.mirror / "a").read_text() == "mine"
    assert (world.status.now.generation, world.status.now.exact) == (1, False)


async def test_drift_is_repaired_from_what_the_generation_says(world: World) -> None:
    """One file's content is fetched, and nothing else."""
    await world.commit(tree())
    await world.pull()
    (world.mirror / "b/f3").write_text("mine")
    result = await world.pull()
    assert found(world.mirror) == expected(tree())
    assert (result.placed, len(world.asked)) == (2, 1)


@pytest.mark.fault("D5")
async def test_files_that_syncd_never_wrote_stay(world: World) -> None:
    """Own files lie in a mirrored directory that goes upstream, and where a refused generation wanted its own.

    Both stay, also when the next generation removes all around them.
    """
    await world.commit(tree())
    await world.pull()
    (world.mirror / "b/mine").write_text("mine")
    (world.mirror / "new").write_bytes(NEW)
    await world.commit(newer(), FAULTS["a blob is missing"][0])
    with pytest.raises(ObjectGone):
        await world.pull()
    await world.commit({"a": file("hello")})
    await world.pull()
    assert (world.mirror / "b/mine").read_text() == "mine"
    assert (world.mirror / "new").read_bytes() == NEW


# -- a running subscriber ----------------------------------------------------------------------------------------------


async def test_a_generation_that_cannot_be_had_is_left_for_a_newer_one_at_once(world: World) -> None:
    """Its retry is far away; the hint of a commit is enough."""
    await world.commit(tree())
    running = asyncio.create_task(world.subscriber().run())
    try:
        await eventually(lambda: world.status.now.generation == 1)
        await world.commit(newer(), FAULTS["a blob is damaged"][0])
        await eventually(lambda: world.status.now.state is FolderState.FAILED)
        assert [(one.path, one.code) for one in world.status.now.problems] == [("fresh", "bad_content")]
        assert found(world.mirror) == expected(tree())
        await world.commit(newer() | {"good": file("good")}, Forge())
        await eventually(lambda: world.status.now.generation == 3, 10)
        await eventually(lambda: world.status.now.state is FolderState.IN_SYNC)
        assert found(world.mirror) == expected(newer() | {"good": file("good")})
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_refused_generation_is_not_fetched_over_and_over(world: World, monkeypatch: Any) -> None:
    """Until its time comes; then it is, and may be good by then (its blob was put again)."""
    now = 1000.0
    await world.commit(tree())
    await world.commit(newer(), FAULTS["a blob is damaged"][0])
    subscriber = world.subscriber()
    await subscriber._open()
    try:
        subscriber._checkout._now = lambda: now  # type: ignore[method-assign]
        for _ in range(3):
            with pytest.raises(ObjectCorrupt):
                await subscriber._round(full=True, allow_delete=False)
        assert world.asked.count(digest_of(FRESH)) == 1
        now += 31
        with pytest.raises(ObjectCorrupt):
            await subscriber._round(full=True, allow_delete=False)
        assert world.asked.count(digest_of(FRESH)) == 2
        now += 31
        with pytest.raises(ObjectCorrupt):
            await subscriber._round(full=True, allow_delete=False)
        assert world.asked.count(digest_of(FRESH)) == 2
        world.damage(digest_of(FRESH), RAW + FRESH)
        now += 31
        await subscriber._round(full=True, allow_delete=False)
    finally:
        await subscriber._close()
    assert found(world.mirror) == expected(newer())


async def test_a_server_that_fails_in_the_middle_refuses_nothing(world: World) -> None:
    """A time-out is no fault of the generation: the next round goes on with what is staged."""
    await world.commit(tree())
    world.store.faults.fail("get_blobs", StoreTimeout("silence"))
    with pytest.raises(StoreTimeout):
        await world.pull()
    await world.pull()
    assert found(world.mirror) == expected(tree())


async def test_blobs_may_come_in_any_order(world: World) -> None:
    """The store promises none."""
    world.store.faults.reorder = True
    await world.commit(tree())
    await world.pull()
    await world.commit(newer())
    await world.pull()
    assert found(world.mirror) == expected(newer())
