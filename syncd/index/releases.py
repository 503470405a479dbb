"""What the index said of a release, kept in a file of its own: going back to that release costs no scan and no listing.

Rules kept here:
 * a file is written under another name and gets its own when it is complete and on the disk;
 * it is read through a connection of its own, so that damage in it never is damage of the index: a file that is
   damaged, cut off or of another version is as good as none;
 * what is loaded replaces both halves of the index in one transaction, and counts only if every row is as it was saved;
 * memory is bounded whatever the number of rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from syncd.errors import DiskProblem
from syncd.index.database import PAGE, Row
from syncd.index.index import LocalRow, local_values
from syncd.paths import printable

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping
    from pathlib import Path

    from syncd.index.index import Index
    from syncd.model import Entry, Stat

log = structlog.get_logger()

RELEASE: Final = "release"
"""Note of the index: the release that its ``local`` half describes."""
SUFFIX: Final = ".db"
_UNFINISHED: Final = ".new"
_APPLICATION_ID: Final = 0x73796E72  # "synr"
_VERSION: Final = 1
_TABLES: Final = {"local": 15, "remote": 16, "node": 6}
"""The tables that are kept, with the number of their columns; their rows are those of the index, value by value."""
_CHECKSUM: Final = "checksum"


class Known(Protocol):
    """One path of a release: what the builder of a mirror yields, or a row of the index."""

    @property
    def path(self) -> str:
        """Its path."""

    @property
    def entry(self) -> Entry:
        """What it is."""

    @property
    def stat(self) -> Stat:
        """Its stat."""


class _DamagedError(Exception):
    """The file is not one that was saved here, as it was saved."""


def release_file(index_file: Path, name: str) -> Path:
    """Return where what the index says of a release is kept."""
    return index_file.with_name(index_file.name + ".releases") / (name + SUFFIX)


def prune_release_files(index_file: Path, names: Container[str]) -> None:
    """Remove the files of releases that are not among ``names``.

    :raises DiskProblem: the disk refused.
    """
    directory = release_file(index_file, "").parent
    try:
        for file in list(directory.iterdir()) if directory.is_dir() else []:
            if file.name.removesuffix(SUFFIX) not in names and file.name.endswith((SUFFIX, _UNFINISHED)):
                file.unlink(missing_ok=True)
    except OSError as exc:
        raise DiskProblem(f"cannot remove what is known of old releases: {exc.strerror}") from exc


class ReleaseTables:
    """Saves and loads what an index says of releases. Blocking."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def save(self, file: Path, rows: Iterable[Known] | None = None, notes: Mapping[str, str] | None = None) -> None:
        """Save what is known of a release; the ``remote`` half and the nodes are those of the index.

        :param rows: what the release holds, in any order; ``None``: what the ``local`` half says. They may be made
            while they are taken, from rows of the index also; an error of theirs is raised and nothing is saved.
        :param notes: are notes of the index once the release is loaded.
        :raises DiskProblem: the disk refused; what was saved before under this name is as it was.
        """
        unfinished = file.with_name(file.name + _UNFINISHED)
        with _disk(file):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            unfinished.unlink(missing_ok=True)
            unfinished.touch(mode=0o600)
        try:
            with contextlib.closing(_create(unfinished)) as db:
                values = self._index.stream("SELECT * FROM local", (), PAGE) if rows is None else _values(rows)
                sums = [_fill(db, file, "local", values)]
                sums += [
                    _fill(db, file, table, self._index.stream(f"SELECT * FROM {table}", (), PAGE))  # noqa: S608
                    for table in ("remote", "node")
                ]
                kept = dict(notes or {})
                kept[_CHECKSUM] = " ".join([*sums, _sum_of_notes(kept)])
                with _disk(file):
                    db.executemany("INSERT INTO note VALUES (?, ?)", kept.items())
                    db.execute("COMMIT")
            with _disk(file):
                _sync(unfinished)
                unfinished.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise

    def load(self, file: Path) -> bool:
        """Let the index say what was saved, and note which release that is.

        :returns: ``False``: nothing that can be used is there; the index is as it was.
        :raises DiskProblem: the index could not be written.
        """
        try:
            with contextlib.closing(_open(file)) as db, self._index.transaction():
                notes, sums = _notes(db)
                for (table, width), expected in zip(_TABLES.items(), sums, strict=True):
                    self._index.run(f"DELETE FROM {table}")  # noqa: S608
                    checked = _Summed(_rows(db, table))
                    self._index.many(f"INSERT INTO {table} VALUES ({', '.join('?' * width)})", checked)  # noqa: S608
                    if checked.hexdigest() != expected:
                        raise _DamagedError(f"the rows of {table!r} are not those that were saved")
                for key, value in notes.items():
                    self._index.set_note(key, value)
                self._index.set_note(RELEASE, file.name.removesuffix(SUFFIX))
        except (_DamagedError, sqlite3.IntegrityError) as exc:  # the latter: rows that the index's tables cannot hold
            if file.exists():
                log.warning("release_file_refused", file=str(file), reason=printable(str(exc)))
            return False
        return True

    def notes(self, file: Path) -> dict[str, str] | None:
        """Return the notes that were saved; ``None``: nothing that can be used is there."""
        try:
            with contextlib.closing(_open(file)) as db:
                return _notes(db)[0]
        except _DamagedError:
            return None

    def loaded(self) -> str:
        """Return the release that the ``local`` half describes; "": none that is known."""
        return self._index.note(RELEASE)

    def set_loaded(self, name: str) -> None:
        """Note which release the ``local`` half describes, where it was not loaded but looked at."""
        self._index.set_note(RELEASE, name)


