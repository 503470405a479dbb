"""Publisher and subscriber on the memory twin: what one round does, without a server."""

from __future__ import annotations

import asyncio
import os
import re
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog

from syncd import agenda as agendas
from syncd import service
from syncd.agenda import Agenda
from syncd.errors import DiskProblem, FolderTaken, SafetyHalt, Unavailable, Untrusted
from syncd.index import Index
from syncd.outlet import PublishOptions, PushResult, Wish
from syncd.paths import subject_token
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.status import Allowance, FolderState, FolderStatus, StatusKeeper
from syncd.store.base import BucketSpec, Link, ObjectMeta, SmallPut
from syncd.store.memory import MemoryBucket, MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support.trees import difference


def keeper(role: Any) -> StatusKeeper:
    return StatusKeeper(FolderStatus(role, "app", "/"), clock=time.time, report=lambda _: None)


class World:
    """One store, one source, one mirror."""

    def __init__(self, tmp: Path, layout: str) -> None:
        self.tmp = tmp
        self.layout = layout
        self.store = MemoryStore()
        self.source = tmp / "source"
        self.mirror = tmp / "mirror"
        self.source.mkdir()
        self.options: dict[str, Any] = {}
        self.clock = time.time
        self.identity = "here:/source"

    async def push(self, **arguments: Any) -> Any:
        rules = self.options.get("rules", Rules())
        options = PublishOptions("app", self.source, rules, self.identity, **self.publish_options())
        publisher = Publisher(options, self.store, self.tmp / "publish.db", status=keeper("publish"), clock=self.clock)
        return await publisher.push(**arguments)

    def publish_options(self) -> dict[str, Any]:
        chosen = {key: value for key, value in self.options.items() if key not in {"rules", "drift", "owner"}}
        return {"layout": self.layout, "bucket": BucketSpec(layout=self.layout), **chosen}

    def sent(self, pushed: Any) -> int:
        """Bytes of content of a push; what nodes cost is not counted where it is little."""
        return pushed.uploaded_bytes if self.layout == "objects" else max(0, pushed.uploaded_bytes - NODES)

    async def pull(self, **arguments: Any) -> Any:
        chosen = {key: self.options[key] for key in ("drift", "owner") if key in self.options}
        options = SubscribeOptions("app", self.mirror, Rules(), **chosen)
        subscriber = Subscriber(options, self.store, self.tmp / "mirror.db", status=keeper("subscribe"))
        return await subscriber.pull(**arguments)

    async def foreign_put(self, name: str, data: bytes, **metadata: str) -> None:
        await self.store.create_bucket("app", BucketSpec())
        [result] = await self.store.bucket("app").put_many(
            [SmallPut(ObjectMeta(name, metadata=metadata), data, None, None)]
        )
        assert result.error is None


