"""What the index says of a release, saved beside it and loaded again."""

from __future__ import annotations

import random
import sqlite3
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

import syncd.index.releases as module
from syncd.errors import DiskProblem
from syncd.index import Index, LocalRow, RemoteRow
from syncd.index.releases import ReleaseTables, prune_release_files, release_file
from syncd.model import Entry, Kind, Stat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "7-0123abcd"


def local(path: str, *, number: int = 1) -> LocalRow:
    return LocalRow(
        path, Entry(Kind.FILE, 0o444, -number, number, f"{number:064x}"), Stat(number, -number, 0, 2**64 - 1, 3)
    )


def remote(path: str, *, number: int = 1) -> RemoteRow:
    entry = Entry(Kind.FILE, 0o444, -number, number, f"{number:064x}")
    return RemoteRow(path, entry, "bucket", "", f"p:{number:064x}:12", 0, 0, number, "generation")


LOCALS = [
    LocalRow("d", Entry(Kind.DIR, 0o555, 5), Stat(4096, 5, 0, 77)),
    local("d/ü\n\u202e", number=2),
    LocalRow("l", Entry(Kind.SYMLINK, 0o777, 6, target="d\x1b"), Stat(2, 6, 0, 78)),
    *(local(f"many/{number:05}", number=number) for number in range(2500)),
]
REMOTES = [remote("d/ü\n\u202e", number=9), *(remote(f"many/{number:05}", number=number) for number in range(2500))]


def fill(index: Index) -> None:
    index.put_local(LOCALS)
    index.put_remote(REMOTES)
    index.run("INSERT INTO node VALUES (?, ?, ?, ?, ?, ?)", (b"", b"t" * 32, 1, b"b" * 32, 0, 9))
    index.set_note("target", "seven")


def content(index: Index) -> tuple[object, ...]:
    return list(index.iter_local()), list(index.iter_remote()), index.rows("SELECT * FROM node")


def spoil(index: Index) -> None:
    """Another generation came."""
    index.clear_remote()
    index.drop_local_tree("")
    index.run("DELETE FROM node")
    index.put_local([local("other")])
    index.put_remote([remote("other", number=10_000)])
    index.set_note("target", "eight")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path / "index")
    fill(opened)
    yield opened
    opened.close()


@pytest.fixture
def tables(index: Index) -> ReleaseTables:
    return ReleaseTables(index)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return release_file(tmp_path / "index", NAME)


def test_what_was_saved_is_loaded(index: Index, tables: ReleaseTables, file: Path) -> None:
    """Both halves, the nodes and the notes, exactly; other notes stay."""
    tables.save(file, notes={"target": "seven", "odd \n note": "ü"})
    saved = content(index)
    spoil(index)
    index.set_note("scan", "12")
    assert tables.loaded() == ""
    assert tables.notes(file) == {"target": "seven", "odd \n note": "ü"}
    assert tables.load(file)
    assert content(index) == saved
    assert [index.note(key) for key in ("target", "odd \n note", "scan")] == ["seven", "ü", "12"]
    assert tables.loaded() == NAME
    assert list(index.diff()) != []
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_rows_of_a_release_that_is_being_built_are_taken_as_they_come(
    index: Index, tables: ReleaseTables, file: Path
) -> None:
    """In any order, while the index is read and written; the remote half is the index's own."""

    def rows() -> Iterator[LocalRow]:
        for row in index.iter_local():
            index.set_note("progress", row.path)
            yield row._replace(stat=row.stat._replace(ino=5))
        yield local("after")

    tables.save(file, rows())
    spoil(index)
    assert tables.load(file)
    assert [row.path for row in index.iter_local()] == sorted([*(row.path for row in LOCALS), "after"])
    assert {row.stat.ino for row in index.iter_local("many")} == {5}
    assert len(list(index.iter_remote())) == len(REMOTES)


