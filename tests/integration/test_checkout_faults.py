"""SIGKILL at every named point of a checkout; then another process goes on, and fetches only what is missing."""

from __future__ import annotations

import pickle
import random
import time
from typing import TYPE_CHECKING

import pytest

from syncd.errors import StoreTimeout
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support.generations import CHUNK, Tree, expected, file, folder, found, link, pull_apart
from tests.support.mirror import litter

if TYPE_CHECKING:
    from pathlib import Path

RANDOM = random.Random(5)
LARGE = RANDOM.randbytes(40 * CHUNK)
BLOBS = {f"w{number:02}": file(RANDOM.randbytes(100_000)) for number in range(30)}

OLD: Tree = {
    "a": folder({"changed": file("old"), "gone": file("gone"), "touched": file("touched")}),
    "d": folder({"inner": folder({"f": file("f")})}),
    "f": file("becomes a directory"),
    "l": link("a/changed"),
    "large": file(LARGE),
}
NEW: Tree = {
    "a": folder({"added": file("added"), "changed": file("new, and longer"), "touched": file("touched", mode=0o600)}),
    "d": file("was a directory"),
    "f": folder({"g": file("below what was a file")}),
    "l": link("f/g"),
    "large": file(LARGE[:-1] + b"!"),
    "many": folder({f"m{number:03}": file(f"small {number}") for number in range(300)}),
    "whole": folder(BLOBS),
}
NEWER: Tree = NEW | {"last": file("last")}

OLD_WITHOUT_LARGE: Tree = {name: item for name, item in OLD.items() if name != "large"}
WIDE: Tree = {f"d{number:02}": folder({f"f{inner:03}": file("x") for inner in range(500)}) for number in range(22)}

BEFORE_THE_FIRST_PAGE = (
    "walked",
    "content_staged",
    "content_staged:2",
    "stage_write:7",
    "stage_write:200",
    "stage_finished:100",
    "generation_staged",
    "before_first_page",
    "before_journal",
    "journal_torn",
)
FROM_THE_FIRST_PAGE = (
    "journal_durable",
    "before_dir_meta",
    "before_journal_removed",
    "done",
    "batch_applied",
    "between_pages",
    "generation_applied",
    "remembered",
)


class Prepared:
    """A mirror at OLD, and a process on its way to NEW."""

    def __init__(self, directory: Path) -> None:
        self.mirror = directory / "mirror"
        self.index = directory / "index.db"
        self.directory = directory
        self.pull(OLD)

    def trees(self, *trees: Tree) -> Path:
        state = self.directory / "trees"
        state.write_bytes(pickle.dumps(trees))
        return state

    def pull(self, *trees: Tree, crash: str = "") -> int:
        """Go to the last of the trees; return the bytes that were fetched."""
        told = pull_apart(self.trees(*trees), self.mirror, self.index, crash=crash)
        return 0 if told is None else int(told["downloaded"])


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path)


@pytest.mark.fault("C1 C3")
@pytest.mark.parametrize("point", BEFORE_THE_FIRST_PAGE)
def test_killed_before_the_first_page_the_mirror_is_as_it_was(prepared: Prepared, point: str) -> None:
    """A subscriber's process is killed (SIGKILL) at one of ten named points up to a torn journal.

    The mirror is the generation before, to the nanosecond; the next start brings the new one and leaves no litter.
    """
    prepared.pull(OLD, NEW, crash=point)
    assert found(prepared.mirror) == expected(OLD)
    prepared.pull(OLD, NEW)
    assert found(prepared.mirror) == expected(NEW)
    assert litter(prepared.mirror) == []


@pytest.mark.fault("C1 C3")
@pytest.mark.parametrize("point", FROM_THE_FIRST_PAGE)
def test_killed_while_it_is_applied_the_next_start_rolls_forward(prepared: Prepared, point: str) -> None:
    """A subscriber's process is killed (SIGKILL) at one of eight named points from the durable journal on.

    The next start completes the generation, fetches nothing again and leaves no litter.
    """
    prepared.pull(OLD, NEW, crash=point)
    assert prepared.pull(OLD, NEW) == 0
    assert found(prepared.mirror) == expected(NEW)
    assert litter(prepared.mirror) == []


@pytest.mark.fault("C3")
@pytest.mark.parametrize("point", ["generation_staged", "before_first_page", "between_pages", "generation_applied"])
def test_killed_and_overtaken_the_newest_is_reached(prepared: Prepared, point: str) -> None:
    """A subscriber is killed (SIGKILL) once all is staged, between pages or when applied, and a newer generation comes.

    The next start reaches that, and fetches only what is new in it.
    """
    prepared.pull(OLD, NEW, crash=point)
    assert prepared.pull(OLD, NEW, NEWER) <= len(b"was a directory" + b"last")  # one pack
    assert found(prepared.mirror) == expected(NEWER)
    assert litter(prepared.mirror) == []


