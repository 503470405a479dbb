"""SIGKILL, at named points and at random: publisher, subscriber and server.

After every kill the killed process is started again and everything heals by itself: trees equal, no litter in a
mirror, no chunk in the bucket that nothing announces. ``SYNCD_TEST_KILLS=500`` makes the random loop a long one,
``SYNCD_TEST_SEED=n`` repeats one that failed.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from syncd.crashpoints import ENV_CRASH_POINT
from tests.e2e.conftest import Daemons, Gardener, healed, publish, subscribe
from tests.support.server import NatsServer
from tests.support.trees import difference, equal_trees, eventually, snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.daemon import Daemon

# Taken out of the environment: syncd refuses variables that look like its keys.
KILLS = int(os.environ.pop("SYNCD_TEST_KILLS", "10"))
SERIES = os.environ.pop("SYNCD_TEST_SERIES", "p s n psn").split()
SEED = int(os.environ.pop("SYNCD_TEST_SEED", str(int(time.time()))))


def grow(source: Path) -> None:
    """A tree with every kind of entry and content of every size class, in place of what was there."""
    for path in source.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
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


async def published(publisher: Daemon, source: Path, witness: Path) -> None:
    """Wait until the bucket has what the source has, as a fetch of its own tells."""

    def same() -> bool:
        pulled = publisher.run("pull", "app", str(witness))
        return pulled.returncode == 0 and not difference(source, witness)

    await eventually(same)


SUBSCRIBER_POINTS = [
    "stage_write", "stage_finished:3", "batch_staged", "before_journal", "journal_torn", "journal_durable",
    "after_each_step", "after_each_step:7", "before_dir_meta", "before_journal_removed", "done", "batch_applied",
]  # fmt: skip
GENERATION_POINTS = [
    "walked", "content_staged", "generation_staged", "before_first_page", "between_pages", "generation_applied",
    "remembered",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault("C1 C3")
async def test_a_subscriber_killed_at_any_named_point_heals_at_its_next_start(
    layout: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """What the kill leaves is old or new, path by path, never anything else; the next start completes it."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    publisher = daemons.make("p", publish(source))
    subscriber = daemons.make("s", subscribe(mirror))
    source.mkdir()
    for point in SUBSCRIBER_POINTS + (GENERATION_POINTS if layout == "generations" else []):
        print(point)
        grow(source)
        publisher.process or publisher.start()
        subscriber.process or subscriber.start()
        await equal_trees(source, mirror)
        assert await asyncio.to_thread(subscriber.stop) == 0
        before = snapshot(mirror)
        change(source)
        await published(publisher, source, tmp_path / "witness")
        after = snapshot(source)
        subscriber.start(**{ENV_CRASH_POINT: point})
        await died(subscriber)
        for path, entry in snapshot(mirror, times=False).items():
            whole = {row[path][3] for row in (before, after) if path in row}
            assert entry[0] == "dir" or entry[3] in whole, path
        subscriber.start()
        await equal_trees(source, mirror)
    await healed(nats_server, source, mirror)