@pytest.fixture(params=["objects", "generations"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(tmp_path, request.param)


def only(layout: str) -> Any:
    """A fact about one layout alone."""
    return pytest.mark.parametrize("world", [layout], indirect=True)


NODES = 4096
"""Bytes that a commit of a small tree may cost besides content."""


def write(path: Path, text: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


async def test_a_tree_arrives_with_kinds_modes_times_and_link_texts(world: World) -> None:
    """Files, empty files, directories, symlinks, modes and nanoseconds are the same on the other side."""
    write(world.source / "a.txt", "hello")
    write(world.source / "empty", "")
    write(world.source / "big", os.urandom(700_000))
    write(world.source / "bin/tool", "#!/bin/sh\n").chmod(0o755)
    (world.source / "void").mkdir(mode=0o700)
    (world.source / "link").symlink_to("bin/tool")
    os.utime(world.source / "a.txt", ns=(0, 1_234_567_890_123_456_789))
    os.utime(world.source / "empty", ns=(0, -5_000_000_001))
    pushed = await world.push()
    assert (pushed.problems, pushed.again) == ([], set())
    pulled = await world.pull()
    assert pulled.problems == []
    assert difference(world.source, world.mirror) == {}


async def test_nothing_to_do_does_nothing(world: World) -> None:
    """A second round over an unchanged tree writes no object and no file."""
    write(world.source / "d/a.txt")
    await world.push()
    await world.pull()
    pushed, pulled = await world.push(), await world.pull()
    assert (pushed.puts, pushed.deletes, pulled.placed, pulled.removed) == (0, 0, 0, 0)


async def test_renames_copies_and_reverts_cost_no_upload(world: World) -> None:
    """Content that the bucket has under any name, or had a moment ago, is not sent again."""
    write(world.source / "a", os.urandom(300_000))
    write(world.source / "keep", "k")
    await world.push()
    (world.source / "a").rename(world.source / "b")
    assert world.sent(await world.push(allow_delete=True)) == 0
    content = (world.source / "b").read_bytes()
    write(world.source / "c/copy", content)
    assert world.sent(await world.push()) == 0
    write(world.source / "b", "other")
    (world.source / "c/copy").unlink()
    await world.push()
    write(world.source / "b", content)
    assert world.sent(await world.push()) == 0
    await world.pull()
    assert difference(world.source, world.mirror) == {}


@only("objects")
async def test_identical_files_in_one_push_are_sent_once(world: World) -> None:
    """Twins within one batch share their content."""
    for number in range(50):
        write(world.source / f"f{number}", b"same" * 5000)
    assert (await world.push()).uploaded_bytes == 20_000


async def test_kinds_may_change_at_one_path(world: World) -> None:
    """File, directory and symlink replace one another in both directions."""
    write(world.source / "x", "file")
    write(world.source / "y/inner/file", "deep")
    (world.source / "z").symlink_to("x")
    write(world.source / "keep", "k")
    await world.push()
    await world.pull()
    (world.source / "x").unlink()
    write(world.source / "x/now/dir", "d")
    for path in ("y/inner/file", "z"):
        (world.source / path).unlink()
    (world.source / "y/inner").rmdir()
    (world.source / "y").rmdir()
    write(world.source / "y", "now a file")
    (world.source / "z").mkdir()
    await world.push(allow_delete=True)
    result = await world.pull(allow_delete=True)
    assert result.problems == []
    assert difference(world.source, world.mirror) == {}


@pytest.mark.fault("D1")
async def test_an_emptied_source_is_held_until_allowed(world: World) -> None:
    """All files of the source are deleted after they were published and mirrored.

    The push halts and the mirror keeps them; with a person's word it passes, and the mirror follows.
    """
    write(world.source / "a")
    write(world.source / "b")
    await world.push()
    await world.pull()
    for name in ("a", "b"):
        (world.source / name).unlink()
    with pytest.raises(SafetyHalt, match="all 2 published paths"):
        await world.push()
    await world.pull()
    assert (world.mirror / "a").exists()
    await world.push(allow_delete=True)
    await world.pull()
    assert list(world.mirror.iterdir()) == [world.mirror / ".syncd"]


@only("objects")
@pytest.mark.fault("D1")
async def test_a_bucket_that_came_back_empty_does_not_empty_a_mirror(world: World) -> None:
    """The bucket is replaced by a new, empty one, without a tombstone.

    The first pull waits, the second halts, and the mirror keeps its file.
    """
    write(world.source / "a")
    await world.push()
    await world.pull()
    world.store = MemoryStore()
    await world.store.create_bucket("app", BucketSpec())
    await world.pull()  # it may be being filled again
    with pytest.raises(SafetyHalt, match="all 1 mirrored"):
        await world.pull()
    assert (world.mirror / "a").read_text() == "x"


@pytest.mark.fault("D5 D3")
async def test_only_what_syncd_wrote_is_removed(world: World) -> None:
    """Local files are put into a mirrored directory and beside it; then the directory is removed upstream.

    What was mirrored of it goes; the local files stay, and so does their directory.
    """
    write(world.source / "d/a")
    write(world.source / "keep")
    await world.push()
    await world.pull()
    write(world.mirror / "d/local", "mine")
    write(world.mirror / "other", "mine too")
    (world.source / "d/a").unlink()
    (world.source / "d").rmdir()
    await world.push(allow_delete=True)
    await world.pull()
    assert (world.mirror / "d/local").read_text() == "mine"
    assert (world.mirror / "other").read_text() == "mine too"
    assert not (world.mirror / "d/a").exists()


@pytest.mark.fault("C6")
async def test_a_lost_state_adopts_what_is_there_by_digest(world: World) -> None:
    """The index of the publisher and that of the mirror are deleted.

    The next push and pull send and fetch no content again, and both trees are equal.
    """
    write(world.source / "a", os.urandom(400_000))
    write(world.source / "d/b", "small")
    await world.push()
    await world.pull()
    for name in ("publish.db", "mirror.db"):
        (world.tmp / name).unlink()
    pushed, pulled = await world.push(), await world.pull()
    assert (world.sent(pushed), pulled.downloaded_bytes) == (0, 0)
    assert difference(world.source, world.mirror) == {}


async def test_drift_is_repaired(world: World) -> None:
    """A mirror file that was edited, removed, chmodded or replaced is put right again."""
    for name in "abcde":
        write(world.source / f"d/{name}", name * 100)
    await world.push()
    await world.pull()
    write(world.mirror / "d/a", "edited")
    (world.mirror / "d/b").unlink()
    (world.mirror / "d/c").chmod(0o600)
    (world.mirror / "d/d").unlink()
    (world.mirror / "d/d").symlink_to("/etc/passwd")
    (world.mirror / "d/e").unlink()
    (world.mirror / "d/e").mkdir()
    await world.pull()
    assert difference(world.source, world.mirror) == {}


@pytest.mark.parametrize("policy", ["report", "keep"])
async def test_drift_stays_under_the_other_policies(world: World, policy: str) -> None:
    """An edited or removed mirror file is left as it is; only "report" makes it a problem."""
    write(world.source / "a", "one")
    write(world.source / "b", "two")
    await world.push()
    await world.pull()
    world.options["drift"] = policy
    write(world.mirror / "a", "edited here")
    (world.mirror / "b").unlink()
    for _ in range(2):
        result = await world.pull()
        assert (world.mirror / "a").read_text() == "edited here"
        assert not (world.mirror / "b").exists()
        assert [problem.code for problem in result.problems] == (["drift"] * 2 if policy == "report" else [])


@pytest.mark.fault("M1")
async def test_everything_in_a_mirror_belongs_to_its_owner(world: World) -> None:
    """A mirror with a configured owner gets files with set-id bits, directories, symlinks, and changes of them.

    All belongs to that owner, and modes with their set-id bits equal the source's.
    """
    uid, gid = (65534, 65533) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    world.options["owner"] = (uid, gid)
    write(world.source / "d/f", "one").chmod(0o4755)
    (world.source / "link").symlink_to("d/f")
    write(world.source / "big", os.urandom(200_000))
    await world.push()
    await world.pull()
    (world.source / "d/f").chmod(0o2750)
    write(world.source / "d/g", "new")
    await world.push()
    result = await world.pull()
    assert result.problems == []
    for path in world.mirror.rglob("[!.]*"):
        if ".syncd" not in path.parts:
            st = path.lstat()
            assert (path, st.st_uid, st.st_gid) == (path, uid, gid)
    assert difference(world.source, world.mirror) == {}


@pytest.mark.fault("L1")
async def test_a_planted_symlink_is_healed_and_never_followed(world: World) -> None:
    """A mirror directory swapped for a symlink to the outside: nothing is written there, the directory comes back."""
    outside = world.tmp / "outside"
    outside.mkdir()
    write(world.source / "d/f", "one")
    await world.push()
    await world.pull()
    (world.mirror / "d/f").unlink()
    (world.mirror / "d").rmdir()
    (world.mirror / "d").symlink_to(outside)
    write(world.source / "d/f", "two")
    await world.push()
    await world.pull()
    assert list(outside.iterdir()) == []
    assert difference(world.source, world.mirror) == {}


@only("objects")
@pytest.mark.fault("P1 P6")
@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "a//b", "./a", ".", "..", "a/", "n\0ul", ".syncd/lock"]
)
async def test_hostile_names_are_refused_and_the_rest_goes_on(world: World, name: str) -> None:
    """Another client puts an object called `../x`, `/etc/x`, `a//b`, `.syncd/lock`, one with a NUL or the like.

    It is reported and writes nothing, and a good one beside it arrives.
    """
    await world.foreign_put(name, b"evil")
    await world.foreign_put("good", b"fine")
    result = await world.pull()
    assert [(problem.path, problem.code) for problem in result.problems] == [(name, "bad_name")]
    assert (world.mirror / "good").read_bytes() == b"fine"
    assert not (world.tmp / "x").exists()
    assert sorted(path.name for path in world.mirror.iterdir()) == [".syncd", "good"]


@only("objects")
async def test_objects_of_other_clients_get_sane_defaults(world: World) -> None:
    """An object without syncd's metadata becomes a 0644 file; its directories are made and removed with it."""
    await world.foreign_put("deep/er/file.txt", b"data")
    await world.foreign_put("stay", b"s")
    await world.pull()
    file = world.mirror / "deep/er/file.txt"
    assert (file.read_bytes(), file.stat().st_mode & 0o7777, file.parent.stat().st_mode & 0o7777) == (
        b"data",
        0o644,
        0o755,
    )
    assert (await world.pull()).placed == 0
    await world.store.bucket("app").delete("deep/er/file.txt", expected_seq=None, metadata={})
    await world.pull()
    assert not (world.mirror / "deep").exists()


@only("objects")
async def test_links_are_followed(world: World) -> None:
    """An object link brings its target's content, a bucket link a bucket's objects; both follow changes and vanish."""
    await world.foreign_put("target", b"one")
    await world.store.create_bucket("other", BucketSpec())
    other = world.store.bucket("other")
    await other.put_many([SmallPut(ObjectMeta("sub/f"), b"far", None, None)])
    bucket = world.store.bucket("app")
    await bucket.put_link("alias", Link("app", "target"))
    await bucket.put_link("mount", Link("other", None))
    await bucket.put_link("dead", Link("app", "nothing"))
    result = await world.pull()
    assert (world.mirror / "alias").read_bytes() == b"one"
    assert (world.mirror / "mount/sub/f").read_bytes() == b"far"
    assert [(problem.path, problem.code) for problem in result.problems] == [("dead", "dead_link")]
    await world.foreign_put("target", b"two!")
    await other.delete("sub/f", expected_seq=None, metadata={})
    await other.put_many([SmallPut(ObjectMeta("g"), b"new", None, None)])
    await world.pull()
    assert (world.mirror / "alias").read_bytes() == b"two!"
    assert not (world.mirror / "mount/sub").exists()
    assert (world.mirror / "mount/g").read_bytes() == b"new"


@pytest.mark.fault("W5")
async def test_a_missing_source_is_a_problem_and_not_a_deletion(world: World) -> None:
    """The source's root is renamed away, and a push runs that may delete.

    It ends with DiskProblem and changes nothing in the bucket, and a pulled mirror keeps its file.
    """
    write(world.source / "a")
    await world.push()
    await world.pull()
    stream = world.store.stream("app")
    before = (dict(stream.metas), {name: list(messages) for name, messages in stream.chunks.items()})
    world.source.rename(world.tmp / "elsewhere")
    with pytest.raises(DiskProblem, match=re.escape(f"source directory {world.source}: No such file or directory")):
        await world.push(allow_delete=True)
    assert (stream.metas, stream.chunks) == before
    await world.pull()
    assert [path.name for path in world.mirror.iterdir() if path.name != ".syncd"] == ["a"]
    assert (world.mirror / "a").read_bytes() == b"x"


@only("objects")
async def test_an_object_that_another_client_wrote_is_not_deleted(world: World) -> None:
    """The publisher tombstones only what syncd wrote, and overwrites only what the source has."""
    await world.foreign_put("theirs", b"t")
    await world.foreign_put("both", b"b")
    write(world.source / "both", "ours")
    write(world.source / "c", "c")
    await world.push()
    (world.source / "c").unlink()
    await world.push(allow_delete=True)
    await world.pull()
    assert {path.name: path.read_text() for path in world.mirror.iterdir() if path.is_file()} == {
        "theirs": "t",
        "both": "ours",
    }


@only("objects")
@pytest.mark.fault("O4")
async def test_replaced_content_is_freed_after_the_grace_time_and_not_before(world: World) -> None:
    """A file is replaced, and the publisher's clock is set on by 599 and by 601 s, with a push at each.

    The old content stays for readers at first, then it is freed; what is in use stays.
    """
    now = time.time()
    world.clock = lambda: now  # type: ignore[assignment]
    write(world.source / "a", "one")
    write(world.source / "b", "stays")
    await world.push()
    write(world.source / "a", "two")
    await world.push()
    bucket = world.store.bucket("app")

    async def nuids() -> int:
        return sum([len(page) async for page in bucket.list_chunks()])

    assert await nuids() == 3
    now += 599
    await world.push()
    assert await nuids() == 3
    now += 2
    await world.push()
    assert await nuids() == 2
    await world.pull()
    assert difference(world.source, world.mirror) == {}


@only("objects")
@pytest.mark.parametrize("end", [asyncio.CancelledError, Unavailable], ids=["crash", "failure"])
async def test_content_that_was_freed_by_one_that_did_not_end_is_not_announced(
    world: World, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    """The chunks are gone, and whoever removed them ended before it could say so: the next put sends them anew."""
    now = time.time()
    world.clock = lambda: now  # type: ignore[assignment]
    write(world.source / "a", "one")
    await world.push()
    write(world.source / "a", "two")
    await world.push()
    now += 601
    real = MemoryBucket.remove_chunks

    async def removed(self: MemoryBucket, nuid: str) -> None:
        await real(self, nuid)
        raise end("the end")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryBucket, "remove_chunks", removed)
        with pytest.raises(end):
            await world.push()
    write(world.source / "b", "one")
    await world.push()
    assert (await world.pull()).problems == []
    assert difference(world.source, world.mirror) == {}


@only("objects")
async def test_what_could_not_be_freed_is_found_and_freed_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it held is forgotten before it is to be removed; it itself is not: the next round frees it."""
    now = time.time()
    options = PublishOptions("app", world.source, Rules(), "here:/source", **world.publish_options())
    publisher = Publisher(options, world.store, None, status=keeper("publish"), clock=lambda: now)
    await publisher._open()

    async def away(_self: MemoryBucket, _nuid: str) -> None:
        raise Unavailable("the server is away")

    try:
        for text in ("one", "two"):
            write(world.source / "a", text)
            await publisher._round(None, PushResult(), Wish())
        now += 601
        with monkeypatch.context() as patch:
            patch.setattr(MemoryBucket, "remove_chunks", away)
            with pytest.raises(Unavailable):
                await publisher._round(None, PushResult(), Wish())
        await publisher._round(None, PushResult(), Wish())
    finally:
        await publisher._close()
    assert sum([len(page) async for page in world.store.bucket("app").list_chunks()]) == 1


@only("objects")
async def test_everything_that_is_due_is_freed_at_once(world: World) -> None:
    """However much it is, and although a push may be the last one for long."""
    now = time.time()
    world.clock = lambda: now  # type: ignore[assignment]
    for text in ("one", "two"):
        for number in range(1100):
            write(world.source / str(number), f"{text} {number}")
        await world.push()
    for _ in range(2):
        now += 601
        await world.push()
    assert sum([len(page) async for page in world.store.bucket("app").list_chunks()]) == 1100
    with closing(Index(world.tmp / "publish.db")) as index:
        assert index.row("SELECT count(*) FROM garbage") == (0,)


@only("objects")
async def test_chunks_that_somebody_removed_are_uploaded_again(world: World) -> None:
    """The audit finds announced content that is gone and puts it again."""
    write(world.source / "a", "one")
    await world.push()
    bucket = world.store.bucket("app")
    async for page in bucket.list_chunks():
        for nuid in page:
            await bucket.remove_chunks(nuid)
    assert (await world.push()).uploaded_bytes == 3
    await world.pull()
    assert difference(world.source, world.mirror) == {}


async def test_a_touch_sends_metadata_only(world: World) -> None:
    """A new time or mode is a metadata message; the mirror's file keeps its inode."""
    write(world.source / "a", os.urandom(300_000))
    await world.push()
    await world.pull()
    inode = (world.mirror / "a").stat().st_ino
    os.utime(world.source / "a", ns=(0, 42))
    (world.source / "a").chmod(0o640)
    pushed, pulled = await world.push(), await world.pull()
    assert (world.sent(pushed), pulled.downloaded_bytes) == (0, 0)
    assert (world.mirror / "a").stat().st_ino == inode
    assert difference(world.source, world.mirror) == {}


@pytest.mark.fault("S3")
async def test_an_unreadable_file_is_reported_and_keeps_what_was_published(world: World) -> None:
    """Opening a changed file is made to fail with EACCES during one push.

    It is reported, and the mirror keeps the version before until the next push.
    """
    write(world.source / "a", "one")
    write(world.source / "b", "b")
    await world.push()
    scan = __import__("syncd.scan", fromlist=["os"])
    real = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "a":
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, mode, dir_fd=dir_fd)

    write(world.source / "a", "two!")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan.os, "open", refuse)
        result = await world.push()
    assert [(problem.path, problem.code) for problem in result.problems] == [("a", "unreadable")]
    await world.pull()
    assert (world.mirror / "a").read_text() == "one"
    await world.push()
    await world.pull()
    assert (world.mirror / "a").read_text() == "two!"


