"""Small disks of a test's own, and what lives on them: filesystems with limits, and both sides of one folder.

A test that cannot have such a disk here (no root, no mkfs, no loop device) skips and says why.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from syncd.rollout import RolloutOptions
from syncd.store.memory import MemoryStore
from tests.support.pair import publisher_of, subscriber_of
from tests.support.trees import difference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from syncd.outlet import PushResult
    from syncd.signatures import Signer
    from syncd.upstream import PullResult

MIB = 1024 * 1024
PAGE = 4096
FIRST_SUBVOLUME = 256
"""The number that btrfs gives it."""
IMAGE_BYTES = {"btrfs": 128 * MIB, "xfs": 512 * MIB, "ext4": 32 * MIB}
"""About what each of them wants at least; the image is sparse."""


# -- filesystems -------------------------------------------------------------------------------------------------------


def run(*command: str | Path) -> None:
    """Run a program of the system that may not be possible here."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip(f"{command[0]}: {done.stderr.strip()}")


@contextmanager
def mounted(where: Path, *what: str | Path) -> Iterator[Path]:
    """Mount something for a while."""
    where.mkdir(parents=True, exist_ok=True)
    run("mount", *what, where)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@contextmanager
def tmpfs(where: Path, size: str = "2m", inodes: int = 0) -> Iterator[Path]:
    """A filesystem in memory.

    :param inodes: how many it has, its root included; 0: enough.
    """
    limit = f",nr_inodes={inodes}" if inodes else ""
    with mounted(where, "-t", "tmpfs", "-o", f"size={size},mode=0755{limit}", "none") as disk:
        yield disk


@contextmanager
def filesystem(where: Path, kind: str) -> Iterator[Path]:
    """A filesystem of some kind: "tmpfs", or one in an image beside ``where``."""
    if kind == "tmpfs":
        with tmpfs(where, "16m") as disk:
            yield disk
        return
    image = where.with_name(f"{where.name}.{kind}")
    with image.open("wb") as data:
        data.truncate(IMAGE_BYTES[kind])
    run(shutil.which(f"mkfs.{kind}") or f"mkfs.{kind}", "-q", image)
    with mounted(where, "-o", "loop", image) as disk:
        yield disk


class Quota:
    """A directory with a quota, which no write is excepted from: a subvolume of btrfs."""

    def __init__(self, disk: Path) -> None:
        self.path = disk / "limited"
        self._disk = disk
        run("btrfs", "quota", "enable", disk)
        run("btrfs", "subvolume", "create", self.path)

    def limit(self, size: str) -> None:
        """Set what it may hold, for example ``8M``; ``none`` for no limit."""
        # By way of the whole disk: of the subvolume itself, what is used up cannot be raised.
        command = ("btrfs", "qgroup", "limit", size, f"0/{FIRST_SUBVOLUME}", self._disk)
        subprocess.run(command, check=True, capture_output=True)

    def settle(self) -> None:
        """Count exactly: for what is not on the disk yet, much more is set aside than it takes."""
        subprocess.run(["sync", "-f", self.path], check=True)


@contextmanager
def quota(where: Path, size: str) -> Iterator[Quota]:
    """A directory with a quota on a filesystem that has much more room."""
    with filesystem(where, "btrfs") as disk:
        made = Quota(disk)
        made.limit(size)
        yield made


@contextmanager
def attributes(flag: str, *paths: Path) -> Iterator[None]:
    """Give files an attribute for a while."""
    done = subprocess.run(["chattr", f"+{flag}", *paths], check=False, capture_output=True, text=True)
    try:
        if done.returncode:
            pytest.skip(f"no such attribute here: {done.stderr.strip()}")
        yield
    finally:
        subprocess.run(["chattr", f"-{flag}", *(path for path in paths if path.exists())], check=False)


