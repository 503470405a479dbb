"""Generations made by hand: trees as values, put into a bucket with the format's own words, honestly or forged."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from syncd.crashpoints import ENV_CRASH_POINT
from syncd.model import Entry, Kind
from syncd.nodes import (
    BLOB_MAX,
    MAX_PIECES,
    PACK_ITEM_MAX,
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
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import CHANNELS, HEAD, BucketSpec, Link
from syncd.store.codec import Codec
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trees import generation_name
from tests.support.mirror import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from syncd.store.base import Store

T0 = 1_700_000_000_000_000_000
CHUNK = 64 * 1024


@dataclass(frozen=True)
class Item:
    """One path of a wanted tree: a file's bytes, a symlink's target, or a directory's children."""

    data: bytes | None = None
    target: str = ""
    children: dict[str, Item] | None = None
    mode: int = 0o644
    mtime_ns: int = T0


def file(data: bytes | str, *, mode: int = 0o644, mtime_ns: int = T0 + 1) -> Item:
    return Item(data=data.encode() if isinstance(data, str) else data, mode=mode, mtime_ns=mtime_ns)


def folder(children: dict[str, Item] | None = None, *, mode: int = 0o755, mtime_ns: int = T0 + 2) -> Item:
    return Item(children=children or {}, mode=mode, mtime_ns=mtime_ns)


def link(target: str, *, mtime_ns: int = T0 + 3) -> Item:
    return Item(target=target, mode=0o777, mtime_ns=mtime_ns)


Tree = dict[str, Item]


@dataclass
class Forge:
    """What is done to honest words on their way.

    :ivar child: changes a child before it is written.
    :ivar node: changes a directory's stored bytes, given its path.
    :ivar identities: changes the identities that a directory's digest is made of.
    :ivar blob: changes the payload under which a digest is stored; ``None``: it is not stored at all.
    :ivar recipe: changes a recipe's bytes.
    :ivar record: changes the generation record.
    """

    child: Callable[[str, Child], Child] = lambda path, child: child
    identities: Callable[[str, list[bytes]], list[bytes]] = lambda path, parts: parts
    node: Callable[[str, bytes], bytes] = lambda path, data: data
    blob: Callable[[str, bytes, bytes], bytes | None] = lambda digest, data, payload: payload
    recipe: Callable[[bytes], bytes] = lambda data: data
    record: Callable[[Generation], Generation] = lambda generation: generation


@dataclass
class Publisher:
    """Commits trees to one bucket, keeping nothing but what the bucket has."""

    store: Store
    folder: str = "app"
    number: int = 0
    seq: int = 0
    stored: set[str] = field(default_factory=set)
    parent: str = ""
    commits: list[Generation] = field(default_factory=list)

    async def create(self) -> None:
        await self.store.create_bucket(self.folder, BucketSpec(layout="generations"))

    async def commit(self, tree: Tree, forge: Forge | None = None, **fields: Any) -> Generation:
        """Commit a tree; later fields go into the record."""
        if not self.number:
            await self.create()
        builder = Builder(forge or Forge())
        root = builder.directory("", tree)
        codec = Codec()
        async with self.store.bucket(self.folder).blob_sink() as sink:
            for digest, data in builder.blobs.items():
                payload = builder.forge.blob(digest, data, codec.encode(data))
                if payload is not None and (digest not in self.stored or forge is not None):
                    await sink.put(digest, payload, replace=digest in self.stored)
                    self.stored.add(digest)
            await sink.flush()
        self.number += 1
        generation = Generation(
            self.folder,
            self.number,
            root,
            "2026-01-01T00:00:00Z",
            "test:/source",
            parent=self.parent,
            files=builder.files,
            size=builder.size,
        )
        generation = builder.forge.record(replace(generation, **fields))
        record = encode_record(generation)
        self.seq = await self.store.bucket(self.folder).commit_generation(
            self.number, record, {}, channel=HEAD, expected_seq=self.seq
        )
        self.parent = digest_of(record)
        self.commits.append(generation)
        return generation

    async def move(self, number: int) -> None:
        """Point the channel at another generation."""

        self.seq = await self.store.bucket(self.folder).put_link(
            CHANNELS + HEAD, Link(self.folder, generation_name(number))
        )


