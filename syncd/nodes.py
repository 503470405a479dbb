"""The stored words of the generations layout: directory nodes, recipes and generation records, as bytes and back.

The format is permanent and specified in docs/format.md ("Generations layout"); this module is its only writer and
reader here. Everything is pure, and everything decoded is untrusted: lengths, counts, order and names are checked
before anything is built from them, and a form that this version would not have written is refused. All integers are
little-endian.
"""

from __future__ import annotations

import json
import re
import struct
from calendar import monthrange
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from blake3 import blake3

from syncd.errors import FormatTooNew, ObjectCorrupt
from syncd.model import MODE_BITS, Entry, Kind
from syncd.paths import MAX_COMPONENT_BYTES, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

FORMAT: Final = 1
"""The version of everything here, and of ``syncd.format`` in the stream's metadata."""

BLOB_MAX: Final = 512 * 1024
"""Bytes of a blob before compression."""
PACK_ITEM_MAX: Final = 64 * 1024
"""Contents and nodes up to this travel in packs."""
NODE_MAX: Final = 64 * 1024 * 1024
MAX_CHILDREN: Final = 1_000_000
RECIPE_LEVELS: Final = 4
RECORD_MAX: Final = 16 * 1024
NOTE_MAX: Final = 1000
"""Characters of a generation's note."""
MAX_TARGET_BYTES: Final = 4095
MAX_GENERATION: Final = 9_999_999_999
"""Ten digits, as in the name of a generation object."""

DIGEST_BYTES: Final = 32
EMPTY_DIGEST: Final = blake3(b"").hexdigest()
"""The digest of no bytes, and the tree digest of an empty directory."""
_NODE_HEAD = struct.Struct("<BIII")
_CHILD = struct.Struct("<HBHqQ")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_SLICE = struct.Struct("<II")
_TAGGED_SLICE = struct.Struct("<BII")
_TAGGED_OFFSET = struct.Struct("<BI")
_RECIPE_HEAD = struct.Struct("<BBQ")
_PIECE = struct.Struct("<32sQ")
_FILE, _DIR, _SYMLINK = range(3)
_LINK_MODE: Final = 0o777
_INT63: Final = 1 << 63
_NO_SIZE: Final = bytes(8)
_SIZE_AT: Final = slice(13, 21)
"""Where an identity holds the size."""
_DOTS: Final = frozenset({b".", b".."})
_HEX = re.compile(r"[0-9a-f]{64}")

_PLACE = struct.Struct("<BIII")
"""A child's place while a node is written: how it is stored, the number of the blob, the offset in it, and of a
directory the length of its node."""
_DIRECTORY: Final = 0x80
_ITS_OWN: Final = 0xFFFFFFFF
"""In place of a blob's number: the blob is the content itself."""

_BLOB, _RECIPE, _SLICED, _BESIDE = range(4)
_TAG: Final = tuple(bytes([tag]) for tag in range(4))


class Where(IntEnum):
    """How a content is stored; the numbers are those of the index, not of the format."""

    EMPTY = 0
    """No bytes, stored nowhere."""
    BLOB = 1
    """A whole blob."""
    RECIPE = 2
    """The chunks that a recipe lists."""
    PACK = 3
    """A slice of a pack."""


class Location(NamedTuple):
    """Where a content's bytes are: a hint, since what it yields is checked against the content's own digest.

    :ivar blob: digest of the blob, of the recipe or of the pack, lower-case hex; "" where empty.
    :ivar offset: first byte within the pack.
    """

    where: Where
    blob: str = ""
    offset: int = 0


EMPTY_LOCATION: Final = Location(Where.EMPTY)
# Python 3.11 takes a quarter of a microsecond for ``Kind.FILE``, which is much for a directory of 100,000 entries.
_KIND_FILE, _KIND_DIR, _KIND_SYMLINK = Kind.FILE, Kind.DIR, Kind.SYMLINK
_EMPTY, _IN_BLOB, _IN_RECIPE, _IN_PACK = Where.EMPTY, Where.BLOB, Where.RECIPE, Where.PACK
BESIDE: Final = ""
"""As the ``blob`` of a pack location in a node that is written: the same pack that the node itself goes to."""
_OWN_BLOB: Final = _PLACE.pack(_IN_BLOB, _ITS_OWN, 0, 0)