async def test_concurrent_rounds_of_two_mirrors_share_a_bucket(world: World) -> None:
    """Two mirrors of one bucket are equal."""
    for number in range(200):
        write(world.source / f"d{number % 7}/f{number}", str(number))
    await world.push()
    second = World.__new__(World)
    second.__dict__.update(world.__dict__ | {"mirror": world.tmp / "mirror2", "tmp": world.tmp / "two"})
    (world.tmp / "two").mkdir()
    await asyncio.gather(world.pull(), second.pull())
    assert difference(world.source, world.mirror) == difference(world.source, second.mirror) == {}


async def test_a_new_ignore_file_withdraws_what_it_excludes(world: World) -> None:
    """.syncdignore adds to the exclude patterns, in its own directory and below, and is itself distributed."""
    for name in ("a.tmp", "d/b.tmp", "d/b.txt", "keep"):
        write(world.source / name)
    await world.push()
    write(world.source / "d/.syncdignore", "*.tmp\n")
    await world.push()
    await world.pull()
    files = {str(path.relative_to(world.mirror)) for path in world.mirror.rglob("*") if path.is_file()}
    assert files - {".syncd/lock"} == {"a.tmp", "d/.syncdignore", "d/b.txt", "keep"}


@only("objects")
@pytest.mark.fault("N5")
async def test_a_bucket_that_is_being_filled_again_does_not_thin_out_a_mirror(world: World) -> None:
    """The bucket is made again and holds one of ten objects, without tombstones.

    The first pull removes nothing, the second halts; once all are published again the mirror is equal.
    """
    for number in range(10):
        write(world.source / f"f{number}")
    await world.push()
    await world.pull()
    world.store = MemoryStore()
    await world.foreign_put("f0", b"x")
    await world.pull()
    assert len(list(world.mirror.glob("f*"))) == 10
    with pytest.raises(SafetyHalt, match="9 of 10 mirrored paths that vanished"):
        await world.pull()
    await world.push()
    await world.pull()
    assert difference(world.source, world.mirror) == {}


