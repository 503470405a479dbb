"""SIGKILL, at named points and at random: publisher, subscriber and server.

After every kill the killed process is started again and everything heals by itself: trees equal, no litter in a
mirror, no chunk in the bucket that nothing announces. ``SYNCD_TEST_KILLS=500`` makes the random loop a long one,
``SYNCD_TEST_SEED=n`` repeats one that failed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from syncd.crashpoints import ENV_CRASH_POINT
from tests.e2e.conftest import Daemons, Gardener, healed, publish, subscribe
from tests.support.trees import difference, equal_trees, eventually, snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.daemon import Daemon
    from tests.support.server import NatsServer

# Taken out of the environment: syncd refuses variables that look like its keys.
KILLS = int(os.environ.pop("SYNCD_TEST_KILLS", "20"))
SEED = int(os.environ.pop("SYNCD_TEST_SEED", str(int(time.time()))))


def grow(source: Path) -> None:
    """A tree with every kind of entry and content of every size class."""
    (source / "d/deep").mkdir(parents=True)
    for number in range(8):
        (source / f"d/f{number}").write_bytes(os.urandom(1000))
    (source / "large").write_bytes(os.urandom(700_000))
    (source / "d/link").symlink_to("f1")
    (source / "d/deep/empty").touch()


def change(source: Path) -> None:
    """One of everything: edit, add, remove, rename, another kind, another mode, a large file and a small one."""
    (source / "d/f0").write_bytes(os.urandom(2000))
    (source / "d/f1").unlink()
    (source / "d/f2").rename(source / "d/deep/moved")
    (source / "d/f3").unlink()
    (source / "d/f3").mkdir()
    (source / "d/f3/inside").write_text("a directory where a file was")
    (source / "d/f4").chmod(0o600)
    (source / "d/link").unlink()
    (source / "d/link").symlink_to("f5")
    (source / "large").write_bytes(os.urandom(800_000))
    (source / "also-large").write_bytes(os.urandom(300_000))
    (source / "d/f6").unlink()


async def died(daemon: Daemon, seconds: float = 30) -> None:
    code = await asyncio.to_thread(daemon.wait, seconds)
    assert code == -signal.SIGKILL


SUBSCRIBER_POINTS = [
    "stage_write", "stage_finished:3", "batch_staged", "before_journal", "journal_torn", "journal_durable",
    "after_each_step", "after_each_step:7", "before_dir_meta", "before_journal_removed", "done", "batch_applied",
]  # fmt: skip


@pytest.mark.fault("C1 C3")
@pytest.mark.parametrize("point", SUBSCRIBER_POINTS)
async def test_a_subscriber_killed_at_a_named_point_heals_at_its_next_start(
    point: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """What the kill leaves is old or new, path by path, never anything else; the next start completes it."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    source.mkdir()
    grow(source)
    publisher = daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    assert subscriber.stop() == 0
    before = snapshot(mirror)
    published = len(publisher.events("published"))
    change(source)
    publisher.wait_event("published", count=published + 1)
    await eventually(lambda: publisher.status()["publish-app"]["state"] == "in_sync")
    after = snapshot(source)
    subscriber.start(**{ENV_CRASH_POINT: point})
    await died(subscriber)
    for path, entry in snapshot(mirror, times=False).items():
        whole = {row[path][3] for row in (before, after) if path in row}
        assert entry[0] == "dir" or entry[3] in whole, path
    subscriber.start()
    await healed(nats_server, source, mirror)


PUBLISHER_POINTS = ["metas_stored", "content_stored", "content_stored:2", "tombstones_stored", "garbage_freed"]


