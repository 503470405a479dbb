"""What others see of a mirror while it changes: modes and owners, after every single system call of an apply."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd.modes import ModePolicy
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support.generations import Publisher, Tree, file, folder, link
from tests.support.visible import Seen, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

SET_ID = stat.S_ISUID | stat.S_ISGID
OWNER = (4321, 4322)
LARGE = bytes(range(256)) * 3000
FIRST: Tree = {
    "content": file("one"),
    "d": folder({"deep": file("deep", mode=0o600), "gone": file("gone")}, mode=0o750),
    "large": file(LARGE, mode=0o640),
    "link": link("content"),
    "mode": file("the same", mode=0o644),
    "narrower": file("secret", mode=0o644),
    "open": file("written by all", mode=0o666),
    "setid": file("#!/bin/sh\n", mode=0o4755),
    "setid-changes": file("#!/bin/sh\n", mode=0o2755),
    "setid-goes": file("#!/bin/sh\n", mode=0o4755),
    "time": file("the same", mode=0o4711),
    "turns": file("a file"),
    "wider": file("secret", mode=0o600),
}
SECOND: Tree = {
    "content": file("two", mode=0o4710),
    "d": folder({"deep": file("deeper", mode=0o400), "new": file("new", mode=0o4700)}, mode=0o700),
    "large": file(LARGE[::-1], mode=0o600),
    "link": link("large"),
    "mode": file("the same", mode=0o751),
    "narrower": file("secret", mode=0o600),
    "new": folder({"tool": file("#!/bin/sh\n", mode=0o6711), "e": file("", mode=0o444)}, mode=0o711),
    "open": file("written by all", mode=0o4755),
    "setid": file("#!/bin/sh\n", mode=0o4755),
    "setid-changes": file("#!/bin/sh\n", mode=0o4711),
    "setid-goes": file("#!/bin/sh\n", mode=0o755),
    "time": file("the same", mode=0o4711, mtime_ns=5),
    "turns": folder({"in": file("in", mode=0o640)}),
    "wider": file("secret", mode=0o664),
}


class Host:
    """A bucket of generations and a mirror of it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.mirror = base / "m"
        self.store = MemoryStore()
        self.publisher = Publisher(self.store)
        self.options: dict[str, Any] = {}

    async def pull(self) -> Watch:
        """Bring the mirror up to the bucket, watched."""
        self.mirror.mkdir(exist_ok=True)
        status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
        options = SubscribeOptions("app", self.mirror, Rules(), **self.options)
        subscriber = Subscriber(options, self.store, self.base / "index.db", status=status)
        with Watch(self.mirror) as watch:
            result = await subscriber.pull()
        assert result.problems == []
        assert watch.looks > 100
        return watch


@pytest.fixture
def host() -> Iterator[Host]:
    base = Path(tempfile.mkdtemp(prefix="syncd-test-"))
    yield Host(base)
    shutil.rmtree(base)


def check_states(watch: Watch, wanted: dict[str, tuple[int, int, int]]) -> None:
    """Each file is as it was, or as it is to be; a directory is never more open than both of these."""
    for path, states in watch.states.items():
        there = [state for state in states if state is not None]
        ends = {states[0], states[-1]}
        for state in there:
            if state.is_file:
                assert state in ends, (path, states)
            elif state.is_dir:
                most = [end.mode for end in ends if end is not None and end.is_dir] or [0o700]
                assert any(not state.mode & ~mode for mode in (*most, 0o700)), (path, states)
        _check_set_id(path, there)
    found = {
        path: (states[-1].mode, states[-1].uid, states[-1].gid)
        for path, states in watch.states.items()
        if states[-1] is not None and states[-1].is_file
    }
    assert found == wanted


def _check_set_id(path: str, states: list[Seen]) -> None:
    """A file that may be run as somebody is always his; one that keeps its bits has them all the time."""
    files = [state for state in states if state.is_file]
    if files and files[0].mode & files[-1].mode & SET_ID:
        kept = files[0].mode & files[-1].mode & SET_ID
        assert all(state.mode & kept == kept for state in files), (path, files)
    owners = {(state.uid, state.gid) for state in (files[0], files[-1]) if state.mode & SET_ID} if files else set()
    assert all((state.uid, state.gid) in owners for state in files if state.mode & SET_ID), (path, files)


def wanted(tree: Tree, owner: tuple[int, int], above: str = "", *, less: int = 0) -> dict[str, tuple[int, int, int]]:
    """Mode and owner of each file of a tree."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, item in tree.items():
        if item.children is not None:
            found |= wanted(item.children, owner, f"{above}{name}/", less=less)
        elif item.data is not None:
            found[above + name] = (item.mode & ~less, *owner)
    return found


def ours() -> tuple[int, int]:
    return os.geteuid(), os.getegid()


@pytest.mark.fault("M2")
@pytest.mark.parametrize("drift", ["repair", "report"])
async def test_a_visible_file_has_its_old_mode_or_its_new_one(host: Host, drift: str) -> None:
    """After every system call of pulls to and fro between two trees, all modes and owners on disk are looked at.

    From the moment at which its name appears until it goes a file has its old mode or its new one.
    """
    host.options["drift"] = drift
    for tree in (FIRST, SECOND, FIRST):
        await host.publisher.commit(tree)
        check_states(await host.pull(), wanted(tree, ours()))


@pytest.mark.fault("M2")
async def test_a_visible_file_of_a_release_has_its_own_mode(host: Host) -> None:
    """After every system call of two pulls of a release, all modes and owners on disk are looked at.

    No file that is shown changes, also where it shares its content with the release before.
    """
    host.options["rollout"] = RolloutOptions(mode="release", modes=ModePolicy(read_only=True), keep_releases=3)
    for tree in (FIRST, SECOND):
        await host.publisher.commit(tree)
        watch = await host.pull()
        here = f"{(host.mirror / 'current').readlink()}/"
        for path, states in watch.states.items():
            there = [state for state in states if state is not None]
            assert len({state for state in there if state.is_file}) <= 1, (path, states)
            _check_set_id(path, there)
        found = {
            path.removeprefix(here): (states[-1].mode, states[-1].uid, states[-1].gid)
            for path, states in watch.states.items()
            if path.startswith(here) and states[-1] is not None and states[-1].is_file
        }
        assert found == wanted(tree, ours(), less=0o222)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.fault("M2")
@pytest.mark.parametrize("drift", ["repair", "report"])
async def test_a_visible_file_belongs_to_its_owner_from_the_beginning(host: Host, drift: str) -> None:
    """After every system call of pulls as root, for an owner 4321, all modes and owners on disk are looked at.

    Placed, replaced, put right in place: never root's for a moment, and never root's with a set-id bit.
    """
    host.options |= {"owner": OWNER, "drift": drift}
    for tree in (FIRST, SECOND, FIRST):
        await host.publisher.commit(tree)
        check_states(await host.pull(), wanted(tree, OWNER))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.fault("M2")
async def test_a_set_id_file_never_runs_as_another_while_it_is_given_away(host: Host) -> None:
    """A mirror with set-id files gets another owner than root; it is looked at after every system call of the pull.

    Bits that stay are there all the time, and always his in whose name it runs.
    """
    await host.publisher.commit(FIRST)
    await host.pull()
    host.options["owner"] = OWNER
    await host.publisher.commit(SECOND)
    watch = await host.pull()
    for path, states in watch.states.items():
        _check_set_id(path, [state for state in states if state is not None])
    last = {path: states[-1] for path, states in watch.states.items()}
    assert {(one.uid, one.gid) for one in last.values() if one is not None and one.is_file} == {OWNER}