@only("objects")
@pytest.mark.fault("O1")
async def test_a_broken_object_leaves_the_version_before_in_place(world: World) -> None:
    """Two objects' metadata is overwritten in the bucket, with no JSON and with fields that make no file.

    Both are reported by this pull and the next, and the mirror keeps what it has of them.
    """
    for name in ("a", "b", "c", "d"):
        write(world.source / name, name)
    await world.push()
    await world.pull()
    world.store.write_raw_meta("app", subject_token("a"), b"not json")
    world.store.write_raw_meta("app", subject_token("b"), b'{"name":"b","bucket":"app","nuid":"n","size":1,"chunks":1}')
    for _ in range(2):
        result = await world.pull()
        assert {(problem.path, problem.code) for problem in result.problems} == {
            ("a", "bad_metadata"),
            ("b", "bad_object"),
        }
        assert [(world.mirror / name).read_text() for name in "abcd"] == ["a", "b", "c", "d"]


@pytest.mark.fault("C5")
async def test_a_second_publisher_is_refused_until_it_takes_over(world: World) -> None:
    """A publisher with another identity and no index pushes to a published folder; later it takes the folder over.

    Before, it is refused and changes nothing; afterwards the first one is refused.
    """
    write(world.source / "a", "one")
    await world.push()
    world.identity = "there:/source"
    write(world.source / "a", "two")
    (world.tmp / "publish.db").rename(world.tmp / "first.db")
    with pytest.raises(FolderTaken, match="is published by here:/source"):
        await world.push(allow_delete=True)
    await world.pull()
    assert (world.mirror / "a").read_text() == "one"
    assert (await world.push(take_over=True)).puts > 0
    await world.pull()
    assert difference(world.source, world.mirror) == {}
    world.identity = "here:/source"
    with pytest.raises(FolderTaken, match="is published by there:/source"):
        await world.push()


