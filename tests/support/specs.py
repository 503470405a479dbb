"""Trees written as dictionaries: as blobs and nodes, as generations of a bucket, and on disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from syncd.model import Entry, Kind
from syncd.nodes import (
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
from syncd.store.codec import RAW
from syncd.store.mapping import KIND, PUBLISHER

if TYPE_CHECKING:
    from pathlib import Path

    from syncd.store.base import Bucket

Spec = dict[str, Any]
"""Name -> bytes (a file), str (a symlink), dict (a directory), or (one of them, mode or None, mtime_ns)."""

MTIME_NS = 5
CHUNK = 400_000


class Builder:
    """Makes blobs of trees; every node and every small content is a blob of its own, large ones are recipes.

    :param swap: names of two files of one length: the location of the first one leads to the second one's content.
    """

    def __init__(self, swap: tuple[str, str] | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.files = 0
        self.size = 0
        self._swap = swap

    def tree(self, spec: Spec) -> NodeRef:
        children = [self._child(name, spec) for name in sorted(spec, key=str.encode)]
        identities = [identity(child) for child in children]
        data = encode_node(identities, [(child.entry.kind, child.location, child.length) for child in children])
        return NodeRef(tree_digest(identities), Location(Where.BLOB, self._blob(data)), len(data))

    def _child(self, name: str, spec: Spec) -> Child:
        what, mode, mtime_ns = parts(spec[name])
        if isinstance(what, dict):
            ref = self.tree(what)
            return Child(name, Entry(Kind.DIR, mode, mtime_ns), ref.tree, ref.location, ref.length)
        self.files += 1
        if isinstance(what, str):
            return Child(name, Entry(Kind.SYMLINK, 0o777, mtime_ns, target=what))
        self.size += len(what)
        entry = Entry(Kind.FILE, mode, mtime_ns, len(what), blake3(what).hexdigest())
        swapped = self._swap is not None and name == self._swap[0]
        return Child(name, entry, location=self._content(what, lie=spec[self._swap[1]] if swapped else None))

    def _content(self, data: bytes, *, lie: bytes | None) -> Location:
        if lie is not None:  # a location of a blob is its digest alone: only a pack can lie
            return Location(Where.PACK, self._blob(lie))
        if not data:
            return EMPTY_LOCATION
        if len(data) <= CHUNK:
            return Location(Where.BLOB, self._blob(data))
        pieces = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        recipe = Recipe(0, tuple(Piece(self._blob(piece), len(piece)) for piece in pieces))
        return Location(Where.RECIPE, self._blob(encode_recipe(recipe)))

    def _blob(self, data: bytes) -> str:
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest


def parts(what: Any) -> tuple[Any, int, int]:
    """Content, mode and mtime of one value of a spec."""
    what, mode, mtime_ns = what if isinstance(what, tuple) else (what, None, MTIME_NS)
    if mode is None:
        mode = 0o755 if isinstance(what, dict) else 0o644
    return what, mode, mtime_ns


async def commit(
    bucket: Bucket,
    number: int,
    spec: Spec,
    *,
    note: str = "",
    publisher: str = "build:/srv/app",
    created: str = "2026-05-04T12:30:05Z",
    swap: tuple[str, str] | None = None,
) -> Generation:
    """Commit a tree as a generation and move the head to it."""
    builder = Builder(swap)
    root = builder.tree(spec)
    async with bucket.blob_sink() as sink:
        for digest, data in builder.blobs.items():
            await sink.put(digest, RAW + data)
        await sink.flush()
    generation = Generation(
        folder=bucket.name,
        number=number,
        root=root,
        created=created,
        publisher=publisher,
        files=builder.files,
        size=builder.size,
        note=note,
    )
    head = await bucket.get_info("channels/head")
    await bucket.commit_generation(
        number,
        encode_record(generation),
        described(generation),
        channel="head",
        expected_seq=0 if head is None else head.seq,
    )
    return generation


def described(generation: Generation) -> dict[str, str]:
    """What a generation object's metadata repeats of its record."""
    return {
        KIND: "generation",
        PUBLISHER: generation.publisher,
        "syncd-number": str(generation.number),
        "syncd-tree": generation.root.tree,
        "syncd-created": generation.created,
        "syncd-files": str(generation.files),
        "syncd-bytes": str(generation.size),
        "syncd-added": str(generation.added),
        "syncd-changed": str(generation.changed),
        "syncd-removed": str(generation.removed),
        "syncd-note": generation.note,
    }


def write_spec(directory: Path, spec: Spec) -> Path:
    """Write a tree to disk, modes and times included."""
    directory.mkdir()
    for name, value in spec.items():
        what, mode, mtime_ns = parts(value)
        path = directory / name
        if isinstance(what, dict):
            write_spec(path, what)
        elif isinstance(what, str):
            path.symlink_to(what)
        else:
            path.write_bytes(what)
        if not isinstance(what, str):
            path.chmod(mode)
        os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)
    return directory