class InPack(NamedTuple):
    """A place in a pack that is not closed yet, and so has no digest.

    :ivar blob: a number that stands for it.
    """

    blob: int
    offset: int

    @property
    def where(self) -> Where:
        """How the content is stored, as in :class:`Location`."""
        return _IN_PACK


class Child(NamedTuple):
    """One entry of a directory node.

    :ivar entry: what a tree knows of it; a directory's entry has no digest.
    :ivar tree: the tree digest of a directory, lower-case hex; "" for others.
    :ivar location: of a file's content, or of a directory's stored node; empty for symlinks and empty files.
    :ivar length: bytes of a directory's stored node, 0 for others (a content's length is its size).
    """

    name: str
    entry: Entry
    tree: str = ""
    location: Location = EMPTY_LOCATION
    length: int = 0


@dataclass(frozen=True, slots=True)
class NodeRef:
    """What it takes to read a directory: its tree digest, where its stored node is, and how long that is."""

    tree: str
    location: Location
    length: int


def digest_of(data: bytes | memoryview) -> str:
    """Return the BLAKE3-256 of bytes as lower-case hex."""
    return blake3(data).hexdigest()


# -- directory nodes -----------------------------------------------------------------------------------------------


def identity(child: Child) -> bytes:
    """Return the bytes of one child that the tree digest covers."""
    entry = child.entry
    name = child.name.encode()
    if entry.kind is _KIND_FILE:
        return (
            _CHILD.pack(len(name), _FILE, entry.mode, entry.mtime_ns, entry.size) + name + bytes.fromhex(entry.digest)
        )
    if entry.kind is _KIND_DIR:
        return _CHILD.pack(len(name), _DIR, entry.mode, entry.mtime_ns, 0) + name + bytes.fromhex(child.tree)
    target = entry.target.encode()
    head = _CHILD.pack(len(name), _SYMLINK, _LINK_MODE, entry.mtime_ns, 0)
    return b"".join((head, name, _U16.pack(len(target)), target))


def tree_digest(identities: Iterable[bytes]) -> str:
    """Return the tree digest of a directory, given the identities of its children in order."""
    digest = blake3()
    for one in identities:
        digest.update(one)
    return digest.hexdigest()


def node_bound(children: int, identity_bytes: int) -> int:
    """Return an upper bound of a stored node's length, whatever its locations turn out to be."""
    return _NODE_HEAD.size + identity_bytes + children * (2 * DIGEST_BYTES + 16)