@pytest.mark.fault("C3")
def test_an_interrupted_download_goes_on_where_it_was(tmp_path: Path) -> None:
    """A subscriber is killed (SIGKILL) with small files staged and half of a large one made.

    The next start fetches neither those nor the chunks that the large one has.
    """
    prepared = Prepared(tmp_path)
    fresh = {"large": file(RANDOM.randbytes(150 * CHUNK)), "whole": folder(BLOBS)} | OLD_WITHOUT_LARGE
    whole = sum(len(item.data or b"") for item in BLOBS.values())
    large = 150 * CHUNK
    # The small ones are staged as one batch or more; then the large file is under way, 64 chunks at a time.
    prepared.pull(OLD, fresh, crash="content_staged:3")
    (part,) = [path for path in (prepared.mirror / ".syncd/stage").iterdir() if path.name.startswith("part-")]
    done = part.stat().st_size
    assert 0 < done < large
    again = prepared.pull(OLD, fresh)
    assert again <= large - done + 40 * 160 + 10
    assert again < whole + large - done
    assert found(prepared.mirror) == expected(fresh)
    assert litter(prepared.mirror) == []


@pytest.mark.fault("C3 O7")
def test_staged_content_that_was_torn_is_fetched_again(prepared: Prepared) -> None:
    """A subscriber is killed (SIGKILL) when all is staged; three staged files are overwritten with zeros.

    The next start fetches just these three again, and the mirror is right.
    """
    prepared.pull(OLD, NEW, crash="generation_staged")
    torn = 0
    for path in (prepared.mirror / ".syncd/stage").iterdir():
        if path.stat().st_size == 100_000 and torn < 3:
            path.write_bytes(bytes(100_000))
            torn += 1
    assert torn == 3
    assert prepared.pull(OLD, NEW) == 300_000
    assert found(prepared.mirror) == expected(NEW)


@pytest.mark.fault("C3 O7")
def test_a_half_made_large_file_that_was_torn_is_mended(prepared: Prepared) -> None:
    """A subscriber is killed (SIGKILL) in the middle of a large file, and two of its chunks become zeros on disk.

    The next start finds them, and the mirror is right.
    """
    fresh = OLD_WITHOUT_LARGE | {"large": file(RANDOM.randbytes(150 * CHUNK))}
    prepared.pull(OLD, fresh, crash="content_staged:2")
    (part,) = (prepared.mirror / ".syncd/stage").glob("part-*")
    with part.open("r+b") as torn:
        torn.seek(5 * CHUNK)
        torn.write(bytes(2 * CHUNK))
    prepared.pull(OLD, fresh)
    assert found(prepared.mirror) == expected(fresh)


@pytest.mark.fault("C1 N1")
async def test_a_generation_that_was_cut_off_is_finished_without_a_network(tmp_path: Path) -> None:
    """A subscriber is killed (SIGKILL) between two pages; at the next start every call to the store times out.

    The generation is completed from what is staged.
    """
    prepared = Prepared(tmp_path)
    prepared.pull(OLD, WIDE, crash="between_pages")
    assert found(prepared.mirror) != expected(WIDE)
    store = MemoryStore()
    store.faults.fail("*", StoreTimeout("away"), 1000)
    status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
    options = SubscribeOptions("app", prepared.mirror, Rules())
    with pytest.raises(StoreTimeout):
        await Subscriber(options, store, prepared.index, status=status).pull()
    assert found(prepared.mirror) == expected(WIDE)
    assert status.now.generation == 2


@pytest.mark.fault("C1")
def test_pages_are_applied_one_after_another_and_finished_first(tmp_path: Path) -> None:
    """A subscriber is killed (SIGKILL) between two pages of a generation, and the channel moves on.

    The next start completes that one and reaches the newer one, without litter.
    """
    prepared = Prepared(tmp_path)
    prepared.pull(OLD, WIDE, crash="between_pages")
    half = len(found(prepared.mirror))
    assert 5000 < half < 11_022
    told = pull_apart(prepared.trees(OLD, WIDE, OLD), prepared.mirror, prepared.index)
    assert told is not None
    assert told["generation"] == 3
    assert found(prepared.mirror) == expected(OLD)
    assert litter(prepared.mirror) == []
