"""syncd and the JavaScript client (@nats-io/obj 3) on one bucket, in both directions. Skipped where Node is absent.

What differs is in docs/interop.md.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from nats.js.errors import BadObjectMetaError, LinkIsABucketError

import tests.support.js
from syncd.store.base import CHUNK_SIZE, Link, hex_to_digest
from tests.integration.test_interop_py import DATA, DIGESTS, put_raw, token
from tests.support.interop import (
    BEYOND_ASCII,
    NAMES,
    PROMPT_SECONDS,
    SIZES,
    Interop,
    content,
    hangs,
    read_tree,
    tree_of,
    within,
    write_tree,
)
from tests.support.js.client import JsClient, JsError, install, missing
from tests.support.trees import difference, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import NatsServer


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver beside its installed packages, outside the repository."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    return install(tmp_path_factory.mktemp("js"))


@pytest.fixture
async def world(tmp_path: Path, shared_server: NatsServer, request: pytest.FixtureRequest) -> AsyncIterator[Interop]:
    bucket = "js-" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    async with Interop.open(tmp_path, shared_server, bucket) as opened:
        yield opened


@pytest.fixture
async def js(driver: Path, shared_server: NatsServer) -> AsyncIterator[JsClient]:
    async with JsClient(driver, shared_server.url) as client:
        yield client


def latin1(name: str) -> str:
    """The subject token that the JavaScript client makes of a name."""
    return base64.urlsafe_b64encode(name.encode("latin-1")).decode()


# -- JavaScript reads what syncd wrote ---------------------------------------------------------------------------------


@pytest.mark.fault("O6")
async def test_javascript_reads_every_size_that_syncd_wrote(world: Interop, js: JsClient) -> None:
    """Empty, one byte, k chunks and a byte more or less, megabytes: equal bytes, size, chunks and digest."""
    files = {name: content(size, size) for name, size in SIZES.items()}
    await world.push(files)
    for name, data in files.items():
        assert await js.get(world.bucket, name) == data, name
        info = await js.info(world.bucket, name)
        assert info is not None
        assert (info["size"], info["chunks"]) == (len(data), -(-len(data) // CHUNK_SIZE)), name
        assert info["digest"] == hex_to_digest(hashlib.sha256(data).hexdigest()), name


async def test_javascript_reads_every_ascii_name_that_syncd_wrote(world: Interop, js: JsClient) -> None:
    """Spaces, wildcards of NATS, percent signs, dots, control characters, deep paths."""
    files = tree_of(NAMES)
    await world.push(files)
    assert {info["name"] for info in await js.list(world.bucket) if info["size"]} == set(files)
    for name, data in files.items():
        assert await js.get(world.bucket, name) == data, name


async def test_javascript_sees_headers_metadata_and_status(world: Interop, js: JsClient) -> None:
    """Content-Type is a header, syncd's and the folder's own metadata are there; the bucket is listed and described."""
    (world.source / "run.sh").write_bytes(b"#!/bin/sh\n")
    (world.source / "run.sh").chmod(0o750)
    await world.push({"page.html": b"<p>"})
    page, script = [await js.info(world.bucket, name) for name in ("page.html", "run.sh")]
    assert page is not None
    assert script is not None
    assert page["headers"] == {"Content-Type": ["text/html"]}
    assert script["metadata"].items() >= {"team": "web", "syncd-kind": "file", "syncd-mode": "0750"}.items()
    assert world.bucket in await js.call("buckets")
    status = await js.call("status", world.bucket)
    assert (status["bucket"], status["storage"], status["replicas"], status["sealed"]) == (
        world.bucket,
        "file",
        1,
        False,
    )
    assert status["metadata"]["syncd.layout"] == "objects"
    assert status["size"] > 10


async def test_javascript_lists_a_bucket_with_directories_symlinks_and_tombstones(world: Interop, js: JsClient) -> None:
    """syncd publishes a directory, a symlink, a file and one that it deletes again; the JavaScript client reads.

    Directories and symlinks are objects of size 0; what was deleted is not listed and not found.
    """
    (world.source / "void").mkdir()
    (world.source / "link").symlink_to("d/file")
    await world.push({"d/file": b"x", "gone": b"y"})
    (world.source / "gone").unlink()
    await world.push()
    listed = {info["name"]: info["size"] for info in await js.list(world.bucket)}
    assert listed == {"d": 0, "d/file": 1, "void": 0, "link": 0}
    for name in ("d", "void", "link"):
        assert await js.get(world.bucket, name) == b""
    assert await js.get(world.bucket, "gone") is None
    info = await js.info(world.bucket, "gone")
    assert info is not None
    assert info["deleted"] is True


@pytest.mark.fault("O8")
async def test_javascript_lists_buckets_without_any_live_object(world: Interop, js: JsClient) -> None:
    """An empty bucket and one in which all is deleted are empty lists."""
    await js.call("create", world.bucket)
    assert await js.list(world.bucket) == []
    await world.push({"a": b"1"})
    (world.source / "a").unlink()
    await world.push(allow_delete=True)
    assert await js.list(world.bucket) == []


async def test_javascript_watches_a_bucket_that_syncd_publishes_to(world: Interop, js: JsClient) -> None:
    """First what is there, then every put, touch and delete of later pushes, marked as updates."""
    await world.push({"a": b"1", "b": b"2"})
    watch = await js.watch(world.bucket, includeHistory=True)
    assert [(await watch.next())["name"] for _ in range(2)] == ["a", "b"]
    await world.push({"a": b"changed", "new/file": content(300_000)})
    update = await watch.until("a")
    assert (update["size"], update["isUpdate"]) == (7, True)
    assert (await watch.until("new/file"))["size"] == 300_000
    os.utime(world.source / "b", ns=(0, 7_000_000_001))
    await world.push()
    assert (await watch.until("b"))["metadata"]["syncd-mtime"] == "7000000001"
    (world.source / "b").unlink()
    await world.push()
    update = await watch.until("b")
    assert (update["deleted"], update["mtime"]) == (True, None)


async def test_javascript_watches_a_live_publisher(world: Interop, js: JsClient) -> None:
    """A file edited, made, renamed and removed in the source is an update in JavaScript a moment later."""
    await world.push({"a": b"1", "b": b"2"})
    watch = await js.watch(world.bucket)
    async with world.publishing():
        write_tree(world.source, {"a": b"edited", "new/file": content(300_000)})
        assert (await watch.until("a", PROMPT_SECONDS))["size"] == 6
        assert (await watch.until("new/file", PROMPT_SECONDS))["size"] == 300_000
        (world.source / "a").rename(world.source / "z")
        assert (await watch.until("z", PROMPT_SECONDS))["size"] == 6
        assert (await watch.until("a", PROMPT_SECONDS))["deleted"] is True
        assert await js.get(world.bucket, "z") == b"edited"


async def test_javascript_follows_links_that_syncd_wrote(world: Interop, js: JsClient) -> None:
    """Within the bucket and into another one; a bucket link is refused as such."""
    await world.create("other-" + world.bucket)
    await within((await world.other("other-" + world.bucket)).put("far", b"other content"))
    await world.push({"target": b"content"})
    bucket = world.store.bucket(world.bucket)
    await bucket.put_link("alias", Link(world.bucket, "target"))
    await bucket.put_link("remote", Link("other-" + world.bucket, "far"))
    await bucket.put_link("mount", Link("other-" + world.bucket, None))
    assert await js.get(world.bucket, "alias") == b"content"
    assert await js.get(world.bucket, "remote") == b"other content"
    with pytest.raises(JsError, match="link is a bucket"):
        await js.get(world.bucket, "mount")
    assert {info["name"] for info in await js.list(world.bucket)} == {"target", "alias", "remote", "mount"}


# -- syncd mirrors what JavaScript wrote -------------------------------------------------------------------------------


@pytest.mark.fault("O6")
async def test_syncd_mirrors_every_size_that_javascript_wrote(world: Interop, js: JsClient) -> None:
    """JavaScript puts contents of 0 bytes to 3 MiB, around whole chunks among them, and one in chunks of 1 KiB.

    syncd mirrors equal bytes, and a second round has nothing to do.
    """
    await js.call("create", world.bucket)
    files = {name: content(size, size) for name, size in SIZES.items()}
    for name, data in files.items():
        await js.put(world.bucket, name, data)
    files["own chunks"] = content(100_001)
    assert (await js.put(world.bucket, "own chunks", files["own chunks"], chunk=1024))["chunks"] == 98
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == files
    again = await world.pull()
    assert (again.placed, again.removed, again.downloaded_bytes) == (0, 0, 0)


async def test_syncd_mirrors_every_ascii_name_that_javascript_wrote(world: Interop, js: JsClient) -> None:
    """With description, headers and metadata of the writer's own, which syncd reads over."""
    await js.call("create", world.bucket, options={"compression": True})
    files = tree_of(NAMES)
    for name, data in files.items():
        meta = {"description": f"about {name}", "headers": {"X-Many": ["1", "2"]}, "metadata": {"by": "javascript"}}
        await js.put(world.bucket, name, data, **meta)
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == files


