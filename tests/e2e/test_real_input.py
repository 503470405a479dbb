"""The whole way on real input: a standard library and two successive releases of a package, on two mirrors."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import Daemons, no_orphans, publish, subscribe
from tests.support.trees import difference, eventually

if TYPE_CHECKING:
    from tests.support.server import NatsServer

PACKAGE, RELEASES = "Sphinx", ("8.1.2", "8.1.3")


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Both releases as pip gets them, unpacked with the times that are in the archive."""
    unpacked = []
    for release in RELEASES:
        directory = tmp_path_factory.mktemp("release")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*pip, "--dest", str(directory), f"{PACKAGE}=={release}"],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        [wheel] = directory.glob("*.whl")
        target = directory / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            for item in archive.infolist():
                path = Path(archive.extract(item, target))
                when = time.mktime((*item.date_time, 0, 0, -1))
                os.utime(path, (when, when))
        unpacked.append(target)
    return unpacked


def copy_of_the_standard_library(target: Path) -> None:
    """What a running Python does not change under us, without what others installed into it and its own tests."""
    ignored = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages", "test", "tests", "config-*")
    shutil.copytree(sysconfig.get_path("stdlib"), target, symlinks=True, ignore=ignored)


def outlines(root: Path) -> dict[str, tuple[Any, ...]]:
    """What can be had without reading: whether to begin to compare for good."""
    found = {}
    for directory, names, files in os.walk(root):
        if directory == str(root) and ".syncd" in names:
            names.remove(".syncd")
        for name in names + files:
            path = Path(directory, name)
            now = path.lstat()
            size = 0 if name in names else now.st_size
            found[str(path.relative_to(root))] = (now.st_mode, size, now.st_mtime_ns)
    return found


async def equal(source: Path, *mirrors: Path, seconds: float = 60) -> None:
    """Content, kinds, modes, modification times and link targets."""

    def alike(mirror: Path) -> bool:
        try:
            return outlines(source) == outlines(mirror)
        except FileNotFoundError:
            return False

    for mirror in mirrors:
        try:
            await eventually(lambda mirror=mirror: alike(mirror), seconds)
        finally:
            assert dict(list(difference(source, mirror).items())[:5]) == {}


def contents(root: Path) -> dict[str, int]:
    """Digest -> size of every distinct content."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    return {hashlib.sha1(path.read_bytes()).hexdigest(): path.stat().st_size for path in files}


@pytest.mark.slow
@pytest.mark.fault("N1 W6 M5")
async def test_a_standard_library_and_two_releases_of_a_package_on_two_mirrors(
    layout: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer, releases: list[Path]
) -> None:
    """A new release is swapped in, files are edited, chmodded and touched, directories renamed and removed.

    Each while a subscriber, the publisher or the (killed) server is down: both mirrors become equal, and nothing is
    sent or fetched twice.
    """
    source, one, two = tmp_path / "source", tmp_path / "one", tmp_path / "two"
    source.mkdir()
    copy_of_the_standard_library(source / "lib")
    shutil.copytree(releases[0], source / "app", symlinks=True)
    extra = 'symlinks = "all"\nmax_delete_percent = 100\ngrace_seconds = 1\nrescan_seconds = 2\n'
    publisher = daemons.start("p", publish(source, extra=extra))
    first = daemons.start("s1", subscribe(one, extra=""))
    second = daemons.start("s2", subscribe(two, extra=""))
    await equal(source, one, two)

    # The next release arrives as a deployment brings it, while one subscriber is away.
    assert second.stop() == 0
    sent = sum(event["uploaded_bytes"] for event in publisher.events("published"))
    fresh = contents(releases[1]).items() - contents(source).items()
    shutil.copytree(releases[1], tmp_path / "incoming", symlinks=True)
    (source / "app").rename(tmp_path / "outgoing")
    (tmp_path / "incoming").rename(source / "app")
    await equal(source, one)
    second.start()
    await equal(source, two)
    sent = sum(event["uploaded_bytes"] for event in publisher.events("published")) - sent
    size = sum(size for _, size in fresh)
    assert sent == size if layout == "objects" else 0 < sent < size  # compressed, and with nodes

    # Edits and new kinds of things while the publisher is away.
    assert publisher.stop() == 0
    for path in sorted((source / "lib").glob("*.py"))[:60]:
        with path.open("a") as file:
            file.write("# edited\n")
    for path in sorted((source / "lib").glob("*.py"))[60:80]:
        path.chmod(0o755)
    for path in sorted((source / "lib").glob("*.py"))[80:100]:
        os.utime(path, ns=(0, 1_234_567_890_123_456_789))
    (source / "lib/this.py").unlink()
    (source / "lib/this.py").symlink_to("antigravity.py")
    (source / "lib/empty-directory").mkdir(mode=0o750)
    publisher.start()
    await equal(source, one, two)

    # Renames and deletes while the server is away.
    await nats_server.astop(kill=True)
    (source / "lib/json").rename(source / "lib/json-renamed")
    (source / "app/sphinx/builders").rename(source / "builders")
    shutil.rmtree(source / "lib/email")
    shutil.rmtree(source / "app/sphinx/locale/ar")
    (source / "lib/logging").rename(source / "lib/away")
    (source / "lib/away/handlers.py").rename(source / "lib/logging")
    await nats_server.astart()
    await equal(source, one, two)

    # Everything stopped and started: nothing is sent or fetched again.
    for daemon in (publisher, first, second):
        assert await asyncio.to_thread(daemon.stop) == 0
        daemon.log.unlink()
    await nats_server.arestart()
    for daemon in (publisher, first, second):
        daemon.start()
    (source / "last").write_text("seen by everybody")
    await equal(source, one, two)
    most = 17 if layout == "objects" else 100_000  # the nodes on the way travel, too
    assert 17 <= sum(event["uploaded_bytes"] for event in publisher.events("published")) <= most
    for daemon in (first, second):
        assert 17 <= sum(event["downloaded_bytes"] for event in daemon.events("mirrored")) <= most
    await no_orphans(nats_server.url)
