"""What a publisher knows of the generations layout: blobs that the bucket holds, contents in them, directory nodes.

Rules kept here:
 * a content counts as located only while the blob that holds it counts as held;
 * nodes are those of the newest generation, as the ``remote`` half of the index is: both change after a commit only;
 * blobs are noted before the server has acknowledged them. The note ``unsettled`` says so, and sends whoever finds it
   after a crash to list the bucket.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Final

from syncd.index.database import FOREVER, Row, chunks, key_range
from syncd.model import Entry, Kind
from syncd.nodes import Location, NodeRef, Where
from syncd.paths import ancestors, from_sort_key, sort_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from syncd.index.database import Database

UNSETTLED: Final = "unsettled"
STRAYS: Final = "strays"
MAX_STRAYS: Final = 1000
"""Chunks that no object names, of one collection; the rest is for the next one."""
_KINDS = (Kind.FILE, Kind.DIR, Kind.SYMLINK)
_FETCH = 500

# From each child one seek leads to the next: behind whatever is below it. (Joined texts become bytes again by CAST.)
_CHILDREN = """
WITH RECURSIVE child(key) AS (
  SELECT (SELECT key FROM local WHERE key >= ?1 AND key < ?2 ORDER BY key LIMIT 1)
  UNION ALL
  SELECT (SELECT key FROM local WHERE key >= CAST(child.key || x'01' AS BLOB) AND key < ?2 ORDER BY key LIMIT 1)
  FROM child WHERE child.key IS NOT NULL)
SELECT l.key, l.kind, l.mode, l.mtime, l.size, l.digest, l.target, l.problem,
       lb.freed IS NOT NULL, d.place, d.blob, d.at,
       nb.freed IS NOT NULL, n.tree, n.place, n.blob, n.at, n.length
