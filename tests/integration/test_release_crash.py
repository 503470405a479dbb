"""SIGKILL at every named point of a release and at random moments; then another process goes on."""

from __future__ import annotations

import pickle
import random
import signal
import threading
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from syncd.index.releases import release_file
from syncd.mirror import Mirror
from tests.support.mirror import T0, Tree, expected, file, folder, link, snapshot
from tests.support.release import Releaser, in_order, litter, name_of, opened, read_only, run, seen

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from syncd.model import Entry

EVEN: Tree = read_only(
    {
        "a": folder(mtime_ns=T0 - 5),
        "a/changed": file("even content"),
        "a/deep": folder(),
        "a/deep/same": file("the same"),
        "a/even": file("even only"),
        "d": folder(),
        "d/f": file("f"),
        "l": link("a/even"),
    }
)
ODD: Tree = read_only(
    {
        "a": folder(mode=0o700, mtime_ns=T0 + 5),
        "a/changed": file("odd content, longer", mode=0o600),
        "a/deep": folder(),
        "a/deep/same": file("the same", mode=0o700),
        "d": file("was a directory"),
        "l": link("d"),
        "odd": folder(),
        "odd/o": file("odd only"),
    }
)
TREES = [EVEN, ODD]

NOT_PUBLISHED = (
    "stage_write",
    "stage_finished:3",
    "release_building:1",
    "release_building:5",
    f"release_building:{len(EVEN)}",
    "release_built",
)
PUBLISHED = ("release_published", "before_switch")
SWITCHED = ("after_switch",)
PRUNING = ("release_pruned", "release_removing:1", "release_removing:5")


def tree_of(number: int) -> Tree:
    return TREES[number % 2]


def release(number: int) -> str:
    return name_of(number, tree_of(number))