async def test_syncd_honours_its_own_metadata_written_by_javascript(world: Interop, js: JsClient) -> None:
    """Mode and time can be given by any client; values that make no sense count as absent."""
    await js.call("create", world.bucket)
    good = {"syncd-mode": "0600", "syncd-mtime": "1234567890123456789"}
    await js.put(world.bucket, "good", b"1", metadata=good)
    await js.put(world.bucket, "bad", b"2", metadata={"syncd-mode": "rwx", "syncd-mtime": "now", "syncd-digest": "?"})
    await js.put(world.bucket, "link", b"", metadata={"syncd-kind": "symlink", "syncd-target": "good"})
    await js.put(world.bucket, "dir", b"", metadata={"syncd-kind": "dir", "syncd-mode": "0700"})
    assert (await world.pull()).problems == []
    stat = (world.mirror / "good").stat()
    assert (stat.st_mode & 0o7777, stat.st_mtime_ns) == (0o600, 1234567890123456789)
    assert (world.mirror / "bad").stat().st_mode & 0o7777 == 0o644
    assert (world.mirror / "link").readlink().as_posix() == "good"
    assert (world.mirror / "dir").stat().st_mode & 0o7777 == 0o700


async def test_a_live_mirror_hears_of_changes_in_a_bucket_that_javascript_made(world: Interop, js: JsClient) -> None:
    """Put, overwrite, delete: each is in the mirror long before the timer; a consumer brings the hints."""
    await js.call("create", world.bucket)
    await js.put(world.bucket, "a", b"0")
    async with world.mirroring():
        assert (await world.stream()).config.republish is None
        assert len(await world.meta_consumers()) == 1
        for number in range(1, 5):
            await js.put(world.bucket, "a", b"%d" % number)
            await world.appears({"a": b"%d" % number})
        await js.put(world.bucket, "d/b", content(300_000))
        await world.appears({"d/b": content(300_000)})
        await js.call("delete", world.bucket, name="d/b")
        await world.appears({"d/b": None})
        await eventually(lambda: not (world.mirror / "d").exists(), PROMPT_SECONDS)