@pytest.mark.fault("C1 D2")
@pytest.mark.parametrize("point", ["journal_durable", "done", "batch_applied"])
async def test_what_was_applied_and_not_remembered_is_still_known_as_ours(
    point: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Deleted upstream while the killed subscriber was down, it goes from the mirror too, and nothing else does."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    (source / "d").mkdir(parents=True)
    (source / "keep").write_text("k")
    publisher = daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    assert await asyncio.to_thread(subscriber.stop) == 0
    (source / "new/deep").mkdir(parents=True)
    (source / "new/deep/file").write_bytes(os.urandom(1000))
    (source / "new/link").symlink_to("deep")
    await published(publisher, source, tmp_path / "witness")
    subscriber.start(**{ENV_CRASH_POINT: point})
    await died(subscriber)
    (mirror / "stray").write_text("not of syncd")
    shutil.rmtree(source / "new")
    await published(publisher, source, tmp_path / "witness")
    subscriber.start()
    await eventually(lambda: not (mirror / "new").exists())
    assert (mirror / "stray").read_text() == "not of syncd"
    (mirror / "stray").unlink()
    await healed(nats_server, source, mirror)


PUBLISHER_POINTS = {
    "objects": ["metas_stored", "content_stored", "content_stored:2", "tombstones_stored", "garbage_freed"],
    "generations": [
        "blobs_stored", "before_commit", "generation_committed", "generation_remembered",
        "generation_removed", "blobs_forgotten", "blobs_freed",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault("C4")
async def test_a_publisher_killed_at_any_named_point_heals_at_its_next_start(
    layout: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Whatever it had sent and not remembered is found again; nothing is lost and nothing is left over."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    publisher = daemons.make("p", publish(source))
    daemons.start("s", subscribe(mirror))
    source.mkdir()
    for point in PUBLISHER_POINTS[layout]:
        print(point)
        grow(source)
        publisher.process or publisher.start()
        await equal_trees(source, mirror)
        assert await asyncio.to_thread(publisher.stop) == 0
        change(source)
        publisher.start(**{ENV_CRASH_POINT: point})
        await died(publisher)
        (source / "while-dead").write_bytes(os.urandom(200_000))
        publisher.start()
        await equal_trees(source, mirror)
    await healed(nats_server, source, mirror)


@pytest.mark.fault("C4")
async def test_a_publisher_killed_in_its_first_round_begins_where_it_was(
    layout: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Killed at every metadata write in turn, each start gets further; then the trees are equal."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    source.mkdir()
    for number in range(1200):
        (source / f"f{number}").write_bytes(os.urandom(100))
    publisher = daemons.make("p", publish(source))
    daemons.start("s", subscribe(mirror))
    for _ in range(3):
        publisher.start(**{ENV_CRASH_POINT: "metas_stored" if layout == "objects" else "before_commit"})
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


async def kill_at_random(victims: dict[str, Daemon | NatsServer], kills: int, chance: random.Random) -> None:
    """Kill each ``kills`` times and start it again, independently of the others."""

    async def kill(role: str, victim: Daemon | NatsServer, own: random.Random) -> None:
        for _ in range(kills):
            await asyncio.sleep(own.choice([own.uniform(0, 0.5), own.uniform(0.5, 1.5), own.uniform(0.8, 1.2)]))
            if isinstance(victim, NatsServer):
                await victim.astop(kill=True)
                await asyncio.sleep(own.choice([0, 0, 0.3]))
                await victim.astart()
                continue
            assert victim.process is not None
            assert victim.process.poll() is None, f"{role} ended by itself: {victim.log.read_text()[-2000:]}"
            await asyncio.to_thread(victim.kill)
            victim.start()

    async with asyncio.TaskGroup() as group:
        for role, victim in victims.items():
            group.create_task(kill(role, victim, random.Random(chance.random())))


@pytest.mark.slow
@pytest.mark.fault("C1 C4 N1")
@pytest.mark.timeout(240 + KILLS * 20)
async def test_killed_at_random_moments_while_the_tree_changes(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Each role alone, then all at once: after each series it is quiet, the trees become equal, nothing is left."""
    print(f"SYNCD_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    source, mirror, fresh = tmp_path / "source", tmp_path / "mirror", tmp_path / "fresh"
    source.mkdir()
    (source / "keep").write_text("a folder is never emptied")
    gardener = Gardener(source, SEED)
    for _ in range(60):
        gardener.change()
    publisher = daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    every: dict[str, Daemon | NatsServer] = {"p": publisher, "s": subscriber, "n": nats_server}
    for roles in SERIES:
        print(roles)
        victims = {role: every[role] for role in roles}
        async with gardening(gardener):
            await kill_at_random(victims, max(1, KILLS // 2), chance)
        await healed(nats_server, source, mirror)
        pulled = publisher.run("pull", "app", str(fresh))
        assert pulled.returncode == 0, pulled.stderr
        assert difference(source, fresh) == {}


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
