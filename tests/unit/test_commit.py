"""Generations on the memory twin: what one round of the publisher commits, and what it costs."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from structlog.testing import capture_logs

from syncd.channels import Channels
from syncd.errors import FolderTaken, LayoutMismatch, ObjectGone, SafetyHalt, StoreFull, StoreTimeout
from syncd.keysets import KeyChange, KeySets, read_keys
from syncd.model import Kind
from syncd.moves import move_metadata, read_move
from syncd.nodes import Generation, NodeRef, digest_of
from syncd.outlet import PublishOptions, PushResult, Wish
from syncd.publisher import Publisher
from syncd.retention import Retention
from syncd.rules import Rules
from syncd.signatures import Signer, generate
from syncd.status import FolderStatus, StatusKeeper
from syncd.store import memory
from syncd.store.base import CHANNELS, HEAD, NUID_PREFIX, BadMeta, BucketSpec, Link, ObjectMeta, SmallPut
from syncd.store.codec import Codec
from syncd.store.memory import MemoryStore
from syncd.trees import Commit, TreeReader, generation_name
from syncd.trust import Trust
from tests.support.clocks import ServerClock

DAY = 86400.0


class Shelf:
    """One store, one source; publishers with and without memory."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.store = MemoryStore()
        self.source = tmp / "source"
        self.source.mkdir()
        self.options: dict[str, Any] = {}
        self.now = time.time()
        self.identity = "here:/source"
        self.index: Path | None = tmp / "publish.db"

    def publisher(self) -> Publisher:
        options = PublishOptions("app", self.source, Rules(), self.identity, **self.options)
        status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
        return Publisher(options, self.store, self.index, status=status, clock=lambda: self.now)

    async def push(self, **arguments: Any) -> Any:
        return await self.publisher().push(**arguments)

    async def head(self) -> Commit:
        found = await TreeReader(self.store.bucket("app")).channel(HEAD)
        assert found is not None
        return found

    async def tree(self, generation: Generation | None = None) -> dict[str, tuple[Any, ...]]:
        """What a generation holds, read by its blobs; every content is checked."""
        reader = TreeReader(self.store.bucket("app"))
        generation = generation or (await self.head()).generation
        found: dict[str, tuple[Any, ...]] = {}
        stack = [("", generation.root)]
        while stack:
            path, ref = stack.pop()
            [node] = await reader.nodes([ref])
            for child in node.children():
                where = f"{path}/{child.name}" if path else child.name
                entry = child.entry
                content: Any = entry.target
                if entry.kind is Kind.DIR:
                    stack.append((where, NodeRef(child.tree, child.location, child.length)))
                elif entry.kind is Kind.FILE:
                    parts = [part async for part in reader.content(child.location, entry.size, entry.digest)]
                    content = b"".join(parts)
                    assert blake3(content).hexdigest() == entry.digest
                found[where] = (entry.kind, entry.mode, entry.mtime_ns, content)
        return found

    def disk(self) -> dict[str, tuple[Any, ...]]:
        """What the source holds."""
        found: dict[str, tuple[Any, ...]] = {}
        for path in self.source.rglob("*"):
            st = path.lstat()
            where = str(path.relative_to(self.source))
            if path.is_symlink():
                found[where] = (Kind.SYMLINK, 0o777, st.st_mtime_ns, str(path.readlink()))
            elif path.is_dir():
                found[where] = (Kind.DIR, st.st_mode & 0o7777, st.st_mtime_ns, "")
            else:
                found[where] = (Kind.FILE, st.st_mode & 0o7777, st.st_mtime_ns, path.read_bytes())
        return found

    async def blobs(self) -> set[str]:
        names: set[str] = set()
        async for page in self.store.bucket("app").list_chunks():
            names.update(name for name in page if len(name) == 64)
        return names


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    shelf = Shelf(tmp_path)
    monkeypatch.setattr(memory, "time", ServerClock(lambda: shelf.now))
    return shelf


