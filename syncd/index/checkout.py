"""What a subscriber knows of the generations layout: nodes, a walk in progress, staged content, chunks in the mirror.

Rules kept here:
 * a walk collects in temporary tables and becomes the ``remote`` half in one transaction: after a crash that half
   describes exactly the generation before or the one walked;
 * ``node`` says which directories the ``remote`` half describes; without the root's row it describes none;
 * memory is bounded: everything that grows with the tree stays in tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from syncd.index.database import FOREVER, PAGE, Row, chunks
from syncd.index.index import LocalRow
from syncd.model import Entry, Kind, Stat
from syncd.nodes import Location, NodeRef, Where, decode_recipe
from syncd.paths import from_sort_key, sort_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from syncd.index.database import Database

MAX_TOUCHED: Final = 50_000
"""Paths that one walk names; of more changes it says "all"."""

_KINDS: Final = (Kind.FILE, Kind.DIR, Kind.SYMLINK)
_NUMBER_OF: Final = {kind: number for number, kind in enumerate(_KINDS)}
_LETTERS: Final = {Where.EMPTY: "", Where.BLOB: "b", Where.RECIPE: "r", Where.PACK: "p"}
_IN_PACK, _EMPTY = Where.PACK, Where.EMPTY
_DIR: Final = 1
_WAS_DIR: Final = ((_DIR,), ())
"""The kind of a directory's row, and of one that does not take part itself."""
_WHERES: Final = {letter: where for where, letter in _LETTERS.items()}
_WORDS_OF_PACK: Final = 3

_TEMP = """
CREATE TEMP TABLE IF NOT EXISTS fresh(
  key BLOB PRIMARY KEY, kind INTEGER, mode INTEGER, mtime INTEGER, size INTEGER, digest, target TEXT, nuid TEXT,
  touches INTEGER) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS todo(
  key BLOB PRIMARY KEY, tree BLOB, place INTEGER, blob BLOB, at INTEGER, length INTEGER) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS walked(
  key BLOB PRIMARY KEY, tree BLOB, place INTEGER, blob BLOB, at INTEGER, length INTEGER) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS gone(first BLOB PRIMARY KEY, last BLOB) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS adopted(key BLOB PRIMARY KEY, found TEXT) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS wanted(
  place INTEGER, blob BLOB, at INTEGER, key BLOB, size INTEGER, digest BLOB, mode INTEGER, mtime INTEGER,
  PRIMARY KEY(place, blob, at, key)) WITHOUT ROWID;
"""
_TAKE_OVER = """INSERT OR REPLACE INTO remote
SELECT key, kind, mode, mtime, size, digest, '', target, ?, '', nuid, 0, 0, ?, ?, '' FROM temp.fresh"""
_TOUCHED = """
SELECT remote.key FROM temp.gone JOIN remote ON remote.key >= gone.first AND remote.key < gone.last
UNION ALL SELECT key FROM temp.fresh WHERE touches LIMIT ?"""
# From each child one seek leads to the next: behind whatever is below it. ?3 is where names begin, counted from 1.
_NAME = """CASE instr(substr(key, ?3), x'00') WHEN 0 THEN key
  ELSE substr(key, 1, ?3 - 2 + instr(substr(key, ?3), x'00')) END"""
_KNOWN = f"""
WITH RECURSIVE child(key) AS (
  SELECT (SELECT {_NAME} FROM remote WHERE key >= ?1 AND key < ?2 ORDER BY key LIMIT 1)
  UNION ALL
  SELECT (SELECT {_NAME} FROM remote WHERE key >= CAST(child.key || x'01' AS BLOB) AND key < ?2 ORDER BY key LIMIT 1)
  FROM child WHERE child.key IS NOT NULL)
SELECT child.key, r.key, kind, mode, mtime, size, digest, target, nuid
FROM child LEFT JOIN remote r ON r.key = child.key WHERE child.key IS NOT NULL"""  # noqa: S608
_WANTED = f"""SELECT * FROM temp.wanted WHERE (place, blob, at, key) > (?, ?, ?, ?) AND (place = 2) = ?
ORDER BY place, blob, at, key LIMIT {PAGE}"""  # noqa: S608
# The indexes of digests and locations leave out empty ones, so each statement has to say that it does, too.
_CONTENTS = """SELECT digest, min(key) FROM local
WHERE digest IN (%s) AND digest <> '' AND kind = 0 AND problem = '' GROUP BY digest"""