@only("objects")
async def test_twins_are_sent_once_wherever_they_stand(world: World) -> None:
    """Side by side, batches apart, small or large, and also where the first copy's put fails."""
    for number in range(1200):
        write(world.source / f"s{number:04}", f"{number % 450}-" * 50)
    large = os.urandom(400_000)
    for name in ("l1", "l2", "z/l3"):
        write(world.source / name, large)
    sent = sum(len(f"{number}-" * 50) for number in range(450)) + len(large)
    assert (await world.push()).uploaded_bytes == sent
    await world.pull()
    assert difference(world.source, world.mirror) == {}


@only("objects")
async def test_a_large_file_of_a_new_size_is_hashed_while_it_is_sent(world: World, monkeypatch: Any) -> None:
    """Its digest ends up in index and metadata; a second file of that size is compared before it is sent."""
    monkeypatch.setattr("syncd.announce.UNHASHED_BYTES", 200_000)
    content = os.urandom(300_000)
    for name in ("a", "b"):
        write(world.source / name, content)
    write(world.source / "c", os.urandom(300_000))
    assert (await world.push()).uploaded_bytes == 600_000
    assert (await world.push()).puts == 0
    (world.source / "a").rename(world.source / "d")
    assert (await world.push()).uploaded_bytes == 0
    await world.pull()
    assert difference(world.source, world.mirror) == {}


