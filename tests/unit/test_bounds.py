"""Memory is bounded whatever one directory holds: pages of rows and bytes, not an object for each entry."""

from __future__ import annotations

import tracemalloc
from contextlib import closing, contextmanager
from itertools import repeat
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from syncd.errors import ObjectCorrupt
from syncd.index import Index
from syncd.model import Entry, Kind
from syncd.nodes import (
    BESIDE,
    Child,
    InPack,
    Location,
    NodeRef,
    NodeWriter,
    Piece,
    Recipe,
    Where,
    digest_of,
    encode_node,
    encode_recipe,
    identity,
)
from syncd.rules import Rules
from syncd.scan import Scanner
from syncd.source import Source
from syncd.store.base import BucketSpec
from syncd.store.codec import Codec
from syncd.store.memory import MemoryStore
from syncd.trees import TreeReader

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path


MB = 1_000_000
MANY = 20_000


@contextmanager
def peak() -> Iterator[list[int]]:
    """Append the most bytes that the body has allocated at once."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_a_scan_of_a_large_directory_holds_its_names_only(tmp_path: Path) -> None:
    """Neither what it finds, the first time, nor what is known of it by then is held together."""
    root = tmp_path / "source"
    root.mkdir()
    for number in range(MANY):
        (root / f"entry-{number:06}").touch()
    with closing(Index(tmp_path / "index.db")) as index:
        source = Source(Scanner(root, Rules(), symlinks="inside"), index, "app")
        for _ in range(2):
            with peak() as found:
                source.scan()
            assert found[0] < 3.5 * MB
        with peak() as found:
            assert sum(1 for _ in index.local_children("")) == MANY
        assert found[0] < 2 * MB


def children(count: int) -> Iterator[Child]:
    for number in range(count):
        digest = blake3(b"%d" % number).hexdigest()
        yield Child(f"entry-{number:06}", Entry(Kind.FILE, 0o644, number, 5, digest), location=in_pack(number))


def in_pack(number: int) -> Location:
    return Location(Where.PACK, digest_of(b"%d" % (number % 7)), number)


def test_a_node_is_written_from_bytes_not_from_objects() -> None:
    """Twice its length: what is collected, and the node itself."""
    with peak() as found:
        node = NodeWriter()
        for child in children(MANY):
            node.add(identity(child), child.entry.kind, child.location, 0)
        data = node.finish()
    assert len(data) > MANY * 70
    assert found[0] < 2.6 * len(data)


def test_the_places_of_a_node_may_be_known_at_its_end() -> None:
    """Packs that were open when a child was added: by then one is closed, and one is the node's own."""
    names = {5: digest_of(b"closed"), 6: BESIDE}
    some = list(children(9))
    ids = [identity(child) for child in some]
    places = [InPack(5 + number % 2, number) for number in range(9)]
    places[4] = places[8] = some[4].location  # type: ignore[call-overload]
    node = NodeWriter()
    for one, place in zip(ids, places, strict=True):
        node.add(one, Kind.FILE, place, 0)
    known = [
        Location(Where.PACK, names[place.blob], place.offset) if isinstance(place, InPack) else place
        for place in places
    ]
    assert node.finish(names.__getitem__) == encode_node(ids, list(zip(repeat(Kind.FILE), known, repeat(0))))


class Kept:
    """A cache of blobs that holds none."""

    def get(self, digests: Collection[str]) -> dict[str, bytes]:
        return {}

    def put(self, blobs: dict[str, bytes]) -> None:
        """Forget them."""


async def test_a_large_node_is_read_into_one_piece_of_memory() -> None:
    """Its chunks are not held beside it: only those that came together."""
    node = NodeWriter()
    for child in children(3 * MANY):
        node.add(identity(child), child.entry.kind, child.location, 0)
    data = node.finish()
    size = 16 * 1024
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    recipe = encode_recipe(Recipe(0, tuple(Piece(digest_of(chunk), len(chunk)) for chunk in chunks)))
    store = MemoryStore()
    await store.create_bucket("app", BucketSpec(layout="generations"))
    bucket = store.bucket("app")
    async with bucket.blob_sink() as sink:
        for blob in (recipe, *chunks):
            await sink.put(digest_of(blob), Codec().encode(blob))
        await sink.flush()
    del chunks
    reader = TreeReader(bucket, Kept())
    ref = NodeRef(node.tree, Location(Where.RECIPE, digest_of(recipe)), len(data))
    with peak() as found:
        [read] = await reader.nodes([ref])
        assert sum(1 for _ in read.rows()) == 3 * MANY
    assert found[0] < 1.6 * len(data)


@pytest.mark.fault("O5")
async def test_a_node_in_countless_pieces_is_refused() -> None:
    """A node's recipe of recipes, a few kilobytes in the bucket, lists one and the same byte 500,000 times.

    Reading the node ends with ObjectCorrupt in the first of its fifty lists of pieces; the others are not fetched.
    """
    store = MemoryStore()
    await store.create_bucket("app", BucketSpec(layout="generations"))
    bucket = store.bucket("app")
    some = encode_recipe(Recipe(0, (Piece(digest_of(b"x"), 1),) * 10_000))
    many = encode_recipe(Recipe(1, (Piece(digest_of(some), 10_000),) * 50))
    async with bucket.blob_sink() as sink:
        for blob in (b"x", some, many):
            await sink.put(digest_of(blob), Codec().encode(blob))
        await sink.flush()
    ref = NodeRef(digest_of(b"tree"), Location(Where.RECIPE, digest_of(many)), 500_000)
    reader = TreeReader(bucket, Kept())
    with pytest.raises(ObjectCorrupt, match="countless pieces"):
        await reader.nodes([ref])
    assert reader.fetched_bytes < len(many) + 2 * len(some)