async def test_a_live_mirror_follows_a_rename_and_a_new_description(world: Interop, js: JsClient) -> None:
    """JavaScript renames without a tombstone and updates without rollup: the full round after the hint sees both."""
    await js.call("create", world.bucket)
    await js.put(world.bucket, "old", b"content")
    await js.put(world.bucket, "stays", b"s")
    async with world.mirroring():
        await js.call("update", world.bucket, name="stays", description="only words")
        await js.call("update", world.bucket, name="old", rename="new/name")
        await world.appears({"new/name": b"content", "old": None, "stays": b"s"})
    assert {info["name"] for info in await js.list(world.bucket)} == {"new/name", "stays"}
    messages = (
        await world.js.stream_info(f"OBJ_{world.bucket}", subjects_filter=f"$O.{world.bucket}.M.>")
    ).state.subjects
    assert messages == {f"$O.{world.bucket}.M.{token('stays')}": 2, f"$O.{world.bucket}.M.{token('new/name')}": 1}


# -- links -------------------------------------------------------------------------------------------------------------


async def test_object_links_made_by_javascript_are_followed(world: Interop, js: JsClient) -> None:
    """Within the bucket and into another one; they follow their target's changes and vanish with the link."""
    other = "other-" + world.bucket
    await js.call("create", world.bucket)
    await js.call("create", other)
    await js.put(world.bucket, "target", b"one")
    await js.put(other, "far", content(300_000))
    await js.call("link", world.bucket, name="alias", target={"name": "target"})
    await js.call("link", world.bucket, name="links/far", target={"bucket": other, "name": "far"})
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == {"target": b"one", "alias": b"one", "links/far": content(300_000)}
    await js.put(world.bucket, "target", b"two")
    await js.put(other, "far", b"nearer")
    await js.call("delete", world.bucket, name="alias")
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == {"target": b"two", "links/far": b"nearer"}