class NodeWriter:
    """A directory's stored node in the making.

    It keeps bytes, not objects: a directory may have a million children.
    """

    def __init__(self) -> None:
        self.count = 0
        self._identities = bytearray()
        self._digest = blake3()
        self._places = bytearray()
        self._blobs: dict[str | int, int] = {}

    @property
    def tree(self) -> str:
        """The tree digest of the children so far."""
        return self._digest.hexdigest()

    @property
    def bound(self) -> int:
        """An upper bound of the stored node's length, whatever its locations turn out to be."""
        return node_bound(self.count, len(self._identities))

    def add(self, one: bytes, kind: Kind, place: Location | InPack, length: int) -> None:
        """Add the next child by the bytes of its name.

        :param one: its identity.
        :param length: of a directory's stored node.
        :raises ValueError: readers would refuse its location.
        """
        where = place.where
        if where is _EMPTY or kind is _KIND_SYMLINK:
            if kind is _KIND_DIR or (kind is _KIND_FILE and one[_SIZE_AT] != _NO_SIZE):
                raise ValueError("a child without a location")
        elif kind is _KIND_DIR:
            self._put(_DIRECTORY | where, place.blob, place.offset, length)
        elif one[_SIZE_AT] == _NO_SIZE:
            raise ValueError("an empty file with a location")
        elif where is _IN_BLOB:
            self._places += _OWN_BLOB
        else:
            self._put(where, place.blob, place.offset, 0)
        self.count += 1
        self._identities += one
        self._digest.update(one)

    def _put(self, where: int, blob: str | int, offset: int, length: int) -> None:
        number = self._blobs.setdefault(blob, len(self._blobs))
        self._places += _PLACE.pack(where, number, offset, length)

    def finish(self, pack: Callable[[int], str] = str) -> bytes:
        """Return the stored node.

        :param pack: returns the digest of a pack that was not closed when a child was added; BESIDE for the one that
            the node itself goes to.
        :raises ValueError: more than a node may hold.
        """
        blobs = [blob if isinstance(blob, str) else pack(blob) for blob in self._blobs]
        packs: dict[str, int] = {}
        places = bytearray()
        for where, number, offset, length in _PLACE.iter_unpack(self._places):
            form = where & ~_DIRECTORY
            if form != _IN_PACK:
                places += _TAG[_RECIPE] if form == _IN_RECIPE else _TAG[_BLOB]
                if number != _ITS_OWN:
                    places += bytes.fromhex(blobs[number])
            elif blobs[number] == BESIDE:
                places += _TAGGED_OFFSET.pack(_BESIDE, offset)
            else:
                places += _TAGGED_SLICE.pack(_SLICED, packs.setdefault(blobs[number], len(packs)), offset)
            if where & _DIRECTORY:
                places += _U32.pack(length)
        head = _NODE_HEAD.pack(FORMAT, self.count, len(self._identities), len(packs))
        size = len(head) + len(packs) * DIGEST_BYTES + len(self._identities) + len(places)
        if self.count > MAX_CHILDREN or size > NODE_MAX:
            raise ValueError(f"{self.count} children in {size} bytes are too much for a directory node")
        return b"".join((head, *map(bytes.fromhex, packs), self._identities, places))


def encode_node(identities: Sequence[bytes], stored: Sequence[tuple[Kind, Location, int]]) -> bytes:
    """Return the stored node of a directory.

    :param identities: of its children, sorted by the bytes of their names.
    :param stored: kind, location and (directories) stored length of the same children, in the same order.
    :raises ValueError: more than a node may hold, or a location that readers would refuse.
    """
    node = NodeWriter()
    for one, (kind, location, length) in zip(identities, stored, strict=True):
        node.add(one, kind, location, length)
    return node.finish()


Row = tuple[str, Kind, int, int, int, str, str, Where, str, int, int]
"""A child as plain values: name, kind, mode, mtime_ns, size, digest (of a directory: its tree digest), link target,
and where, blob, offset and length of its location as in :class:`Child`."""


