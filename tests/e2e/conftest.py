"""What the end-to-end tests share: configurations, daemons, and what must be true after healing."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from typing import TYPE_CHECKING

import nats
import pytest
from nats.js.errors import NotFoundError

from syncd.errors import ObjectGone
from syncd.store.address import ConnectionOptions
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection
from tests.support.daemon import Daemon
from tests.support.mirror import litter
from tests.support.reach import reachable
from tests.support.trees import equal_trees, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.server import NatsServer

EAGER = "settle_ms = 10\nrescan_seconds = 1\n"
"""Both roles: look at everything every second, so that a test of healing need not wait a minute for it."""
EAGER_PUBLISH = EAGER + "grace_seconds = 1\nmax_delete_percent = 100\n"
FREED_SECONDS = 30.0


def nats_config(server: NatsServer) -> str:
    return f'[nats]\nservers = ["{server.url}"]\n'


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test runs in both layouts, unless it is marked ``@pytest.mark.layout("objects")`` or the other."""
    mark = metafunc.definition.get_closest_marker("layout")
    metafunc.parametrize("layout", mark.args if mark else ("generations", "objects"), indirect=True)


@pytest.fixture(autouse=True)
def layout(request: pytest.FixtureRequest) -> Iterator[str]:
    """What :func:`publish` configures."""
    _layout.append(request.param)
    yield request.param
    _layout.pop()


_layout: list[str] = []


def publish(source: Path, folder: str = "app", extra: str = EAGER_PUBLISH) -> str:
    kept = "keep_generations = 3\n" if _layout[-1] == "generations" and extra == EAGER_PUBLISH else ""
    return f'[[publish]]\nfolder = "{folder}"\npath = "{source}"\nlayout = "{_layout[-1]}"\n{kept}{extra}\n'


def subscribe(mirror: Path, folder: str = "app", extra: str = EAGER) -> str:
    return f'[[subscribe]]\nfolder = "{folder}"\npath = "{mirror}"\n{extra}\n'


class Daemons(list[Daemon]):
    """Every daemon of one test; what still runs at its end is killed, and none may have met a bug of ours."""

    def __init__(self, directory: Path, server: NatsServer) -> None:
        super().__init__()
        self.directory = directory
        self.server = server

    def make(self, name: str, folders: str) -> Daemon:
        """One that is not started yet, with a state directory and a log of its own."""
        daemon = Daemon(self.directory / name, nats_config(self.server) + folders)
        self.append(daemon)
        return daemon

    def start(self, name: str, folders: str, **environ: str) -> Daemon:
        return self.make(name, folders).start(**environ)


@pytest.fixture
def daemons(tmp_path: Path, nats_server: NatsServer) -> Iterator[Daemons]:
    running = Daemons(tmp_path / "daemons", nats_server)
    yield running
    for daemon in running:
        daemon.kill()
    for daemon in running:
        assert daemon.events("folder_crashed") == []


# -- the bucket, as somebody else sees it ----------------------------------------------------------------------------


async def orphans(url: str, folder: str = "app") -> set[str]:
    """Chunk subjects of a bucket that nothing needs: no metadata message, no kept generation."""
    connection = Connection(ConnectionOptions(servers=(url,), name="orphans"))
    await connection.start(10)
    try:
        bucket = NatsStore(connection).bucket(folder)
        listed: set[str] = set()
        async for page in bucket.list_chunks():
            listed.update(page)
        return listed - await reachable(bucket)
    finally:
        await connection.close()


async def no_orphans(url: str, folder: str = "app", seconds: float = FREED_SECONDS) -> None:
    """Wait until every chunk of the bucket is announced by some object."""
    async with asyncio.timeout(seconds + 30):
        for tries_left in reversed(range(int(seconds / 0.2))):
            try:
                left = await orphans(url, folder)
            except ObjectGone:  # a generation was collected while we read it; one that is really broken stays so
                if not tries_left:
                    raise
            else:
                if not left:
                    return
            await asyncio.sleep(0.2)
    raise AssertionError(f"{len(left)} contents that nothing announces: {await _describe(url, folder, left)}")


