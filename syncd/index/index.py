"""The index: what was last agreed per path, in one SQLite file per role and folder.

Rules of the file are kept by :mod:`syncd.index.database`. Two halves are compared: ``local``, what this host's disk
has, and ``remote``, what the bucket announces.
"""

from __future__ import annotations

import sqlite3
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from syncd.index.database import FOREVER, PAGE, Database, Row, chunks, columns, key_range
from syncd.model import Entry, Kind, Stat
from syncd.paths import ancestors, from_sort_key, parent, sort_key
from syncd.store.base import Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

_ENTRY = ("key", "kind", "mode", "mtime", "size", "digest", "sha256", "target")
_LOCAL = (*_ENTRY, "st_size", "st_mtime", "st_ctime", "st_ino", "st_dev", "hashed", "problem")
_REMOTE = (*_ENTRY, "bucket", "name", "nuid", "chunks", "chunk_size", "seq", "publisher", "via")


_PUT_LOCAL = f"INSERT OR REPLACE INTO local VALUES ({', '.join('?' * len(_LOCAL))})"  # noqa: S608
_PUT_REMOTE = (
    f"INSERT INTO remote VALUES ({', '.join('?' * len(_REMOTE))}) ON CONFLICT(key) DO UPDATE SET "  # noqa: S608
    + ", ".join(f"{name} = excluded.{name}" for name in _REMOTE[1:])
    # Sequences of two buckets, or of two ways to the same path, cannot be compared.
    + " WHERE excluded.seq >= remote.seq OR excluded.via <> remote.via OR excluded.bucket <> remote.bucket"
)
_MARK = (
    "INSERT INTO temp.seen VALUES (?, ?) "
    "ON CONFLICT(key) DO UPDATE SET scan = excluded.scan WHERE excluded.scan > seen.scan"
)

# Entry.same() in SQL: kinds are those of _KINDS, digests are "" where unknown.
_SAME = """(l.kind = r.kind AND l.mtime = r.mtime AND (l.kind = 2 OR l.mode = r.mode) AND CASE l.kind
  WHEN 1 THEN 1 WHEN 2 THEN l.target = r.target
  ELSE l.size = r.size AND CASE WHEN l.digest <> '' AND r.digest <> '' THEN l.digest = r.digest
                                ELSE l.sha256 <> '' AND l.sha256 = r.sha256 END END)"""
_BOTH = f"{columns(_LOCAL, 'l')}, {columns(_REMOTE, 'r')}"
_DIFF_PAGE = f"""
SELECT * FROM (
  SELECT l.key AS at, {_BOTH} FROM local l LEFT JOIN remote r ON r.key = l.key
    WHERE l.key > ?1 AND l.problem = '' AND (r.key IS NULL OR NOT {_SAME})
  UNION ALL
  SELECT r.key AS at, {_BOTH} FROM remote r LEFT JOIN local l ON l.key = r.key
    WHERE r.key > ?1 AND l.key IS NULL
) ORDER BY at LIMIT {PAGE}"""  # noqa: S608
_DIFF_SOME = f"""
WITH want(key) AS (VALUES %s)
SELECT want.key AS at, {_BOTH} FROM want
  LEFT JOIN local l ON l.key = want.key LEFT JOIN remote r ON r.key = want.key
  WHERE coalesce(l.problem, '') = '' AND CASE WHEN l.key IS NULL THEN r.key IS NOT NULL
                                              ELSE r.key IS NULL OR NOT {_SAME} END"""  # noqa: S608

_KINDS = (Kind.FILE, Kind.DIR, Kind.SYMLINK)
_KIND_NUMBER = {kind: number for number, kind in enumerate(_KINDS)}
_DIGEST_CHARS = 64
_FIRST_CHILDREN = 64
"""Children of a directory read at first, then twice as many: a scan keeps such a page for each level it is in."""
_SIGNED_64 = 1 << 63


class LocalRow(NamedTuple):
    """One path on this host's disk as last read.

    :ivar hashed_ns: wall clock, nanoseconds, when the content was read; 0: never. A file whose mtime
        is not older is
        "racy": it may have changed afterwards without a new time, so it is hashed again.
    :ivar problem: non-empty: the path is there but could not be read, and ``entry`` may be stale or
        zero. Neither it nor anything below it takes part in a diff, so it is neither published nor deleted.
    """

    path: str
    entry: Entry
    stat: Stat
    hashed_ns: int = 0
    problem: str = ""