class Node:
    """A stored directory node, checked against the tree digest that its parent or generation names.

    :param data: the stored bytes.
    :param tree: the tree digest it must have, lower-case hex.
    :param pack: digest of the pack it was read from, "" where it is not from one.
    :ivar count: number of children.
    :raises ObjectCorrupt: its digest is another one, or its lengths lie.
    :raises FormatTooNew: written by a newer version.
    """

    def __init__(self, data: bytes, tree: str, *, pack: str = "") -> None:
        self._data = data
        self._pack = pack
        if len(data) < _NODE_HEAD.size or len(data) > NODE_MAX:
            raise ObjectCorrupt(f"a directory node of {len(data)} bytes")
        version, self.count, size, packs = _NODE_HEAD.unpack_from(data)
        check_format(version, "a directory node")
        self._begin = _NODE_HEAD.size + packs * DIGEST_BYTES
        self._end = self._begin + size
        if self.count > MAX_CHILDREN or packs > self.count or self._end > len(data):
            raise ObjectCorrupt("a directory node's lengths do not fit its bytes")
        if blake3(memoryview(data)[self._begin : self._end]).hexdigest() != tree:
            raise ObjectCorrupt("a directory node does not match its tree digest")

    def children(self) -> Iterator[Child]:
        """Yield the children in order, each checked before it is yielded.

        :raises ObjectCorrupt: a name that must not be used, a wrong order, or lengths that lie. What was yielded
            before must not be acted upon unless the iteration ends without this.
        """
        new = tuple.__new__  # a third of the time of calling the classes; the values are what they would make
        for name, kind, mode, mtime_ns, size, digest, target, where, blob, offset, length in self.rows():
            location = new(Location, (where, blob, offset)) if blob else EMPTY_LOCATION
            if kind is _KIND_DIR:
                yield new(Child, (name, new(Entry, (kind, mode, mtime_ns, 0, "", "", "")), digest, location, length))
            else:
                yield new(Child, (name, new(Entry, (kind, mode, mtime_ns, size, digest, "", target)), "", location, 0))

    def rows(self) -> Iterator[Row]:
        """Yield what :meth:`children` does as tuples, in half of its time.

        :raises ObjectCorrupt: as in :meth:`children`.
        """
        try:
            yield from self._rows()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise ObjectCorrupt(f"a directory node is not readable: {error}") from None

    def _rows(self) -> Iterator[Row]:
        data, at, end = self._data, self._begin, self._end
        places = _Places(data, self._begin, self._end, self._pack)
        unpack, head = _CHILD.unpack_from, _CHILD.size
        last = b""
        for _ in range(self.count):
            name_size, number, mode, mtime_ns, size = unpack(data, at)
            at += head
            raw = data[at : at + name_size]
            at += name_size
            if raw <= last or name_size > MAX_COMPONENT_BYTES or b"/" in raw or b"\0" in raw or raw in _DOTS:
                raise _bad_name(raw, last)
            last = raw
            name = raw.decode()
            if mode > MODE_BITS or size >= _INT63:
                raise ObjectCorrupt(f"{printable(name)!r} has an unknown mode or size")
            if number == _SYMLINK:
                (length,) = _U16.unpack_from(data, at)
                target = _target(data[at + 2 : at + 2 + length], name)
                at += 2 + length
                if mode != _LINK_MODE or size or at > end:
                    raise ObjectCorrupt(f"symlink {printable(name)!r} has a mode or size, or ends nowhere")
                yield name, _KIND_SYMLINK, mode, mtime_ns, 0, "", target, _EMPTY, "", 0, 0
                continue
            digest = data[at : at + DIGEST_BYTES].hex()
            at += DIGEST_BYTES
            if at > end:
                raise ObjectCorrupt("a directory node's lengths do not fit its bytes")
            if number == _FILE:
                where, blob, offset = places.of_file(size, digest)
                yield name, _KIND_FILE, mode, mtime_ns, size, digest, "", where, blob, offset, 0
            elif number == _DIR and not size:
                where, blob, offset, length = places.of_directory()
                yield name, _KIND_DIR, mode, mtime_ns, 0, digest, "", where, blob, offset, length
            else:
                raise ObjectCorrupt(f"{printable(name)!r} has an unknown kind, or a directory's size")
        if at != end:
            raise ObjectCorrupt("a directory node has bytes that nothing accounts for")
        places.finish()