class Prepared:
    """A mirror at generation 3, generation 2 kept, and a process that will be killed on its way to generation 4."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "mirror"
        self.state = directory / "state"
        self.state.mkdir()
        (self.state / "trees").write_bytes(pickle.dumps(TREES))
        with self.opened() as releaser:
            for number in (2, 3):
                releaser.go(number, tree_of(number))

    def opened(self) -> AbstractContextManager[Releaser]:
        return opened(self.root, keep=2, state=self.state / "index")

    def crash(self, point: str, command: str = "go", *numbers: int) -> None:
        died = run(command, self.root, self.state, *map(str, numbers or (4,)), crash=point)
        assert died.returncode == -signal.SIGKILL, (point, died.returncode)

    def check_readable(self, *numbers: int) -> int:
        """What a reader finds, at this very moment, is one generation; return which."""
        current = int((self.root / "current").readlink().name.partition("-")[0])
        assert current in numbers
        assert seen(self.root) == expected(tree_of(current))
        return current


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path)


def check_all(releaser: Releaser, *numbers: int) -> None:
    """Exactly these releases, each whole; no litter; the index says what is there."""
    root, mirror = releaser.mirror.root, releaser.mirror
    assert mirror.releases() == [release(number) for number in numbers]
    for number in numbers:
        assert snapshot(root / "releases" / release(number)) == expected(tree_of(number))
    assert litter(root) == []
    assert mirror.current() == mirror.release == releaser.tables.loaded()
    assert releaser.drifted() == []
    current = tree_of(int(mirror.release.partition("-")[0]))
    assert [row.path for row in releaser.index.iter_local()] == in_order(current)


@pytest.mark.fault("C1 C3")
@pytest.mark.parametrize("point", [*NOT_PUBLISHED, *PUBLISHED, *SWITCHED, *PRUNING])
def test_killed_at_any_point_the_old_or_the_new_release_is_current(prepared: Prepared, point: str) -> None:
    """A process that makes the next release is killed (SIGKILL) at each point from staging to pruning.

    Readers at that moment, and the next start, find the old or the new release, whole; it then goes on to the new.
    """
    prepared.crash(point)
    old = point in (*NOT_PUBLISHED, *PUBLISHED)
    prepared.check_readable(3 if old else 4)
    with prepared.opened() as releaser:
        there = (2, 3) if point in NOT_PUBLISHED else (3, 4) if point in PRUNING else (2, 3, 4)
        check_all(releaser, *there)
        prepared.check_readable(3 if old else 4)
        assert releaser.index.note("applied") == releaser.mirror.current()
        releaser.go(4, tree_of(4))
        check_all(releaser, 3, 4)
        prepared.check_readable(4)


@pytest.mark.fault("C1 C3")
def test_a_release_that_was_published_before_the_crash_is_not_built_again(prepared: Prepared) -> None:
    """The process is killed (SIGKILL) when its release has its name and is not switched to.

    It is complete and durable: the next start only switches.
    """
    prepared.crash("release_published")
    with prepared.opened() as releaser, pytest.MonkeyPatch.context() as patch:
        patch.setattr(releaser, "build", lambda *_: pytest.fail("built again"))
        releaser.go(4, tree_of(4))
        check_all(releaser, 3, 4)


@pytest.mark.fault("C1 C3")
@pytest.mark.parametrize("point", ["release_building:5", "release_built"])
def test_what_was_staged_for_a_release_that_was_not_finished_is_there_for_the_next(
    prepared: Prepared, point: str
) -> None:
    """The process is killed (SIGKILL) within a release's build, or at the end of it.

    That costs no download: what it staged is linked in, not moved, so recovery still has it, and it fits.
    """
    prepared.crash(point)
    names = {path.name for path in (prepared.root / ".syncd/stage").iterdir()}
    assert len(names) == 3
    with Mirror.open(prepared.root, mode="release") as mirror:
        mirror.recover(names)
        assert {path.name for path in (prepared.root / ".syncd/stage").iterdir()} == names
        wanted: dict[str, Entry] = {node.data.decode(): node.entry for node in EVEN.values() if node.data}
        for name in names:
            entry = wanted[(prepared.root / ".syncd/stage" / name).read_text()]
            assert mirror.refit_staged(name, entry, reread=True)


@pytest.mark.fault("C1")
def test_killed_after_publishing_the_staged_content_goes_at_the_next_start(prepared: Prepared) -> None:
    """The process is killed (SIGKILL) when its release has its name; recovery is asked to spare what is staged.

    It goes all the same: its inode is a release's by then, which nobody must change in another place.
    """
    prepared.crash("release_published")
    names = {path.name for path in (prepared.root / ".syncd/stage").iterdir()}
    assert names
    with Mirror.open(prepared.root, mode="release") as mirror:
        mirror.recover(names)
        assert litter(prepared.root) == []


@pytest.mark.fault("C1 C6")
def test_killed_after_the_switch_with_what_is_known_of_it_lost(prepared: Prepared) -> None:
    """The process is killed (SIGKILL) right after the switch, and the new release's index file is emptied.

    The index still speaks of the release before, and says so.
    """
    prepared.crash("after_switch")
    release_file(prepared.state / "index", release(4)).write_bytes(b"")
    with Mirror.open(prepared.root, mode="release") as mirror:
        mirror.recover()
        releaser = Releaser(mirror, prepared.state / "index")
        try:
            assert releaser.tables.loaded() == release(3)
            assert mirror.current() == release(4)
            assert not releaser.tables.load(release_file(prepared.state / "index", release(4)))
            assert [row.path for row in releaser.index.iter_local()] == in_order(ODD)
        finally:
            releaser.index.close()


@pytest.mark.fault("C1")
@pytest.mark.parametrize("point", ["journal_durable", "after_each_step:1", "before_dir_meta", "before_journal_removed"])
def test_killed_while_a_release_is_mended_it_is_completed(prepared: Prepared, point: str) -> None:
    """A process that mends a removed file in the current release is killed (SIGKILL) at four points of it.

    Recovery rolls the batch forward in that release.
    """
    current = prepared.root / "releases" / release(3)
    with prepared.opened() as releaser:
        (prepared.state / "trees").write_bytes(pickle.dumps([ODD]))
        (current / "odd").chmod(0o755)
        (current / "odd/o").unlink()
        assert releaser.drifted() == ["odd", "odd/o"]
    prepared.crash(point, "repair")
    with Mirror.open(prepared.root, mode="release") as mirror:
        placed = {done.path: done.stat for done in mirror.recover()}
        assert placed.keys() == {"odd", "odd/o"}
        assert all(found is not None and found.ctime_ns == 0 for found in placed.values())
        assert seen(prepared.root) == expected(ODD)
        assert litter(prepared.root) == []


@pytest.mark.fault("C1 D5")
@pytest.mark.parametrize("now", [2, None])
def test_a_batch_for_another_release_is_dropped(prepared: Prepared, now: int | None) -> None:
    """A process is killed with a journal for the current release; then `current` is moved by hand, or removed.

    The batch is dropped and logged: its paths are not those of the tree now.
    """
    with prepared.opened() as releaser:
        (prepared.state / "trees").write_bytes(pickle.dumps([ODD]))
        (prepared.root / "releases" / release(3) / "a/changed").unlink()
        assert releaser.drifted() == ["a", "a/changed"]
    prepared.crash("journal_durable", "repair")
    (prepared.root / "current").unlink()
    if now is not None:
        (prepared.root / "current").symlink_to(f"releases/{release(now)}")
    with Mirror.open(prepared.root, mode="release") as mirror, capture_logs() as logs:
        assert mirror.recover() == []
        assert "journal_of_another_release" in [line["event"] for line in logs]
        assert litter(prepared.root) == []
    assert snapshot(prepared.root / "releases" / release(2)) == expected(EVEN)
    assert not (prepared.root / "releases" / release(3) / "a/changed").exists()


@pytest.mark.fault("C1")
def test_a_batch_is_completed_before_the_release_is_left(prepared: Prepared) -> None:
    """A process that mends the current release is killed (SIGKILL) with its journal durable; another is switched to.

    The batch is completed before ``current`` moves, also without a recovery: the release that is left is whole.
    """
    (prepared.state / "trees").write_bytes(pickle.dumps([ODD]))
    mended = prepared.root / "releases" / release(3) / "a/changed"
    mended.unlink()
    prepared.crash("journal_durable", "repair")
    assert not mended.exists()
    with Mirror.open(prepared.root, mode="release") as mirror:
        mirror.switch(release(2))
        assert snapshot(prepared.root / "releases" / release(3)) == expected(ODD)
        assert litter(prepared.root) == []


@pytest.mark.slow
@pytest.mark.fault("C1 C3")
def test_killed_at_random_moments_of_an_endless_series(prepared: Prepared) -> None:
    """Twenty times a process that makes release after release is killed (SIGKILL) after up to 150 ms.

    Always one whole release for readers; after recovery nothing else.
    """
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    reached = set()
    for _ in range(20):
        process = run("flip", prepared.root, prepared.state, wait=False)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", f"seed {seed}"
        threading.Event().wait(rng.random() * 0.15)
        process.kill()
        process.communicate()
        current = int((prepared.root / "current").readlink().name.partition("-")[0])
        assert seen(prepared.root) == expected(tree_of(current)), f"seed {seed}"
        with prepared.opened() as releaser:
            assert releaser.mirror.current() == release(current)
            assert releaser.drifted() == []
            for name in releaser.mirror.releases():
                number = int(name.partition("-")[0])
                assert snapshot(prepared.root / "releases" / name) == expected(tree_of(number)), f"seed {seed}"
            assert litter(prepared.root) == []
        reached.add(current)
    assert len(reached) > 5
