"""A real mirror that is watched, and a real disk that loses what was written."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from syncd.errors import DiskProblem
from syncd.mirrorwatch import MirrorWatch
from syncd.service import FolderThread
from tests.support.drift import Mirrored
from tests.support.mirror import file, folder, link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

DEADLINE = 15.0
SETTLE = 0.05
TREE = {
    "d": folder(),
    "d/a": file("aaaa"),
    "d/b": file("bbbb"),
    "d/e": folder(),
    "d/e/x": file("xxxx"),
    "f": file("ffff"),
    "l": link("d/a"),
}


class Watching:
    """A mirror, its folder's thread and its watch."""

    def __init__(self, tmp: Path, policy: str, **options: Any) -> None:
        self.kept = Mirrored(tmp, TREE, policy)
        self.thread = FolderThread("mirror-test")
        self.modes: list[str] = []
        self.asked: list[frozenset[str]] = []
        self.root: Callable[[], Path] = lambda: self.kept.root
        self.options = {"settle": SETTLE, **options}
        self.watch: MirrorWatch

    async def suspects(self, paths: frozenset[str]) -> set[str]:
        self.asked.append(paths)
        return await self.thread.run(lambda: self.kept.drift.suspects(paths))

    async def begin(self) -> None:
        self.watch = MirrorWatch(
            lambda: self.root(),  # noqa: PLW0108 - it becomes another one
            self.suspects,
            on_mode=lambda mode, _: self.modes.append(mode),
            **self.options,
        )
        await self.watch.__aenter__()

    async def begun(self) -> None:
        """Wait for the rescan that every watching begins with."""
        async with asyncio.timeout(DEADLINE):
            while not (await self.watch.next()).rescan:
                pass

    async def told(self, seconds: float = DEADLINE) -> set[str]:
        async with asyncio.timeout(seconds):
            hints = await self.watch.next()
        assert not hints.rescan
        return set(hints.paths)

    async def silent(self, seconds: float = 1.0) -> None:
        """Nothing is told, although hints have come and gone."""
        with pytest.raises(TimeoutError):
            await self.told(seconds)

    async def check(self, paths: set[str]) -> set[str] | None:
        return await self.thread.run(lambda: self.kept.drift.check(paths))

    async def repair(self) -> None:
        """Bring the mirror up as a subscriber would."""

        def repaired() -> None:
            for path in self.kept.differences():
                row = self.kept.index.local(path)
                if row is None:
                    self.kept.keeper.index.pop(path, None)
                else:
                    self.kept.keeper.index[path] = (row.entry, row.stat)
            self.kept.go(self.kept.tree)

        await self.thread.run(repaired)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Watching]]:
    made: list[Watching] = []

    def build(policy: str = "repair", **options: Any) -> Watching:
        made.append(Watching(tmp_path / str(len(made)), policy, **options))
        return made[-1]

    yield build
    for each in made:
        await each.watch.__aexit__(None, None, None)
        await each.thread.close(each.kept.close)


@pytest.fixture
async def watching(make: Callable[..., Watching]) -> Watching:
    watching = make()
    await watching.begin()
    await watching.begun()
    return watching


async def test_a_change_of_somebody_else_is_found_in_moments_and_repaired_in_silence(watching: Watching) -> None:
    """Written, removed, replaced, moved away: told by path; what syncd does about it is no news."""
    kept, root = watching.kept, watching.kept.root
    for spoil, paths in (
        (lambda: (root / "f").write_text("FFFF"), {"f"}),
        ((root / "d/b").unlink, {"d/b"}),
        (lambda: (root / "d/a").chmod(0o600), {"d/a"}),
        (lambda: (root / "d/e").rename(root.parent / "e"), {"d/e"}),
        ((root / "l").unlink, {"l"}),
    ):
        began = time.monotonic()
        spoil()
        found: set[str] = set()
        while not paths <= found:
            found |= await watching.told()
        assert time.monotonic() - began < 5
        await watching.check(found)
        await watching.repair()
        assert await watching.thread.run(kept.drift.check) is None
        assert await watching.thread.run(kept.differences) == set()
    assert (root / "d/e/x").read_text() == "xxxx"
    await watching.silent()