@pytest.mark.fault("C4")
@pytest.mark.parametrize("point", PUBLISHER_POINTS)
async def test_a_publisher_killed_at_a_named_point_heals_at_its_next_start(
    point: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Whatever it had sent and not remembered is found again; nothing is lost and nothing is left over."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    source.mkdir()
    grow(source)
    publisher = daemons.start("p", publish(source))
    daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    assert publisher.stop() == 0
    change(source)
    publisher.start(**{ENV_CRASH_POINT: point})
    await died(publisher)
    (source / "while-dead").write_bytes(os.urandom(200_000))
    publisher.start()
    await healed(nats_server, source, mirror)


@pytest.mark.fault("C4")
async def test_a_publisher_killed_in_its_first_round_begins_where_it_was(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Killed at every metadata write in turn, each start gets further; then the trees are equal."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    source.mkdir()
    for number in range(1200):
        (source / f"f{number}").write_bytes(os.urandom(100))
    publisher = daemons.make("p", publish(source))
    daemons.start("s", subscribe(mirror))
    for _ in range(3):
        publisher.start(**{ENV_CRASH_POINT: "metas_stored"})
        await died(publisher)
    publisher.start()
    await healed(nats_server, source, mirror)


@asynccontextmanager
async def gardening(gardener: Gardener) -> AsyncIterator[None]:
    """Change the tree some fifty times a second."""

    async def work() -> None:
        while True:
            await asyncio.to_thread(gardener.change)
            await asyncio.sleep(gardener.random.uniform(0, 0.04))

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError), outcome


@pytest.mark.slow
@pytest.mark.fault("C1 C4 N1")
@pytest.mark.timeout(120 + KILLS * 20)
@pytest.mark.parametrize("role", ["publisher", "subscriber", "server"])
async def test_killed_at_random_moments_while_the_tree_changes(
    role: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Twenty kills of each; every fifth one is followed by quiet, and then the trees are equal and nothing is left."""
    print(f"SYNCD_TEST_SEED={SEED}")
    chance = random.Random(f"{SEED}-{role}")
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    source.mkdir()
    (source / "keep").write_text("a folder is never emptied")
    gardener = Gardener(source, SEED)
    for _ in range(60):
        gardener.change()
    publisher = daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    done = 0
    while done < KILLS:
        async with gardening(gardener):
            for _ in range(min(5, KILLS - done)):
                if role == "server":
                    await asyncio.sleep(chance.uniform(0, 0.8))
                    await nats_server.astop(kill=True)
                    await asyncio.sleep(chance.choice([0, 0, 0.3]))
                    await nats_server.astart()
                else:
                    victim = publisher if role == "publisher" else subscriber
                    await asyncio.sleep(chance.choice([chance.uniform(0, 2), chance.uniform(0.5, 1.2)]))
                    assert victim.process is not None
                    assert victim.process.poll() is None, victim.log.read_text()[-2000:]
                    await asyncio.to_thread(victim.kill)
                    victim.start()
                done += 1
        try:
            await healed(nats_server, source, mirror)
        except AssertionError:
            print(difference(source, mirror), publisher.status(), subscriber.status())
            raise
    fresh = tmp_path / "fresh"
    pulled = publisher.run("pull", "app", str(fresh))
    assert pulled.returncode == 0, pulled.stderr
    assert difference(source, fresh) == {}
    for daemon in (publisher, subscriber):
        assert daemon.events("folder_crashed") == []


@pytest.mark.fault("U5")
async def test_sigterm_at_random_moments_ends_within_five_seconds(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Ten times, at start, in a first sync, in mid-upload: exit code 0, and what was interrupted is taken up again."""
    print(f"SYNCD_TEST_SEED={SEED}")
    chance = random.Random(f"{SEED}-sigterm")
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    source.mkdir()
    for number in range(1000):
        (source / f"f{number}").write_bytes(chance.randbytes(3000))
    large = [source / "large1", source / "large2"]
    daemon = daemons.make("both", publish(source) + subscribe(mirror))
    for number in range(10):
        daemon.start()
        for file in large:
            file.write_bytes(chance.randbytes(20_000_000))
        daemon.wait_event("daemon_started", count=number + 1)
        await asyncio.sleep(chance.uniform(0, 1))
        started = time.monotonic()
        assert await asyncio.to_thread(daemon.stop) == 0
        assert time.monotonic() - started < 5
        assert daemon.events("folder_stop_late") == []
    daemon.start()
    await healed(nats_server, source, mirror)