# -- the loop of rounds ------------------------------------------------------------------------------------------------


async def test_a_round_that_takes_long_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints are looked at unseen; when that lasts, as with a server that is away, nobody reads "in_sync" any more."""
    monkeypatch.setattr(service, "SHOWN_SECONDS", 0.05)
    monkeypatch.setattr(agendas, "MIN_QUIET_SECONDS", 3600.0)
    states: list[FolderState] = []
    status = StatusKeeper(
        FolderStatus("publish", "app", "/"), clock=time.time, report=lambda now: states.append(now.state)
    )
    agenda = Agenda(settle=0.0, rescan=3600.0)
    go_on = asyncio.Event()

    async def round_(paths: frozenset[str] | None, _allowed: bool) -> None:
        if paths == frozenset({"slow"}):
            await go_on.wait()

    async def finish(_result: None) -> None:
        agenda.done(0.0)
        status.in_sync()

    rounds = asyncio.create_task(
        service.keep_rounds(
            agenda, round_, finish, status=status, allowance=Allowance(), broken=lambda: False, rescan=3600.0, log=None
        )
    )
    try:
        async with asyncio.timeout(10):
            while status.now.state is not FolderState.IN_SYNC:
                await asyncio.sleep(0.001)
            states.clear()
            agenda.hint(["quick"])
            while not states:  # its last_sync
                await asyncio.sleep(0.001)
            assert set(states) == {FolderState.IN_SYNC}
            agenda.hint(["slow"])
            while status.now.state is not FolderState.SYNCING:
                await asyncio.sleep(0.001)
            go_on.set()
            while status.now.state is not FolderState.IN_SYNC:
                await asyncio.sleep(0.001)
    finally:
        rounds.cancel()
        await asyncio.gather(rounds, return_exceptions=True)


@pytest.mark.parametrize(
    ("error", "state"), [(SafetyHalt("held"), FolderState.HALTED), (Untrusted("refused"), FolderState.FAILED)]
)
async def test_what_a_person_has_to_look_at_stays_to_be_seen(
    monkeypatch: pytest.MonkeyPatch, error: Exception, state: FolderState
) -> None:
    """It is tried again and again, and each time takes long: whoever looks meanwhile is told, and since when."""
    monkeypatch.setattr(service, "SHOWN_SECONDS", 0.01)
    monkeypatch.setattr(agendas, "MIN_QUIET_SECONDS", 0.01)
    seen: list[tuple[FolderState, float]] = []
    status = StatusKeeper(
        FolderStatus("publish", "app", "/"), clock=time.time, report=lambda now: seen.append((now.state, now.since))
    )
    agenda = Agenda(settle=0.0, rescan=0.01)
    rounds = 0

    async def round_(_paths: frozenset[str] | None, _allowed: bool) -> None:
        nonlocal rounds
        rounds += 1
        await asyncio.sleep(0.05)
        if rounds < 4:
            raise error

    async def finish(_result: None) -> None:
        agenda.done(3600.0)
        status.in_sync()

    task = asyncio.create_task(
        service.keep_rounds(
            agenda,
            round_,
            finish,
            status=status,
            allowance=Allowance(),
            broken=lambda: False,
            rescan=0.01,
            log=structlog.get_logger(),
        )
    )
    try:
        async with asyncio.timeout(10):
            while status.now.state is not FolderState.IN_SYNC:
                await asyncio.sleep(0.001)
                agenda.hint([""])
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert len({since for what, since in seen if what is state}) == 1
    after = [what for what, _ in seen][[what for what, _ in seen].index(state) :]
    assert set(after) == {state, FolderState.IN_SYNC}