def location_text(location: Location) -> str:
    """Write a location as the ``nuid`` of a remote row: "" (no bytes), ``b:<hex>``, ``r:<hex>`` or ``p:<hex>:<at>``."""
    return place_text(*location)


def place_text(where: Where, blob: str, offset: int) -> str:
    """Do what :func:`location_text` does, given the parts of a location."""
    if where is _IN_PACK:
        return f"p:{blob}:{offset}"
    return "" if where is _EMPTY else f"{_LETTERS[where]}:{blob}"


def parse_location(text: str) -> Location:
    """Invert :func:`location_text`."""
    if not text:
        return Location(Where.EMPTY)
    words = text.split(":")
    return Location(_WHERES[words[0]], words[1], int(words[2]) if len(words) == _WORDS_OF_PACK else 0)


@dataclass(frozen=True, slots=True)
class Staged:
    """Content that is staged for a path.

    :ivar run: the run that verified it.
    """

    name: str
    digest: str
    run: str


class Wanted(NamedTuple):
    """A file whose content is to be fetched."""

    path: str
    entry: Entry
    location: Location


class Walked(NamedTuple):
    """One child of a directory that was read.

    :ivar digest: of a file's content, else "".
    :ivar place: where a file's content is, as :func:`location_text` writes it.
    :ivar node: of a directory that is to be descended into.
    :ivar takes: whether it takes part by itself.
    """

    name: str
    kind: Kind
    mode: int
    mtime_ns: int
    size: int
    digest: str
    target: str
    place: str
    node: NodeRef | None = None
    takes: bool = True


class ChunkPlace(NamedTuple):
    """Where a chunk was seen: at an offset of a content."""

    digest: str
    content: str
    at: int
    length: int


