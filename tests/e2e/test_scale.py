"""Trees and files that are large: bounded memory, bounded time, every byte there.

More of it by hand: ``SYNCD_TEST_FILES=1000000``, ``SYNCD_TEST_LARGE=1`` (docs/testing.md).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import nats
import psutil
import pytest

from tests.e2e.conftest import Daemons, publish, subscribe
from tests.support.server import NatsServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemon import Daemon

FILES = int(os.environ.pop("SYNCD_TEST_FILES", "10000"))
EQUAL = {"generations": 100_000, "objects": 10_000}
PEAK_MB = 200
"""Of a first sync: some 130 MB whatever the tree, and another 25 for a directory of 100,000 (docs/performance.md)."""
FILES_A_SECOND = 300
"""What the slowest machine must do; what quadratic work would fall below at once."""
PATIENT = pytest.mark.timeout(600 + 6 * FILES / FILES_A_SECOND)
"""Each command has a deadline of its own."""
GIB = 1 << 30
ABOVE_2_GIB = 2 * GIB + (1 << 20) + 1
ABOVE_4_GIB = 4 * GIB + (1 << 20) + 1
ALL = bool(os.environ.pop("SYNCD_TEST_LARGE", ""))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory for much content, in memory where there is plenty: on disk all other tests would wait for it."""
    place = Path("/dev/shm")
    plenty = 4 * max(ABOVE_4_GIB, FILES * 10_000)
    if not place.is_dir() or min(shutil.disk_usage(place).free, psutil.virtual_memory().available) < plenty:
        yield tmp_path
        return
    directory = Path(tempfile.mkdtemp(prefix="syncd-scale-", dir=place))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def nats_server(disk: Path) -> Iterator[NatsServer]:
    """A server whose store is there, too."""
    server = NatsServer(disk / "nats").start()
    try:
        yield server
    finally:
        server.stop()


class Used(NamedTuple):
    seconds: float
    peak_mb: float
    said: str


def used(daemon: Daemon, *arguments: str, seconds: float) -> Used:
    """Run one command of a configuration; fail if it fails or takes longer."""
    output = daemon.directory / "command.log"
    started = time.monotonic()
    with output.open("wb") as out:
        command = [sys.executable, "-m", "syncd", *arguments, "--config", str(daemon.config)]
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - started > seconds:
            process.kill()
            process.wait()
            raise AssertionError(f"{arguments} takes longer than {seconds:.0f} s: {output.read_text()[-2000:]}")
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output.read_text()[-3000:]
    return Used(time.monotonic() - started, usage.ru_maxrss / 1000, output.read_text())