class RemoteRow(NamedTuple):
    """One path as a bucket announces it.

    :ivar name: the object's name in ``bucket``; equals ``path`` unless a link brought it.
    :ivar seq: stream sequence of the metadata message in ``bucket``.
    :ivar publisher: the metadata ``syncd-publisher``; "" means that another client wrote it.
    :ivar via: name of the link object that brought it, "" for none.
    """

    path: str
    entry: Entry
    bucket: str
    name: str
    nuid: str
    chunks: int
    chunk_size: int
    seq: int
    publisher: str = ""
    via: str = ""


def _pack(digest: str) -> bytes | str:
    """Store a digest in half the bytes; what is not one (another client's metadata) is kept as it is."""
    if len(digest) != _DIGEST_CHARS:
        return digest
    try:
        raw = bytes.fromhex(digest)
    except ValueError:
        return digest
    return raw if raw.hex() == digest else digest


def _unpack(value: bytes | str) -> str:
    return value.hex() if isinstance(value, bytes) else value


def _signed(number: int) -> int:
    """Fit an unsigned 64-bit inode or device number (overlayfs, NFS) into SQLite's signed integer."""
    return number - 2 * _SIGNED_64 if number >= _SIGNED_64 else number


def _unsigned(number: int) -> int:
    return number + 2 * _SIGNED_64 if number < 0 else number


def _entry_values(entry: Entry) -> Row:
    return (
        _KIND_NUMBER[entry.kind],
        entry.mode,
        entry.mtime_ns,
        entry.size,
        _pack(entry.digest),
        _pack(entry.sha256),
        entry.target,
    )


def _entry(row: Row) -> Entry:
    return Entry(_KINDS[row[1]], row[2], row[3], row[4], _unpack(row[5]), _unpack(row[6]), row[7])


def local_values(row: LocalRow) -> Row:
    """Return a row as the table ``local`` has it."""
    stat = row.stat
    return (
        sort_key(row.path),
        *_entry_values(row.entry),
        stat.size,
        stat.mtime_ns,
        stat.ctime_ns,
        _signed(stat.ino),
        _signed(stat.dev),
        row.hashed_ns,
        row.problem,
    )


def _local(row: Row) -> LocalRow:
    stat = Stat(row[8], row[9], row[10], _unsigned(row[11]), _unsigned(row[12]))
    return LocalRow(from_sort_key(row[0]), _entry(row), stat, row[13], row[14])


def _remote_values(row: RemoteRow) -> Row:
    return (
        sort_key(row.path),
        *_entry_values(row.entry),
        row.bucket,
        row.name,
        row.nuid,
        row.chunks,
        row.chunk_size,
        row.seq,
        row.publisher,
        row.via,
    )


def _remote(row: Row) -> RemoteRow:
    return RemoteRow(from_sort_key(row[0]), _entry(row), *row[8:])


def _stored(row: Row) -> Stored:
    nuid, chunks, size, digest, sha256, chunk_size = row
    return Stored(nuid, chunks, size, _unpack(digest), _unpack(sha256), chunk_size)