FROM child CROSS JOIN local l ON l.key = child.key
  LEFT JOIN located d ON l.kind = 0 AND d.digest = l.digest
  LEFT JOIN blob lb ON lb.digest = d.blob AND lb.freed = 0
  LEFT JOIN node n ON l.kind = 1 AND n.key = l.key AND NOT EXISTS (SELECT 1 FROM temp.dirty WHERE dirty.key = l.key)
  LEFT JOIN blob nb ON nb.digest = n.blob AND nb.freed = 0"""
_LOST_CONTENTS = """
INSERT INTO temp.moved SELECT key FROM local l
WHERE kind = 0 AND size > 0 AND problem = '' AND digest <> '' AND NOT EXISTS (
  SELECT 1 FROM located d JOIN blob b ON b.digest = d.blob AND b.freed = 0 WHERE d.digest = l.digest)"""
# The name "." below the directory: soiling goes upwards from there, and no path is called so.
_LOST_NODES = """
INSERT OR IGNORE INTO temp.moved SELECT CASE key WHEN x'' THEN x'2e' ELSE CAST(key || x'002e' AS BLOB) END FROM node n
WHERE NOT EXISTS (SELECT 1 FROM blob b WHERE b.digest = n.blob AND b.freed = 0)"""


class State(Enum):
    """What a publisher knows of a blob."""

    UNKNOWN = "unknown"
    HELD = "held"
    """The bucket has it."""
    FREED = "freed"
    """Removed by us not long ago: its remover may still be stored in its place."""


@dataclass(frozen=True, slots=True)
class ChildRow:
    """One child of a source directory.

    :ivar location: of a file's content, ``None`` where it is not in the bucket or not known yet.
    :ivar node: of a directory that has not changed; ``None``: to be built.
    """

    path: str
    entry: Entry
    problem: str
    location: Location | None
    node: NodeRef | None


class Blobs:
    """The tables ``blob``, ``located`` and ``node`` of an index."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # -- blobs -------------------------------------------------------------------------------------------------------

    def state(self, digest: str) -> State:
        """Tell what we know of a blob."""
        row = self._db.row("SELECT freed FROM blob WHERE digest = ?", (_raw(digest),))
        return State.UNKNOWN if row is None else State.FREED if row[0] else State.HELD

    def hold(self, digests: Iterable[str]) -> None:
        """Note blobs that are sent."""
        self._db.many("INSERT OR REPLACE INTO blob VALUES (?, 0, 0)", ((_raw(digest),) for digest in digests))

    def count_held(self) -> int:
        """Return the number of blobs."""
        return self._db.count("SELECT count(*) FROM blob WHERE freed = 0")

    def begin_listing(self) -> None:
        """Begin a listing of the bucket's blobs."""
        self._db.run("DELETE FROM temp.listed_blob")

    def listed(self, digests: Iterable[str]) -> None:
        """Note what the bucket lists."""
        self._db.many("INSERT OR IGNORE INTO temp.listed_blob VALUES (?)", ((_raw(digest),) for digest in digests))

    def end_listing(self) -> int:
        """Take the listing for the truth; return how many blobs are lost that were held."""
        with self._db.transaction():
            gone = "freed = 0 AND NOT EXISTS (SELECT 1 FROM temp.listed_blob t WHERE t.digest = blob.digest)"
            lost = self._db.count(f"SELECT count(*) FROM blob WHERE {gone}")  # noqa: S608
            if lost:
                # Which content a lost chunk belongs to is in recipes only: all large contents are looked at again.
                known = "SELECT blob FROM located UNION SELECT blob FROM node"
                strangers = self._db.count(f"SELECT count(*) FROM blob WHERE {gone} AND digest NOT IN ({known})")  # noqa: S608
                if strangers:
                    self._db.run("DELETE FROM located WHERE place = ?", (int(Where.RECIPE),))
                    self._db.run("DELETE FROM node WHERE place = ?", (int(Where.RECIPE),))
                self._db.run(f"DELETE FROM blob WHERE {gone}")  # noqa: S608
            self._db.run("INSERT OR IGNORE INTO blob SELECT digest, 0, 0 FROM temp.listed_blob")
        self._db.run("DELETE FROM temp.listed_blob")
        return lost

    # -- collection --------------------------------------------------------------------------------------------------

    def begin_marking(self) -> None:
        """Begin a mark: nothing is reached."""
        self._db.run("DELETE FROM temp.reached")
        self._db.run("DELETE FROM temp.visited")

    def reach(self, digests: Iterable[str]) -> None:
        """Note blobs that a kept generation needs."""
        self._db.many("INSERT OR IGNORE INTO temp.reached VALUES (?)", ((_raw(digest),) for digest in digests))

    def is_reached(self, digest: str) -> bool:
        """Tell whether a blob was reached before."""
        return self._db.row("SELECT 1 FROM temp.reached WHERE digest = ?", (_raw(digest),)) is not None

    def visit(self, refs: Iterable[NodeRef]) -> list[NodeRef]:
        """Return those nodes that were not visited before, and note them."""
        fresh: list[NodeRef] = []
        with self._db.transaction():
            for ref in refs:
                key = _raw(ref.tree) + _raw(ref.location.blob) + ref.location.offset.to_bytes(4, "little")
                if self._db.row("SELECT 1 FROM temp.visited WHERE node = ?", (key,)) is None:
                    self._db.run("INSERT INTO temp.visited VALUES (?)", (key,))
                    fresh.append(ref)
        return fresh

    def unreached(self, digests: Iterable[str]) -> list[str]:
        """Return those of the argument that nothing reached."""
        left = list(digests)
        found: set[bytes] = set()
        for chunk in chunks(map(_raw, left)):
            marks = ", ".join("?" * len(chunk))
            found.update(
                row[0]
                for row in self._db.rows(f"SELECT digest FROM temp.reached WHERE digest IN ({marks})", chunk)  # noqa: S608
            )
        return [digest for digest in left if _raw(digest) not in found]

    def since(self, digests: Iterable[str], now: float) -> dict[str, float]:
        """Return when each blob was first found unreached; for those that are found so now: now, which is noted.

        :param now: seconds since the epoch, by the server's clock.
        """
        found: dict[str, float] = {}
        with self._db.transaction():
            for digest in digests:
                row = self._db.row("SELECT since FROM blob WHERE digest = ?", (_raw(digest),))
                since = float(row[0]) if row is not None else 0.0
                if not since or since > now:  # by a clock that was ahead
                    since = now
                    self._db.run(
                        "INSERT INTO blob VALUES (?, 0, ?) ON CONFLICT(digest) DO UPDATE SET since = excluded.since",
                        (_raw(digest), now),
                    )
                found[digest] = since
        return found

    def strays_since(self, nuids: Iterable[str], now: float) -> dict[str, float]:
        """Return when chunks that no object names were first found so; for new ones: now. The others are forgotten."""
        try:
            known = json.loads(self._db.note(STRAYS, "{}"))
        except ValueError:
            known = {}
        found = {nuid: min(now, float(known.get(nuid, now))) for nuid in islice(nuids, MAX_STRAYS)}
        self._db.set_note(STRAYS, json.dumps(found))
        return found

    def clear_since(self) -> None:
        """Forget since when blobs are unreached, for those that are reached again."""
        self._db.run(
            "UPDATE blob SET since = 0 WHERE since > 0 AND freed = 0 AND digest IN (SELECT digest FROM temp.reached)"
        )

    def free(self, digests: Iterable[str], now: float) -> None:
        """Note, durably, blobs that are about to be removed: nothing may rely on them from here on."""
        self._db.many("INSERT OR REPLACE INTO blob VALUES (?, 1, ?)", ((_raw(digest), now) for digest in digests))
        self._db.sync()

    def forget_freed(self, before: float) -> None:
        """Forget removals that are long done, and what was located in them."""
        with self._db.transaction():
            self._db.run("DELETE FROM blob WHERE freed = 1 AND since < ?", (before,))
            self._db.run("DELETE FROM located WHERE NOT EXISTS (SELECT 1 FROM blob WHERE blob.digest = located.blob)")

    # -- contents ----------------------------------------------------------------------------------------------------

    def location(self, digest: str) -> Location | None:
        """Return where a content is, ``None`` where the bucket does not have it."""
        row = self._db.row(
            "SELECT d.place, d.blob, d.at FROM located d JOIN blob b ON b.digest = d.blob AND b.freed = 0 "
            "WHERE d.digest = ?",
            (_raw(digest),),
        )
        return _location(row) if row else None

    def locate(self, rows: Iterable[tuple[str, Location, int]]) -> None:
        """Note where contents are: digest, location, size."""
        self._db.many(
            "INSERT OR REPLACE INTO located VALUES (?, ?, ?, ?, ?)",
            (
                (_raw(digest), int(location.where), _raw(location.blob), location.offset, size)
                for digest, location, size in rows
            ),
        )

    def find_moved(self) -> int:
        """Find what the bucket does not have (any more) of what is committed: contents of source files, and nodes.

        :returns: how many.
        """
        with self._db.transaction():
            self._db.run("DELETE FROM temp.moved")
            self._db.run(_LOST_CONTENTS)
            self._db.run(_LOST_NODES)
            return self._db.count("SELECT count(*) FROM temp.moved")

    def moved(self) -> Iterator[str]:
        """Yield the paths that :meth:`find_moved` found: files, and something in each directory without a node."""
        after = b""
        while page := self._db.rows("SELECT key FROM temp.moved WHERE key > ? ORDER BY key LIMIT ?", (after, _FETCH)):
            for (key,) in page:
                yield from_sort_key(key)
            after = page[-1][0]

    def sparse_packs(self, below: float) -> list[tuple[str, int]]:
        """Return packs of which less than this share is content of the source now; digest and live bytes."""
        rows = self._db.rows(
            "SELECT d.blob, sum(d.size), sum(CASE WHEN EXISTS (SELECT 1 FROM local l WHERE l.digest = d.digest) "
            "THEN d.size ELSE 0 END) AS live FROM located d WHERE d.place = ? GROUP BY d.blob "
            "HAVING live > 0 AND live < ? * sum(d.size)",
            (int(Where.PACK), below),
        )
        return [(row[0].hex(), row[2]) for row in rows]

    def unlocate_in(self, packs: Iterable[str]) -> None:
        """Forget where the contents of packs are: they are packed anew with the next commit."""
        self._db.many("DELETE FROM located WHERE blob = ?", ((_raw(pack),) for pack in packs))

    # -- nodes -------------------------------------------------------------------------------------------------------

    def node(self, path: str) -> NodeRef | None:
        """Return the node of a directory as committed, ``None`` where there is none, or its blob is gone."""
        row = self._db.row(
            "SELECT n.tree, n.place, n.blob, n.at, n.length FROM node n "
            "JOIN blob b ON b.digest = n.blob AND b.freed = 0 WHERE n.key = ?",
            (sort_key(path),),
        )
        return _node(row) if row else None

    def begin_build(self) -> None:
        """Begin to build: no directory is dirty, none is built."""
        self._db.run("DELETE FROM temp.dirty")
        self._db.run("DELETE FROM temp.fresh_node")

    def soil(self, paths: Iterable[str]) -> None:
        """Mark all directories above paths, and the root, as to be built anew."""
        keys = {b""}
        keys.update(sort_key(above) for path in paths for above in ancestors(path))
        self._db.many("INSERT OR IGNORE INTO temp.dirty VALUES (?)", ((key,) for key in keys))

    def soil_itself(self, path: str) -> None:
        """Mark a directory whose own node must not be used as it is."""
        self._db.run("INSERT OR IGNORE INTO temp.dirty VALUES (?)", (sort_key(path),))

    def built(self, rows: Iterable[tuple[str, NodeRef]]) -> None:
        """Note nodes of the generation that is being built."""
        self._db.many(
            "INSERT OR REPLACE INTO temp.fresh_node VALUES (?, ?, ?, ?, ?, ?)",
            ((sort_key(path), *_node_values(ref)) for path, ref in rows),
        )

    def take_built(self) -> None:
        """The generation is committed: what was built is what is."""
        with self._db.transaction():
            self._db.run("INSERT OR REPLACE INTO node SELECT * FROM temp.fresh_node")
            self._db.run("DELETE FROM temp.fresh_node")
            self._db.run("DELETE FROM temp.dirty")

    def put_nodes(self, rows: Iterable[tuple[str, NodeRef]]) -> None:
        """Note nodes of the newest generation."""
        self._db.many(
            "INSERT OR REPLACE INTO node VALUES (?, ?, ?, ?, ?, ?)",
            ((sort_key(path), *_node_values(ref)) for path, ref in rows),
        )

    def drop_nodes(self, paths: Iterable[str]) -> None:
        """Forget the nodes of directories that are gone, and of all below them."""
        self._db.many("DELETE FROM node WHERE key >= ? AND key < ?", (key_range(path) for path in paths))

    def clear(self) -> None:
        """Forget everything but recent removals: the bucket is another one, or had another layout a moment ago."""
        with self._db.transaction():
            for table in ("located", "node"):
                self._db.run(f"DELETE FROM {table}")  # noqa: S608
            self._db.run("DELETE FROM blob WHERE freed = 0")

    def clear_nodes(self) -> None:
        """Forget all nodes."""
        self._db.run("DELETE FROM node")

    # -- children ----------------------------------------------------------------------------------------------------

    def children(self, path: str) -> Iterator[ChildRow]:
        """Yield a source directory's direct children in the order of their names; "" is the root.

        Costs one seek per child, whatever is below it. The local half must not change meanwhile.
        """
        prefix = sort_key(path) + b"\0" if path else b""
        end = prefix[:-1] + b"\x01" if path else FOREVER
        yield from map(_child, self._db.stream(_CHILDREN, (prefix, end), _FETCH))


def _raw(digest: str) -> bytes:
    return bytes.fromhex(digest)


def _location(row: Row) -> Location:
    return Location(Where(row[0]), row[1].hex(), row[2])


def _node(row: Row) -> NodeRef:
    return NodeRef(row[0].hex(), _location(row[1:4]), row[4])


def _node_values(ref: NodeRef) -> Row:
    location = ref.location
    return (_raw(ref.tree), int(location.where), _raw(location.blob), location.offset, ref.length)


def _child(row: Row) -> ChildRow:
    kind = _KINDS[row[1]]
    digest = row[5].hex() if isinstance(row[5], bytes) else row[5]
    return ChildRow(
        from_sort_key(row[0]),
        Entry(kind, row[2], row[3], row[4] if kind is Kind.FILE else 0, digest, target=row[6]),
        row[7],
        _location(row[9:12]) if row[8] else None,
        _node(row[13:18]) if row[12] else None,
    )
