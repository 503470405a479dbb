"""One SQLite file: opening, locking, failing, and the statements that the tables of the index are made of.

Rules kept here:
 * the index is a cache. What it loses costs a scan and a listing, never data; so a file that cannot be
   trusted is set aside and a new one begun, and no caller has to repair anything;
 * everything is blocking and belongs to one thread at a time. The file is locked exclusively: two
   processes on one state is an error (:class:`syncd.errors.Locked`), not a race;
 * paths are stored as :func:`syncd.paths.sort_key` bytes, which SQLite compares with memcmp. Component
   order is therefore key order, a subtree is one range of keys, and no directory column is needed;
 * memory is bounded whatever the number of rows: iterators read keyset pages, so the caller may write
   between rows;
 * a power cut undoes the last transactions, never half of one, and none that was committed before a :meth:`sync`;
 * every failure of the disk or the file is a :class:`syncd.errors.DiskProblem`; a statement that fails
   inside a transaction dooms that transaction, even where the caller swallows the error.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import structlog

from syncd.errors import DiskProblem, Locked
from syncd.paths import sort_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

log = structlog.get_logger()

SCHEMA_VERSION = 2
KEPT_BROKEN = 3
"""How many files that could not be used are kept for a look."""

PAGE = 1000
_APPLICATION_ID = 0x73796E64  # "synd": tells our files from other SQLite databases
_CHUNK = 500  # values bound to one statement; SQLite before 3.32 allows 999
_CACHE_KIB = 8 * 1024
_WAL_LIMIT_BYTES = 32 * 1024 * 1024
FOREVER = b"\xff"  # above every key: UTF-8 never holds this byte

_SCHEMA = """
CREATE TABLE note(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE local(
  key BLOB PRIMARY KEY, kind INTEGER NOT NULL, mode INTEGER NOT NULL, mtime INTEGER NOT NULL,
  size INTEGER NOT NULL, digest NOT NULL, sha256 NOT NULL, target TEXT NOT NULL,
  st_size INTEGER NOT NULL, st_mtime INTEGER NOT NULL, st_ctime INTEGER NOT NULL,
  st_ino INTEGER NOT NULL, st_dev INTEGER NOT NULL,
  hashed INTEGER NOT NULL, problem TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX local_digest ON local(digest) WHERE digest <> '';
CREATE INDEX local_sha256 ON local(sha256) WHERE sha256 <> '';
CREATE INDEX local_problem ON local(problem) WHERE problem <> '';
CREATE TABLE remote(
  key BLOB PRIMARY KEY, kind INTEGER NOT NULL, mode INTEGER NOT NULL, mtime INTEGER NOT NULL,
  size INTEGER NOT NULL, digest NOT NULL, sha256 NOT NULL, target TEXT NOT NULL,
  bucket TEXT NOT NULL, name TEXT NOT NULL, nuid TEXT NOT NULL, chunks INTEGER NOT NULL,
  chunk_size INTEGER NOT NULL, seq INTEGER NOT NULL,
  publisher TEXT NOT NULL, via TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX remote_digest ON remote(digest) WHERE digest <> '';
CREATE INDEX remote_nuid ON remote(nuid) WHERE nuid <> '';
CREATE INDEX remote_via ON remote(via) WHERE via <> '';
CREATE TABLE garbage(
  nuid TEXT PRIMARY KEY, since REAL NOT NULL, known INTEGER NOT NULL, chunks INTEGER NOT NULL,
  size INTEGER NOT NULL, digest NOT NULL, sha256 NOT NULL, chunk_size INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX garbage_since ON garbage(since);
CREATE INDEX garbage_digest ON garbage(digest) WHERE known;
"""

# Marks of running scans live in a temporary table: a scan that finds nothing changed writes nothing to
# the index.
_TEMP_SCHEMA = """
CREATE TEMP TABLE seen(key BLOB PRIMARY KEY, scan INTEGER NOT NULL) WITHOUT ROWID;
CREATE TEMP TABLE listed(key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE moved(key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE dirty(key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE fresh_node(
  key BLOB PRIMARY KEY, tree BLOB NOT NULL, place INTEGER NOT NULL, blob BLOB NOT NULL, at INTEGER NOT NULL,
  length INTEGER NOT NULL) WITHOUT ROWID;
CREATE TEMP TABLE listed_blob(digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE reached(digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE visited(node BLOB PRIMARY KEY) WITHOUT ROWID;
"""

# What a publisher knows of the generations layout: the blobs that the bucket holds, where each content is in them, and
# the node of each directory. What a subscriber knows: the tree digest of each directory that the remote half
# describes, content that is staged and not yet in place, the chunks of large files in the mirror, and nodes' chunks.
_SCHEMA += """
CREATE TABLE blob(digest BLOB PRIMARY KEY, freed INTEGER NOT NULL, since REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE located(
  digest BLOB PRIMARY KEY, place INTEGER NOT NULL, blob BLOB NOT NULL, at INTEGER NOT NULL,
  size INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX located_blob ON located(blob);
CREATE TABLE node(
  key BLOB PRIMARY KEY, tree BLOB NOT NULL, place INTEGER NOT NULL, blob BLOB NOT NULL, at INTEGER NOT NULL,
  length INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX node_blob ON node(blob);
CREATE TABLE staged(
  key BLOB PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL, run TEXT NOT NULL) WITHOUT ROWID;
CREATE UNIQUE INDEX staged_name ON staged(name);
CREATE INDEX staged_digest ON staged(digest);
CREATE TABLE chunk(
  digest BLOB NOT NULL, content BLOB NOT NULL, at INTEGER NOT NULL, length INTEGER NOT NULL,
  PRIMARY KEY(digest, content)) WITHOUT ROWID;
CREATE INDEX chunk_content ON chunk(content);
CREATE TABLE cached(digest BLOB PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
"""

Row = tuple[Any, ...]


@cache
def columns(names: tuple[str, ...], table: str = "") -> str:
    """Return column names for a statement, each with its table if one is given."""
    return ", ".join(f"{table}.{name}" if table else name for name in names)


def key_range(path: str) -> tuple[bytes, bytes]:
    """Return first and end (exclusive) of the keys of a path and everything below it; "" for all."""
    if not path:
        return b"", FOREVER
    key = sort_key(path)
    return key, key + b"\x01"  # below: key + NUL + ...; so the range also holds no sibling


def chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Cut values into lists that one statement can bind."""
    source = iter(values)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk


class Database:
    """One file of tables. ``None`` for the file keeps it in memory.

    :ivar recovered: why the file found at opening was set aside, "" if it was not.
    :ivar broken: True once the file was found damaged in use: it is set aside, every call raises, open
        it anew.
    :raises Locked: another process (or another Index of this one) has the file open.
    :raises DiskProblem: the file can neither be opened nor set aside.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.recovered = ""
        self.broken = False
        self._open_transaction = False
        self._doomed: DiskProblem | None = None  # the first failure inside the open transaction
        self._db = self._open()
        try:
            self._db.executescript(_TEMP_SCHEMA)
        except sqlite3.Error as exc:
            raise self._problem(exc) from exc

    # -- opening, closing, failing ---------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._file is None:
            return _connect(":memory:")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
        except OSError as exc:
            raise DiskProblem(f"cannot write the index {self._file}: {exc.strerror}") from exc
        for attempt in (1, 2):
            try:
                return _connect(str(self._file))
            except _UnusableError as exc:
                if attempt > 1:
                    raise DiskProblem(f"a fresh index {self._file} is damaged at once: {exc}") from exc
                self.recovered = str(exc)
                self._set_aside()
            except sqlite3.Error as exc:
                if _primary(exc) not in _DAMAGED or attempt > 1:
                    raise self._problem(exc) from exc
                self.recovered = str(exc)
                self._set_aside()
        raise AssertionError("unreachable")

    def _set_aside(self) -> None:
        """Rename the file to ``<name>.broken-<n>`` with the next free number; only the newest few stay."""
        assert self._file is not None
        file = self._file
        pattern = re.compile(re.escape(file.name) + r"\.broken-(\d+)")
        try:
            numbers = sorted(
                int(found[1]) for other in file.parent.iterdir() if (found := pattern.fullmatch(other.name))
            )
            aside = file.with_name(f"{file.name}.broken-{numbers[-1] + 1 if numbers else 1}")
            file.replace(aside)
            # A write-ahead log belongs to its file; left behind, SQLite would replay it into the new one.
            for suffix in ("-wal", "-shm", "-journal"):
                file.with_name(file.name + suffix).unlink(missing_ok=True)
            for number in numbers[: len(numbers) + 1 - KEPT_BROKEN]:
                file.with_name(f"{file.name}.broken-{number}").unlink(missing_ok=True)
            file.touch(mode=0o600)
        except OSError as exc:
            raise DiskProblem(f"cannot set the damaged index {file} aside: {exc.strerror}") from exc
        log.warning("index_set_aside", file=str(file), aside=aside.name, reason=self.recovered)

    def close(self) -> None:
        """Close the file; further calls are errors. Closing twice is allowed."""
        with contextlib.suppress(sqlite3.Error):  # the last checkpoint failed: the log is replayed at the next start
            self._db.close()

    def _problem(self, exc: sqlite3.Error) -> Exception:
        """Turn SQLite's error into ours; what is a bug stays what it is."""
        code = _primary(exc)
        where = f"index {self._file}" if self._file else "index in memory"
        if code in _DAMAGED:
            if self._file is not None and not self.broken:
                self.broken = True
                self.recovered = str(exc)
                self.close()
                self._set_aside()
            return self._doom(DiskProblem(f"{where} was damaged and is set aside: {exc}", hint="it is built anew"))
        if self.broken:
            return DiskProblem(f"{where} was damaged and is set aside", hint="open it anew")
        if code in _BUSY:
            return Locked(f"{where} is in use by another process", hint="stop the other syncd")
        if code in _DISK:
            return self._doom(DiskProblem(f"{where}: {exc}", hint="check space, permissions and health of the disk"))
        return exc

    def _doom(self, problem: DiskProblem) -> DiskProblem:
        self._doomed = problem
        return problem

    # -- statements ------------------------------------------------------------------------------------

    def rows(self, sql: str, values: Iterable[object] = ()) -> list[Row]:
        """Run a statement and return all its rows."""
        return self._execute(sql, tuple(values))

    def _execute(self, sql: str, values: Row = ()) -> list[Row]:
        self._check_transaction()
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as exc:
            raise self._problem(exc) from exc

    def _check_transaction(self) -> None:
        # SQLite ends a transaction by itself after some errors (disk full among them). Statements that
        # follow such an error would be committed alone, so they fail as the first one did, COMMIT included.
        if self._open_transaction and self._doomed is not None:
            raise self._doomed

    def row(self, sql: str, values: Iterable[object] = ()) -> Row | None:
        """Run a statement and return its first row."""
        rows = self.rows(sql, values)
        return rows[0] if rows else None

    def count(self, sql: str, values: Iterable[object] = ()) -> int:
        """Run a statement and return the number that it yields."""
        row = self.row(sql, values)
        assert row is not None
        return int(row[0])

    def run(self, sql: str, values: Iterable[object] = ()) -> None:
        """Run a statement that writes, in a transaction."""
        with self.transaction():
            self.rows(sql, values)

    def many(self, sql: str, rows: Iterable[Iterable[object]]) -> None:
        """Run a statement that writes for each row, in one transaction."""
        with self.transaction():
            self._check_transaction()
            try:
                self._db.executemany(sql, (tuple(row) for row in rows))
            except sqlite3.Error as exc:
                raise self._problem(exc) from exc

    def stream(self, sql: str, values: Iterable[object], at_once: int) -> Iterator[Row]:
        """Run a statement and yield its rows as they come; the tables it reads must not change meanwhile."""
        self._check_transaction()
        try:
            cursor = self._db.execute(sql, tuple(values))
            try:
                size = 8  # a caller that looks at the first rows only shall not pay for many
                while page := cursor.fetchmany(size):
                    yield from page
                    size = min(at_once, 2 * size)
            finally:
                with contextlib.suppress(sqlite3.ProgrammingError):  # left half-way, and the file is closed by now
                    cursor.close()
        except sqlite3.Error as exc:
            raise self._problem(exc) from exc

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """One BEGIN IMMEDIATE..COMMIT; rolled back on any exception. A transaction inside another joins it.

        :raises DiskProblem: the commit failed, or a statement inside failed and the error was swallowed.
        """
        if self._open_transaction:
            yield
            return
        self._doomed = None
        self._execute("BEGIN IMMEDIATE")
        self._open_transaction = True
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            raise
        finally:
            self._open_transaction = False

    def pages(self, table: str, names: tuple[str, ...], below: str) -> Iterator[Row]:
        """Yield a subtree's rows in key order, a page at a time, so that the caller may write in between."""
        after, end = key_range(below)
        compare = ">="
        while True:
            sql = (
                f"SELECT {columns(names)} FROM {table} "  # noqa: S608
                f"WHERE key {compare} ? AND key < ? ORDER BY key LIMIT {PAGE}"
            )
            page = self.rows(sql, (after, end))
            yield from page
            if len(page) < PAGE:
                return
            after, compare = page[-1][0], ">"

    def sync(self) -> None:
        """Make durable what was committed so far: for what must not be undone once the world outside has seen it.

        :raises DiskProblem: the disk refused.
        """
        if self._file is None:
            return
        try:
            # SQLite's lock hangs on the file itself: to open and close the log beside it does not touch that.
            descriptor = os.open(f"{self._file}-wal", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            pass  # nothing was written since it was opened
        except OSError as exc:
            raise DiskProblem(f"index {self._file}: {exc.strerror}", hint="check the health of the disk") from exc

    # -- notes -----------------------------------------------------------------------------------------

    def note(self, key: str, default: str = "") -> str:
        """Return a remembered value, ``default`` where there is none."""
        row = self.row("SELECT value FROM note WHERE key = ?", (key,))
        return str(row[0]) if row else default

    def set_note(self, key: str, value: str) -> None:
        """Remember a value."""
        self.run("INSERT OR REPLACE INTO note VALUES (?, ?)", (key, value))

    def known(self, sql: str, values: Iterable[str]) -> set[str]:
        """Return what a statement with ``IN (%s)`` finds of the values."""
        found: set[str] = set()
        for chunk in chunks(values):
            found.update(row[0] for row in self.rows(sql % ", ".join("?" * len(chunk)), chunk))
        return found


# -- the file ------------------------------------------------------------------------------------------

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOLFS,
}


class _UnusableError(Exception):
    """The file is a database, but not one that this version may use."""


def _primary(exc: sqlite3.Error) -> int:
    """Return the primary result code of an error, 0 where Python's module raised it by itself."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF


def _connect(file: str) -> sqlite3.Connection:
    """Open and check an index, or make the tables of a new one.

    :raises _UnusableError: not ours, or of another version.
    :raises sqlite3.Error: damaged, or the disk refuses.
    """
    db = sqlite3.connect(file, timeout=0.5, isolation_level=None, check_same_thread=False)
    try:
        # Exclusive before WAL: no shared-memory file, so that truncating it under us cannot raise
        # SIGBUS, and a second process is refused instead of interleaved.
        for pragma in (
            "locking_mode = EXCLUSIVE",
            "page_size = 4096",
            f"cache_size = -{_CACHE_KIB}",
            "temp_store = FILE",
            "mmap_size = 0",
            "synchronous = NORMAL",
            "journal_mode = WAL",
            f"journal_size_limit = {_WAL_LIMIT_BYTES}",
        ):
            db.execute(f"PRAGMA {pragma}").fetchall()
        version = db.execute("PRAGMA user_version").fetchone()[0]
        empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if empty and version == 0:
            db.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID}; "
                f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
            return db
        _check_usable(db, version)
    except BaseException:
        db.close()
        raise
    return db


def _check_usable(db: sqlite3.Connection, version: int) -> None:
    if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise _UnusableError("not an index of syncd")
    if version != SCHEMA_VERSION:
        raise _UnusableError(f"schema version {version}, this syncd knows {SCHEMA_VERSION}")
    verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise _UnusableError(f"damaged: {str(verdict).splitlines()[-1]}")