def fill(directory: Path, number: int = errno.ENOSPC, name: str = "filler") -> Path:
    """Write until nothing more can be written, not a byte; return the file that takes it all.

    :param number: the error that ends it.
    """
    filler = directory / name
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (MIB, PAGE, 1):
            data = b"\n" * size
            assert _until_refused(lambda data=data: os.write(fd, data)) == number  # type: ignore[misc]
    finally:
        os.close(fd)
    return filler


def _until_refused(action: Callable[[], object]) -> int:
    """Do something again and again; return the number of the error that ends it."""
    while True:
        try:
            action()
        except OSError as refused:
            return refused.errno or 0


def leave(directory: Path, pages: int) -> None:
    """Fill a disk but for some pages."""
    filler = fill(directory)
    os.truncate(filler, filler.stat().st_size // PAGE * PAGE - pages * PAGE)


def use_up_inodes(directory: Path, but: int = 0) -> Path:
    """Make empty files until there can be no more; return the directory that holds them.

    :param but: so many stay free.
    """
    heap = directory / "heap"
    heap.mkdir()
    numbers = itertools.count()
    assert _until_refused(lambda: os.mknod(heap / str(next(numbers)))) == errno.ENOSPC
    for spare in range(but):
        (heap / str(spare)).unlink()
    return heap


# -- a folder ----------------------------------------------------------------------------------------------------------

WAYS = ("objects", "generations", "release")
"""The objects layout; the generations layout in both modes of a mirror."""


class Folder:
    """A source and a mirror of it, by way of a bucket in memory; each round is that of a new process.

    :param how: one of :data:`WAYS`.
    :param mirror: where the mirror is.
    :param state: where the subscriber's index is; the publisher's is in ``published``, beside it by default.
    :param options: fields of SubscribeOptions.
    :ivar signer: signs what is published.
    """

    def __init__(
        self,
        tmp: Path,
        how: str,
        *,
        mirror: Path | None = None,
        state: Path | None = None,
        published: Path | None = None,
        rollout: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.layout = "objects" if how == "objects" else "generations"
        self.store = MemoryStore()
        self.source = tmp / "source"
        self.source.mkdir()
        self.mirror = mirror or tmp / "mirror"
        self.tree = self.mirror / "current" if how == "release" else self.mirror
        self.state = state or tmp / "state"
        self.published = published or tmp / "published"
        mode: Any = "release" if how == "release" else "mirror"
        self.signer: Signer | None = None
        self.options = {"rollout": RolloutOptions(mode=mode, **(rollout or {})), **options}

    def check(self, hook: tuple[str, ...]) -> None:
        """Have a hook look at each staged tree."""
        self.options["rollout"] = replace(self.options["rollout"], check=hook)

    async def push(self) -> PushResult:
        publisher = publisher_of(
            self.store,
            self.source,
            index=self.published / "index.db",
            layout=self.layout,
            symlinks="all",
            signer=self.signer,
        )
        return await publisher.push(allow_delete=True)

    async def pull(self) -> PullResult:
        index = self.state / "index.db"
        return await subscriber_of(self.store, self.mirror, index=index, **self.options).pull(allow_delete=True)

    async def go(self) -> PullResult:
        """Bring the mirror up to the source; they are equal, and nobody complains."""
        pushed, pulled = await self.push(), await self.pull()
        assert (pushed.problems, pushed.again, pulled.problems) == ([], set(), [])
        assert difference(self.source, self.tree) == {}
        return pulled

    async def rests(self) -> None:
        """A further round has nothing to do, and nothing was left behind."""
        pulled = await self.go()
        assert (pulled.placed, pulled.removed, pulled.drifted) == (0, 0, 0)
        assert self.litter() == []

    def litter(self) -> list[str]:
        """What lies around in the mirror and is nobody's."""
        staged = [str(path.relative_to(self.mirror)) for path in (self.mirror / ".syncd").rglob("*")]
        hidden = [str(path.relative_to(self.mirror)) for path in (self.mirror / "releases").glob(".*")]
        return sorted({*staged, *hidden} - {".syncd/lock", ".syncd/stage"})