class _Places:
    """The locations of a node, read one after the other.

    The packs are listed in the order of their first use, each once: a node has one form only.
    """

    def __init__(self, data: bytes, begin: int, end: int, pack: str) -> None:
        self._data = data
        self._at = end
        self._pack = pack
        self._packs = [data[at : at + DIGEST_BYTES].hex() for at in range(_NODE_HEAD.size, begin, DIGEST_BYTES)]
        self._used = 0
        if len({*self._packs, pack}) != len(self._packs) + 1:
            raise ObjectCorrupt("a directory node lists a pack twice, or its own")

    def of_file(self, size: int, digest: str) -> tuple[Where, str, int]:
        """Return where a file's content is."""
        if (size == 0) is not (digest == EMPTY_DIGEST):
            raise ObjectCorrupt(f"a file of {size} bytes has the digest of another size")
        if not size:
            return EMPTY_LOCATION
        if self._data[self._at] == _BLOB:
            self._at += 1
            where, blob, offset = _IN_BLOB, digest, 0
        else:
            where, blob, offset = self._location()
        if offset + size > BLOB_MAX and where is not _IN_RECIPE:
            raise ObjectCorrupt(f"a content of {size} bytes at {offset} where a blob ends before")
        return where, blob, offset

    def of_directory(self) -> tuple[Where, str, int, int]:
        """Return where a directory's node is, and its length."""
        where, blob, offset = self._location()
        (length,) = _U32.unpack_from(self._data, self._at)
        self._at += _U32.size
        if not is_node_length(length, where, offset):
            raise ObjectCorrupt(f"a directory node of {length} bytes at {offset} of what holds it")
        return where, blob, offset, length

    def _location(self) -> tuple[Where, str, int]:
        data, at = self._data, self._at
        tag = data[at]
        if tag == _SLICED:
            number, offset = _SLICE.unpack_from(data, at + 1)
            self._at = at + _TAGGED_SLICE.size
            if number >= self._used:
                self._use(number)
            return _IN_PACK, self._packs[number], offset
        if tag == _BESIDE and self._pack:
            (offset,) = _U32.unpack_from(data, at + 1)
            self._at = at + _TAGGED_OFFSET.size
            return _IN_PACK, self._pack, offset
        if tag not in {_BLOB, _RECIPE}:
            raise ObjectCorrupt(f"a directory node holds a location of kind {tag}, which is unknown here")
        self._at = at + 1 + DIGEST_BYTES
        if self._at > len(data):
            raise ObjectCorrupt("a directory node ends early")
        return _IN_BLOB if tag == _BLOB else _IN_RECIPE, data[at + 1 : self._at].hex(), 0

    def _use(self, number: int) -> None:
        if number != self._used:
            raise ObjectCorrupt("a directory node names its packs out of order")
        self._used += 1

    def finish(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._data) or self._used != len(self._packs):
            raise ObjectCorrupt("a directory node has locations or packs that nothing accounts for")


def is_node_length(length: int, where: Where, offset: int) -> bool:
    """Tell whether a stored node may have a length, given where it is."""
    return _NODE_HEAD.size <= length <= NODE_MAX and (where is _IN_RECIPE or offset + length <= BLOB_MAX)


def _bad_name(raw: bytes, last: bytes) -> ObjectCorrupt:
    if not raw or len(raw) > MAX_COMPONENT_BYTES:
        return ObjectCorrupt(f"a name of {len(raw)} bytes in a directory node")
    if raw <= last:
        return ObjectCorrupt(f"{printable(raw)!r} is out of order, or twice, in a directory node")
    return ObjectCorrupt(f"the name {printable(raw)!r} in a directory node")


def _target(raw: bytes, name: str) -> str:
    if not 0 < len(raw) <= MAX_TARGET_BYTES or b"\0" in raw:
        raise ObjectCorrupt(f"symlink {printable(name)!r} without a usable target")
    return raw.decode()