def test_a_build_that_fails_leaves_what_was_saved_before(index: Index, tables: ReleaseTables, file: Path) -> None:
    """Its error is raised as what it is, whatever it is."""
    tables.save(file, notes={"n": "before"})

    def rows(error: BaseException) -> Iterator[LocalRow]:
        yield from LOCALS
        raise error

    for error in (DiskProblem("full"), sqlite3.OperationalError("not of this file"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            tables.save(file, rows(error))
        assert caught.value is error
    assert tables.notes(file) == {"n": "before"}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.fault("C6")
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "text", "cut", "half", "directory", "version", "other database"]
)
def test_a_file_that_is_no_use_is_refused_and_the_index_is_as_it_was(
    index: Index, tables: ReleaseTables, file: Path, damage: str
) -> None:
    """The tables saved beside a release are missing, empty, text, cut, halved, a directory or another database.

    They are not loaded; the index is as it was and is not taken for damaged.
    """
    tables.save(file)
    whole = file.read_bytes()
    spoil(index)
    before = content(index)
    if damage in {"missing", "directory"}:
        file.unlink()
    if damage == "directory":
        file.mkdir()
    if damage in {"empty", "text", "cut", "half"}:
        file.write_bytes(
            {"empty": b"", "text": b"no database", "cut": whole[:-5000], "half": whole[: len(whole) // 2]}[damage]
        )
    if damage == "version":
        with sqlite3.connect(file) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    if damage == "other database":
        file.unlink()
        Index(file).close()
    assert tables.load(file) is False
    assert content(index) == before
    assert not index.broken
    assert index.note("target") == "eight"
    assert tables.loaded() == ""


@pytest.mark.fault("C6")
def test_a_flipped_byte_is_found_or_does_not_matter(index: Index, tables: ReleaseTables, file: Path) -> None:
    """One bit of the tables saved beside a release is flipped at random, fifty times.

    What is loaded is what was saved, or nothing is.
    """
    tables.save(file, notes={"target": "seven"})
    saved, whole = content(index), file.read_bytes()
    spoil(index)
    spoiled = content(index)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    refused = 0
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(damaged))
        if tables.load(file):
            assert (content(index), index.note("target")) == (saved, "seven"), f"seed {seed}"
            spoil(index)
        else:
            refused += 1
            assert content(index) == spoiled, f"seed {seed}"
        assert not index.broken
    assert refused > 10


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM local WHERE rowid = 1000",
        "UPDATE local SET c4 = c4 + 1 WHERE rowid = 7",
        "UPDATE remote SET c10 = 'b:00' WHERE rowid = 7",
        "INSERT INTO local SELECT * FROM local WHERE rowid = 7",
        "UPDATE local SET c1 = NULL WHERE rowid = 7",
        "DELETE FROM node",
        "UPDATE note SET value = 'nine' WHERE key = 'target'",
        "INSERT INTO note VALUES ('applied', 'nine')",
        "DELETE FROM note WHERE key = 'checksum'",
        "DROP TABLE remote",
    ],
)
def test_every_row_and_note_counts(index: Index, tables: ReleaseTables, file: Path, change: str) -> None:
    """A file that somebody edited says something that was never verified."""
    tables.save(file, notes={"target": "seven"})
    with sqlite3.connect(file) as db:
        db.execute(change)
    db.close()
    spoil(index)
    before = content(index)
    with capture_logs() as logs:
        assert tables.load(file) is False
    assert [line["event"] for line in logs] == ["release_file_refused"]
    assert content(index) == before
    assert not index.broken


@pytest.mark.fault("X1")
def test_a_disk_that_refuses_is_reported_and_saves_nothing(
    tables: ReleaseTables, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving a release's tables fails with ENOSPC at its sync, then because a plain file is in the way.

    Both end with DiskProblem; what was saved before stays, and no part is left.
    """

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    tables.save(file, notes={"n": "before"})
    monkeypatch.setattr(module, "_sync", fail)
    with pytest.raises(DiskProblem, match="No space left"):
        tables.save(file)
    assert tables.notes(file) == {"n": "before"}
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    (file.parent.parent / "blocked").write_text("")
    with pytest.raises(DiskProblem, match="cannot save what is known"):
        tables.save(file.parent.parent / "blocked/x.db")


def test_files_of_releases_that_are_gone_are_removed(tables: ReleaseTables, tmp_path: Path) -> None:
    """And what a crash left; nothing else."""
    index_file = tmp_path / "index"
    prune_release_files(index_file, [])  # nothing was ever saved
    names = ["1-00000000", "2-00000000", "3-00000000"]
    for name in names:
        tables.save(release_file(index_file, name))
    directory = release_file(index_file, NAME).parent
    (directory / "3-00000000.db.new").write_text("")
    (directory / "notes.txt").write_text("")
    prune_release_files(index_file, names[1:])
    assert sorted(path.name for path in directory.iterdir()) == ["2-00000000.db", "3-00000000.db", "notes.txt"]


def test_a_release_that_was_only_looked_at_can_be_noted(tables: ReleaseTables) -> None:
    """After a check of all files, where nothing could be loaded."""
    tables.set_loaded(NAME)
    assert tables.loaded() == NAME
