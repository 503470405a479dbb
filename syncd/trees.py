"""Reading trees of the generations layout: channels, generation records, directory nodes, recipes, contents.

Rules kept here:
 * nothing is trusted: a blob is checked against its digest, a node against its tree digest, a record against its
   number and folder; what does not match is :class:`syncd.errors.ObjectCorrupt`;
 * memory is bounded: blobs that hold several things (packs) are kept in a cache of limited size.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Final, Literal

from syncd.errors import FormatTooNew, ObjectCorrupt, ObjectGone, SyncdError
from syncd.nodes import (
    FORMAT,
    NODE_MAX,
    RECIPE_LEVELS,
    Generation,
    Location,
    Node,
    NodeRef,
    Piece,
    Where,
    decode_recipe,
    decode_record,
    digest_of,
)
from syncd.paths import printable
from syncd.store.base import CHANNELS, GENERATIONS, HEAD
from syncd.trust import MOVE, SIGNATURES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence
    from typing import Protocol

    from syncd.store.base import Bucket, BucketState

    class BlobCache(Protocol):
        """Blobs kept between runs (those of large nodes); blocking calls, made in a thread."""

        def get(self, digests: Collection[str]) -> dict[str, bytes]:
            """Return those that are kept."""
            ...

        def put(self, blobs: dict[str, bytes]) -> None:
            """Keep some."""
            ...


CACHE_BYTES: Final = 24 * 1024 * 1024
_GENERATION = re.compile(re.escape(GENERATIONS) + "([0-9]{10})")
FETCH_AT_ONCE: Final = 64
NODE_PIECES_FREE: Final = 64
NODE_PIECE_MIN: Final = 1024
"""A directory node has at most so many pieces, and one more for each so many bytes (docs/format.md)."""
MAX_DIGITS: Final = 9
"""Blobs asked for in one request."""


Layout = Literal["objects", "generations"]


async def layout_of(bucket: Bucket, state: BucketState) -> Layout:
    """Return a bucket's layout: what its stream's metadata says, else what it looks like.

    :raises FormatTooNew: a newer version wrote it.
    """
    version = state.metadata.get("syncd.format", "")
    layout = state.metadata.get("syncd.layout", "")
    newer = version.isascii() and version.isdigit() and (len(version) > MAX_DIGITS or int(version) > FORMAT)
    if newer or layout not in {
        "",
        "objects",
        "generations",
    }:
        raise FormatTooNew(
            f"bucket {bucket.name!r} has layout {printable(layout)!r} of format {printable(version)!r}, "
            f"which this syncd does not know",
            hint="upgrade syncd on this host",
        )
    if layout:
        return "generations" if layout == "generations" else "objects"
    info = await bucket.get_info(CHANNELS + HEAD)
    link = None if info is None else info.link
    is_head = link is not None and link.bucket == bucket.name and (link.name or "").startswith(GENERATIONS)
    return "generations" if is_head else "objects"


def generation_name(number: int) -> str:
    """Return the object name of a generation."""
    return f"{GENERATIONS}{number:010d}"


def number_of(name: str) -> int:
    """Return the number of a generation object's name, 0 where it is none."""
    found = _GENERATION.fullmatch(name)
    return int(found[1]) if found is not None else 0


@dataclass(frozen=True, slots=True)
class Commit:
    """A generation as it was found in the bucket.

    :ivar digest: BLAKE3 of the record.
    :ivar seq: sequence of the metadata message it was found by: the channel's, or the generation object's own.
    :ivar record: the record's bytes.
    :ivar signatures: the text of the record's signatures, "" where it has none.
    :ivar move, move_signatures: the texts of the channel's move and of its signatures, where a channel led to it.
    """

    generation: Generation
    digest: str
    seq: int
    record: bytes = b""
    signatures: str = ""
    move: str = ""
    move_signatures: str = ""


