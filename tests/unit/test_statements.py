"""Statements find what they ask for by an index: what one path costs does not depend on how many there are."""

from __future__ import annotations

import hashlib
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from syncd.index import Index, LocalRow, RemoteRow
from syncd.index.blobs import Blobs
from syncd.index.checkout import CheckoutTables
from syncd.model import Entry, Kind, Stat
from syncd.nodes import Location, Where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MANY = 2000
STEP = 10


def digest(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


@pytest.fixture
def index() -> Iterator[Index]:
    """2,000 files, as committed and as mirrored, in packs of a hundred."""
    with closing(Index(None)) as index:
        entries = [Entry(Kind.FILE, 0o644, 1, 5, digest(number)) for number in range(MANY)]
        index.put_local(LocalRow(f"f{number}", entry, Stat(5, 1, 1, number)) for number, entry in enumerate(entries))
        index.put_remote(
            RemoteRow(f"f{number}", entry, "b", "n", f"p:{digest(number // 100)}:{number}", 0, 0, 1)
            for number, entry in enumerate(entries)
        )
        blobs = Blobs(index)
        blobs.hold(digest(number) for number in range(MANY // 100))
        blobs.locate(
            (entry.digest, Location(Where.PACK, digest(number // 100), number), 5)
            for number, entry in enumerate(entries)
        )
        yield index


@contextmanager
def instructions(index: Index) -> Iterator[list[int]]:
    """Append how many instructions of its virtual machine SQLite ran in the body."""
    found: list[int] = []
    count = 0

    def step() -> int:
        nonlocal count
        count += STEP
        return 0

    database = index._db
    database.set_progress_handler(step, STEP)
    try:
        yield found
    finally:
        database.set_progress_handler(None, 0)
        found.append(count)


ASKED: dict[str, Callable[[Index], object]] = {
    "paths of a content": lambda index: CheckoutTables(index).local_contents([digest(-1), digest(-2)]),
    "whether a content is announced": lambda index: CheckoutTables(index).is_announced(digest(-1)),
    "large files without chunks": lambda index: CheckoutTables(index).unlearned(10),
    "what a link brought": lambda index: index.replace_via("link", ()),
    "a file of the source by content": lambda index: index.find_local_content(digest(-1), digest(-2), 5),
    "a file of the bucket by content": lambda index: index.find_remote_content(digest(-1), 5),
}


@pytest.mark.parametrize("question", ASKED)
def test_a_question_about_one_thing_looks_at_few_rows(index: Index, question: str) -> None:
    """Less than an instruction for each row."""
    CheckoutTables(index)
    with instructions(index) as ran:
        ASKED[question](index)
    assert ran[0] < MANY
