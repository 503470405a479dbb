"""syncd and nats-py's ObjectStore on one bucket, in both directions. What differs is in docs/interop.md."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats
import pytest
from nats.js.api import ObjectMeta, ObjectMetaOptions
from nats.js.errors import NotFoundError, ObjectAlreadyExists, ObjectNotFoundError

from syncd.errors import BucketSealed
from syncd.store.base import CHUNK_SIZE, EMPTY_SHA256, Link, hex_to_digest
from tests.support.interop import (
    BEYOND_ASCII,
    NAMES,
    PROMPT_SECONDS,
    SECONDS,
    SIZES,
    Interop,
    content,
    hangs,
    read_tree,
    tree_of,
    within,
)
from tests.support.trees import difference, equal_trees

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import NatsServer

ROLLUP = {"Nats-Rollup": "sub"}
MIRROR_FILE_MODE, MIRROR_DIR_MODE = 0o644, 0o755


@pytest.fixture
async def world(tmp_path: Path, shared_server: NatsServer, request: pytest.FixtureRequest) -> AsyncIterator[Interop]:
    bucket = "py-" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    async with Interop.open(tmp_path, shared_server, bucket) as opened:
        yield opened


def token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


# -- nats-py reads what syncd wrote ------------------------------------------------------------------------------------


@pytest.mark.fault("O6")
async def test_nats_py_reads_every_size_that_syncd_wrote(world: Interop) -> None:
    """Empty, one byte, k chunks and a byte more or less, megabytes: equal bytes, size and number of chunks."""
    files = {name: content(size, size) for name, size in SIZES.items()}
    await world.push(files)
    store = await world.other()
    for name, data in files.items():
        result = await within(store.get(name))
        assert result.data == data, name
        assert (result.info.size, result.info.chunks) == (len(data), -(-len(data) // CHUNK_SIZE)), name
        assert result.info.digest == hex_to_digest(hashlib.sha256(data).hexdigest()), name


async def test_nats_py_reads_every_name_that_syncd_wrote(world: Interop) -> None:
    """Spaces, wildcards of NATS, dots, control characters, deep paths, any script: listed and read by name."""
    files = tree_of(NAMES + BEYOND_ASCII)
    await world.push(files)
    store = await world.other()
    assert {info.name for info in await within(store.list()) if info.size} == set(files)
    for name, data in files.items():
        assert (await within(store.get(name))).data == data, name


async def test_nats_py_sees_directories_and_symlinks_as_empty_objects(world: Interop) -> None:
    """What is no file in the source is an object of size 0; nats-py lists and reads it."""
    (world.source / "void").mkdir()
    (world.source / "link").symlink_to("d/file")
    await world.push({"d/file": b"x"})
    store = await world.other()
    assert {info.name: info.size for info in await within(store.list())} == {"d": 0, "d/file": 1, "void": 0, "link": 0}
    for name in ("d", "void", "link"):
        assert (await within(store.get(name))).data == b""
    await world.pull()
    assert difference(world.source, world.mirror) == {}


async def test_nats_py_sees_headers_and_not_metadata(world: Interop) -> None:
    """Content-Type is a list of one; `metadata` is in the message, which nats-py's ObjectInfo has no field for."""
    await world.push({"page.html": b"<p>", "blob": b"\0"})
    store = await world.other()
    infos = {info.name: info for info in await within(store.list())}
    assert infos["page.html"].headers == {"Content-Type": ["text/html"]}
    assert infos["blob"].headers == {"Content-Type": ["application/octet-stream"]}
    assert not hasattr(infos["blob"], "metadata")
    stored = (await world.raw(token("blob")))["metadata"]
    assert stored.items() >= {"team": "web", "syncd-kind": "file", "syncd-publisher": "here:/source"}.items()


async def test_nats_py_reads_the_status_of_a_bucket_that_syncd_made(world: Interop) -> None:
    """Name, storage, replicas, size and seal are those of the stream."""
    await world.push({"a": content(1000)})
    status = await within((await world.other()).status())
    assert (status.bucket, status.storage_type, status.replicas, bool(status.sealed)) == (
        world.bucket,
        "file",
        1,
        False,
    )
    assert status.size > 1000


