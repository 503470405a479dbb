"""A source's tree as blobs: contents into packs, chunks and recipes; changed directories into nodes. Blocking.

Everything runs in the folder's own thread, as generators of blobs to send, so that memory stays bounded whatever the
size of the tree. Rules kept here:
 * a file is read between two equal stats or not at all in this round;
 * a path that could not be read, or whose content is not in the bucket yet, stays in the tree as it was committed last;
 * what the bucket holds is not sent again: blobs by digest, contents by location, directories by tree digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from syncd.chunker import Chunks, RecipeBuilder
from syncd.errors import FileChanged, StoreRejected, Untrusted
from syncd.index.blobs import State
from syncd.model import Entry, Kind, Problem
from syncd.nodes import (
    BESIDE,
    BLOB_MAX,
    EMPTY_LOCATION,
    NODE_MAX,
    PACK_ITEM_MAX,
    Child,
    Location,
    NodeRef,
    Piece,
    Where,
    digest_of,
    encode_node,
    identity,
    node_bound,
    tree_digest,
)
from syncd.paths import printable
from syncd.scan import Unreadable
from syncd.source import ScanStopped

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from syncd.index import Index, LocalRow
    from syncd.index.blobs import Blobs, ChildRow
    from syncd.outlet import PushResult
    from syncd.source import Source

FLUSH: Final = 500


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob to send.

    :ivar replace: it was removed a moment ago: write over its remover.
    """

    digest: str
    data: bytes
    replace: bool = False


@dataclass(frozen=True, slots=True)
class _InPack:
    """A place in a pack of this commit, which may not be closed yet and so has no digest."""

    pack: int
    offset: int