def names(root: Path) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of each file, in an order of its own."""
    stack = [root]
    while stack:
        here = stack.pop()
        with os.scandir(here) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                if entry.name != ".syncd":
                    stack.append(here / entry.name)
            else:
                about = entry.stat(follow_symlinks=False)
                yield f"{here.relative_to(root)}/{entry.name}", about.st_size, about.st_mtime_ns


async def bucket_bytes(server: NatsServer, folder: str = "app") -> int:
    client = await nats.connect(server.url)
    try:
        return (await client.jetstream().stream_info(f"OBJ_{folder}")).state.bytes
    finally:
        await client.close()


def both_ways(daemons: Daemons, source: Path, mirror: Path, files: int) -> tuple[Used, Used]:
    """Push and pull, each within its bounds; say what they took."""
    daemon = daemons.make("d", publish(source, extra="") + subscribe(mirror, extra=""))
    deadline = 30 + files / FILES_A_SECOND
    push = used(daemon, "push", "app", seconds=deadline)
    pull = used(daemon, "pull", "app", str(mirror), seconds=deadline)
    for what, use in (("push", push), ("pull", pull)):
        print(f"{files} files, {what}: {use.seconds:.1f} s, peak {use.peak_mb:.0f} MB")
        assert use.peak_mb < PEAK_MB, what
    return push, pull


@PATIENT
@pytest.mark.slow
@pytest.mark.fault("X3")
async def test_many_small_files_take_bounded_time_and_memory(
    disk: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Push and pull 10,000 small files (by hand a million: ``SYNCD_TEST_FILES``); the second time nothing moves."""
    source, mirror = disk / "source", disk / "mirror"
    for number in range(FILES // 100):
        directory = source / f"{number // 100:03}/{number % 100:02}"
        directory.mkdir(parents=True)
        for file in range(100):
            (directory / f"{file:02}").write_bytes(b"%d/%d\n" % (number, file))
    both_ways(daemons, source, mirror, FILES)
    for there, here in zip(names(mirror), names(source), strict=True):
        assert there == here
    for number in random.Random(1).sample(range(FILES), 200):
        path = f"{number // 10000:03}/{number // 100 % 100:02}/{number % 100:02}"
        assert (mirror / path).read_bytes() == (source / path).read_bytes()
    before = await bucket_bytes(nats_server)
    both_ways(daemons, source, mirror, FILES)
    assert await bucket_bytes(nats_server) <= before + 1_000_000


@PATIENT
@pytest.mark.slow
@pytest.mark.fault("X3")
async def test_a_hundred_thousand_equal_files_are_one_content(
    disk: Path, daemons: Daemons, nats_server: NatsServer, layout: str
) -> None:
    """Push and pull 100,000 files of the same 4,000 bytes (as objects 10,000): sent once, stored once.

    In the mirror each is a file of its own.
    """
    source, mirror, files = disk / "source", disk / "mirror", EQUAL[layout]
    content = random.Random(2).randbytes(4_000)
    for number in range(files // 100):
        directory = source / f"{number // 100:02}/{number % 100:02}"
        directory.mkdir(parents=True)
        for file in range(100):
            (directory / f"{file:02}").write_bytes(content)
    both_ways(daemons, source, mirror, files)
    assert await bucket_bytes(nats_server) < files * len(content) / 5
    inodes = set()
    for path, size, _ in names(mirror):
        assert size == len(content)
        inodes.add((mirror / path).lstat().st_ino)
    assert len(inodes) == files
    for number in random.Random(3).sample(range(files), 200):
        assert (mirror / f"{number // 10000:02}/{number // 100 % 100:02}/{number % 100:02}").read_bytes() == content


@contextmanager
def landmarks(path: Path, size: int) -> Iterator[dict[int, bytes]]:
    """Make a file of holes with something to find at its ends and around 2 and 4 GiB; remove it afterwards."""
    chance = random.Random(size)
    marks = {max(0, at - 50_000): chance.randbytes(100_000) for at in (0, 2 * GIB, 4 * GIB) if at < size}
    marks |= {size - 7: b"the end"}
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in marks.items():
            os.pwrite(file.fileno(), data, at)
    try:
        yield marks
    finally:
        path.unlink()


def arrives(daemons: Daemons, source: Path, mirror: Path, size: int) -> None:
    source.mkdir()
    daemon = daemons.make("d", publish(source, extra="") + subscribe(mirror, extra=""))
    with landmarks(source / "large", size) as marks:
        for command in (["push", "app"], ["pull", "app", str(mirror)]):
            use = used(daemon, *command, seconds=300)
            print(f"{size} bytes, {command[0]}: {use.seconds:.1f} s, peak {use.peak_mb:.0f} MB")
            assert use.peak_mb < PEAK_MB
        with (mirror / "large").open("rb") as copy:
            assert os.fstat(copy.fileno()).st_size == size
            for at, data in marks.items():
                assert os.pread(copy.fileno(), len(data), at) == data
        (mirror / "large").unlink()


@PATIENT
@pytest.mark.slow
@pytest.mark.layout("generations")
@pytest.mark.fault("O6")
@pytest.mark.parametrize("size", [ABOVE_4_GIB, *([ABOVE_2_GIB] if ALL else [])])
def test_a_file_above_the_limits_of_32_bits_arrives_in_chunks(disk: Path, daemons: Daemons, size: int) -> None:
    """Push and pull a sparse file of 4 GiB, a mebibyte and a byte, with marks at its ends and across 2 and 4 GiB."""
    arrives(daemons, disk / "source", disk / "mirror", size)


@PATIENT
@pytest.mark.slow
@pytest.mark.layout("objects")
@pytest.mark.fault("O6")
@pytest.mark.parametrize("size", [ABOVE_2_GIB, *([ABOVE_4_GIB] if ALL else [])])
def test_an_object_above_the_limits_of_32_bits_arrives(disk: Path, daemons: Daemons, size: int) -> None:
    """Push and pull, as one object, a file of 2 GiB, a mebibyte and a byte (by hand of 4), marked in the same way."""
    arrives(daemons, disk / "source", disk / "mirror", size)