async def test_nats_py_watches_a_bucket_that_syncd_publishes_to(world: Interop) -> None:
    """First what is there and the end marker, then every put, touch and delete of later pushes."""
    await world.push({"a": b"1", "b": b"2"})
    watcher = await within((await world.other()).watch())
    first = [await watcher.updates(SECONDS) for _ in range(3)]
    assert [info and info.name for info in first] == ["a", "b", None]
    await world.push({"a": b"changed"})
    update = await watcher.updates(SECONDS)
    assert (update.name, update.size, bool(update.deleted)) == ("a", 7, False)
    os.utime(world.source / "b", ns=(0, 0))
    await world.push()
    update = await watcher.updates(SECONDS)
    assert (update.name, update.size, bool(update.deleted)) == ("b", 1, False)
    (world.source / "a").unlink()
    await world.push()
    update = await watcher.updates(SECONDS)
    assert (update.name, update.size, update.deleted, update.mtime) == ("a", 0, True, None)
    await watcher.stop()


@pytest.mark.fault("O8")
async def test_tombstones_of_syncd_do_not_break_a_listing_by_nats_py(world: Interop) -> None:
    """syncd publishes two files and deletes the one, then the other; nats-py lists and gets each time.

    They are listed as deleted; where that is not wanted, a bucket without any other object is "not found".
    """
    await world.push({"a": b"1", "b": b"2"})
    (world.source / "a").unlink()
    await world.push()
    store = await world.other()
    assert {info.name: bool(info.deleted) for info in await within(store.list())} == {"a": True, "b": False}
    assert [info.name for info in await within(store.list(ignore_deletes=True))] == ["b"]
    with pytest.raises(ObjectNotFoundError):
        await within(store.get("a"))
    (world.source / "b").unlink()
    await world.push(allow_delete=True)
    assert {info.name for info in await within(store.list())} == {"a", "b"}
    with pytest.raises(NotFoundError):
        await within(store.list(ignore_deletes=True))


async def test_nats_py_follows_links_that_syncd_wrote(world: Interop) -> None:
    """A link of syncd's store has the nuid and digest that nats-py's reader and listing want."""
    await world.push({"target": b"content"})
    await world.store.bucket(world.bucket).put_link("alias", Link(world.bucket, "target"))
    store = await world.other()
    assert (await within(store.get("alias"))).data == b"content"
    assert {info.name for info in await within(store.list())} == {"target", "alias"}


# -- syncd mirrors what nats-py wrote ----------------------------------------------------------------------------------


@pytest.mark.fault("O6")
async def test_syncd_mirrors_every_size_that_nats_py_wrote(world: Interop) -> None:
    """nats-py puts contents of 0 bytes to 3 MiB, around whole chunks among them.

    syncd mirrors equal bytes, and a second round has nothing to do.
    """
    store = await world.create()
    files = {name: content(size, size) for name, size in SIZES.items()}
    for name, data in files.items():
        await within(store.put(name, data))
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == files
    again = await world.pull()
    assert (again.placed, again.removed, again.downloaded_bytes) == (0, 0, 0)


async def test_syncd_mirrors_every_name_that_nats_py_wrote(world: Interop) -> None:
    """Directories that no object describes are made on the way; modes are sane, times are those of the messages."""
    store = await world.create()
    files = tree_of(NAMES + BEYOND_ASCII)
    before = time.time() - 1
    for name, data in files.items():
        await within(store.put(name, data))
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == files
    for path in world.mirror.rglob("*"):
        if path.relative_to(world.mirror).parts[0] == ".syncd":
            continue
        stat = path.stat()
        assert stat.st_mode & 0o7777 == (MIRROR_DIR_MODE if path.is_dir() else MIRROR_FILE_MODE), path
        assert before <= stat.st_mtime <= time.time() + 1, path


@pytest.mark.fault("P1 P6")
async def test_names_of_nats_py_that_are_no_paths_are_reported(world: Interop) -> None:
    """nats-py puts objects with names like `/absolute`, `../up`, `a//b`, `.`, `.syncd/lock`, and one of 256 letters.

    Each is a problem of its own, and the good one beside them is mirrored.
    """
    store = await world.create()
    bad = ["/absolute", "../up", "a//b", "trailing/", ".", ".syncd/lock", "m" * 256]
    for name in [*bad, "good"]:
        await within(store.put(name, b"x"))
    result = await world.pull()
    assert sorted((problem.path, problem.code) for problem in result.problems) == sorted(
        (name, "bad_name") for name in bad
    )
    assert read_tree(world.mirror) == {"good": b"x"}