async def test_bucket_links_made_by_javascript_are_followed(world: Interop, js: JsClient) -> None:
    """All objects of the other bucket appear below the link's name, and follow what happens there."""
    other = "other-" + world.bucket
    await js.call("create", world.bucket)
    await js.call("create", other)
    await js.put(other, "x/one", b"1")
    await js.put(other, "two", b"2")
    await js.call("linkStore", world.bucket, name="mount", target={"bucket": other})
    await js.put(world.bucket, "own", b"o")
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == {"own": b"o", "mount/x/one": b"1", "mount/two": b"2"}
    await js.call("delete", other, name="x/one")
    await js.put(other, "two", b"2 again")
    await world.pull()
    assert read_tree(world.mirror) == {"own": b"o", "mount/two": b"2 again"}
    await js.call("delete", world.bucket, name="mount")
    await world.pull()
    assert read_tree(world.mirror) == {"own": b"o"}


async def test_a_live_mirror_follows_links_within_the_bucket(world: Interop, js: JsClient) -> None:
    """A new link, a new content of its target, and the link's end are hinted like any other change."""
    await js.call("create", world.bucket)
    await js.put(world.bucket, "target", b"one")
    async with world.mirroring():
        await js.call("link", world.bucket, name="alias", target={"name": "target"})
        await world.appears({"alias": b"one"})
        await js.put(world.bucket, "target", b"two")
        await world.appears({"alias": b"two", "target": b"two"})
        await js.call("delete", world.bucket, name="alias")
        await world.appears({"alias": None, "target": b"two"})


async def test_a_link_whose_target_was_deleted_is_reported(world: Interop, js: JsClient) -> None:
    """The link's file goes, the problem names the link, and a target that comes back mends it."""
    await js.call("create", world.bucket)
    await js.put(world.bucket, "target", b"one")
    await js.put(world.bucket, "keep", b"k")
    await js.call("link", world.bucket, name="alias", target={"name": "target"})
    await world.pull()
    await js.call("delete", world.bucket, name="target")
    result = await world.pull()
    assert [(problem.path, problem.code) for problem in result.problems] == [("alias", "dead_link")]
    assert read_tree(world.mirror) == {"keep": b"k"}
    await js.put(world.bucket, "target", b"back")
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == {"keep": b"k", "target": b"back", "alias": b"back"}


async def test_nats_py_cannot_read_object_links_of_javascript(world: Interop, js: JsClient) -> None:
    """They have no nuid: nats-py's get fails, and its list waits for ever when one is the newest. syncd reads both."""
    await js.call("create", world.bucket)
    await js.put(world.bucket, "target", b"one")
    await js.call("linkStore", world.bucket, name="mount", target={"bucket": world.bucket})
    store = await world.other()
    assert {info.name for info in await within(store.list())} == {"target", "mount"}
    with pytest.raises(LinkIsABucketError):
        await within(store.get("mount"))
    await js.call("delete", world.bucket, name="mount")
    await js.call("link", world.bucket, name="alias", target={"name": "target"})
    assert "nuid" not in await world.raw(token("alias"))
    with pytest.raises(BadObjectMetaError):
        await within(store.get("alias"))
    assert await hangs(store.list())
    await world.pull()
    assert read_tree(world.mirror) == {"target": b"one", "alias": b"one"}


# -- both write to one bucket ------------------------------------------------------------------------------------------


