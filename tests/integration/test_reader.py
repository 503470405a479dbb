"""docs/reader.py, which knows only docs/format.md, checks out what syncd's words describe, and refuses the rest.

The writer here stores a tree with every kind of location that the format has; `syncd push` chooses its own.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import runpy
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats
import pytest
import zstandard
from blake3 import blake3
from nats.js.api import StreamConfig

from syncd.model import Entry, Kind
from syncd.nodes import (
    BESIDE,
    EMPTY_LOCATION,
    Child,
    Generation,
    Location,
    NodeRef,
    Piece,
    Recipe,
    Where,
    digest_of,
    encode_node,
    encode_recipe,
    encode_record,
    identity,
    tree_digest,
)
from tests.support.trees import difference

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.support.server import NatsServer

READER = Path(__file__).parents[2] / "docs/reader.py"
PIECE = 1000
ALONE = "import sys, runpy; sys.modules.update(syncd=None, zstandard=None); runpy.run_path({!r}, run_name='__main__')"


class Writer:
    """Stores trees in a bucket with plain publishes. A file's name says how its content is stored."""

    def __init__(self, client: nats.NATS, bucket: str) -> None:
        self.js = client.jetstream()
        self.bucket = bucket
        self.stored: set[str] = set()
        self.kinds: set[tuple[Where, bool]] = set()
        self.head: Generation | None = None
        self.compress = True

    async def create(self) -> None:
        await self.js.add_stream(
            StreamConfig(
                name=f"OBJ_{self.bucket}",
                subjects=[f"$O.{self.bucket}.C.>", f"$O.{self.bucket}.M.>"],
                allow_direct=True,
                allow_rollup_hdrs=True,
                metadata={"syncd.layout": "generations", "syncd.format": "1"},
            )
        )

    async def blob(self, data: bytes, *, compress: bool = False) -> str:
        digest = digest_of(data)
        if digest not in self.stored:
            payload = b"\1" + zstandard.compress(data) if compress and self.compress else b"\0" + data
            expected = {"Nats-Expected-Last-Subject-Sequence": "0"}
            await self.js.publish(f"$O.{self.bucket}.C.{digest}", payload, headers=expected)
            self.stored.add(digest)
        return digest

    async def recipe(self, data: bytes, *, fan: int) -> str:
        """Cut into pieces of a fixed size, ``fan`` to a recipe; more make recipes of recipes."""
        pieces = [
            Piece(await self.blob(data[at : at + PIECE], compress=at % 2 == 0), len(data[at : at + PIECE]))
            for at in range(0, len(data), PIECE)
        ]
        level = 0
        while True:
            groups = [Recipe(level, tuple(pieces[at : at + fan])) for at in range(0, len(pieces), fan)]
            pieces = [Piece(await self.blob(encode_recipe(group)), group.size) for group in groups]
            if len(pieces) == 1:
                return pieces[0].digest
            level += 1

    async def content(self, name: str, data: bytes, pack: list[bytes]) -> Location:
        if not data:
            return EMPTY_LOCATION
        if name.startswith("recipe"):
            return Location(Where.RECIPE, await self.recipe(data, fan=10_000))
        if name.startswith("deep"):
            return Location(Where.RECIPE, await self.recipe(data, fan=3))
        if name.startswith("slice"):
            padding = b"what lies before it "
            return Location(Where.PACK, await self.blob(padding + data + b" and after"), len(padding))
        if name.startswith("near"):
            pack.append(data)
            return Location(Where.PACK, BESIDE, sum(map(len, pack[:-1])))
        return Location(Where.BLOB, await self.blob(data, compress=name.startswith("zstd")))

    async def directory(self, path: Path, above: list[bytes]) -> tuple[str, Location, int]:
        """Store a directory: ``near...`` in the pack of its parent, ``wide...`` by a recipe, others alone."""
        near = path.name.startswith("near")
        pack = above if near else []
        found = sorted(path.iterdir(), key=os.fsencode)
        children = [await self.child(each.name, each, pack) for each in found]
        identities = [identity(child) for child in children]
        self.kinds |= {(child.location.where, child.location.blob == BESIDE) for child in children}
        node = encode_node(identities, [(child.entry.kind, child.location, child.length) for child in children])
        pack.append(node)
        place = Location(Where.PACK, BESIDE, sum(map(len, pack[:-1])))
        if path.name.startswith("wide"):
            place = Location(Where.RECIPE, await self.recipe(node, fan=2))
        elif not near and len(pack) == 1:
            place = Location(Where.BLOB, await self.blob(node, compress=True))
        elif not near:
            place = place._replace(blob=await self.blob(b"".join(pack)))
        return tree_digest(identities), place, len(node)

    async def child(self, name: str, path: Path, pack: list[bytes]) -> Child:
        st = path.lstat()
        if stat.S_ISLNK(st.st_mode):
            return Child(name, Entry(Kind.SYMLINK, 0o777, st.st_mtime_ns, target=str(path.readlink())))
        mode = stat.S_IMODE(st.st_mode)
        if stat.S_ISDIR(st.st_mode):
            tree, place, length = await self.directory(path, pack)
            return Child(name, Entry(Kind.DIR, mode, st.st_mtime_ns), tree, place, length)
        data = path.read_bytes()
        entry = Entry(Kind.FILE, mode, st.st_mtime_ns, len(data), digest_of(data))
        return Child(name, entry, location=await self.content(name, data, pack))

    async def commit(self, root: NodeRef, **changes: Any) -> None:
        """Write a generation object and point the head at it."""
        number = 1 if self.head is None else self.head.number + 1
        self.head = Generation(self.bucket, number, root, "2026-11-21T02:02:45.600984Z", "web-1:/srv/app", note="näh\n")
        self.head = replace(self.head, **changes)
        await self.announce(number, encode_record(self.head))

    async def announce(self, number: int, record: bytes) -> None:
        nuid = f"syncd-{number:022d}"
        name = f"generations/{number:010d}"
        digest = "SHA-256=" + base64.urlsafe_b64encode(hashlib.sha256(record).digest()).decode()
        meta = {"name": name, "bucket": self.bucket, "nuid": nuid, "size": len(record), "chunks": 1, "digest": digest}
        link = {"name": "channels/head", "bucket": self.bucket, "nuid": nuid, "size": 0, "chunks": 0}
        link["options"] = {"link": {"bucket": self.bucket, "name": name}}
        await self.js.publish(f"$O.{self.bucket}.C.{nuid}", record)
        for fields in (meta, link):
            subject = f"$O.{self.bucket}.M.{base64.urlsafe_b64encode(fields['name'].encode()).decode()}"  # type: ignore[union-attr]
            await self.js.publish(subject, json.dumps(fields).encode(), headers={"Nats-Rollup": "sub"})

    async def push(self, source: Path) -> None:
        """Commit a directory: what `syncd push` does."""
        await self.commit(NodeRef(*await self.directory(source, [])))