# -- recipes -------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """One piece of a content: a chunk, or, in a recipe of recipes, the content of a recipe.

    :ivar length: bytes of content.
    """

    digest: str
    length: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """A large content's pieces in order.

    :ivar level: 0: the pieces are chunks; n: they are recipes of level n - 1.
    """

    level: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return sum(piece.length for piece in self.pieces)


def encode_recipe(recipe: Recipe) -> bytes:
    """Return a recipe's bytes.

    :raises ValueError: it does not fit a blob (make a recipe of recipes), or has no piece.
    """
    if not 0 < len(recipe.pieces) <= MAX_PIECES:
        raise ValueError(f"{len(recipe.pieces)} pieces do not fit a recipe")
    head = _RECIPE_HEAD.pack(FORMAT, recipe.level, recipe.size)
    return head + b"".join(_PIECE.pack(bytes.fromhex(piece.digest), piece.length) for piece in recipe.pieces)


MAX_PIECES: Final = (BLOB_MAX - _RECIPE_HEAD.size) // _PIECE.size


def decode_recipe(data: bytes, *, size: int, below: int = RECIPE_LEVELS) -> Recipe:
    """Read a recipe.

    :param size: bytes that its content must have.
    :param below: its level must be lower: that of the recipe which names it.
    :raises ObjectCorrupt: its lengths lie, or it is none.
    :raises FormatTooNew: written by a newer version.
    """
    if len(data) < _RECIPE_HEAD.size or len(data) > BLOB_MAX:
        raise ObjectCorrupt(f"a recipe of {len(data)} bytes")
    version, level, total = _RECIPE_HEAD.unpack_from(data)
    check_format(version, "a recipe")
    if level >= below:
        raise ObjectCorrupt(f"a recipe of level {level} where less than {below} is due")
    body = memoryview(data)[_RECIPE_HEAD.size :]
    if not body or len(body) % _PIECE.size or total != size:
        raise ObjectCorrupt(f"a recipe for {total} bytes, which does not fit the {size} of its content")
    pieces = tuple(Piece(digest.hex(), length) for digest, length in _PIECE.iter_unpack(body))
    limit = BLOB_MAX if level == 0 else size
    if sum(piece.length for piece in pieces) != size or not all(0 < piece.length <= limit for piece in pieces):
        raise ObjectCorrupt("a recipe's pieces do not add up to its content")
    return Recipe(level, pieces)


# -- generation records --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Generation:
    """A committed tree of a folder: the record that its object holds.

    :ivar number: from 1, growing by one.
    :ivar root: the root directory's node.
    :ivar parent: BLAKE3 of the record before, lower-case hex; "" for the first.
    :ivar created: RFC 3339, UTC, as the publisher's clock had it: for people, no decision depends on it.
    :ivar publisher: who committed it.
    :ivar files, size: regular files and symlinks of the tree, and the files' bytes.
    :ivar added, changed, removed: paths against the generation before, directories not counted.
    :ivar allowed: a person allowed the removal of everything.
    :ivar expires: RFC 3339, UTC; "" for never.
    """

    folder: str
    number: int
    root: NodeRef
    created: str
    publisher: str
    parent: str = ""
    files: int = 0
    size: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    note: str = ""
    allowed: bool = False
    expires: str = ""


_RECORD_KEYS: Final = frozenset(
    {"format", "folder", "number", "tree", "root", "created", "publisher", "parent", "files", "bytes"}
    | {"added", "changed", "removed", "note", "allowed", "expires"}
)
_ROOT_KEYS: Final = frozenset({"where", "blob", "offset", "length"})
_WHERES: Final = {Where.BLOB: "blob", Where.RECIPE: "recipe", Where.PACK: "pack"}
_WHERE_OF: Final = {word: where for where, word in _WHERES.items()}
_MAX_INT: Final = (1 << 53) - 1
"""What every JSON reader counts exactly."""
_TIME = re.compile(
    r"([0-9]{4})-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?Z"
)


def encode_record(generation: Generation) -> bytes:
    """Return the canonical JSON of a generation record (RFC 8785): sorted keys, no blanks, UTF-8.

    :raises ValueError: a record that readers would refuse.
    """
    data = _record_bytes(generation)
    try:
        decode_record(data)
    except ObjectCorrupt as error:
        raise ValueError(str(error)) from None
    return data


def _record_bytes(generation: Generation) -> bytes:
    location = generation.root.location
    fields = {
        "format": FORMAT,
        "folder": generation.folder,
        "number": generation.number,
        "tree": generation.root.tree,
        "root": {
            "where": _WHERES.get(location.where, ""),
            "blob": location.blob,
            "offset": location.offset,
            "length": generation.root.length,
        },
        "created": generation.created,
        "publisher": generation.publisher,
        "parent": generation.parent,
        "files": generation.files,
        "bytes": generation.size,
        "added": generation.added,
        "changed": generation.changed,
        "removed": generation.removed,
        "note": generation.note,
        "allowed": generation.allowed,
        "expires": generation.expires,
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode_record(data: bytes) -> Generation:
    """Read a generation record.

    :raises ObjectCorrupt: it is none, or not in its canonical form.
    :raises FormatTooNew: written by a newer version.
    """
    if len(data) > RECORD_MAX:
        raise ObjectCorrupt(f"a generation record of {len(data)} bytes")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise ObjectCorrupt("a generation record is not JSON") from None
    if not isinstance(fields, dict):
        raise ObjectCorrupt("a generation record is no JSON object")
    check_format(_integer(fields, "format"), "the generation record")
    root = fields.get("root")
    if fields.keys() != _RECORD_KEYS or not isinstance(root, dict) or root.keys() != _ROOT_KEYS:
        raise ObjectCorrupt("a generation record lacks fields, or has unknown ones")
    generation = _read_record(fields, root)
    try:
        if _record_bytes(generation) != data:  # doubled keys, blanks, other escapes, 1e3
            raise ObjectCorrupt("a generation record is not in canonical form")
    except UnicodeEncodeError:
        raise ObjectCorrupt("a generation record is not UTF-8") from None
    return generation


def _read_record(fields: dict[str, Any], root: dict[str, Any]) -> Generation:
    number = _integer(fields, "number")
    where = _WHERE_OF.get(_text(root, "where"))
    if where is None or not 0 < number <= MAX_GENERATION:
        raise ObjectCorrupt("a generation record names no root, or no number")
    offset, length = _integer(root, "offset"), _integer(root, "length")
    if not is_node_length(length, where, offset) or (offset and where is not Where.PACK):
        raise ObjectCorrupt("a generation record's root does not fit")
    created, expires = _text(fields, "created"), _text(fields, "expires")
    if not _is_time(created) or (expires and not _is_time(expires)):
        raise ObjectCorrupt("a generation record's times are not RFC 3339 in UTC")
    if type(fields["allowed"]) is not bool or len(_text(fields, "note")) > NOTE_MAX:
        raise ObjectCorrupt("a generation record's note or flags do not fit")
    return Generation(
        folder=_text(fields, "folder"),
        number=number,
        root=NodeRef(_hex(fields, "tree"), Location(where, _hex(root, "blob"), offset), length),
        created=created,
        publisher=_text(fields, "publisher"),
        parent=_hex(fields, "parent", optional=True),
        files=_integer(fields, "files"),
        size=_integer(fields, "bytes"),
        added=_integer(fields, "added"),
        changed=_integer(fields, "changed"),
        removed=_integer(fields, "removed"),
        note=fields["note"],
        allowed=fields["allowed"],
        expires=expires,
    )


def _is_time(text: str) -> bool:
    found = _TIME.fullmatch(text)
    if found is None or int(found[1]) == 0:
        return False
    return int(found[3]) <= monthrange(int(found[1]), int(found[2]))[1]


def _integer(fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise ObjectCorrupt(f"a generation record's {key} is no number in range")
    return value


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields[key]
    if type(value) is not str:
        raise ObjectCorrupt(f"a generation record's {key} is no text")
    return value


def _hex(fields: dict[str, Any], key: str, *, optional: bool = False) -> str:
    value = _text(fields, key)
    if not _HEX.fullmatch(value) and not (optional and not value):
        raise ObjectCorrupt(f"a generation record's {key} is no digest")
    return value


def check_format(version: int, what: str) -> None:
    """Refuse what a newer version wrote.

    :raises FormatTooNew: it did.
    :raises ObjectCorrupt: no version has this number.
    """
    if version > FORMAT:
        raise FormatTooNew(
            f"{what} is of format {version}; this syncd reads up to {FORMAT}", hint="upgrade syncd on this host"
        )
    if version != FORMAT:
        raise ObjectCorrupt(f"{what} is of format {version}, which does not exist")