# -- writing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(file: Path) -> Iterator[None]:
    """Word what goes wrong with the file."""
    try:
        yield
    except (OSError, sqlite3.Error) as exc:
        raise DiskProblem(f"cannot save what is known of a release in {file}: {exc}") from exc


def _create(file: Path) -> sqlite3.Connection:
    """Begin a file, in a transaction; nobody reads it before it is complete, so it needs no journal."""
    with _disk(file):
        db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        try:
            for pragma in (
                "journal_mode = OFF",
                "synchronous = OFF",
                f"application_id = {_APPLICATION_ID}",
                f"user_version = {_VERSION}",
            ):
                db.execute(f"PRAGMA {pragma}").fetchall()
            db.execute("BEGIN")
            db.execute("CREATE TABLE note(key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            for table, width in _TABLES.items():
                db.execute(f"CREATE TABLE {table}({', '.join(f'c{n}' for n in range(width))})")
        except BaseException:
            db.close()
            raise
    return db


def _fill(db: sqlite3.Connection, file: Path, table: str, rows: Iterator[Row]) -> str:
    """Write a table; return the checksum of its rows."""
    summed = _Summed(rows)
    sql = f"INSERT INTO {table} VALUES ({', '.join('?' * _TABLES[table])})"  # noqa: S608
    while page := list(islice(summed, PAGE)):  # an error of the rows is raised here, as what it is
        with _disk(file):
            db.executemany(sql, page)
    return summed.hexdigest()


def _values(rows: Iterable[Known]) -> Iterator[Row]:
    for row in rows:
        yield local_values(LocalRow(row.path, row.entry, row.stat))


def _sync(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sum_of_notes(notes: Mapping[str, str]) -> str:
    summed = _Summed(iter(sorted(notes.items())))
    for _ in summed:
        pass
    return summed.hexdigest()


# -- reading -------------------------------------------------------------------------------------------------------


def _open(file: Path) -> sqlite3.Connection:
    """Open a complete file of this version.

    :raises _DamagedError: it is none.
    """
    try:
        db = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    except sqlite3.Error as exc:
        raise _DamagedError(str(exc)) from exc
    try:
        found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if found != [_APPLICATION_ID, _VERSION]:
            raise _DamagedError(f"not a file of this version: {found}")
    except sqlite3.Error as exc:
        db.close()
        raise _DamagedError(str(exc)) from exc
    except BaseException:
        db.close()
        raise
    return db


def _notes(db: sqlite3.Connection) -> tuple[dict[str, str], list[str]]:
    """Return the notes, and the checksums of the tables."""
    notes: dict[str, str] = dict(_select(db, "SELECT key, value FROM note"))
    sums = str(notes.pop(_CHECKSUM, "")).split(" ")
    if len(sums) != len(_TABLES) + 1 or sums.pop() != _sum_of_notes(notes):
        raise _DamagedError("its notes are not those that were saved")
    return notes, sums


def _rows(db: sqlite3.Connection, table: str) -> Iterator[Row]:
    return _select(db, f"SELECT * FROM {table} ORDER BY rowid")  # noqa: S608


def _select(db: sqlite3.Connection, sql: str) -> Iterator[Row]:
    """Yield rows; what goes wrong in this file must not be taken for damage of the index."""
    try:
        for row in db.execute(sql):  # noqa: UP028 - "yield from" would close the cursor, after its file perhaps
            yield row
    except (sqlite3.Error, UnicodeDecodeError) as exc:
        raise _DamagedError(str(exc)) from exc


class _Summed:
    """Passes rows on and sums up what they are."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._sum = hashlib.blake2b(digest_size=16)
        self._count = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Row:
        row = next(self._rows)
        self._sum.update(repr(row).encode("utf-8", "surrogatepass"))
        self._count += 1
        return row

    def hexdigest(self) -> str:
        """Return the checksum of what passed."""
        return f"{self._count}:{self._sum.hexdigest()}"