class CheckoutTables:
    """The tables ``node``, ``staged``, ``chunk`` and ``cached`` of an index, and what a walk needs meanwhile."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._knows = False
        for statement in _TEMP.split(";"):
            if statement.strip():
                db.rows(statement)

    # -- a walk ------------------------------------------------------------------------------------------------------

    def begin_walk(self, root: NodeRef) -> None:
        """Begin a walk at the root; where the ``remote`` half describes no generation, everything is new."""
        self._knows = self._db.row("SELECT 1 FROM node WHERE key = x''") is not None
        with self._db.transaction():
            self._clear_walk()
            self._put_nodes("temp.todo", [(b"", root)])

    def next_dirs(self, limit: int, max_bytes: int) -> list[tuple[str, NodeRef]]:
        """Take the next directories to be read, in component order.

        :param max_bytes: of their stored nodes together; one may be longer.
        """
        with self._db.transaction():
            rows = self._db.rows("SELECT * FROM temp.todo ORDER BY key LIMIT ?", (limit,))
            size = 0
            for number, row in enumerate(rows):
                size += row[-1]
                if number and size > max_bytes:
                    del rows[number:]
                    break
            self._db.many("DELETE FROM temp.todo WHERE key = ?", ((row[0],) for row in rows))
            self._db.many("INSERT INTO temp.walked VALUES (?, ?, ?, ?, ?, ?)", rows)
        return [(from_sort_key(row[0]), _ref(row)) for row in rows]

    def add_directory(self, path: str, children: Iterable[Walked]) -> None:
        """Compare a directory that was read with what the ``remote`` half has of it; queue what is to be read next.

        :param children: all of them, sorted by the bytes of their names.
        """
        prefix = sort_key(path) + b"\0" if path else b""
        known = self._known_children(prefix) if self._knows else iter(())
        here = next(known, None)
        fresh: list[Row] = []
        dirs: list[tuple[bytes, NodeRef]] = []
        gone: list[Row] = []
        for child in children:
            key = prefix + child.name.encode()
            while here is not None and here[0] < key:
                gone.append((here[0], here[0] + b"\x01"))
                here = next(known, None)
            before: Row | None = None
            if here is not None and here[0] == key:
                before, here = here, next(known, None)
            kind = _NUMBER_OF[child.kind]
            digest = bytes.fromhex(child.digest) if child.digest else ""
            row = (key, kind, child.mode, child.mtime_ns, child.size, digest, child.target, child.place)
            if child.takes and row != before:
                fresh.append((*row, before is None or row[:-1] != before[:-1]))
            if before is not None and kind != _DIR and before[1:2] in _WAS_DIR:
                gone.append((key + b"\0", key + b"\x01"))  # what was below it
            if child.node is not None:
                dirs.append((key, child.node))
            if len(fresh) + len(dirs) + len(gone) >= PAGE:
                self._add(fresh, dirs, gone)
        while here is not None:
            gone.append((here[0], here[0] + b"\x01"))
            here = next(known, None)
        self._add(fresh, dirs, gone)

    def _known_children(self, prefix: bytes) -> Iterator[Row]:
        """Yield the rows of a directory's direct children; of those that only have something below them, the key."""
        end = prefix[:-1] + b"\x01" if prefix else FOREVER
        for row in self._db.stream(_KNOWN, (prefix, end, len(prefix) + 1), PAGE):
            yield row[1:] if row[1] is not None else row[:1]

    def _add(self, fresh: list[Row], dirs: list[tuple[bytes, NodeRef]], gone: list[Row]) -> None:
        """Write down what :meth:`add_directory` found, and empty its lists."""
        self._db.many("INSERT INTO temp.fresh VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", fresh)
        self._db.many("INSERT OR IGNORE INTO temp.gone VALUES (?, ?)", gone)
        for some in chunks(dirs):
            values = dict(some)
            marks = ", ".join("?" * len(values))
            if self._knows:
                for row in self._db.rows(f"SELECT * FROM node WHERE key IN ({marks})", values):  # noqa: S608
                    if _ref(row) == values[row[0]]:
                        del values[row[0]]
            self._put_nodes("temp.todo", values.items())
        for one in (fresh, dirs, gone):
            one.clear()

    def _put_nodes(self, table: str, dirs: Iterable[tuple[bytes, NodeRef]]) -> None:
        self._db.many(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?)", (_node_values(*one) for one in dirs))  # noqa: S608

    def finish_walk(self, bucket: str, publisher: str, step: int) -> set[str] | None:
        """Make the ``remote`` half what was walked; return the paths that changed, ``None`` where they are many.

        :param step: the sequence of new and changed rows: higher than that of any row before.
        """
        db = self._db
        with db.transaction():
            touched: set[str] | None = None
            if self._knows:
                rows = db.rows(_TOUCHED, (MAX_TOUCHED + 1,))
                touched = {from_sort_key(row[0]) for row in rows} if len(rows) <= MAX_TOUCHED else None
                for table in ("remote", "node"):
                    db.rows(
                        f"DELETE FROM {table} WHERE key IN (SELECT {table}.key FROM temp.gone "  # noqa: S608
                        f"JOIN {table} ON {table}.key >= gone.first AND {table}.key < gone.last)"
                    )
                db.rows("DELETE FROM node WHERE key IN (SELECT key FROM temp.fresh WHERE kind <> 1)")
            else:
                db.rows("DELETE FROM remote")
                db.rows("DELETE FROM node")
            db.rows(_TAKE_OVER, (bucket, step, publisher))
            db.rows("INSERT OR REPLACE INTO node SELECT * FROM temp.walked")
            self._clear_walk()
        return touched

    def _clear_walk(self) -> None:
        for table in ("fresh", "todo", "walked", "gone"):
            self._db.rows(f"DELETE FROM temp.{table}")  # noqa: S608

    def forget_nodes(self) -> None:
        """Let the next walk read everything."""
        self._db.run("DELETE FROM node")

    # -- what is to be fetched ---------------------------------------------------------------------------------------

    def begin_gather(self) -> None:
        """Want nothing yet."""
        with self._db.transaction():
            self._db.rows("DELETE FROM temp.wanted")
            self._db.rows("DELETE FROM temp.adopted")

    def put_adopted(self, rows: Iterable[LocalRow]) -> None:
        """Note files that are there already with the content that is wanted; they are not syncd's yet."""
        self._db.many(
            "INSERT OR REPLACE INTO temp.adopted VALUES (?, ?)",
            ((sort_key(row.path), json.dumps([row.entry, row.stat])) for row in rows),
        )

    def adopted(self, paths: Iterable[str]) -> dict[str, LocalRow]:
        """Return what was noted for paths."""
        found: dict[str, LocalRow] = {}
        for some in chunks(map(sort_key, paths)):
            marks = ", ".join("?" * len(some))
            for key, text in self._db.rows(f"SELECT * FROM temp.adopted WHERE key IN ({marks})", some):  # noqa: S608
                path = from_sort_key(key)
                entry, stat = json.loads(text)
                found[path] = LocalRow(path, Entry(Kind(entry[0]), *entry[1:]), Stat(*stat))
        return found

    def want(self, files: Iterable[Wanted]) -> None:
        """Note files whose content is to be fetched."""
        self._db.many(
            "INSERT OR REPLACE INTO temp.wanted VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    int(file.location.where),
                    bytes.fromhex(file.location.blob),
                    file.location.offset,
                    sort_key(file.path),
                    file.entry.size,
                    bytes.fromhex(file.entry.digest),
                    file.entry.mode,
                    file.entry.mtime_ns,
                )
                for file in files
            ),
        )

    def wanted_bytes(self) -> int:
        """Return the sum of the sizes of what is wanted."""
        return self._db.count("SELECT coalesce(sum(size), 0) FROM temp.wanted")

    def wanted(self, *, recipes: bool) -> Iterator[Wanted]:
        """Yield what is wanted by its location, so that what lies in one blob comes together."""
        after: Row = (-1, b"", 0, b"")
        while page := self._db.rows(_WANTED, (*after, recipes)):
            for place, blob, at, key, size, digest, mode, mtime in page:
                entry = Entry(Kind.FILE, mode, mtime, size, digest.hex())
                yield Wanted(from_sort_key(key), entry, Location(Where(place), blob.hex(), at))
            after = page[-1][:4]

    # -- staged content ----------------------------------------------------------------------------------------------

    def put_staged(self, rows: Iterable[tuple[str, Staged]]) -> None:
        """Note what is staged for paths."""
        self._db.many(
            "INSERT OR REPLACE INTO staged VALUES (?, ?, ?, ?)",
            ((sort_key(path), one.name, bytes.fromhex(one.digest), one.run) for path, one in rows),
        )

    def staged(self, paths: Iterable[str]) -> dict[str, Staged]:
        """Return what is staged for paths."""
        found: dict[str, Staged] = {}
        for some in chunks(map(sort_key, paths)):
            marks = ", ".join("?" * len(some))
            for key, name, digest, run in self._db.rows(f"SELECT * FROM staged WHERE key IN ({marks})", some):  # noqa: S608
                found[from_sort_key(key)] = Staged(name, digest.hex(), run)
        return found

    def staged_content(self, digest: str, run: str) -> Staged | None:
        """Return any staged file with this content that a run has verified."""
        row = self._db.row("SELECT name FROM staged WHERE digest = ? AND run = ? LIMIT 1", (bytes.fromhex(digest), run))
        return Staged(row[0], digest, run) if row else None

    def drop_staged(self, paths: Iterable[str]) -> None:
        """Forget what was staged for paths."""
        self._db.many("DELETE FROM staged WHERE key = ?", ((sort_key(path),) for path in paths))

    def clear_staged(self) -> None:
        """Forget everything that was staged."""
        self._db.run("DELETE FROM staged")

    def is_staged(self, name: str) -> bool:
        """Tell whether a staged name is noted."""
        return self._db.row("SELECT 1 FROM staged WHERE name = ?", (name,)) is not None

    # -- chunks ------------------------------------------------------------------------------------------------------

    def put_chunks(self, places: Iterable[ChunkPlace]) -> None:
        """Note where chunks are."""
        self._db.many(
            "INSERT OR IGNORE INTO chunk VALUES (?, ?, ?, ?)",
            ((bytes.fromhex(one.digest), bytes.fromhex(one.content), one.at, one.length) for one in places),
        )

    def find_chunks(self, digests: Iterable[str]) -> dict[str, list[ChunkPlace]]:
        """Return where chunks may be found."""
        found: dict[str, list[ChunkPlace]] = {}
        for some in chunks(map(bytes.fromhex, digests)):
            marks = ", ".join("?" * len(some))
            for digest, content, at, length in self._db.rows(
                f"SELECT * FROM chunk WHERE digest IN ({marks})",  # noqa: S608
                some,
            ):
                found.setdefault(digest.hex(), []).append(ChunkPlace(digest.hex(), content.hex(), at, length))
        return found

    def unlearned(self, limit: int) -> list[tuple[str, str, int]]:
        """Return large contents of the mirror whose chunks are not noted: recipe, digest and size of each."""
        rows = self._db.rows(
            "SELECT DISTINCT r.nuid, r.digest, r.size FROM remote r JOIN local l ON l.key = r.key "
            "WHERE r.nuid <> '' AND r.nuid >= 'r:' AND r.nuid < 'r;' AND l.digest = r.digest "
            "AND NOT EXISTS (SELECT 1 FROM chunk WHERE content = r.digest) LIMIT ?",
            (limit,),
        )
        return [(parse_location(nuid).blob, digest.hex(), size) for nuid, digest, size in rows]

    def drop_lost_chunks(self) -> None:
        """Forget the chunks of contents that the mirror does not have (any more)."""
        self._db.run(
            "DELETE FROM chunk WHERE content IN (SELECT content FROM (SELECT DISTINCT content FROM chunk) "
            "WHERE NOT EXISTS (SELECT 1 FROM local WHERE digest = content AND digest <> ''))"
        )

    def local_contents(self, digests: Iterable[str]) -> dict[str, str]:
        """Return for each content that the mirror has a path that has it."""
        found: dict[str, str] = {}
        for some in chunks(map(bytes.fromhex, digests)):
            rows = self._db.rows(_CONTENTS % ", ".join("?" * len(some)), some)
            found.update((digest.hex(), from_sort_key(key)) for digest, key in rows)
        return found

    def is_announced(self, digest: str) -> bool:
        """Tell whether any file of the ``remote`` half has this content."""
        return (
            self._db.row("SELECT 1 FROM remote WHERE digest = ? AND digest <> '' LIMIT 1", (bytes.fromhex(digest),))
            is not None
        )

    # -- chunks of large nodes ---------------------------------------------------------------------------------------

    def get_cached(self, digests: Collection[str]) -> dict[str, bytes]:
        """Return those blobs that are kept."""
        found: dict[str, bytes] = {}
        for some in chunks(map(bytes.fromhex, digests)):
            marks = ", ".join("?" * len(some))
            rows = self._db.rows(f"SELECT digest, data FROM cached WHERE digest IN ({marks})", some)  # noqa: S608
            found.update((digest.hex(), data) for digest, data in rows)
        return found

    def put_cached(self, blobs: dict[str, bytes]) -> None:
        """Keep blobs."""
        self._db.many(
            "INSERT OR REPLACE INTO cached VALUES (?, ?)",
            ((bytes.fromhex(digest), data) for digest, data in blobs.items()),
        )

    def drop_unused_cached(self) -> None:
        """Forget the kept blobs that no node of the ``remote`` half is made of."""
        used: set[bytes] = set()
        for blob, length in self._db.rows("SELECT blob, length FROM node WHERE place = 2"):
            self._collect(blob, length, used)
        kept = [row for row in self._db.rows("SELECT digest FROM cached") if row[0] not in used]
        self._db.many("DELETE FROM cached WHERE digest = ?", kept)

    def _collect(self, recipe: bytes, size: int, used: set[bytes]) -> None:
        used.add(recipe)
        row = self._db.row("SELECT data FROM cached WHERE digest = ?", (recipe,))
        if row is None:
            return
        read = decode_recipe(row[0], size=size)
        for piece in read.pieces:
            if read.level:
                self._collect(bytes.fromhex(piece.digest), piece.length, used)
            else:
                used.add(bytes.fromhex(piece.digest))


def _node_values(key: bytes, ref: NodeRef) -> Row:
    location = ref.location
    return (
        key,
        bytes.fromhex(ref.tree),
        int(location.where),
        bytes.fromhex(location.blob),
        location.offset,
        ref.length,
    )


def _ref(row: Row) -> NodeRef:
    return NodeRef(row[1].hex(), Location(Where(row[2]), row[3].hex(), row[4]), row[5])