class TreeReader:
    """Reads one bucket of the generations layout.

    :param cache: where the chunks of large nodes are looked for first, and kept.
    """

    def __init__(self, bucket: Bucket, cache: BlobCache | None = None) -> None:
        self._bucket = bucket
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._cache = cache
        self.fetched_bytes = 0

    # -- generations -------------------------------------------------------------------------------------------------

    async def channel(self, name: str) -> Commit | None:
        """Return the generation that a channel points at, ``None`` where there is no such channel.

        :raises ObjectCorrupt: the channel is no link to a generation of this bucket, or the record is not readable.
        :raises ObjectGone: the generation it points at is gone.
        """
        info = await self._bucket.get_info(CHANNELS + name)
        if info is None or info.deleted:
            return None
        link = info.link
        if link is None or link.bucket != self._bucket.name or not (number := number_of(link.name or "")):
            raise ObjectCorrupt(f"channel {name!r} is no link to a generation of this bucket")
        found = await self.generation(number)
        if found is None:
            raise ObjectGone(f"channel {name!r} points at generation {number}, which is gone")
        metadata = info.metadata
        return replace(found, seq=info.seq, move=metadata.get(MOVE, ""), move_signatures=metadata.get(SIGNATURES, ""))

    async def generation(self, number: int) -> Commit | None:
        """Return a generation by its number, ``None`` where there is none (any more).

        :raises ObjectCorrupt: its record is not readable, or not this folder's.
        """
        info = await self._bucket.get_info(generation_name(number))
        if info is None or info.deleted:
            return None
        async for _, record in self._bucket.download_many([info]):
            if isinstance(record, Exception):
                raise record
            generation = decode_record(record)
            if generation.number != number or generation.folder != self._bucket.name:
                raise ObjectCorrupt(
                    f"generation {number} holds the record of generation {generation.number} "
                    f"of folder {generation.folder!r}"
                )
            signatures = info.metadata.get(SIGNATURES, "")
            return Commit(generation, digest_of(record), info.seq, record, signatures)
        raise ObjectGone(f"the record of generation {number} is gone")

    # -- nodes -------------------------------------------------------------------------------------------------------

    async def nodes(self, refs: Sequence[NodeRef]) -> list[Node]:
        """Return directory nodes in the order asked for, fetched together; at most some hundred at once.

        :raises ObjectGone, ObjectCorrupt: one of them cannot be had: the tree cannot be read.
        """
        await self._fetch({ref.location.blob for ref in refs if ref.location.where is not Where.EMPTY})
        return [await self._node(ref) for ref in refs]

    async def _node(self, ref: NodeRef) -> Node:
        if ref.length > NODE_MAX:
            raise ObjectCorrupt(f"a directory node of {ref.length} bytes")
        if ref.location.where is Where.RECIPE:
            return await self._large_node(ref)
        blob = await self._kept_blob(ref.location.blob)
        pack = ref.location.blob if ref.location.where is Where.PACK else ""
        return Node(cut(blob, ref.location, ref.length), ref.tree, pack=pack)

    async def _large_node(self, ref: NodeRef) -> Node:
        data = BytesIO()
        # Room for all at once, and no copy at the end: a buffer that grows is moved, and its old places stay resident.
        data.seek(ref.length - 1)
        data.write(b"\0")
        data.seek(0)
        some: list[Piece] = []
        left = NODE_PIECES_FREE + ref.length // NODE_PIECE_MIN
        async for piece in self.pieces(ref.location.blob, ref.length):
            left -= 1
            if left < 0:
                raise ObjectCorrupt(f"a directory node of {ref.length} bytes in countless pieces")
            some.append(piece)
            if len(some) == FETCH_AT_ONCE:
                await self._append(data, some)
                some.clear()
        await self._append(data, some)
        return await asyncio.to_thread(lambda: Node(data.getvalue(), ref.tree))

    async def _append(self, data: BytesIO, pieces: Sequence[Piece]) -> None:
        blobs = await self.blobs({piece.digest for piece in pieces}, keep=self._cache)
        data.writelines(_sized(blobs[piece.digest], piece.length) for piece in pieces)

    # -- contents ----------------------------------------------------------------------------------------------------

    async def pieces(self, recipe: str, size: int, *, below: int = RECIPE_LEVELS) -> AsyncIterator[Piece]:
        """Yield the chunks of a content in order, following recipes of recipes one at a time.

        :raises ObjectGone, ObjectCorrupt: a recipe cannot be had, or lies.
        """
        data = (await self.blobs({recipe}, keep=self._cache))[recipe]
        read = decode_recipe(data, size=size, below=below)
        for piece in read.pieces:
            if read.level == 0:
                yield piece
            else:
                async for chunk in self.pieces(piece.digest, piece.length, below=read.level):
                    yield chunk

    async def content(self, location: Location, size: int, digest: str) -> AsyncIterator[bytes]:
        """Yield a content's bytes in order. The caller checks the whole against its digest.

        :raises ObjectGone, ObjectCorrupt: it cannot be had.
        """
        if location.where is Where.EMPTY:
            if size:
                raise ObjectCorrupt(f"content {digest[:12]} of {size} bytes is stored nowhere")
            return
        if location.where is not Where.RECIPE:
            yield cut(await self._kept_blob(location.blob), location, size)
            return
        some: list[Piece] = []
        async for piece in self.pieces(location.blob, size):
            some.append(piece)
            if len(some) == FETCH_AT_ONCE // 4:
                async for data in self._chunks(some):
                    yield data
                some = []
        async for data in self._chunks(some):
            yield data

    async def _chunks(self, pieces: Sequence[Piece]) -> AsyncIterator[bytes]:
        blobs = await self.blobs({piece.digest for piece in pieces})
        for piece in pieces:
            yield _sized(blobs[piece.digest], piece.length)

    # -- blobs -------------------------------------------------------------------------------------------------------

    async def blobs(self, digests: Collection[str], *, keep: BlobCache | None = None) -> dict[str, bytes]:
        """Return blobs; all of them are in memory at once, so ask for few.

        :param keep: look there first, and put there what was fetched.
        :raises ObjectGone, ObjectCorrupt: one of them cannot be had.
        """
        found: dict[str, bytes] = {}
        if keep is not None:
            found = await asyncio.to_thread(keep.get, digests)
        missing = [digest for digest in digests if digest not in found]
        fetched: dict[str, bytes] = {}
        failure: SyncdError | None = None
        if missing:
            async for digest, data in self._bucket.get_blobs(missing):
                if isinstance(data, bytes):
                    fetched[digest] = data
                    self.fetched_bytes += len(data)
                else:
                    failure = data
        if failure is not None:
            raise failure
        if keep is not None and fetched:
            await asyncio.to_thread(keep.put, fetched)
        return found | fetched

    def kept(self, digest: str) -> bytes | None:
        """Return a pack that is at hand, because a node was read from it a moment ago."""
        return self._kept.get(digest)

    async def _fetch(self, digests: Collection[str]) -> None:
        missing = [digest for digest in digests if digest not in self._kept]
        if missing:
            for digest, data in (await self.blobs(missing)).items():
                self._keep(digest, data)

    async def _kept_blob(self, digest: str) -> bytes:
        data = self._kept.get(digest)
        if data is None:
            data = (await self.blobs({digest}))[digest]
            self._keep(digest, data)
        else:
            self._kept.move_to_end(digest)
        return data

    def _keep(self, digest: str, data: bytes) -> None:
        self._kept[digest] = data
        self._kept_bytes += len(data)
        while self._kept_bytes > CACHE_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped)


def cut(blob: bytes, location: Location, size: int) -> bytes:
    """Return a content's bytes out of the blob that holds it.

    :raises ObjectCorrupt: it does not hold so much.
    """
    end = location.offset + size
    if end > len(blob) or (location.where is Where.BLOB and end != len(blob)):
        raise ObjectCorrupt(f"blob {location.blob[:12]} does not hold {size} bytes at {location.offset}")
    return blob[location.offset : end]


def _sized(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise ObjectCorrupt(f"a chunk of {len(data)} bytes where its recipe says {length}")
    return data