async def _describe(url: str, folder: str, nuids: set[str]) -> list[str]:
    client = await nats.connect(url)
    try:
        js = client.jetstream()
        found = []
        for nuid in sorted(nuids)[:5]:
            last = await js.get_last_msg(f"OBJ_{folder}", f"$O.{folder}.C.{nuid}")
            found.append(f"{nuid} ends with #{last.seq}: {len(last.data or b'')} bytes, {last.headers}, {last.time}")
        return found
    finally:
        await client.close()


async def delete_bucket(url: str, folder: str = "app") -> None:
    client = await nats.connect(url)
    try:
        await client.jetstream().delete_stream(f"OBJ_{folder}")
    finally:
        await client.close()


async def bucket_exists(url: str, folder: str = "app") -> bool:
    client = await nats.connect(url)
    try:
        await client.jetstream().stream_info(f"OBJ_{folder}")
    except NotFoundError:
        return False
    finally:
        await client.close()
    return True


async def healed(server: NatsServer, source: Path, *mirrors: Path, folder: str = "app", seconds: float = 30) -> None:
    """Trees equal, nothing staged or journaled left in a mirror, no chunk left in the bucket that nothing needs."""
    for mirror in mirrors:
        await equal_trees(source, mirror, seconds)
    await no_orphans(server.url, folder)
    for mirror in mirrors:
        await eventually(lambda mirror=mirror: litter(mirror) == [])  # a subscriber may still be starting


# -- a source in motion ----------------------------------------------------------------------------------------------


KINDS = ["create", "edit", "replace", "delete", "rename", "touch", "mode", "link", "tree"]


class Gardener:
    """Changes a tree at random, reproducibly: every kind of change that a directory can undergo."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.count = 0

    def bytes(self) -> bytes:
        size = self.random.choice([0, 1, 100, 5_000, 70_000, 131_072, 131_073, 400_000])
        return self.random.randbytes(size)

    def paths(self, *, directories: bool = False) -> list[Path]:
        found = [path for path in self.root.rglob("*") if path.is_dir() and not path.is_symlink()]
        return sorted(found) if directories else sorted(path for path in self.root.rglob("*") if path.is_file())

    def directory(self) -> Path:
        return self.random.choice([self.root, *self.paths(directories=True)])

    def change(self) -> None:
        """One change; the tree keeps some fifty files."""
        self.count += 1
        files = self.paths()
        kind = "create" if len(files) < 10 else self.random.choice(KINDS)
        if kind == "create" or not files:
            (self.directory() / f"f{self.count}").write_bytes(self.bytes())
            return
        file = self.random.choice(files)
        match kind:
            case "edit":
                with file.open("ab") as out:
                    out.write(self.random.randbytes(200))
            case "replace":
                fresh = self.root / f".new{self.count}"
                fresh.write_bytes(self.bytes())
                fresh.replace(file)
            case "delete":
                file.unlink()
            case "rename":
                file.rename(self.directory() / f"r{self.count}")
            case "touch":
                os.utime(file, ns=(self.count, 1_600_000_000_000_000_000 + self.count))
            case "mode":
                file.chmod(self.random.choice([0o600, 0o644, 0o755]))
            case "link":
                (self.directory() / f"l{self.count}").symlink_to(f"f{self.count}")
            case _:
                self.tree(len(files))

    def tree(self, files: int) -> None:
        directories = self.paths(directories=True)
        if len(directories) > 4 or files > 60:
            shutil.rmtree(self.random.choice(directories))
            return
        new = self.directory() / f"d{self.count}/deep"
        new.mkdir(parents=True)
        for number in range(5):
            (new / f"f{number}").write_bytes(self.bytes())