@pytest.fixture
async def writer(shared_server: NatsServer, request: pytest.FixtureRequest) -> AsyncIterator[Writer]:
    client = await nats.connect(shared_server.url)
    writer = Writer(client, "reader_" + digest_of(request.node.name.encode())[:8])
    await writer.create()
    try:
        yield writer
    finally:
        await client.close()


def read(server: NatsServer, bucket: str, target: Path, *options: str, alone: bool = False) -> str:
    """Run the reader; return its complaint, "" where it has none."""
    program: Sequence[str | Path] = ["-c", ALONE.format(str(READER))] if alone else [READER]
    arguments = [sys.executable, "-I", *program, "--server", server.url, bucket, target, *options]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == (done.stderr == ""), done.stderr
    return done.stderr


def make_tree(root: Path) -> None:
    """One of everything."""
    noise = hashlib.shake_256(b"syncd").digest(20_000)
    for name in ("packed/near-inner/near-deeper", "wide/empty", "plain", "ünï/日本"):
        (root / name).mkdir(parents=True)
    for name, data in {
        "blob": b"a whole blob",
        "zstd": b"the same line again and again\n" * 500,
        "recipe": noise[:7_777],
        "deep": noise,
        "slice": b"out of a pack",
        "empty": b"",
        "packed/near": b"beside its node",
        "packed/near-inner/near": b"beside its node, deeper",
        "packed/near-inner/near-deeper/slice": b"out of another pack",
        "ünï/日本/🙂": b"\0\1\2",
        "line\nbreak": b"x",
        "back\\slash": b"y",
    }.items():
        (root / name).write_bytes(data)
    for number in range(60):
        (root / f"wide/{number}").write_bytes(b"%d" % number)
    (root / "blob").chmod(0o755)
    (root / "zstd").chmod(0o4600)
    (root / "link").symlink_to("packed/near")
    (root / "dangling").symlink_to("../nowhere/at/all")
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(0, 1_790_000_000_123_456_789 - number * 2**56), follow_symlinks=False)
    (root / "plain").chmod(0o500)