class Builder:
    """Turns a tree into blobs: contents up to ``PACK_ITEM_MAX`` into packs of their own, nodes as blobs."""

    def __init__(self, forge: Forge) -> None:
        self.forge = forge
        self.blobs: dict[str, bytes] = {}
        self.files = self.size = 0

    def add(self, data: bytes) -> str:
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def directory(self, path: str, children: Tree) -> NodeRef:
        small = {name: item for name, item in children.items() if item.data and len(item.data) <= PACK_ITEM_MAX}
        places = self.pack(small) if len(small) > 1 else {}
        identities: list[bytes] = []
        stored: list[tuple[Kind, Location, int]] = []
        for name in sorted(children, key=str.encode):
            item = children[name]
            below = f"{path}/{name}" if path else name
            child = self.forge.child(below, self.child(below, name, item, places.get(name)))
            identities.append(identity(child))
            stored.append((child.entry.kind, child.location, child.length))
        identities = self.forge.identities(path, identities)
        data = self.forge.node(path, encode_node(identities, stored))
        tree = tree_digest(identities)
        if len(data) > BLOB_MAX:
            return NodeRef(tree, Location(Where.RECIPE, self.recipe(data)), len(data))
        return NodeRef(tree, Location(Where.BLOB, self.add(data)), len(data))

    def child(self, path: str, name: str, item: Item, place: Location | None) -> Child:
        if item.children is not None:
            ref = self.directory(path, item.children)
            entry = Entry(Kind.DIR, item.mode, item.mtime_ns)
            return Child(name, entry, ref.tree, ref.location, ref.length)
        self.files += 1
        if item.data is None:
            return Child(name, Entry(Kind.SYMLINK, 0o777, item.mtime_ns, target=item.target))
        self.size += len(item.data)
        digest = blake3(item.data).hexdigest()
        entry = Entry(Kind.FILE, item.mode, item.mtime_ns, len(item.data), digest)
        if not item.data:
            return Child(name, entry)
        if place is not None:
            return Child(name, entry, location=place)
        if len(item.data) > BLOB_MAX:
            return Child(name, entry, location=Location(Where.RECIPE, self.recipe(item.data)))
        return Child(name, entry, location=Location(Where.BLOB, self.add(item.data)))

    def pack(self, items: Tree) -> dict[str, Location]:
        """Put small contents together into packs."""
        places: dict[str, tuple[int, int]] = {}
        packs: list[bytearray] = [bytearray()]
        for name in sorted(items, key=str.encode):
            data = items[name].data or b""
            if len(packs[-1]) + len(data) > BLOB_MAX:
                packs.append(bytearray())
            places[name] = (len(packs) - 1, len(packs[-1]))
            packs[-1] += data
        digests = [self.add(bytes(pack)) for pack in packs]
        return {name: Location(Where.PACK, digests[number], at) for name, (number, at) in places.items()}

    def recipe(self, data: bytes) -> str:
        """Cut content into chunks at multiples of ``CHUNK``; return the recipe's digest."""
        pieces = []
        for at in range(0, len(data), CHUNK):
            chunk = data[at : at + CHUNK]
            pieces.append(Piece(self.add(chunk), len(chunk)))
        level = 0
        while len(pieces) > MAX_PIECES:
            groups = [tuple(pieces[at : at + MAX_PIECES]) for at in range(0, len(pieces), MAX_PIECES)]
            recipes = [Recipe(level, group) for group in groups]
            pieces = [Piece(self.add(encode_recipe(recipe)), recipe.size) for recipe in recipes]
            level += 1
        return self.add(self.forge.recipe(encode_recipe(Recipe(level, tuple(pieces)))))


def expected(tree: Tree, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """What :func:`found` says of a mirror that equals the tree."""
    out: dict[str, tuple[Any, ...]] = {}
    for name, item in tree.items():
        path = prefix + name
        if item.children is not None:
            out[path] = ("dir", item.mode, item.mtime_ns)
            out |= expected(item.children, path + "/")
        elif item.data is None:
            out[path] = ("symlink", item.mtime_ns, item.target)
        else:
            out[path] = ("file", item.mode, item.mtime_ns, digest_of(item.data))
    return out


def found(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a root but ``.syncd``: kind, mode, mtime, content digest."""

    return {
        path: (*what[:3], digest_of(what[3])) if what[0] == "file" else what  # type: ignore[arg-type]
        for path, what in snapshot(root).items()
    }


async def _pull() -> None:
    """As a process of its own: commit the pickled trees to a store in memory, and pull.

    python -m tests.support.generations TREES MIRROR INDEX GENERATION
    """
    trees, mirror, index = (Path(argument) for argument in sys.argv[1:4])
    store = MemoryStore()
    publisher = Publisher(store)
    for tree in pickle.loads(trees.read_bytes()):
        await publisher.commit(tree)
    status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
    subscriber = Subscriber(SubscribeOptions("app", mirror, Rules()), store, index, status=status)
    result = await subscriber.pull(generation=int(sys.argv[4]))
    print(json.dumps({"downloaded": result.downloaded_bytes, "root": result.root, "generation": result.generation}))


def pull_apart(
    trees: Path, mirror: Path, index: Path, *, crash: str = "", generation: int = 0
) -> dict[str, Any] | None:
    """Run a pull as a process of its own; ``None`` where it died at a crash point."""
    command = [sys.executable, "-m", "tests.support.generations", str(trees), str(mirror), str(index), str(generation)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, ENV_CRASH_POINT: crash},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if crash:
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        return None
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    asyncio.run(_pull())