async def test_what_syncd_does_itself_is_no_news(watching: Watching) -> None:
    """Hints come, are compared with the index, and go; what happens in .syncd brings none."""
    tree = {path: node for path, node in TREE.items() if not path.startswith("d/e")}
    tree |= {f"new/{number}": file(str(number)) for number in range(50)} | {"new": folder(), "f": file("other")}
    await watching.thread.run(lambda: watching.kept.go(tree))
    await watching.silent()
    assert "f" in frozenset().union(*watching.asked)
    assert not {path for asked in watching.asked for path in asked if path.startswith(".syncd")}


async def test_reading_and_linking_are_no_changes(watching: Watching, tmp_path: Path) -> None:
    """The audit, a reader, and a release that shares files bring no work."""
    await watching.thread.run(watching.kept.audit_all)
    (watching.kept.root / "d/a").read_text()
    os.link(watching.kept.root / "d/a", tmp_path / "twin")
    (tmp_path / "twin").unlink()
    await watching.silent(0.7)
    assert watching.asked == []


async def test_strangers_and_their_directories_are_left_to_the_full_round(watching: Watching) -> None:
    """A program that keeps its own files in a mirrored directory does not keep syncd busy."""
    for number in range(20):
        (watching.kept.root / f"d/cache{number}").write_text("x")
    (watching.kept.root / "d/cache0").unlink()
    await watching.silent()
    assert watching.asked


async def test_a_program_that_writes_for_ever_is_answered_ever_more_slowly(make: Callable[..., Watching]) -> None:
    """Repairs stay few, and every one of them is made."""
    watching = make(settle=0.05, max_wait=30.0)
    await watching.begin()
    await watching.begun()
    path = watching.kept.root / "f"
    stop = asyncio.Event()

    async def write_for_ever() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            path.write_text(str(count))
            await asyncio.sleep(0.01)

    writer = asyncio.create_task(write_for_ever())
    repairs = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(4.0):
            while True:
                await watching.check(await watching.told())
                await watching.repair()
                repairs += 1
    stop.set()
    await writer
    assert 3 <= repairs <= 8


async def test_drift_that_is_kept_is_told_once(make: Callable[..., Watching]) -> None:
    """Held, it is no suspect; the next change of it is."""
    watching = make("report")
    await watching.begin()
    await watching.begun()
    kept = watching.kept
    (kept.root / "f").write_text("mine")
    await watching.check(await watching.told())
    assert kept.problems()["f"][0] == "drift"
    os.utime(kept.root / "f")
    assert await watching.told() == {"f"}
    await watching.check({"f"})
    (kept.root / "d/b").unlink()
    assert await watching.told() == {"d/b"}


@pytest.mark.fault("L10")
async def test_the_watch_goes_where_the_mirrors_tree_goes(make: Callable[..., Watching], tmp_path: Path) -> None:
    """The root of a watch is missing at first, then a symlink that is switched to another tree, then a directory.

    The watch begins again each time, with a rescan, and tells what is written into the tree of now, and only that.
    """
    watching = make()
    root = watching.kept.root
    releases = tmp_path / "r"
    for name in ("1", "2"):
        shutil.copytree(root, releases / name, symlinks=True, ignore=shutil.ignore_patterns(".syncd"))
    watching.root = lambda: releases / "current"
    told: list[frozenset[str]] = []

    async def everything(paths: frozenset[str]) -> frozenset[str]:
        told.append(paths)
        return paths

    watching.suspects = everything  # type: ignore[method-assign]
    await watching.begin()
    async with asyncio.timeout(DEADLINE):
        while "down" not in watching.modes:
            with contextlib.suppress(TimeoutError):
                await watching.told(0.1)
    (releases / "current").symlink_to("1")
    await watching.begun()
    (releases / "2/other").write_text("not watched")
    (releases / "1/f").write_text("x")
    assert await watching.told() == {"f"}
    (releases / "next").symlink_to("2")
    (releases / "next").rename(releases / "current")
    await watching.begun()
    (releases / "1/d/a").write_text("not watched any more")
    (releases / "2/d/b").write_text("x")
    assert await watching.told() == {"d/b"}
    watching.root = lambda: releases / "1"
    await watching.begun()
    (releases / "2/d/a").write_text("not watched any more")
    (releases / "1/d/e/x").write_text("x")
    assert await watching.told() == {"d/e/x"}