def write(path: Path, data: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def grow(source: Path) -> None:
    """Every kind of entry, every way to store a content."""
    write(source / "a.txt", "hello")
    write(source / "empty", "")
    write(source / "medium", os.urandom(200_000))
    write(source / "large", os.urandom(2_000_000))
    write(source / "bin/tool", "#!/bin/sh\n").chmod(0o755)
    write(source / "bin/same", "hello")
    write(source / "deep/er/still/file", "down here")
    (source / "void").mkdir(mode=0o700)
    (source / "link").symlink_to("bin/tool")
    os.utime(source / "a.txt", ns=(0, -5_000_000_001))


async def test_a_tree_is_committed_whole(shelf: Shelf) -> None:
    """Files of every size, empty files, directories and symlinks are in generation 1, with modes and nanoseconds."""
    grow(shelf.source)
    pushed = await shelf.push(note="first")
    assert (pushed.generation, pushed.committed, pushed.problems) == (1, True, [])
    assert await shelf.tree() == shelf.disk()
    record = (await shelf.head()).generation
    assert (record.number, record.note, record.parent, record.files, record.added) == (1, "first", "", 8, 8)
    sizes = [len(what[3]) for what in shelf.disk().values() if what[0] is Kind.FILE]
    assert record.size == sum(sizes)


async def test_an_empty_source_is_a_generation(shelf: Shelf) -> None:
    """The first push of an empty directory commits a tree with nothing in it."""
    assert (await shelf.push()).generation == 1
    assert await shelf.tree() == {}


async def test_nothing_changed_is_no_generation(shelf: Shelf) -> None:
    """A second push commits nothing and sends nothing; nor does one that only touched what it put back."""
    grow(shelf.source)
    await shelf.push()
    again = await shelf.push()
    assert (again.generation, again.committed, again.uploaded_bytes, again.puts) == (1, False, 0, 0)
    before = (shelf.source / "a.txt").stat().st_mtime_ns
    write(shelf.source / "a.txt", "hello")
    os.utime(shelf.source / "a.txt", ns=(0, before))
    assert (await shelf.push()).committed is False


async def test_numbers_parents_and_counts(shelf: Shelf) -> None:
    """Each generation names the record before it, and counts files added, changed and removed against it."""
    grow(shelf.source)
    await shelf.push()
    first = await shelf.head()
    write(shelf.source / "a.txt", "changed")
    write(shelf.source / "new", "n")
    (shelf.source / "medium").unlink()
    await shelf.push()
    second = await shelf.head()
    record = second.generation
    assert (record.number, record.parent) == (2, first.digest)
    assert (record.added, record.changed, record.removed, record.files) == (1, 1, 1, 8)
    assert await shelf.tree() == shelf.disk()
    assert (await shelf.tree(first.generation))["a.txt"][3] == b"hello"


async def test_equal_trees_have_equal_digests(tmp_path: Path) -> None:
    """However a tree came about, and however it is packed, its digest is the same."""
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shelf = Shelf(tmp_path / name)
        for number in range(5):
            write(shelf.source / f"d/f{number}", f"content {number}")
            os.utime(shelf.source / f"d/f{number}", ns=(0, number))
            if name == "two":
                await shelf.push()
        os.utime(shelf.source / "d", ns=(0, 1))
        await shelf.push()
        digests.append((await shelf.head()).generation.root.tree)
    assert digests[0] == digests[1]


async def test_renames_copies_and_reverts_send_nodes_only(shelf: Shelf) -> None:
    """Content that the bucket has under any name, or in any earlier generation, is not sent again."""
    content = os.urandom(3_000_000)
    write(shelf.source / "d/a", content)
    write(shelf.source / "small", os.urandom(5_000))
    await shelf.push()
    (shelf.source / "d/a").rename(shelf.source / "b")
    (shelf.source / "small").rename(shelf.source / "d/little")
    assert (await shelf.push(allow_delete=True)).uploaded_bytes < 2_000
    write(shelf.source / "c/copy", content)
    assert (await shelf.push()).uploaded_bytes < 2_000
    (shelf.source / "b").unlink()
    await shelf.push()
    write(shelf.source / "b", content)
    assert (await shelf.push()).uploaded_bytes < 2_000
    assert await shelf.tree() == shelf.disk()


async def test_an_edit_in_a_large_file_sends_its_chunks_only(shelf: Shelf) -> None:
    """One byte in the middle, and a kilobyte inserted at the front, cost a chunk or two each."""
    content = bytearray(os.urandom(20_000_000))
    write(shelf.source / "large", bytes(content))
    await shelf.push()
    content[10_000_000] ^= 1
    write(shelf.source / "large", bytes(content))
    assert (await shelf.push()).uploaded_bytes < 600_000
    write(shelf.source / "large", os.urandom(1000) + bytes(content))
    assert (await shelf.push()).uploaded_bytes < 600_000
    assert await shelf.tree() == shelf.disk()


async def test_many_small_files_are_few_blobs(shelf: Shelf) -> None:
    """3,000 small files travel in some packs, nodes apart from contents; an edit sends one blob."""
    for number in range(3000):
        write(shelf.source / f"d{number % 30}/f{number}", os.urandom(1000))
    await shelf.push()
    assert len(await shelf.blobs()) < 12
    before = await shelf.blobs()
    write(shelf.source / "d7/f7", "edited")
    pushed = await shelf.push()
    assert len(await shelf.blobs() - before) == 1
    assert pushed.uploaded_bytes < 20_000
    assert await shelf.tree() == shelf.disk()


async def test_a_directory_of_many_entries(shelf: Shelf) -> None:
    """A node too large for a blob is cut in chunks; an edit in its middle sends a few of them."""
    (shelf.source / "d").mkdir()
    for number in range(12_000):
        (shelf.source / f"d/a-name-of-some-length-{number:08d}").write_bytes(b"%d" % number)
    await shelf.push()
    write(shelf.source / "d/a-name-of-some-length-00006000", "edited")
    assert (await shelf.push()).uploaded_bytes < 600_000
    assert await shelf.tree() == shelf.disk()


async def test_kinds_that_replace_one_another(shelf: Shelf) -> None:
    """File, directory and symlink in one another's place, and back."""
    write(shelf.source / "x", "file")
    write(shelf.source / "keep", "k")
    await shelf.push()
    (shelf.source / "x").unlink()
    write(shelf.source / "x/y/z", "below")
    await shelf.push()
    assert await shelf.tree() == shelf.disk()
    (shelf.source / "x/y/z").unlink()
    (shelf.source / "x/y").rmdir()
    (shelf.source / "x").rmdir()
    (shelf.source / "x").symlink_to("keep")
    await shelf.push(allow_delete=True)
    assert await shelf.tree() == shelf.disk()
    (shelf.source / "x").unlink()
    write(shelf.source / "x", "file")
    await shelf.push()
    assert await shelf.tree() == shelf.disk()


async def test_metadata_alone(shelf: Shelf) -> None:
    """A mode or a time makes a generation and sends no content."""
    write(shelf.source / "d/a", os.urandom(300_000))
    await shelf.push()
    (shelf.source / "d/a").chmod(0o600)
    os.utime(shelf.source / "d", ns=(0, 77))
    pushed = await shelf.push()
    assert (pushed.generation, pushed.uploaded_bytes < 1000) == (2, True)
    assert await shelf.tree() == shelf.disk()


async def test_an_unreadable_path_stays_as_it_was_committed(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is reported, keeps its last content in the tree, and the rest goes on."""
    write(shelf.source / "bad", "before")
    write(shelf.source / "good", "before")
    await shelf.push()
    before = (await shelf.tree())["bad"]
    write(shelf.source / "bad", "after, and longer")
    write(shelf.source / "good", "after")
    real = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if path == "bad":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    pushed = await shelf.push()
    assert [problem.code for problem in pushed.problems] == ["unreadable"]
    tree = await shelf.tree()
    assert (tree["bad"], tree["good"][3]) == (before, b"after")
    monkeypatch.undo()
    assert (await shelf.push()).generation == 3
    assert await shelf.tree() == shelf.disk()


async def test_a_lost_index_costs_no_upload(shelf: Shelf) -> None:
    """With its memory gone, the publisher reads the head back, hashes its source and commits nothing."""
    grow(shelf.source)
    await shelf.push()
    assert shelf.index is not None
    shelf.index.unlink()
    again = await shelf.push()
    assert (again.generation, again.committed, again.uploaded_bytes) == (1, False, 0)
    write(shelf.source / "a.txt", "edited")
    shelf.index.unlink()
    again = await shelf.push()
    assert (again.generation, again.puts) == (2, 1)
    assert again.uploaded_bytes < 2_000
    assert await shelf.tree() == shelf.disk()


async def test_finished_blobs_are_not_sent_again(shelf: Shelf) -> None:
    """A push that dies before its commit leaves blobs; the next one finds them and sends only what is missing."""
    write(shelf.source / "large", os.urandom(4_000_000))
    shelf.store.faults.fail("commit_generation", StoreTimeout("silence"))
    with pytest.raises(StoreTimeout):
        await shelf.push()
    pushed = await shelf.push()
    assert (pushed.generation, pushed.uploaded_bytes < 2_000) == (1, True)
    assert await shelf.tree() == shelf.disk()


async def test_a_failure_among_the_blobs_is_resumed(shelf: Shelf) -> None:
    """What was acknowledged before a failure in the middle of the upload is not sent again."""
    write(shelf.source / "a", os.urandom(4_000_000))
    write(shelf.source / "b", os.urandom(4_000_000))
    sent = len(shelf.store.faults.calls)
    assert sent == 0
    shelf.store.faults.fail("commit_generation", StoreTimeout("silence"))
    with pytest.raises(StoreTimeout):
        await shelf.push()
    (shelf.source / "b").unlink()
    content = os.urandom(4_000_000)
    write(shelf.source / "c", content)
    pushed = await shelf.push()
    assert 4_000_000 < pushed.uploaded_bytes < 4_100_000
    assert await shelf.tree() == shelf.disk()


async def test_a_change_that_is_undone_after_a_failed_commit(shelf: Shelf) -> None:
    """Nodes built for a commit that failed never get into a later tree."""
    write(shelf.source / "one/f", "first")
    write(shelf.source / "two/g", "first")
    os.utime(shelf.source / "one/f", ns=(0, 1))
    await shelf.push()
    write(shelf.source / "one/f", "second")
    os.utime(shelf.source / "one/f", ns=(0, 2))
    shelf.store.faults.fail("commit_generation", StoreTimeout("silence"))
    with pytest.raises(StoreTimeout):
        await shelf.push()
    write(shelf.source / "one/f", "first")
    os.utime(shelf.source / "one/f", ns=(0, 1))
    write(shelf.source / "two/g", "other")
    await shelf.push()
    assert await shelf.tree() == shelf.disk()


async def test_a_second_publisher_is_told_and_nothing_is_lost(shelf: Shelf) -> None:
    """Another identity is refused by the claim; its files are as they were, and so is the bucket."""
    write(shelf.source / "a")
    await shelf.push()
    shelf.identity, shelf.index = "elsewhere:/other", shelf.tmp / "other.db"
    write(shelf.source / "b")
    with pytest.raises(FolderTaken, match="here:/source"):
        await shelf.push()
    assert (await shelf.head()).generation.number == 1
    assert (await shelf.push(take_over=True)).generation == 2


async def test_a_head_that_moved_under_us_is_a_clear_error(shelf: Shelf) -> None:
    """The fence: a publisher whose head is stale commits nothing and says who was there."""
    write(shelf.source / "a")
    await shelf.push()
    publisher = shelf.publisher()
    real = shelf.store.bucket("app").commit_generation
    raced = False

    async def race(self: Any, *arguments: Any, **options: Any) -> int:
        nonlocal raced
        if not raced:
            raced = True
            other = Shelf.__new__(Shelf)
            other.__dict__.update(shelf.__dict__)
            other.identity, other.index = "elsewhere:/other", shelf.tmp / "other.db"
            await other.push(take_over=True)
        return int(await real(*arguments, **options))

    write(shelf.source / "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(shelf.store.bucket("app")), "commit_generation", race)
        with pytest.raises(FolderTaken, match="elsewhere:/other"):
            await publisher.push()
    head = (await shelf.head()).generation
    assert (head.number, head.publisher) == (2, "elsewhere:/other")
    assert await shelf.tree() == shelf.disk()


async def test_deleting_everything_is_held_until_a_person_allows_it(shelf: Shelf) -> None:
    """A halted plan commits nothing at all; the allowance travels in the record, and stays while it is empty."""
    for name in "abc":
        write(shelf.source / name)
    await shelf.push()
    for name in "abc":
        (shelf.source / name).unlink()
    with pytest.raises(SafetyHalt, match="all 3"):
        await shelf.push()
    assert (await shelf.head()).generation.number == 1
    await shelf.push(allow_delete=True)
    assert (await shelf.head()).generation.allowed is True
    (shelf.source / "dir").mkdir()
    await shelf.push()
    assert (await shelf.head()).generation.allowed is True
    write(shelf.source / "dir/file")
    await shelf.push()
    assert (await shelf.head()).generation.allowed is False


async def test_lost_blobs_are_sent_again(shelf: Shelf) -> None:
    """Blobs that vanished from the bucket come back with a generation of the same tree."""
    grow(shelf.source)
    for number in range(50):
        write(shelf.source / f"many/{number}", os.urandom(20_000))
    await shelf.push()
    tree = (await shelf.head()).generation.root.tree
    for digest in sorted(await shelf.blobs()):
        shelf.store.stream("app").chunks.pop(digest)
        await shelf.push()
        assert (await shelf.head()).generation.root.tree == tree
        assert await shelf.tree() == shelf.disk()


async def test_whoever_missed_a_lost_blob_is_told_by_a_new_generation(shelf: Shelf) -> None:
    """Sent again, the same tree is committed anew: a subscriber that gave up on it looks again."""
    content = os.urandom(200_000)
    write(shelf.source / "f", content)
    await shelf.push()
    before = await shelf.head()
    shelf.store.stream("app").chunks.pop(blake3(content).hexdigest())
    result = await shelf.push()
    after = await shelf.head()
    assert (result.committed, after.generation.number) == (True, before.generation.number + 1)
    assert after.generation.root == before.generation.root


async def test_numbers_grow_on_where_the_head_was_lost(shelf: Shelf) -> None:
    """Without the head the bucket's own generations say which numbers were used."""
    for number in range(3):
        write(shelf.source / "f", str(number))
        await shelf.push()
    bucket = shelf.store.bucket("app")
    await bucket.delete(CHANNELS + HEAD, expected_seq=None, metadata={})
    write(shelf.source / "f", "after")
    assert (await shelf.push()).generation == 4
    assert await shelf.tree() == shelf.disk()


async def test_the_status_names_the_generation(shelf: Shelf) -> None:
    """What a publisher's status says is what it committed, and what it found committed."""
    reports: list[FolderStatus] = []
    write(shelf.source / "f")
    await shelf.push()
    status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=reports.append)
    options = PublishOptions("app", shelf.source, Rules(), shelf.identity)
    running = asyncio.create_task(Publisher(options, shelf.store, shelf.index, status=status).run())
    try:
        async with asyncio.timeout(30):
            while not reports or reports[-1].generation == 0:
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    head = await shelf.head()
    assert (reports[-1].generation, reports[-1].root) == (1, head.generation.root.tree)


async def test_a_bucket_made_anew_is_filled_again(shelf: Shelf) -> None:
    """Another bucket of the name is filled whole; its numbers go on where the lost one's ended."""
    grow(shelf.source)
    await shelf.push()
    write(shelf.source / "a.txt", "two")
    await shelf.push()
    shelf.store.delete_bucket("app")
    assert (await shelf.push()).generation == 3
    assert await shelf.tree() == shelf.disk()


async def test_a_full_bucket_keeps_the_head(shelf: Shelf) -> None:
    """No room: said so, the generation before stays; with room again it goes on."""
    shelf.options["bucket"] = BucketSpec(max_bytes=1_000_000)
    write(shelf.source / "a", "small")
    await shelf.push()
    write(shelf.source / "b", os.urandom(2_000_000))
    with pytest.raises(StoreFull):
        await shelf.push()
    assert (await shelf.head()).generation.number == 1
    (shelf.source / "b").unlink()
    write(shelf.source / "c", os.urandom(1000))
    assert (await shelf.push()).generation == 2
    assert await shelf.tree() == shelf.disk()


@pytest.mark.fault("N5")
async def test_what_a_failed_publish_left_is_collected_although_nothing_fits(shelf: Shelf) -> None:
    """A bucket of 1 MB is filled to the brim with blobs that no generation reaches; a file waits in the source.

    The running publisher frees them after the grace time and commits the file by itself.
    """
    shelf.options |= {"bucket": BucketSpec(max_bytes=1_000_000), "grace_seconds": 1.0, "settle_seconds": 0.01}
    await shelf.push()
    bucket = shelf.store.bucket("app")
    async with bucket.blob_sink() as sink:
        while (await bucket.state()).size < 940_000:
            content = os.urandom(50_000)
            await sink.put(digest_of(content), Codec().encode(content))
            await sink.flush()
    write(shelf.source / "small", "waits for room")
    running = asyncio.create_task(shelf.publisher().run())
    try:
        async with asyncio.timeout(60):
            while (await shelf.head()).generation.number < 2:
                assert not running.done()
                shelf.now += 0.1
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert await shelf.tree() == shelf.disk()


async def test_a_head_that_somebody_else_moved_is_told_once(shelf: Shelf) -> None:
    """Not in each round: it is not ours to renew, and stays so until the source changes."""
    signer, other = Signer(generate()[0]), Signer(generate()[0])
    shelf.options |= {"signer": signer, "expire_seconds": 60.0}
    for text in ("one", "two"):
        write(shelf.source / "a", text)
        await shelf.push()
    await Channels(shelf.store.bucket("app"), lambda: shelf.now).rollback(HEAD, to=1, who="somebody", signer=other)
    publisher = shelf.publisher()
    await publisher._open()
    try:
        with capture_logs() as logs:
            for _ in range(3):
                shelf.now += 40
                await publisher._round(None, PushResult(), Wish())
    finally:
        await publisher._close()
    assert [entry["event"] for entry in logs].count("head_not_renewed") == 1


# -- retention ---------------------------------------------------------------------------------------------------------


async def test_collection_frees_what_no_kept_generation_reaches(shelf: Shelf) -> None:
    """Beyond the newest two, generations go at once and their blobs after the grace time; the rest can be read."""
    shelf.options |= {"keep_generations": 2, "grace_seconds": 60.0, "compress": False}
    for _ in range(4):
        write(shelf.source / "medium", os.urandom(200_000))
        write(shelf.source / "small", os.urandom(1_000))
        write(shelf.source / "keep", "always the same")
        await shelf.push()
    assert len(await shelf.blobs()) >= 8
    shelf.now += 3600
    dry = await shelf.publisher().collect(dry_run=True)
    assert (dry.generations_removed, dry.generations_kept) == (2, 2)
    assert len(await shelf.blobs()) >= 8
    await shelf.publisher().collect()
    shelf.now += 61
    collected = await shelf.publisher().collect()
    assert collected.freed_blobs >= 3
    reader = TreeReader(shelf.store.bucket("app"))
    kept = [number for number in range(1, 5) if await reader.generation(number) is not None]
    assert kept == [3, 4]
    for number in kept:
        commit = await reader.generation(number)
        assert commit is not None
        await shelf.tree(commit.generation)
    assert await shelf.tree() == shelf.disk()


async def test_records_that_no_generation_names_are_collected(shelf: Shelf) -> None:
    """A kill between a generation's removal and that of its record leaves a chunk that the next collection frees."""
    shelf.options |= {"grace_seconds": 1.0}
    write(shelf.source / "f")
    await shelf.push()
    chunks = shelf.store.stream("app").chunks
    record = next(name for name in chunks if name.startswith(NUID_PREFIX))
    stray, foreign = f"{NUID_PREFIX}{'0' * 22}", "anothers-nuid"
    chunks[stray], chunks[foreign] = list(chunks[record]), list(chunks[record])
    for expected in ({record, foreign, stray}, {record, foreign}):  # first it waits for the grace time
        shelf.now += 60
        await shelf.publisher().collect()
        assert {name for name in chunks if len(name) != 64} == expected


async def test_what_an_operator_does_during_a_collection_survives(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key set that is written, and a channel that is moved to an expired generation, while blobs are marked."""
    shelf.options |= {"keep_generations": 2, "grace_seconds": 1.0}
    for _ in range(4):
        write(shelf.source / "f", os.urandom(5000))
        await shelf.push()
    bucket = shelf.store.bucket("app")
    signer = Signer(generate()[0])
    trust = Trust(frozenset({signer.public}), 1)
    mark = Retention._mark

    async def meanwhile(self: Retention, infos: Any) -> None:
        await mark(self, infos)
        await KeySets(bucket, time.time).change(trust, KeyChange((Signer(generate()[0]).public,)), [signer])
        await Channels(bucket, time.time).promote(1, "stable", who="me")

    shelf.now += 3600
    with monkeypatch.context() as patched:
        patched.setattr(Retention, "_mark", meanwhile)
        await shelf.publisher().collect()
    for _ in range(3):
        shelf.now += 60
        await shelf.publisher().collect()
    assert {version: bool(one.data) for version, one in (await read_keys(bucket)).items()} == {1: True}
    stable = await TreeReader(bucket).channel("stable")
    assert stable is not None
    await shelf.tree(stable.generation)


@pytest.mark.fault("K3")
async def test_a_forged_count_does_not_stop_the_publisher(shelf: Shelf) -> None:
    """Whoever may write to the bucket sets the head's count to the highest there is: the next commit goes on."""
    write(shelf.source / "f", "one")
    await shelf.push()
    head = await shelf.head()
    move = read_move(head.move)
    assert move is not None
    bucket = shelf.store.bucket("app")
    forged = move_metadata(replace(move, count=(1 << 53) - 1), None)
    await bucket.put_link(CHANNELS + HEAD, Link("app", generation_name(1)), metadata=forged)
    write(shelf.source / "f", "two")
    assert (await shelf.push()).generation == 2
    after = read_move((await shelf.head()).move)
    assert after is not None
    assert after.count == 2


async def test_content_that_was_freed_comes_back_when_it_is_needed(shelf: Shelf) -> None:
    """A revert to collected content sends it again, over its remover."""
    shelf.options |= {"keep_generations": 1, "grace_seconds": 1.0}
    content = os.urandom(200_000)
    write(shelf.source / "f", content)
    await shelf.push()
    write(shelf.source / "f", os.urandom(200_000))
    await shelf.push()
    for _ in range(3):
        shelf.now += 60
        await shelf.publisher().collect()
    write(shelf.source / "f", content)
    pushed = await shelf.push()
    assert pushed.uploaded_bytes > 200_000
    assert await shelf.tree() == shelf.disk()


async def test_a_generation_that_cannot_be_read_stops_the_collection(shelf: Shelf) -> None:
    """Nothing is freed while it is not known what is needed."""
    shelf.options |= {"keep_generations": 5, "grace_seconds": 1.0}
    for _ in range(3):
        write(shelf.source / "f", os.urandom(1_000))
        await shelf.push()
    old = await TreeReader(shelf.store.bucket("app")).generation(1)
    assert old is not None
    shelf.store.stream("app").chunks.pop(old.generation.root.location.blob)
    before = await shelf.blobs()
    shelf.now += 60
    with pytest.raises(ObjectGone):
        await shelf.publisher().collect()
    assert await shelf.blobs() == before


async def test_sparse_packs_are_packed_anew(shelf: Shelf) -> None:
    """A pack of which little is left is dissolved by a collection and the commit after it."""
    shelf.options |= {"keep_generations": 1, "grace_seconds": 1.0, "compress": False}
    for number in range(20):
        write(shelf.source / f"f{number}", os.urandom(20_000))
    await shelf.push()
    for number in range(18):
        (shelf.source / f"f{number}").unlink()
    await shelf.push(allow_delete=True)
    shelf.now += 60
    assert (await shelf.publisher().collect()).repacked == 1
    await shelf.push()
    for _ in range(2):
        shelf.now += 60
        await shelf.publisher().collect()
    state = await shelf.store.bucket("app").state()
    assert state.size < 100_000
    assert await shelf.tree() == shelf.disk()


# -- layouts -----------------------------------------------------------------------------------------------------------


async def test_the_layout_changes_only_when_asked(shelf: Shelf) -> None:
    """Objects to generations and back: refused with both ways out named, done with the word, nothing left behind."""
    grow(shelf.source)
    shelf.options["layout"] = "objects"
    await shelf.push()
    shelf.options["layout"] = "generations"
    with pytest.raises(LayoutMismatch, match="objects layout") as refusal:
        await shelf.push()
    assert "--change-layout" in refusal.value.hint
    assert (await shelf.push(change_layout=True)).generation == 1
    assert await shelf.tree() == shelf.disk()
    assert (await shelf.store.bucket("app").state()).metadata["syncd.layout"] == "generations"
    names = {item.name async for item in live(shelf)}
    assert names == {"channels/head", "generations/0000000001"}
    assert (await shelf.push()).committed is False
    shelf.options["layout"] = "objects"
    with pytest.raises(LayoutMismatch, match="generations layout"):
        await shelf.push()
    await shelf.push(change_layout=True)
    names = {item.name async for item in live(shelf)}
    assert names == {str(path.relative_to(shelf.source)) for path in shelf.source.rglob("*")}
    assert not any(shelf.store.blob_payload("app", digest) for digest in await shelf.blobs())
    assert (await shelf.store.bucket("app").state()).metadata["syncd.layout"] == "objects"


async def test_other_clients_objects_survive_a_change_of_layout(shelf: Shelf) -> None:
    """What syncd did not write it does not remove."""
    shelf.options["layout"] = "objects"
    write(shelf.source / "ours")
    await shelf.push()
    put = SmallPut(ObjectMeta("theirs"), b"x", None, None)
    await shelf.store.bucket("app").put_many([put])
    shelf.options["layout"] = "generations"
    await shelf.push(change_layout=True)
    assert "theirs" in {item.name async for item in live(shelf)}


async def live(shelf: Shelf) -> Any:
    async for page in shelf.store.bucket("app").changes(0):
        for item in page.items:
            if not isinstance(item, BadMeta) and not item.deleted:
                yield item
