"""A local user swaps a directory of the mirror for a symlink, again and again, while every operation runs (L2)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from syncd.errors import DiskProblem, FileChanged
from syncd.mirror import Mirror
from syncd.model import Kind
from syncd.plan import DirMeta, MakeDir, MirrorPlan, Place, Remove, SetMeta
from tests.support.mirror import T0, Keeper, file, folder, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BUDGET_SECONDS = 1.0
ENOUGH, PATIENCE_SECONDS = 20, 20.0
"""Rounds that prove something, and the time they may take on a busy machine."""
SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
one, other = (os.fsencode(name) for name in sys.argv[1:3])
print("ready", flush=True)
while True:
    for _ in range(1000):
        if libc.renameat2(-100, one, -100, other, 2) != 0:  # RENAME_EXCHANGE
            os.rename(one, one + b".t"); os.rename(other, one); os.rename(one + b".t", other)
    if os.getppid() == 1:
        break
"""


class Arena:
    """A mirror whose directory ``d`` is exchanged with a symlink to ``outside`` all the time."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "mirror"
        self.outside = tmp_path / "outside"
        (self.outside / "sub").mkdir(parents=True)
        for name in ("f", "meta", "gone", "sub/x"):
            (self.outside / name).write_text(f"outside {name}")
        self.mirror = Mirror.open(self.root)
        self.keeper = Keeper(self.mirror)
        names = ("f", "meta", "gone", "sub/x")
        self.tree = {"d": folder(), "d/sub": folder(), **{f"d/{name}": file(f"mirror {name}") for name in names}}
        assert not self.keeper.go(self.tree).problems
        (tmp_path / "link").symlink_to(self.outside)
        self.before = self.seen_outside()
        self.swapper = subprocess.Popen(
            [sys.executable, "-c", SWAP, str(self.root / "d"), str(tmp_path / "link")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.swapper.stdout is not None
        assert self.swapper.stdout.readline() == "ready\n"

    def seen_outside(self) -> tuple[object, ...]:
        root = self.outside.stat()
        return snapshot(self.outside), root.st_mode, root.st_mtime_ns

    def close(self) -> None:
        self.swapper.kill()
        self.swapper.communicate()
        self.mirror.close()

    def rounds(self) -> Iterator[int]:
        began = time.monotonic()
        count = 0
        while (spent := time.monotonic() - began) < BUDGET_SECONDS or (count <= ENOUGH and spent < PATIENCE_SECONDS):
            yield count
            count += 1
        assert count > ENOUGH, "the loop hardly ran"


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena(tmp_path)
    yield made
    made.close()


def place(arena: Arena, count: int) -> MirrorPlan:
    node = file(f"version {count}", mode=0o4777)
    (name,) = arena.mirror.stage_bytes([(node.entry, node.data)])
    return MirrorPlan(place=(Place("d/f", node.entry, str(name), None),))


def place_deeper(arena: Arena, count: int) -> MirrorPlan:
    node = file(f"version {count}")
    names = arena.mirror.stage_bytes([(node.entry, node.data)] * 2)
    steps = zip(("d/f", "d/sub/x"), names, strict=True)
    return MirrorPlan(place=tuple(Place(path, node.entry, str(name), None) for path, name in steps))


def set_meta(_: Arena, count: int) -> MirrorPlan:
    return MirrorPlan(set_meta=(SetMeta("d/meta", file("mirror meta", mode=0o4777, mtime_ns=T0 + count).entry, None),))


def remove_file(arena: Arena, count: int) -> MirrorPlan:
    with contextlib.suppress(OSError):  # so that there is something to remove in the mirror's own directory
        fd = os.open(arena.root / "d", os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            os.close(os.open("gone", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        finally:
            os.close(fd)
    return MirrorPlan(remove=(Remove("d/gone", Kind.FILE, None),))


def remove_tree(_: Arena, count: int) -> MirrorPlan:
    return MirrorPlan(clear=(Remove("d/sub/x", Kind.FILE, None), Remove("d/sub", Kind.DIR, None)))


def make_dirs(_: Arena, count: int) -> MirrorPlan:
    new = f"d/new{count}"
    return MirrorPlan(
        make_dirs=(MakeDir("d"), MakeDir(new), MakeDir(f"{new}/below")), dir_meta=(DirMeta(f"{new}/below", 0o777, 1),)
    )


def dir_meta(_: Arena, count: int) -> MirrorPlan:
    return MirrorPlan(dir_meta=(DirMeta("d/sub", 0o777, count), DirMeta("d", 0o777, count)))


@pytest.mark.fault("L2 L4")
@pytest.mark.parametrize("make", [place, place_deeper, set_meta, remove_file, remove_tree, make_dirs, dir_meta])
def test_no_step_reaches_through_a_parent_that_is_swapped_for_a_symlink(
    arena: Arena, make: Callable[[Arena, int], MirrorPlan]
) -> None:
    """Another process swaps a mirror's directory for a symlink to outside (RENAME_EXCHANGE) as fast as it can.

    For a second files are placed, chmodded and removed and directories made below: nothing outside is made, changed or
    removed.
    """
    refused = done = 0
    for count in arena.rounds():
        outcome = arena.mirror.commit(make(arena, count), drift="repair")
        refused += any(problem.code == "parent_is_symlink" for problem in outcome.problems)
        done += not outcome.problems
    assert arena.seen_outside() == arena.before
    if make not in {remove_file, remove_tree}:  # to those, what is behind a symlink is simply not there
        assert refused
    assert done, "the race was never won by us: the test would prove nothing"


@pytest.mark.fault("L2")
def test_no_look_reaches_through_a_parent_that_is_swapped_for_a_symlink(arena: Arena) -> None:
    """While another process swaps a mirror's directory for a symlink to outside, that is walked, hashed and copied.

    Neither content nor names from outside are ever seen, copied or hashed.
    """
    (arena.outside / "only_outside").write_text("x")
    arena.before = arena.seen_outside()
    want = file("outside f").entry
    right = arena.tree["d/f"].entry.digest
    seen = 0
    for _ in arena.rounds():
        assert "d/only_outside" not in [path for path, _ in arena.mirror.walk()]
        assert arena.mirror.look("d/only_outside") is None
        with contextlib.suppress(FileChanged):
            assert arena.mirror.read_digests("d/f")[0] == right
            seen += 1
        with pytest.raises(FileChanged):
            arena.mirror.stage_copy("d/f", want)
    assert seen
    assert arena.seen_outside() == arena.before


@pytest.mark.fault("L3")
def test_a_target_that_keeps_turning_into_a_fifo_or_symlink_is_never_opened(tmp_path: Path) -> None:
    """Another process swaps a mirrored file for a fifo, then for a symlink to outside, as fast as it can.

    Setting modes, hashing and copying neither wait at the one nor follow the other.
    """
    outside = tmp_path / "outside"
    outside.write_text("outside")
    before = (outside.stat().st_mode, outside.stat().st_mtime_ns)
    with Mirror.open(tmp_path / "m") as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file("content")})
        for number, make in enumerate((os.mkfifo, lambda p: p.symlink_to(outside))):
            seen = refused = 0
            make(tmp_path / "other")
            swapper = subprocess.Popen(
                [sys.executable, "-c", SWAP, str(tmp_path / "m/f"), str(tmp_path / "other")],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                assert swapper.stdout is not None
                swapper.stdout.readline()
                began = time.monotonic()
                while (spent := time.monotonic() - began) < BUDGET_SECONDS or (
                    not (seen and refused) and spent < PATIENCE_SECONDS
                ):
                    entry = file("content", mode=0o4777, mtime_ns=T0 + number).entry
                    mirror.commit(MirrorPlan(set_meta=(SetMeta("f", entry, None),)), drift="repair")
                    try:
                        assert mirror.read_digests("f")[0] == entry.digest
                        seen += 1
                    except (FileChanged, DiskProblem):
                        refused += 1
                    with contextlib.suppress(FileChanged, DiskProblem):
                        mirror.stage_copy("f", file("outside").entry)
                        pytest.fail("a copy of what lies outside was taken")
            finally:
                swapper.kill()
                swapper.communicate()
            for path in (tmp_path / "other", tmp_path / "m/f"):
                if not path.is_file() or path.is_symlink():
                    path.unlink()
                elif path.name == "other":
                    path.rename(tmp_path / "m/f")
            assert seen, "the file was never there: the test would prove nothing"
            assert refused, "what it turns into was never met: the test would prove nothing"
    assert (outside.stat().st_mode, outside.stat().st_mtime_ns) == before