async def test_an_index_in_trouble_is_left_to_the_full_round(make: Callable[..., Watching]) -> None:
    """The watch goes on and asks for everything: the round meets the trouble and says so."""
    watching = make()
    real = watching.suspects
    failures = [DiskProblem("the index is full")]

    async def suspects(paths: frozenset[str]) -> set[str]:
        if failures:
            raise failures.pop()
        return await real(paths)

    watching.suspects = suspects  # type: ignore[method-assign]
    await watching.begin()
    await watching.begun()
    (watching.kept.root / "f").write_text("FFFF")
    await watching.begun()
    (watching.kept.root / "f").write_text("FF")
    assert "f" in await watching.told()


# a disk that loses what was written --------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 filesystem in a file: (where it is mounted, the file)."""
    image, where = tmp_path / "image", tmp_path / "disk"
    where.mkdir()
    with image.open("wb") as made:
        made.truncate(32 << 20)
    if os.getuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop,noatime", image, where], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("may not mount")
    try:
        yield where, image
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.fault("X2")
def test_a_flipped_bit_on_the_disk_is_found_although_everything_looks_the_same(disk: tuple[Path, Path]) -> None:
    """One bit of a mirrored file is flipped in the image of its mounted ext4, past the filesystem.

    Size, times and page cache stay right, and a check finds nothing; the audit asks the disk, and finds it.
    """
    where, image = disk
    data = os.urandom(300_000)
    tree = {"d": folder(), "d/good": file(os.urandom(5000)), "d/rot": file(data), "f": file("f")}
    kept = Mirrored(image.parent, tree, root=where / "mirror")
    try:
        os.sync()
        assert (kept.root / "d/rot").read_bytes() == data
        with image.open("r+b") as raw:
            at = raw.read().index(data[200_000:200_100])
            raw.seek(at)
            raw.write(bytes([data[200_000] ^ 1]))
        assert kept.check() == (None, [])
        assert kept.audit_all() == {"d/rot"}
        found, [line] = kept.check(["d/rot"])
        assert (found, line["event"], kept.differences()) == ({"d/rot"}, "silent_corruption", {"d/rot"})
    finally:
        kept.close()


@pytest.mark.fault("X2")
def test_a_sector_that_cannot_be_read_any_more_is_found_and_repaired(disk: tuple[Path, Path]) -> None:
    """The image of a mounted ext4 is cut off where a mirrored file's content begins: the kernel says EIO.

    The audit finds the file; with the image whole again, repair places it anew.
    """
    where, image = disk
    data = os.urandom(300_000)
    tree = {"a": file("a"), "lost": file(data), "z": file("z")}
    kept = Mirrored(image.parent, tree, root=where / "mirror")
    try:
        os.sync()
        size = image.stat().st_size
        at = image.read_bytes().index(data[:100])
        os.truncate(image, at)  # the disk ends there now
        assert kept.audit_all() == {"lost"}
        os.truncate(image, size)
        with image.open("r+b") as raw:
            raw.seek(at)
            raw.write(data)
        found, [line] = kept.check(["lost"])
        assert (found, kept.differences()) == ({"lost"}, {"lost"})
        assert line["found"] == {"kind": "unreadable", "error": "Input/output error"}
        kept.keeper.index.pop("lost")
        kept.go(tree)
        assert (kept.audit_all(), kept.check()) == (set(), (None, []))
    finally:
        kept.close()