@dataclass(slots=True)
class _Pack:
    """The pack that is being filled."""

    number: int = 0
    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    contents: dict[str, tuple[int, int]] = field(default_factory=dict)
    nodes: list[tuple[str, str, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Frame:
    """A directory that is being built."""

    path: str
    children: Iterator[ChildRow]
    identities: list[bytes] = field(default_factory=list)
    stored: list[tuple[Kind, Location | _InPack, int]] = field(default_factory=list)
    size: int = 0
    above: Entry | None = None


class Builder:
    """Builds one generation.

    :param keep: whether what cannot be read may stay as it was committed last; else nothing is built then.
    :ivar root: the root node, once :meth:`nodes` is through.
    """

    def __init__(self, index: Index, blobs: Blobs, source: Source, result: PushResult, *, keep: bool = True) -> None:
        self._index = index
        self._blobs = blobs
        self._source = source
        self._result = result
        self._may_keep = keep
        self._pack = _Pack()
        self._closed: dict[int, str] = {}
        self._open_contents: dict[str, _InPack] = {}
        self._fresh: set[str] = set()
        self._ready: list[Blob] = []
        self._hashed: list[LocalRow] = []
        self._done = 0
        self.root: NodeRef | None = None

    # -- contents ----------------------------------------------------------------------------------------------------

    def contents(self, touched: Collection[str] | None, *, moved: bool) -> Iterator[Blob]:
        """Read changed files and yield the blobs that the bucket lacks.

        :param moved: also unchanged files whose content the bucket has lost (:meth:`Blobs.find_moved`).
        :raises DiskProblem: the source as a whole cannot be read.
        """
        for row in self._wanted(touched, moved=moved):
            if self._source.stopping:
                raise ScanStopped
            try:
                yield from self._store(row)
            except FileChanged:
                self._result.again.add(row.path)
            except Unreadable as error:
                self._source.note_problem(Problem(row.path, "unreadable", error.message), row.path)
        self._flush()
        if self._closed:  # more than one pack: nodes get packs of their own, so that they can be read alone
            self._close_pack()
        self._open_contents = {
            digest: _InPack(self._pack.number, at) for digest, (at, _) in self._pack.contents.items()
        }
        yield from self._take()

    def _wanted(self, touched: Collection[str] | None, *, moved: bool) -> Iterator[LocalRow]:
        for _, local, _ in self._index.diff(touched):
            if local is not None and local.entry.kind is Kind.FILE:
                yield local
        for path in self._blobs.moved() if moved else ():
            row = self._index.local(path)
            if row is not None and row.entry.kind is Kind.FILE and not row.problem:
                yield row

    def _take(self) -> Iterator[Blob]:
        ready, self._ready = self._ready, []
        yield from ready
        if len(self._fresh) >= FLUSH or len(self._hashed) >= FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._fresh or self._hashed:
            with self._index.transaction():
                self._blobs.hold(self._fresh)
                self._index.put_local(self._hashed)
            self._fresh.clear()
            self._hashed.clear()

    def _store(self, row: LocalRow) -> Iterator[Blob]:
        """Get one file's content on its way, hashing it where its digest is not known."""
        entry = row.entry
        if entry.digest and (not entry.size or self._is_stored(entry.digest)):
            self._result.reused_bytes += entry.size
        elif entry.size > BLOB_MAX:
            yield from self._store_large(row)
        else:
            self._store_small(row)
            yield from self._take()

    def _store_small(self, row: LocalRow) -> None:
        row, data = self._source.scanner.hash_file(row.path, keep=BLOB_MAX)
        if data is None:
            raise FileChanged(f"{printable(row.path)} grew while it was read")
        self._hashed.append(row)
        digest = row.entry.digest
        if not data:
            return
        if self._is_stored(digest):
            self._result.reused_bytes += len(data)
        elif len(data) <= PACK_ITEM_MAX:
            if self._pack.size + len(data) > BLOB_MAX:
                self._close_pack()
            self._pack.contents[digest] = (self._add_to_pack(data), len(data))
        else:
            self._emit(digest, data)
            self._locate([(digest, Location(Where.BLOB, digest), len(data))])

    def _store_large(self, row: LocalRow) -> Iterator[Blob]:
        """Cut a file as it is read; nothing of it is named before all of it is found unchanged."""
        with self._source.scanner.open_file(row.path) as file:
            chunks = Chunks(file)
            recipe = RecipeBuilder(self._emit)
            for data in chunks:
                if self._source.stopping:
                    raise ScanStopped
                digest = digest_of(data)
                self._emit(digest, data)
                recipe.add(Piece(digest, len(data)))
                yield from self._take()
            file.check()
            row = file.row(chunks.digest)
        self._hashed.append(row)
        content = row.entry.digest
        if chunks.size and not self._is_stored(content):
            self._locate([(content, Location(Where.RECIPE, recipe.finish()), chunks.size)])
        yield from self._take()

    def _locate(self, rows: Iterable[tuple[str, Location, int]]) -> None:
        """Note where contents are; what holds them counts as held from here on."""
        self._flush()
        self._blobs.locate(rows)

    def _is_stored(self, digest: str) -> bool:
        return digest in self._pack.contents or self._blobs.location(digest) is not None

    # -- packs -------------------------------------------------------------------------------------------------------

    def _emit(self, digest: str, data: bytes) -> None:
        if digest in self._fresh:
            return
        state = self._blobs.state(digest)
        if state is not State.HELD:
            self._ready.append(Blob(digest, data, replace=state is State.FREED))
            self._fresh.add(digest)

    def _add_to_pack(self, data: bytes) -> int:
        pack = self._pack
        at = pack.size
        pack.parts.append(data)
        pack.size += len(data)
        return at

    def _close_pack(self) -> None:
        """Send the pack and note what is in it."""
        pack = self._pack
        self._pack = _Pack(pack.number + 1)
        if not pack.parts:
            return
        data = b"".join(pack.parts)
        digest = digest_of(data)
        self._closed[pack.number] = digest
        self._emit(digest, data)
        alone = len(pack.parts) == 1 and bool(pack.contents)
        self._locate(
            (content, Location(Where.BLOB, digest) if alone else Location(Where.PACK, digest, at), size)
            for content, (at, size) in pack.contents.items()
        )
        self._blobs.built(
            (path, NodeRef(tree, Location(Where.PACK, digest, at), length)) for path, tree, at, length in pack.nodes
        )

    # -- nodes -------------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Blob]:
        """Build every directory that is dirty or has no node, children before parents; yield the blobs they need."""
        stack = [_Frame("", self._blobs.children(""))]
        while stack:
            frame = stack[-1]
            child = next(frame.children, None)
            if child is None:
                stack.pop()
                tree, place, length = self._finish(frame)
                if stack:
                    assert frame.above is not None
                    name = frame.path.rpartition("/")[2]
                    _append(stack[-1], Child(name, frame.above, tree=tree), place, length)
                else:
                    self._finish_root(tree, place, length)
                yield from self._take()
                continue
            self._done += 1
            if self._done % FLUSH == 0 and self._source.stopping:
                raise ScanStopped
            self._add_child(stack, frame, child)
        self._flush()
        yield from self._take()

    def _add_child(self, stack: list[_Frame], frame: _Frame, child: ChildRow) -> None:
        name = child.path.rpartition("/")[2]
        entry = child.entry
        if child.problem:
            self._keep(frame, name, child.path)
        elif entry.kind is Kind.DIR:
            if child.node is not None:
                _append(frame, Child(name, entry, tree=child.node.tree), child.node.location, child.node.length)
            else:
                stack.append(_Frame(child.path, self._blobs.children(child.path), above=entry))
        elif entry.kind is Kind.SYMLINK:
            _append(frame, Child(name, entry), EMPTY_LOCATION, 0)
        else:
            place = self._place_of(entry, child.location)
            if place is None:
                self._keep(frame, name, child.path)
            else:
                _append(frame, Child(name, entry), place, 0)

    def _place_of(self, entry: Entry, location: Location | None) -> Location | _InPack | None:
        if not entry.digest:
            return None
        if not entry.size:
            return EMPTY_LOCATION
        return location or self._open_contents.get(entry.digest) or self._blobs.location(entry.digest)

    def _keep(self, frame: _Frame, name: str, path: str) -> None:
        """Put a path into the tree as it was committed last, if it was.

        :raises StoreRejected: the bucket has lost its content, and it cannot be read.
        :raises Untrusted: what was committed last is not to be believed.
        """
        if not self._may_keep:
            raise Untrusted(
                f"{printable(path)} cannot be read now, and the newest generation, from which it would be kept, "
                "is not signed by this publisher's key, or older than its last one",
                hint="make it readable, or exclude it",
            )
        remote = self._index.remote(path)
        if remote is None:
            return
        entry = remote.entry
        if entry.kind is Kind.DIR:
            node = self._blobs.node(path)
            if node is None:
                raise _lost(path)
            _append(frame, Child(name, entry, tree=node.tree), node.location, node.length)
            return
        location = (
            EMPTY_LOCATION if entry.kind is Kind.SYMLINK or not entry.size else self._blobs.location(entry.digest)
        )
        if location is None:
            raise _lost(path)
        _append(frame, Child(name, entry), location, 0)

    def _finish(self, frame: _Frame) -> tuple[str, Location | _InPack, int]:
        """Store one directory's node; return its tree digest, place and stored length."""
        tree = tree_digest(frame.identities)
        bound = node_bound(len(frame.identities), frame.size)
        if bound > PACK_ITEM_MAX:
            return self._finish_large(frame, tree, bound)
        if self._pack.size + bound > BLOB_MAX:
            self._close_pack()
        data = encode_node(frame.identities, [(kind, self._resolve(place), size) for kind, place, size in frame.stored])
        at = self._add_to_pack(data)
        self._pack.nodes.append((frame.path, tree, at, len(data)))
        return tree, _InPack(self._pack.number, at), len(data)

    def _finish_large(self, frame: _Frame, tree: str, bound: int) -> tuple[str, Location | _InPack, int]:
        if bound > NODE_MAX:
            raise StoreRejected(
                f"directory {printable(frame.path)!r} has {len(frame.identities)} entries, which is too many",
                hint="spread them over several directories",
            )
        self._close_pack()  # what lies in it can be named from outside only once it is closed
        data = encode_node(frame.identities, [(kind, self._resolve(place), size) for kind, place, size in frame.stored])
        location = self._store_node(data)
        self._flush()
        self._blobs.built([(frame.path, NodeRef(tree, location, len(data)))])
        return tree, location, len(data)

    def _store_node(self, data: bytes) -> Location:
        if len(data) <= BLOB_MAX:
            digest = digest_of(data)
            self._emit(digest, data)
            return Location(Where.BLOB, digest)
        recipe = RecipeBuilder(self._emit)
        for chunk in Chunks(_Bytes(data)):
            digest = digest_of(chunk)
            self._emit(digest, chunk)
            recipe.add(Piece(digest, len(chunk)))
        return Location(Where.RECIPE, recipe.finish())

    def _resolve(self, place: Location | _InPack) -> Location:
        if isinstance(place, Location):
            return place
        blob = BESIDE if place.pack == self._pack.number else self._closed[place.pack]
        return Location(Where.PACK, blob, place.offset)

    def _finish_root(self, tree: str, place: Location | _InPack, length: int) -> None:
        self._close_pack()
        self.root = NodeRef(tree, self._resolve(place), length)


def _append(frame: _Frame, child: Child, place: Location | _InPack, length: int) -> None:
    one = identity(child)
    frame.identities.append(one)
    frame.stored.append((child.entry.kind, place, length))
    frame.size += len(one)


def _lost(path: str) -> StoreRejected:
    return StoreRejected(
        f"the bucket has lost the content of {printable(path)}, which cannot be read now",
        hint="make it readable, or remove it",
    )


class _Bytes:
    """Bytes as a source of chunks."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def read(self, size: int) -> bytes:
        data = bytes(self._data[self._at : self._at + size])
        self._at += len(data)
        return data