async def test_the_source_wins_over_a_javascript_that_overwrites_renames_or_deletes(
    world: Interop, js: JsClient
) -> None:
    """Mirrors follow the other writer until the next push; what the source does not have is left to its writer."""
    await world.push({"a": b"ours", "b": b"ours too", "c": b"renamed", "d": b"stays"})
    await js.put(world.bucket, "a", b"theirs")
    await js.call("delete", world.bucket, name="b")
    await js.call("update", world.bucket, name="c", rename="moved")
    await world.pull()
    assert read_tree(world.mirror) == {"a": b"theirs", "d": b"stays", "moved": b"renamed"}
    await js.put(world.bucket, "extra", b"of javascript")
    await world.push()
    await world.pull()
    ours = {"a": b"ours", "b": b"ours too", "c": b"renamed", "d": b"stays"}
    assert read_tree(world.mirror) == ours | {"extra": b"of javascript", "moved": b"renamed"}


@pytest.mark.parametrize("keeps_metadata", [True, False])
async def test_a_live_publisher_restores_what_javascript_renames(
    world: Interop, js: JsClient, keeps_metadata: bool
) -> None:
    """The old name is put again, though no tombstone tells of it; the new one goes if its metadata says it is ours."""
    await world.push({"a": b"1", "b": content(300_000)})
    info = await js.info(world.bucket, "b")
    assert info is not None
    async with world.publishing():
        kept = {"metadata": info["metadata"]} if keeps_metadata else {}
        await js.call("update", world.bucket, name="b", rename="moved", **kept)
        moved = None if keeps_metadata else content(300_000)
        await world.announces({"a": b"1", "b": content(300_000), "moved": moved})


async def test_an_update_by_javascript_drops_the_metadata_it_is_not_given(world: Interop, js: JsClient) -> None:
    """Mode and time of what syncd published are lost to mirrors until the next push."""
    await world.push({"tool": b"#!"})
    (world.source / "tool").chmod(0o755)
    await world.push()
    await js.call("update", world.bucket, name="tool", description="described")
    assert "metadata" not in await world.raw(token("tool"))
    await world.pull()
    assert (world.mirror / "tool").stat().st_mode & 0o7777 == 0o644
    await world.push()
    await world.pull()
    assert difference(world.source, world.mirror) == {}


async def test_syncd_publishes_into_a_bucket_that_javascript_made(world: Interop, js: JsClient) -> None:
    """JavaScript reads every byte of it and keeps its own objects."""
    await js.call("create", world.bucket, options={"description": "made by javascript"})
    await js.put(world.bucket, "theirs", b"t")
    await world.push({"ours": b"o", "large": content(400_000)})
    assert await js.get(world.bucket, "large") == content(400_000)
    (world.source / "ours").unlink()
    await world.push()
    assert {info["name"] for info in await js.list(world.bucket)} == {"theirs", "large"}


async def test_javascript_keeps_the_metadata_of_what_it_deletes_and_nats_py_drops_it(
    world: Interop, js: JsClient
) -> None:
    """A tombstone of JavaScript still says who published the object; both remove the mirror's file."""
    await world.push({"a": b"1", "b": b"2", "c": b"3"})
    await world.pull()
    await js.call("delete", world.bucket, name="a")
    await within((await world.other()).delete("b"))
    assert (await world.raw(token("a")))["metadata"]["syncd-publisher"] == "here:/source"
    assert "metadata" not in await world.raw(token("b"))
    await world.pull()
    assert read_tree(world.mirror) == {"c": b"3"}


# -- known differences -------------------------------------------------------------------------------------------------


async def test_javascript_does_not_find_names_beyond_ascii_that_others_wrote(world: Interop, js: JsClient) -> None:
    """It makes subjects of Latin-1 instead of UTF-8: what syncd wrote is listed, but not found or an error."""
    await world.push(tree_of(BEYOND_ASCII))
    assert {info["name"] for info in await js.list(world.bucket) if info["size"]} == set(BEYOND_ASCII)
    for name in BEYOND_ASCII:
        if name.isascii():
            continue
        try:
            name.encode("latin-1")
        except UnicodeEncodeError:
            with pytest.raises(JsError, match="InvalidCharacterError"):
                await js.get(world.bucket, name)
            with pytest.raises(JsError, match="InvalidCharacterError"):
                await js.put(world.bucket, name, b"x")
        else:
            assert await js.get(world.bucket, name) is None