async def test_syncd_takes_large_chunks_and_small_ones(world: Interop) -> None:
    """The chunk size is the writer's choice: 1 KiB and 512 KiB arrive alike."""
    store = await world.create()
    data = content(1_000_003)
    for name, size in (("small", 1024), ("large", 512 * 1024)):
        meta = ObjectMeta(name=name, options=ObjectMetaOptions(max_chunk_size=size))
        info = await within(store.put(name, data, meta=meta))
        assert info.chunks == -(-len(data) // size)
    await world.pull()
    assert read_tree(world.mirror) == {"small": data, "large": data}


async def test_overwrites_updates_and_deletes_by_nats_py_are_followed(world: Interop) -> None:
    """A new content replaces the file, new headers leave its inode alone, a tombstone removes it and its directory."""
    store = await world.create()
    for name in ("a", "b", "d/c"):
        await within(store.put(name, name.encode()))
    await world.pull()
    inode = (world.mirror / "b").stat().st_ino
    await within(store.put("a", b"anew"))
    await within(store.update_meta("b", ObjectMeta(name="b", description="new", headers={"X": ["1"]})))
    await within(store.delete("d/c"))
    result = await world.pull()
    assert result.problems == []
    assert read_tree(world.mirror) == {"a": b"anew", "b": b"b"}
    assert (world.mirror / "b").stat().st_ino == inode
    assert not (world.mirror / "d").exists()


async def test_a_live_mirror_hears_of_changes_in_a_bucket_that_nats_py_made(world: Interop) -> None:
    """Without republish in the stream a consumer brings the hints; the bucket stays as its maker made it."""
    store = await world.create()
    await within(store.put("a", b"0"))
    config = (await world.stream()).config
    async with world.mirroring():
        assert len(await world.meta_consumers()) == 1
        for number in range(1, 5):
            await within(store.put("a", b"%d" % number))
            await world.appears({"a": b"%d" % number})
        await within(store.put("deep/er/b", content(300_000)))
        assert await world.appears({"deep/er/b": content(300_000)}) < PROMPT_SECONDS
        await within(store.delete("a"))
        await world.appears({"a": None})
    after = (await world.stream()).config
    assert (after.republish, after.metadata, after.allow_rollup_hdrs) == (
        config.republish,
        config.metadata,
        config.allow_rollup_hdrs,
    )


async def test_a_live_mirror_ends_with_what_an_overwriting_nats_py_wrote_last(world: Interop) -> None:
    """Versions whose chunks are purged while they are fetched are passed over; the last one arrives."""
    store = await world.create()
    async with world.mirroring():
        for number in range(30):
            await within(store.put("hot", content(200_000, number)))
        await world.appears({"hot": content(200_000, 29)})


# -- both write to one bucket ------------------------------------------------------------------------------------------


async def test_syncd_publishes_into_a_bucket_that_nats_py_made(world: Interop) -> None:
    """It works without the flags of syncd's own buckets, and leaves nats-py's objects alone."""
    store = await world.create()
    await within(store.put("theirs", b"t"))
    pushed = await world.push({"ours": b"o", "large": content(400_000)})
    assert (pushed.puts, pushed.problems) == (2, [])
    (world.source / "ours").unlink()
    await world.push()
    assert {info.name for info in await within(store.list(ignore_deletes=True))} == {"theirs", "large"}
    assert (await within(store.get("large"))).data == content(400_000)
    await world.pull()
    assert read_tree(world.mirror) == {"theirs": b"t", "large": content(400_000)}


async def test_the_source_wins_over_a_nats_py_that_overwrites_or_deletes(world: Interop) -> None:
    """Mirrors follow the other writer until the next push, which puts the source's state again."""
    await world.push({"a": b"ours", "b": b"ours too", "c": b"stays"})
    store = await world.other()
    await within(store.put("a", b"theirs"))
    await within(store.delete("b"))
    await world.pull()
    assert read_tree(world.mirror) == {"a": b"theirs", "c": b"stays"}
    await world.push()
    await world.pull()
    assert difference(world.source, world.mirror) == {}


async def test_a_live_publisher_restores_what_nats_py_overwrites_or_deletes(world: Interop) -> None:
    """The source's state is back long before the timer, and a live mirror ends with it."""
    await world.push({"a": b"ours", "b": content(300_000), "c": b"stays"})
    store = await world.other()
    async with world.publishing(), world.mirroring():
        await within(store.put("a", b"theirs"))
        await world.announces({"a": b"ours"})
        await within(store.delete("b"))
        await world.announces({"b": content(300_000), "c": b"stays"})
        await equal_trees(world.source, world.mirror)


async def test_nats_py_drops_the_metadata_of_what_it_updates(world: Interop) -> None:
    """Mode and time are lost until the next push: the mirror shows the defaults of a foreign object meanwhile."""
    await world.push({"tool": b"#!"})
    (world.source / "tool").chmod(0o755)
    await world.push()
    store = await world.other()
    await within(store.update_meta("tool", ObjectMeta(name="tool", description="described")))
    assert "metadata" not in await world.raw(token("tool"))
    await world.pull()
    assert (world.mirror / "tool").stat().st_mode & 0o7777 == MIRROR_FILE_MODE
    await world.push()
    await world.pull()
    assert difference(world.source, world.mirror) == {}


async def test_content_shared_by_two_names_is_lost_to_nats_py_and_healed_by_a_push(world: Interop) -> None:
    """Equal files share chunks; a client that deletes one purges them for both. A mirror keeps its copy."""
    await world.push({"one": b"the same", "two": b"the same"})
    await world.pull()
    assert (await world.raw(token("one")))["nuid"] == (await world.raw(token("two")))["nuid"]
    store = await world.other()
    await within(store.delete("one"))
    assert await hangs(store.get("two"))
    await world.pull()
    assert read_tree(world.mirror) == {"two": b"the same"}
    await world.push()
    assert (await within(store.get("two"))).data == b"the same"
    await world.pull()
    assert difference(world.source, world.mirror) == {}


async def test_content_shared_by_two_names_is_healed_at_once_by_a_live_publisher(world: Interop) -> None:
    """It sees that another client purged chunks, and announces nothing whose content is gone."""
    await world.push({"one": b"the same", "two": b"the same", "three": b"the same"})
    store = await world.other()
    async with world.publishing():
        await within(store.put("one", b"another"))
        await world.announces(dict.fromkeys(("one", "two", "three"), b"the same"))
        await within(store.delete("two"))
        await world.announces(dict.fromkeys(("one", "two", "three"), b"the same"))
    await world.pull()
    assert difference(world.source, world.mirror) == {}


async def test_a_bucket_that_nats_py_sealed_is_still_mirrored(world: Interop) -> None:
    """Publishing to it is refused with its name; reading goes on."""
    await world.push({"a": b"1"})
    await within((await world.other()).seal())
    with pytest.raises(BucketSealed, match=world.bucket):
        await world.push({"b": b"2"})
    await world.pull()
    assert read_tree(world.mirror) == {"a": b"1"}


# -- known differences of the metadata ---------------------------------------------------------------------------------


async def put_raw(world: Interop, name: str, data: bytes, **fields: Any) -> None:
    """An object whose metadata message is written by hand, as a client of another language might."""
    nuid = hashlib.sha256(name.encode()).hexdigest()[:22]
    if data:
        await within(world.js.publish(f"$O.{world.bucket}.C.{nuid}", data))
    meta = {"name": name, "bucket": world.bucket, "nuid": nuid, "size": len(data), "chunks": 1 if data else 0} | fields
    subject = f"$O.{world.bucket}.M.{token(name)}"
    await within(world.js.publish(subject, json.dumps(meta).encode(), headers=ROLLUP))


DATA = b"content 6"  # its digest has both - and _ in base64url
RAW = hashlib.sha256(DATA).digest()
PADDED = base64.urlsafe_b64encode(RAW).decode()
DIGESTS = {
    "padded base64url": ("SHA-256=" + PADDED, True, True),
    "unpadded": ("SHA-256=" + PADDED.rstrip("="), False, True),
    "standard base64": ("SHA-256=" + base64.b64encode(RAW).decode(), True, True),
    "lower case": ("sha-256=" + PADDED, False, True),
    "hex": ("SHA-256=" + RAW.hex(), False, False),
    "absent": (None, False, False),
}
"""Form -> digest, whether nats-py reads it, whether syncd does."""


@pytest.mark.fault("O1")
@pytest.mark.parametrize("form", DIGESTS)
async def test_which_forms_of_a_digest_are_read(world: Interop, form: str) -> None:
    """Metadata is written by hand with a digest that is padded, unpadded, standard base64, lower case, hex or absent.

    syncd reads every base64; what it cannot verify it reports and does not write.
    """
    digest, by_nats_py, by_syncd = DIGESTS[form]
    store = await world.create()
    await put_raw(world, "x", DATA, **({} if digest is None else {"digest": digest}))
    try:
        read = (await within(store.get("x"), 3)).data == DATA
    except Exception:  # noqa: BLE001 - whatever it is, it did not read
        read = False
    assert read is by_nats_py
    result = await world.pull()
    assert [(problem.path, problem.code) for problem in result.problems] == ([] if by_syncd else [("x", "bad_object")])
    assert read_tree(world.mirror) == ({"x": DATA} if by_syncd else {})


async def test_what_clients_leave_out_is_not_missed(world: Interop) -> None:
    """No mtime, a nonsensical one, plain string headers, unknown fields, null: all are read."""
    await world.create()
    digest = {"digest": "SHA-256=" + PADDED}
    await put_raw(world, "bare", DATA, **digest)
    await put_raw(world, "go", DATA, **digest, mtime="0001-01-01T00:00:00Z")
    await put_raw(world, "text", DATA, **digest, mtime="yesterday", headers={"X": "plain"}, future={"a": [1]})
    await put_raw(world, "null", DATA, **digest, metadata=None, headers=None, options=None, deleted=None)
    await put_raw(world, "empty", b"", digest=hex_to_digest(EMPTY_SHA256))
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == dict.fromkeys(("bare", "go", "text", "null"), DATA) | {"empty": b""}
    assert abs((world.mirror / "go").stat().st_mtime - time.time()) < 60


async def test_tombstones_have_no_time_or_an_empty_one(world: Interop) -> None:
    """syncd leaves `mtime` out of its tombstones, nats-py writes an empty one; each removes the mirror's file."""
    store = await world.create()
    await within(store.put("theirs", b"1"))
    await world.push({"ours": b"2", "keep": b"3"})
    await world.pull()
    await within(store.delete("theirs"))
    (world.source / "ours").unlink()
    await world.push()
    assert (await world.raw(token("theirs")))["mtime"] == ""
    assert "mtime" not in await world.raw(token("ours"))
    await world.pull()
    assert read_tree(world.mirror) == {"keep": b"3"}


async def test_an_object_and_objects_below_its_name(world: Interop) -> None:
    """A store can hold `a` and `a/b`, a directory cannot: what has no place is a problem until the other goes."""
    store = await world.create()
    await within(store.put("a", b"file"))
    await within(store.put("a/b", b"below"))
    await within(store.put("c", b"rest"))
    for _ in range(2):
        problems = {problem.path: problem.code for problem in (await world.pull()).problems}
        assert problems["a/b"] == "parent_not_directory"
        assert read_tree(world.mirror) == {"a": b"file", "c": b"rest"}
    await within(store.delete("a"))
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == {"a/b": b"below", "c": b"rest"}


async def test_a_rename_by_nats_py_is_refused_by_nats_py(world: Interop) -> None:
    """nats-py takes its own object for one in the way; nothing changes."""
    store = await world.create()
    await within(store.put("old", b"x"))
    with pytest.raises(ObjectAlreadyExists):
        await within(store.update_meta("old", ObjectMeta(name="new")))
    await world.pull()
    assert read_tree(world.mirror) == {"old": b"x"}


async def test_nats_py_never_reads_a_wrong_byte_while_syncd_pushes(world: Interop) -> None:
    """Each object is one version or the next; replaced content stays for the readers under way, so none hangs."""
    await world.push({f"f{number}": b"0" * 1000 for number in range(20)})
    store = await world.other()
    done = asyncio.Event()
    wrong: list[str] = []

    async def read() -> int:
        count = 0
        while not done.is_set():
            try:
                infos = await within(store.list())
            except (TimeoutError, nats.errors.TimeoutError):
                continue  # nats-py's list can wait for ever while the bucket changes; what it reads is the claim here
            for info in infos:
                data = (await within(store.get(info.name))).data
                if len(set(data)) != 1 or len(data) != 1000:
                    wrong.append(info.name)
                count += 1
        return count

    reader = asyncio.create_task(read())
    try:
        for number in range(1, 6):
            await world.push({f"f{index}": b"%d" % number * 1000 for index in range(20)})
    finally:
        done.set()
    assert await within(reader) > 0
    assert wrong == []


# -- the page ----------------------------------------------------------------------------------------------------------


def test_every_claim_of_the_page_names_a_test_that_exists() -> None:
    """docs/interop.md names only tests of these two modules, and every one of them."""
    here = Path(__file__)
    text = "".join(file.read_text() for file in (here, here.with_name("test_interop_js.py")))
    exist = set(re.findall(r"^async def (test_\w+)", text, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", (here.parents[2] / "docs" / "interop.md").read_text()))
    assert named == exist
