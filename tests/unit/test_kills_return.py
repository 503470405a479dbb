"""SIGKILL on the way back: a generation whose hooks fail is gone back from, whatever moment the host dies at.

Each process does one round (:mod:`tests.support.returns`). It is killed at the passages of every crash point, on its
way to the generation that is refused and on its way back; the next starts end at the generation before, whole, and the
hooks of the return have run. ``SYNCD_TEST_RETURN_KILLS=all`` kills at every passage, where CI takes some of them.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

import pytest

from syncd.store.memory import MemoryStore
from tests.support.forks import Forks, Outcome
from tests.support.generations import Publisher, Tree, expected, file, folder, found, link
from tests.support.killpoints import Mode, points
from tests.support.mirror import litter
from tests.support.returns import KEPT_RELEASES, PULL, save_bucket

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ALL = os.environ.pop("SYNCD_TEST_RETURN_KILLS", "") == "all"
MOST_PASSAGES: Final = 200
GOOD: Tree = {
    "a": file("good"),
    "d": folder({"x": file("x"), "y": file("y")}),
    "gone": file("not in the next one"),
    "kind": folder({"inside": file("a directory")}),
    "l": link("a"),
    "m": file("mode"),
    "same": file("same"),
}
BOTH_WAYS: dict[Mode, set[str]] = {
    "mirror": {"before_journal", "journal_durable", "after_each_step", "before_journal_removed", "batch_applied"},
    "release": {"before_switch", "after_switch", "release_switched"},
}
"""Points that are passed on the way there and again on the way back; and these, in both modes:"""
CHECKED: Final = {"release_building:2", "release_removing:2"}
"""In a mirror, too: the tree that is shown to the check hook."""
ALWAYS: Final = {"generation_applied", "remembered", "hooks_begun", "hook_ended"}
AFTER_APPLY: Final = {
    *("generation_applied", "remembered", "hooks_begun", "hook_ended", "hooks_done", "refused", "release_switched"),
}


def bad(number: int) -> Tree:
    """What the hooks refuse: something of every kind of change."""
    return {
        "a": file(f"bad {number}"),
        "bad": file("!"),
        "d": folder({"x": file(f"x {number}"), "z": file("new")}, mode=0o750),
        "kind": file("a file"),
        "l": link("d/x"),
        "m": file("mode", mode=0o755),
        "same": file("same"),
    }


def steps() -> Iterator[int]:
    """Passages to be killed at: each, or ever fewer of those that are passed again and again."""
    passage = 1
    while passage < MOST_PASSAGES:
        yield passage
        passage += 1 if ALL else passage


class Host:
    """One mirror that has generation 1, and a bucket in which each later one is refused."""

    def __init__(self, directory: Path, forks: Forks, mode: Mode, fails: str) -> None:
        self.directory, self.forks, self.mode, self.fails = directory, forks, mode, fails
        self.store = MemoryStore()
        self.publisher = Publisher(self.store)
        self.mirror = directory / "mirror"
        self.log = directory / "log"
        self.kills = 0
        self.publish(GOOD)
        assert self.pull() == Outcome(value=1)
        self.good = self.found()
        assert self.good == self.wanted(GOOD)

    def publish(self, tree: Tree) -> None:
        asyncio.run(self.publisher.commit(tree))
        save_bucket(self.store, self.directory / "bucket")

    def pull(self, crash: str = "", *, offline: bool = False) -> Outcome:
        return self.forks.run(
            PULL, crash=crash, bucket=str(self.directory / "bucket"), mirror=str(self.mirror),
            index=str(self.directory / "state/index.db"), log=str(self.log), mode=self.mode, fails=self.fails,
            offline=offline,
        )  # fmt: skip

    def wanted(self, tree: Tree) -> dict[str, tuple[Any, ...]]:
        """A release is read-only."""
        if self.mode == "mirror":
            return expected(tree)
        return {
            path: what if what[0] == "symlink" else (what[0], what[1] & ~0o222, *what[2:])
            for path, what in expected(tree).items()
        }

    def found(self) -> dict[str, tuple[Any, ...]]:
        return found((self.mirror / "current").resolve() if self.mode == "release" else self.mirror)

    def check_between(self, new: dict[str, tuple[Any, ...]]) -> None:
        """A release is one of the two; a mirror is, path by path, and what both have as a file is there."""
        now, old = self.found(), self.good
        if self.mode == "release":
            assert now in (old, new)
            return
        for path in now.keys() | old.keys() | new.keys():
            here, ends = now.get(path), [tree[path] for tree in (old, new) if path in tree]
            if here is not None and here[0] != "dir":
                assert (here[0], here[-1]) in [(end[0], end[-1]) for end in ends], path
            elif here is None and len(ends) == 2:
                assert "dir" in {end[0] for end in ends}, f"{path} is missing"

    def check_returned(self, asked: list[str]) -> None:
        """The generation before, exactly; its hooks ran after those of the one that is refused; nothing is left over.

        :param asked: what hooks were asked in this scene.
        """
        assert self.found() == self.good
        assert asked[-2:] == ["apply 1", "health 1"], asked
        number = self.publisher.number
        assert f"{self.fails} {number}" in asked[:-2], asked
        assert {line.rpartition(" ")[2] for line in asked} == {"1", str(number)}, asked
        assert litter(self.mirror) == []
        if self.mode == "release":
            releases = sorted(path.name for path in (self.mirror / "releases").iterdir())
            assert len(releases) <= KEPT_RELEASES
            assert not any(name.startswith(".") for name in releases), releases

    def kill(self, crash: str) -> bool:
        """One scene: a generation is refused, and the host dies there, once or twice; tell whether it got to die."""
        tree = bad(self.publisher.number + 1)
        self.publish(tree)
        new = self.wanted(tree)
        before = len(self.asked())
        killed = self.pull(crash).killed
        self.check_between(new)
        if killed:
            self.kills += 1
            if self.kills % 3 == 0:
                self.pull(crash.partition(":")[0])
                self.check_between(new)
            elif self.kills % 6 == 1:
                outcome = self.pull(offline=True)
                assert outcome.error in {"Unavailable", "Held"}, outcome
                assert self.found() in (self.good, new)
            outcome = self.pull()
            assert outcome.error == "Held", outcome
        self.check_returned(self.asked()[before:])
        return killed

    def asked(self) -> list[str]:
        """What hooks were asked, check left out: it may be asked again and again."""
        return [line for line in self.log.read_text().splitlines() if not line.startswith("check")]


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    found = Forks(tmp_path / "forks")
    yield found
    found.close()


@pytest.mark.timeout(0 if ALL else 120)
@pytest.mark.fault("C1 C3 R1 R2")
@pytest.mark.parametrize("fails", ["apply", "health"])
@pytest.mark.parametrize("mode", ["mirror", "release"])
def test_a_kill_on_the_way_back_ends_at_the_generation_before(
    mode: Mode, fails: str, tmp_path: Path, forks: Forks, record_property: Any
) -> None:
    """SIGKILL at each point, on the way there and back: nothing mixed, and the next start runs the return's hooks."""
    host = Host(tmp_path, forks, mode, fails)
    passed: dict[str, int] = {}
    for point in [*points("subscriber", "generations", mode), *points("returner", "generations", mode)]:
        if fails == "health" and point.name not in AFTER_APPLY:
            continue  # the same as with apply
        for passage in steps():
            if not host.kill(f"{point.name}:{passage}"):
                break
            passed[point.name] = passage
    if mode == "mirror" and fails == "apply":
        assert all(map(host.kill, sorted(CHECKED)))
    print(passed)
    record_property("fault_runs", host.kills)
    assert all(passed.get(name, 0) >= 2 for name in ALWAYS), passed
    assert passed["refused"]
    if fails == "apply":
        assert all(passed.get(name, 0) >= 2 for name in BOTH_WAYS[mode]), passed
    assert host.pull().error == "Held"
    assert host.asked()[-1] == "health 1"