async def test_syncd_mirrors_latin_1_names_of_javascript(world: Interop, js: JsClient) -> None:
    """`café.txt` on JavaScript's subject is `café.txt` in the mirror; a delete on that subject removes it."""
    await js.call("create", world.bucket)
    await js.put(world.bucket, "café.txt", b"latin")
    await js.put(world.bucket, "keep", b"k")
    assert (await world.raw(latin1("café.txt")))["name"] == "café.txt"
    assert (await world.pull()).problems == []
    assert read_tree(world.mirror) == {"café.txt": b"latin", "keep": b"k"}
    await js.call("delete", world.bucket, name="café.txt")
    await world.pull()
    assert read_tree(world.mirror) == {"keep": b"k"}


async def test_one_latin_1_name_can_be_two_objects_and_the_newest_counts(world: Interop, js: JsClient) -> None:
    """After JavaScript put over what syncd wrote there are two objects of one name; a mirror has the newer one."""
    await world.push({"café.txt": b"utf-8", "keep": b"k"})
    await js.put(world.bucket, "café.txt", b"latin-1")
    assert [info["name"] for info in await js.list(world.bucket)].count("café.txt") == 2
    assert (await within((await world.other()).get("café.txt"))).data == b"utf-8"
    await world.pull()
    assert read_tree(world.mirror) == {"café.txt": b"latin-1", "keep": b"k"}
    await world.push()
    await world.pull()
    assert difference(world.source, world.mirror) == {}
    assert await js.get(world.bucket, "café.txt") == b"latin-1"


@pytest.mark.fault("O1")
@pytest.mark.parametrize(
    ("form", "by_javascript"),
    [
        ("padded base64url", True),
        ("unpadded", True),
        ("standard base64", True),
        ("lower case", False),
        ("hex", True),
        ("absent", False),
    ],
)
async def test_which_forms_of_a_digest_javascript_reads(
    world: Interop, js: JsClient, form: str, by_javascript: bool
) -> None:
    """Metadata is written by hand with a digest that is padded, unpadded, standard base64, lower case, hex or absent.

    JavaScript reads all of them but the one with a prefix in lower case and the absent one.
    """
    digest = DIGESTS[form][0]
    await world.create()
    await put_raw(world, "x", DATA, **({} if digest is None else {"digest": digest}))
    try:
        read = await js.get(world.bucket, "x") == DATA
    except JsError:
        read = False
    assert read is by_javascript


async def test_content_shared_by_two_names_is_lost_to_javascript_and_healed_by_a_push(
    world: Interop, js: JsClient
) -> None:
    """Equal files share chunks; JavaScript that overwrites one purges them for both. A push mends it."""
    await world.push({"one": b"the same", "two": b"the same"})
    await world.pull()
    await js.put(world.bucket, "one", b"another")
    with pytest.raises(TimeoutError):
        await js.get(world.bucket, "two", seconds=2)
    await world.pull()
    assert read_tree(world.mirror) == {"one": b"another", "two": b"the same"}
    await world.push()
    assert await js.get(world.bucket, "two") == b"the same"
    await world.pull()
    assert difference(world.source, world.mirror) == {}


async def test_a_live_mirror_ends_with_what_an_overwriting_javascript_wrote_last(world: Interop, js: JsClient) -> None:
    """Versions whose chunks are purged while they are fetched are passed over; the last one arrives."""
    await js.call("create", world.bucket)
    async with world.mirroring():
        for number in range(30):
            await js.put(world.bucket, "hot", content(200_000, number))
        await world.appears({"hot": content(200_000, 29)})


# -- the driver --------------------------------------------------------------------------------------------------------


async def test_the_packages_are_installed_outside_of_the_repository(driver: Path) -> None:
    """No node_modules and no lock file appear beside the driver's source."""
    here = Path(tests.support.js.__file__).parent
    assert not driver.is_relative_to(here.parents[2])
    assert not {"node_modules", "package-lock.json"} & {path.name for path in here.iterdir()}
    assert (driver.parent / "node_modules" / "@nats-io" / "obj").is_dir()
    assert not (driver.parent / "package-lock.json").exists()