class Index(Database):
    """One index: both halves, and what is to be freed. ``None`` for the file keeps it in memory.

    :raises Locked: another process (or another Index of this one) has the file open.
    :raises DiskProblem: the file can neither be opened nor set aside.
    """

    def __init__(self, file: Path | None) -> None:
        super().__init__(file)
        self._scan = self._first_scan = int(self.note("scan", "0"))

    # -- local -----------------------------------------------------------------------------------------

    def local(self, path: str) -> LocalRow | None:
        """Return one path's row."""
        row = self.row(f"SELECT {columns(_LOCAL)} FROM local WHERE key = ?", (sort_key(path),))  # noqa: S608
        return _local(row) if row else None

    def put_local(self, rows: Iterable[LocalRow], *, scan: int = 0) -> None:
        """Write rows over whatever is there, and mark them as seen.

        :param scan: the scan that saw them; 0 for none: then they count as seen by every scan that is
            running, since what was written after a scan began is not something the scan missed.
        """
        mark = scan or self._scan
        with self.transaction():
            source = iter(rows)
            while values := [local_values(row) for row in islice(source, PAGE)]:
                self.many(_PUT_LOCAL, values)
                if mark > self._first_scan:
                    self.many(_MARK, ((value[0], mark) for value in values))

    def drop_local(self, paths: Iterable[str]) -> None:
        """Remove these rows, and no others (nothing below them)."""
        self.many("DELETE FROM local WHERE key = ?", ((sort_key(path),) for path in paths))

    def drop_local_tree(self, path: str) -> None:
        """Remove a path's row and everything below it; "" removes all."""
        self.run("DELETE FROM local WHERE key >= ? AND key < ?", key_range(path))

    def local_children(self, path: str) -> Iterator[LocalRow]:
        """Yield a directory's direct children in component order; "" is the root. Rows may be written meanwhile.

        Costs the children and one seek per child that has descendants, however many those are.
        """
        prefix = sort_key(path) + b"\0" if path else b""
        end = prefix[:-1] + b"\x01" if path else FOREVER
        start: bytes | None = prefix
        size = _FIRST_CHILDREN
        while start is not None:
            page, start = self._children_page(start, end, len(prefix), size)
            yield from map(_local, page)
            size = min(PAGE, 2 * size)

    def _children_page(self, start: bytes, end: bytes, skip: int, size: int) -> tuple[list[Row], bytes | None]:
        """Return the next direct children, and from where to go on; no cursor stays open.

        :param skip: bytes of a key before the child's name.
        """
        page: list[Row] = []
        sql = f"SELECT {columns(_LOCAL)} FROM local WHERE key >= ? AND key < ? ORDER BY key"  # noqa: S608
        after: bytes | None = start
        try:
            while after is not None and len(page) < size:
                cursor = self._db.execute(sql, (after, end))
                after = None
                for row in cursor:
                    key: bytes = row[0]
                    deeper = key.find(b"\0", skip)
                    if deeper >= 0:  # jump over the rest of this child's subtree
                        after = key[:deeper] + b"\x01"
                        break
                    page.append(row)
                    if len(page) == size:
                        after = key + b"\x01"
                        break
                cursor.close()
        except sqlite3.Error as exc:
            raise self._problem(exc) from exc
        return page, after

    def iter_local(self, below: str = "") -> Iterator[LocalRow]:
        """Yield the row of a path and all rows below it in component order; rows may be written meanwhile."""
        return map(_local, self.pages("local", _LOCAL, below))

    def count_local(self, *, dirs: bool = True) -> int:
        """Return the number of rows, or of those that are no directories."""
        return self.count("SELECT count(*) FROM local WHERE ? OR kind <> 1", (dirs,))

    def local_bytes(self) -> int:
        """Return the sum of the files' sizes, in bytes."""
        return self.count("SELECT coalesce(sum(size), 0) FROM local WHERE kind = 0")

    def next_scan(self) -> int:
        """Begin a scan and return its number; numbers only grow, also across restarts."""
        number = self._scan + 1
        with self.transaction():
            self.set_note("scan", str(number))
            self.rows("DELETE FROM temp.seen WHERE scan < ?", (number - 8,))  # of scans that nobody finished
        self._scan = number
        return number

    def mark_seen(self, paths: Iterable[str], scan: int) -> None:
        """Say that a scan saw these paths as their rows have them. Marks live as long as this object."""
        self.many(_MARK, ((sort_key(path), scan) for path in paths))

    def mark_tree_seen(self, path: str, scan: int) -> None:
        """Say that a scan must not touch a path and everything below it (it could not look)."""
        first, end = key_range(path)
        self.run(
            "INSERT INTO temp.seen SELECT key, ?1 FROM local WHERE key >= ?2 AND key < ?3 "
            "ON CONFLICT(key) DO UPDATE SET scan = excluded.scan WHERE excluded.scan > seen.scan",
            (scan, first, end),
        )

    def drop_unseen(self, scan: int, below: str = "") -> list[str]:
        """Remove the rows of a path and everything below it that were not marked since ``scan`` began.

        :returns: the removed paths in component order.
        :raises ValueError: the scan was begun by another Index, whose marks are gone: all rows would
            be dropped.
        """
        if not self._first_scan < scan <= self._scan:
            raise ValueError(f"scan {scan} was not begun by this index")
        first, end = key_range(below)
        where = (
            "WHERE key >= ? AND key < ? "
            "AND NOT EXISTS (SELECT 1 FROM temp.seen WHERE seen.key = local.key AND seen.scan >= ?)"
        )
        with self.transaction():
            gone = self.rows(f"SELECT key FROM local {where} ORDER BY key", (first, end, scan))  # noqa: S608
            self.many("DELETE FROM local WHERE key = ?", gone)
        return [from_sort_key(key) for (key,) in gone]

    def find_local_content(self, digest: str, sha256: str, size: int) -> LocalRow | None:
        """Return a readable file with this content, known by its BLAKE3, else by its SHA-256."""
        for column, value in (("digest", digest), ("sha256", sha256)):
            if value:
                row = self.row(
                    f"SELECT {columns(_LOCAL)} FROM local "  # noqa: S608
                    f"WHERE {column} = ? AND {column} <> '' AND size = ? AND kind = 0 AND problem = '' "
                    "LIMIT 1",
                    (_pack(value), size),
                )
                if row:
                    return _local(row)
        return None

    # -- remote ----------------------------------------------------------------------------------------

    def remote(self, path: str) -> RemoteRow | None:
        """Return what the bucket announces at one path."""
        row = self.row(f"SELECT {columns(_REMOTE)} FROM remote WHERE key = ?", (sort_key(path),))  # noqa: S608
        return _remote(row) if row else None

    def put_remote(self, rows: Iterable[RemoteRow], *, listed: bool = False) -> None:
        """Write rows; one with a lower sequence than the stored of its path, via and bucket is ignored.

        :param listed: they come from the listing begun last, see :meth:`drop_unlisted`.
        """
        with self.transaction():
            source = iter(rows)
            while values := [_remote_values(row) for row in islice(source, PAGE)]:
                self.many(_PUT_REMOTE, values)
                if listed:
                    self.many("INSERT OR IGNORE INTO temp.listed VALUES (?)", ((value[0],) for value in values))

    def begin_listing(self) -> None:
        """Begin a complete listing of the bucket."""
        self.run("DELETE FROM temp.listed")

    def forget_sequences(self) -> None:
        """Let whatever is listed next replace what is stored: the bucket is another one, or was set back."""
        self.run("UPDATE remote SET seq = 0 WHERE via = ''")

    def drop_unlisted(self) -> None:
        """Forget what the listing begun last did not bring; what came through links is left alone."""
        self.run(
            "DELETE FROM remote WHERE via = '' AND NOT EXISTS (SELECT 1 FROM temp.listed WHERE listed.key = remote.key)"
        )
        self.run("DELETE FROM temp.listed")

    def replace_via(self, via: str, rows: Iterable[RemoteRow]) -> set[str]:
        """Replace all that one link brought; an object of the bucket itself goes before one that a link brings.

        :returns: the paths of the rows before and after.
        """
        with self.transaction():
            before = {
                from_sort_key(row[0]) for row in self.rows("SELECT key FROM remote WHERE via = ? AND via <> ''", (via,))
            }
            self.run("DELETE FROM remote WHERE via = ? AND via <> ''", (via,))
            after: set[str] = set()
            source = iter(rows)
            while page := list(islice(source, PAGE)):
                fresh = [
                    row for row in page if self.row("SELECT 1 FROM remote WHERE key = ?", (sort_key(row.path),)) is None
                ]
                self.put_remote(fresh)
                after.update(row.path for row in fresh)
        return before | after

    def vias(self) -> set[str]:
        """Return the names of the links that brought any row."""
        return {row[0] for row in self.rows("SELECT DISTINCT via FROM remote WHERE via <> ''")}

    def drop_remote(self, paths: Iterable[str]) -> None:
        """Remove these rows, and no others."""
        self.many("DELETE FROM remote WHERE key = ?", ((sort_key(path),) for path in paths))

    def clear_remote(self) -> None:
        """Forget all that the bucket announces."""
        self.run("DELETE FROM remote")

    def forget_bucket(self) -> None:
        """Forget all that was ever known of the bucket, whatever its layout, but for what was just removed from it.

        The server takes the blob's marker for the blob a moment longer: sent again, it has to replace that.
        """
        with self.transaction():
            for table in ("remote", "garbage", "located", "node"):
                self.run(f"DELETE FROM {table}")  # noqa: S608
            self.run("DELETE FROM blob WHERE freed = 0")
            for note in ("bucket", "position", "head"):
                self.set_note(note, "")
            self.set_note("position", "0")

    def iter_remote(self, below: str = "") -> Iterator[RemoteRow]:
        """Yield the row of a path and all rows below it in component order; rows may be written meanwhile."""
        return map(_remote, self.pages("remote", _REMOTE, below))

    def count_remote(self, *, ours: str | None = None) -> int:
        """Return the number of rows, or of those whose publisher is ``ours``."""
        if ours is None:
            return self.count("SELECT count(*) FROM remote")
        return self.count("SELECT count(*) FROM remote WHERE publisher = ?", (ours,))

    def count_remote_files(self) -> tuple[int, int]:
        """Return the number of rows that are no directories, and the bytes of their content."""
        row = self.row("SELECT count(*), coalesce(sum(size), 0) FROM remote WHERE kind <> 1")
        assert row is not None
        return int(row[0]), int(row[1])

    def count_ours(self) -> int:
        """Return the number of rows that any syncd publisher wrote."""
        return self.count("SELECT count(*) FROM remote WHERE publisher <> ''")

    def has_remote_below(self, path: str) -> bool:
        """Tell whether the bucket announces anything below a path."""
        first, end = key_range(path)
        return self.row("SELECT 1 FROM remote WHERE key > ? AND key < ? LIMIT 1", (first, end)) is not None

    def find_remote_content(self, digest: str, size: int) -> RemoteRow | None:
        """Return an announced file with this content, by its BLAKE3."""
        if not digest:
            return None
        row = self.row(
            f"SELECT {columns(_REMOTE)} FROM remote "  # noqa: S608
            "WHERE digest = ? AND digest <> '' AND size = ? AND kind = 0 LIMIT 1",
            (_pack(digest), size),
        )
        return _remote(row) if row else None

    def has_content_of(self, size: int) -> bool:
        """Tell whether the bucket has, or had a moment ago, any content of this size."""
        announced = "SELECT 1 FROM remote WHERE kind = 0 AND size = ? LIMIT 1"
        replaced = "SELECT 1 FROM garbage WHERE known AND size = ? LIMIT 1"
        return any(self.row(sql, (size,)) is not None for sql in (announced, replaced))

    def nuids(self, nuids: Iterable[str]) -> set[str]:
        """Return those of the argument that a remote row refers to."""
        return self.known("SELECT DISTINCT nuid FROM remote WHERE nuid <> '' AND nuid IN (%s)", nuids)

    # -- diff ------------------------------------------------------------------------------------------

    def diff(
        self, paths: Collection[str] | None = None, *, after: str = ""
    ) -> Iterator[tuple[str, LocalRow | None, RemoteRow | None]]:
        """Yield the paths whose local and remote entries are not the same, in component order.

        The same means :meth:`syncd.model.Entry.same`. A path whose local row has a problem is left
        out, and so is everything below it: what could not be looked at is neither published nor
        deleted. Rows may be written between two steps; changes ahead of the position are seen.

        :param paths: only these (not what is below them); ``None`` for all.
        :param after: only what follows this path in component order; "" from the start.
        """
        unknown = self._unknown_below()
        start = sort_key(after)
        for row in self._diff_pages(start) if paths is None else self._diff_some(paths, start):
            path = from_sort_key(row[0])
            if unknown(path):
                continue
            local, remote = row[1 : 1 + len(_LOCAL)], row[1 + len(_LOCAL) :]
            yield (
                path,
                _local(local) if local[0] is not None else None,
                _remote(remote) if remote[0] else None,
            )

    def _diff_pages(self, after: bytes) -> Iterator[Row]:
        while True:
            page = self.rows(_DIFF_PAGE, (after,))
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1][0]

    def _diff_some(self, paths: Collection[str], after: bytes) -> Iterator[Row]:
        for keys in chunks(sorted({key for path in paths if (key := sort_key(path)) > after})):
            yield from sorted(self.rows(_DIFF_SOME % ", ".join(["(?)"] * len(keys)), keys))

    def _unknown_below(self) -> Callable[[str], bool]:
        """Return a test whether an ancestor of a path has a problem; it remembers the last directory."""
        last_directory, last_answer = "", False

        def unknown(path: str) -> bool:
            nonlocal last_directory, last_answer
            directory = parent(path)
            if directory != last_directory:
                keys = [sort_key(above) for above in ancestors(path)]
                last_directory, last_answer = (
                    directory,
                    any(self._has_problem(chunk) for chunk in chunks(keys)),
                )
            return last_answer

        return unknown

    def _has_problem(self, keys: list[bytes]) -> bool:
        marks = ", ".join("?" * len(keys))
        sql = f"SELECT 1 FROM local WHERE key IN ({marks}) AND problem <> '' LIMIT 1"  # noqa: S608
        return self.row(sql, keys) is not None

    # -- garbage ---------------------------------------------------------------------------------------

    def add_garbage(self, nuid: str, since: float, stored: Stored | None) -> None:
        """Note that nothing announces these chunks any more; of two ``since`` (seconds) the earlier is kept.

        :param stored: what is needed to announce the content again; ``None`` where not known.
        """
        values: Row = (0, 0, "", "", 0)
        if stored is not None:
            values = (
                stored.chunks,
                stored.size,
                _pack(stored.digest),
                _pack(stored.sha256),
                stored.chunk_size,
            )
        self.run(
            "INSERT INTO garbage(nuid, since, known, chunks, size, digest, sha256, chunk_size) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT(nuid) DO UPDATE SET since = min(since, excluded.since)",
            (nuid, since, stored is not None, *values),
        )

    def take_garbage(self, digest: str, size: int) -> Stored | None:
        """Return content that is to be announced again, the youngest of several, and forget it as garbage."""
        if not digest:
            return None
        row = self.row(
            "SELECT nuid, chunks, size, digest, sha256, chunk_size FROM garbage "
            "WHERE known AND digest = ? AND size = ? ORDER BY since DESC LIMIT 1",
            (_pack(digest), size),
        )
        if row is None:
            return None
        self.run("DELETE FROM garbage WHERE nuid = ?", (row[0],))
        return _stored(row)

    def due_garbage(self, before: float, limit: int = 1000) -> list[str]:
        """Return the nuids that have been garbage since ``before`` (seconds) or longer, the oldest first."""
        sql = "SELECT nuid FROM garbage WHERE since <= ? AND chunks >= 0 ORDER BY since, nuid LIMIT ?"
        return [row[0] for row in self.rows(sql, (before, limit))]

    def forget_content(self, nuids: Iterable[str]) -> None:
        """Forget what garbage holds: nothing announces it again."""
        self.many("UPDATE garbage SET known = 0 WHERE nuid = ?", ((nuid,) for nuid in nuids))

    def leave_garbage(self, nuids: Iterable[str], until: float) -> None:
        """Note that garbage is freed, and may be seen until then (seconds)."""
        sql = "UPDATE garbage SET known = 0, chunks = -1, since = ? WHERE nuid = ?"
        self.many(sql, ((until, nuid) for nuid in nuids))

    def drop_left(self, now: float, longest: float) -> None:
        """Forget chunks that are gone by now.

        :param longest: seconds; what is to be seen for longer was noted by another clock.
        """
        self.run("DELETE FROM garbage WHERE chunks < 0 AND (since <= ? OR since > ?)", (now, now + longest))

    def drop_garbage(self, nuids: Iterable[str]) -> None:
        """Forget chunks that are freed."""
        self.many("DELETE FROM garbage WHERE nuid = ?", ((nuid,) for nuid in nuids))

    def garbage_nuids(self, nuids: Iterable[str]) -> set[str]:
        """Return those of the argument that are noted as garbage."""
        return self.known("SELECT nuid FROM garbage WHERE nuid IN (%s)", nuids)

    def left_nuids(self, nuids: Iterable[str]) -> set[str]:
        """Return those of the argument that are freed and may still be seen."""
        return self.known("SELECT nuid FROM garbage WHERE chunks < 0 AND nuid IN (%s)", nuids)