async def test_the_reader_checks_out_every_kind_of_location(
    shared_server: NatsServer, writer: Writer, tmp_path: Path
) -> None:
    """Blobs, recipes, recipes of recipes, slices of this and other packs, raw and zstd: the trees are equal."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    make_tree(source)
    await writer.push(source)
    every = {(Where.EMPTY, False), (Where.BLOB, False), (Where.RECIPE, False), (Where.PACK, False), (Where.PACK, True)}
    assert writer.kinds >= every - {(Where.EMPTY, False)}
    assert read(shared_server, writer.bucket, target) == ""
    assert difference(source, target) == {}
    assert (target / "link").is_symlink()


async def test_the_reader_takes_the_generation_that_it_is_told(
    shared_server: NatsServer, writer: Writer, tmp_path: Path
) -> None:
    """An older generation is as it was; the head is the newest. Without compression no zstandard is needed."""
    source, before, after = tmp_path / "source", tmp_path / "before", tmp_path / "after"
    source.mkdir()
    writer.compress = False
    (source / "file").write_bytes(b"before")
    await writer.push(source)
    (source / "file").write_bytes(b"after")
    await writer.push(source)
    assert read(shared_server, writer.bucket, before, "--generation", "1", alone=True) == ""
    assert (before / "file").read_bytes() == b"before"
    assert read(shared_server, writer.bucket, after, "--channel", "head", alone=True) == ""
    assert difference(source, after) == {}


def forged(name: bytes, data: bytes = b"evil") -> tuple[bytes, str]:
    """A node with one small file of any name, and its tree digest."""
    good = identity(Child("x" * len(name), Entry(Kind.FILE, 0o644, 0, len(data), digest_of(data))))
    one = good.replace(b"x" * len(name), name)
    return encode_node([one], [(Kind.FILE, Location(Where.BLOB, digest_of(data)), 0)]), tree_digest([one])


@pytest.mark.parametrize("name", ["..", ".", "../evil", "/evil", "a/b", "nul\0", ".syncd"])
async def test_the_reader_writes_nothing_outside_of_its_directory(
    shared_server: NatsServer, writer: Writer, tmp_path: Path, name: str
) -> None:
    """A name that leads out, or is reserved, refuses the tree; nothing appears under the name asked for."""
    node, tree = forged(name.encode())
    await writer.blob(b"evil")
    await writer.commit(NodeRef(tree, Location(Where.BLOB, await writer.blob(node)), len(node)))
    assert read(shared_server, writer.bucket, tmp_path / "target").startswith("refused: ")
    assert [path.name for path in tmp_path.iterdir()] == ["target.partial"]
    assert list((tmp_path / "target.partial").iterdir()) == []


async def test_a_symlink_cannot_take_a_directory_elsewhere(
    shared_server: NatsServer, writer: Writer, tmp_path: Path
) -> None:
    """A link and a directory of one name are a name twice."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    inner, inner_tree = forged(b"evil")
    await writer.blob(b"evil")
    link = identity(Child("d", Entry(Kind.SYMLINK, 0o777, 0, target=str(elsewhere))))
    below = identity(Child("d", Entry(Kind.DIR, 0o755, 0), tree=inner_tree))
    place = Location(Where.BLOB, await writer.blob(inner))
    node = encode_node([link, below], [(Kind.SYMLINK, EMPTY_LOCATION, 0), (Kind.DIR, place, len(inner))])
    root = NodeRef(tree_digest([link, below]), Location(Where.BLOB, await writer.blob(node)), len(node))
    await writer.commit(root)
    assert "the name b'd'" in read(shared_server, writer.bucket, tmp_path / "target")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("swapped", "is damaged"),
        ("missing", "there is no"),
        ("removed", "is gone"),
        ("codec", "unknown codec"),
        ("sizeless", "without a size"),
        ("content", "does not match its digest"),
        ("tree", "does not match its tree digest"),
        ("format", "format 2 is not known"),
        ("blanks", "the record is another one"),
        ("folder", "of another folder"),
    ],
)
async def test_the_reader_refuses_what_does_not_match(
    shared_server: NatsServer, writer: Writer, tmp_path: Path, damage: str, complaint: str
) -> None:
    """Damaged, missing, swapped: one line of complaint, and no tree."""
    data = b"the content" * 100
    node, tree = forged(b"file", data)
    if damage == "content":  # a slice of other bytes, well formed
        pack = Location(Where.PACK, await writer.blob(b"other bytes" * 200), 0)
        one = identity(Child("file", Entry(Kind.FILE, 0o644, 0, len(data), digest_of(data))))
        node = encode_node([one], [(Kind.FILE, pack, 0)])
    payload = {
        "swapped": b"\0" + b"other bytes" * 100,
        "removed": b"",
        "codec": b"\2" + data,
        "sizeless": b"\1" + zstandard.ZstdCompressor(write_content_size=False).compress(data),
    }.get(damage, b"\0" + data)
    if damage != "missing":
        await writer.js.publish(f"$O.{writer.bucket}.C.{digest_of(data)}", payload)
    root = NodeRef(tree if damage != "tree" else "ab" * 32, Location(Where.BLOB, await writer.blob(node)), len(node))
    record = encode_record(Generation(writer.bucket, 1, root, "2026-11-21T02:02:45Z", "p"))
    lies = {
        "format": record.replace(b'"format":1', b'"format":2'),
        "blanks": record.replace(b'"format":1', b'"format": 1'),
        "folder": record.replace(writer.bucket.encode(), b"another"),
    }
    await writer.announce(1, lies.get(damage, record))
    assert complaint in read(shared_server, writer.bucket, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def refused_by(reader: dict[str, Any], row: dict[str, Any], data: bytes) -> bool:
    """Tell whether the reader's functions refuse the bytes of a vector; what a recipe lists is not looked at."""
    digest = blake3(data).digest()

    class Served(reader["Bucket"]):  # type: ignore[misc]
        async def get(self, _subject: str) -> bytes:
            return b"\0" + data

        async def content(self, where: int, blob: bytes, *rest: int) -> AsyncIterator[bytes]:
            if blob == digest:
                async for piece in super().content(where, blob, *rest):
                    yield piece

    async def pieces() -> None:
        async for _ in Served(None, "app").content(1, digest, 0, row["size"], row.get("below", 4)):
            pass

    try:
        if row["what"] == "node":
            list(reader["children"](data, bytes.fromhex(row["tree"]), bytes.fromhex(row["pack"])))
        else:
            asyncio.run(pieces())
    except Exception:  # noqa: BLE001 - the reader refuses by whatever comes to hand
        return True
    return False


VECTORS = READER.parents[1] / "tests/vectors"


@pytest.mark.parametrize("what", ["node", "recipe"])
def test_the_reader_refuses_what_the_vectors_refuse(what: str) -> None:
    """Every one of them, and nothing that is well formed."""
    reader = runpy.run_path(str(READER))
    for row in json.loads((VECTORS / f"{what}s.json").read_text()):
        assert not refused_by(reader, row | {"what": what}, bytes.fromhex(row["bytes"]))
    rows = [row for row in json.loads((VECTORS / "refused.json").read_text()) if row["what"] == what]
    assert len(rows) > 10
    assert [row["why"] for row in rows if not refused_by(reader, row, bytes.fromhex(row["bytes"]))] == []


def test_the_reader_reads_the_nodes_of_the_vectors() -> None:
    """Every field of every child is as the vector says."""
    children = runpy.run_path(str(READER))["children"]
    for row in json.loads((VECTORS / "nodes.json").read_text()):
        pack = bytes.fromhex(row["pack"])
        found = list(children(bytes.fromhex(row["bytes"]), bytes.fromhex(row["tree"]), pack))
        for (name, kind, mode, mtime, digest, where, blob, offset, size), told in zip(
            found, row["children"], strict=True
        ):
            assert (name.decode(), mode, mtime) == (told["name"], told["mode"], told["mtime_ns"])
            assert ("file", "dir", "symlink")[kind] == told["kind"]
            assert digest == (
                told["target"].encode() if kind == 2 else bytes.fromhex(told.get("digest") or told["tree"])
            )
            assert size == told.get("size", told.get("length", 0))
            if "location" in told:
                place = told["location"]
                assert ("blob", "recipe", "pack")[where] == place["where"]
                assert (blob.hex(), offset) == (place["blob"], place["offset"])


def test_the_reader_is_short_and_knows_nothing_of_syncd() -> None:
    """Under 200 lines, as its purpose is to be read; nothing imported but nats, blake3, zstandard and Python's own."""
    text = READER.read_text()
    assert len(text.splitlines()) < 200
    assert "import syncd" not in text
    assert "from syncd" not in text
