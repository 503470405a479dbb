"""SIGKILL, at named points and at random: publisher, subscriber and server.

After every kill the killed process is started again and everything heals by itself: trees equal, no litter in a
mirror, no chunk in the bucket that nothing announces.

The matrix kills at every passage of every crash point (:mod:`tests.support.killpoints`), in both layouts and both
modes of a mirror, with processes that do one round each; then at random moments, until there are ``SYNCD_TEST_KILLS``
(200) of them. A long run, of some half an hour: ``SYNCD_TEST_KILLS=5000 scripts/test tests/e2e/test_kills.py -k matrix
-s``. Daemons are killed at random moments only: ``SYNCD_TEST_DAEMON_KILLS=500`` makes that a long loop.
``SYNCD_TEST_SEED=n`` repeats what failed.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import shutil
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd.crashpoints import ENV_CRASH_POINT
from tests.e2e.conftest import Daemons, Gardener, healed, publish, subscribe
from tests.support.fleet import FLEET
from tests.support.forks import Forks, Job
from tests.support.killpoints import Layout, Mode, Role, points
from tests.support.mirror import litter
from tests.support.server import NatsServer
from tests.support.trees import difference, equal_trees, eventually, snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.daemon import Daemon

# Taken out of the environment: syncd refuses variables that look like its keys.
KILLS = int(os.environ.pop("SYNCD_TEST_KILLS", "200"))
DAEMON_KILLS = int(os.environ.pop("SYNCD_TEST_DAEMON_KILLS", "10"))
SERIES = os.environ.pop("SYNCD_TEST_SERIES", "p s n psn").split()
SEED = int(os.environ.pop("SYNCD_TEST_SEED", str(int(time.time()))))

Tree = dict[str, tuple[Any, ...]]


async def died(daemon: Daemon, seconds: float = 30) -> None:
    code = await asyncio.to_thread(daemon.wait, seconds)
    assert code == -signal.SIGKILL


async def published(publisher: Daemon, source: Path, witness: Path) -> None:
    """Wait until the bucket has what the source has, as a fetch of its own tells."""

    def same() -> bool:
        pulled = publisher.run("pull", "app", str(witness))
        return pulled.returncode == 0 and not difference(source, witness)

    await eventually(same)


# -- the matrix --------------------------------------------------------------------------------------------------------

RUNS: list[tuple[str, Layout, Mode]] = [
    ("subscriber", "generations", "mirror"),
    ("subscriber", "generations", "release"),
    ("subscriber", "objects", "mirror"),
    ("publisher", "generations", "mirror"),
    ("publisher", "objects", "mirror"),
]
SHARE = math.ceil(KILLS / len(RUNS))
NOWHERE = "nats://127.0.0.1:1"
SCENES = 2
MOST_PASSAGES = 80
"""Of one point in one round."""


def grow(source: Path, chance: random.Random) -> None:
    """A tree with every kind of entry and content of every size class, in place of what was there."""
    for path in source.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (source / "d/deep").mkdir(parents=True)
    for number in range(6):
        (source / f"d/f{number}").write_bytes(chance.randbytes(1000))
    (source / "large").write_bytes(chance.randbytes(600_000))
    (source / "d/link").symlink_to("f1")
    (source / "d/deep/empty").touch()
    (source / "same").write_bytes(b"the same in all of them")
    os.utime(source / "same", ns=(0, 0))


def change(source: Path, chance: random.Random) -> None:
    """One of everything: edit, add, remove, rename, another kind, another mode, a large file and a small one."""
    (source / "d/f0").write_bytes(chance.randbytes(2000))
    (source / "d/f1").unlink()
    (source / "d/f2").rename(source / "d/deep/moved")
    (source / "d/f3").unlink()
    (source / "d/f3").mkdir()
    (source / "d/f3/inside").write_text("a directory where a file was")
    (source / "d/f4").chmod(0o600)
    (source / "d/link").unlink()
    (source / "d/link").symlink_to("f5")
    with (source / "large").open("r+b") as file:
        file.seek(chance.randrange(500_000))
        file.write(chance.randbytes(1000))
    (source / "also-large").write_bytes(chance.randbytes(300_000))


class Bench:
    """One bucket, its publisher, one mirror, and processes that do one round each; kills are counted."""

    def __init__(self, directory: Path, server: NatsServer, forks: Forks, layout: Layout, mode: Mode) -> None:
        self.directory, self.server, self.forks, self.layout, self.mode = directory, server, forks, layout, mode
        self.chance = random.Random(f"{SEED} {layout} {mode}")
        self.source, self.mirror = directory / "source", directory / "mirror"
        self.source.mkdir()
        self.mirror.mkdir()
        self.stray = self.mirror / "stray"
        self.stray.write_text("not of syncd")
        self.scenes = itertools.cycle([grow, change])
        self.before: Tree = {}
        self.after: Tree = {}
        self.kills = 0
        self.hooked = False
        self.number = 0
        self.seconds = {"push": 0.1, "pull": 0.1}

    # what they do

    def publish(self, task: str, **how: Any) -> Job:
        return self.forks.start(
            FLEET + task, url=self.server.url, folder="app", source=str(self.source),
            index=str(self.directory / "publisher.db"), layout=self.layout, keep=1, **how,
        )  # fmt: skip

    def subscribe(self, *, mirror: Path | None = None, offline: bool = False, **how: Any) -> Job:
        into = mirror or self.mirror
        url = NOWHERE if offline else self.server.url
        hook = ["/bin/sh", "-c", f"echo $SYNCD_GENERATION >> {self.directory}/hooks"]
        hooks = {"check": ["true"], "apply": hook, "health": ["true"]} if self.hooked else {}
        return self.forks.start(
            FLEET + "pull", url=url, folder="app", mirror=str(into), index=f"{into}.db",
            offline=offline, rollout={"mode": self.mode, "keep_releases": 2, **hooks}, **how,
        )  # fmt: skip

    def ends(self, job: Job) -> Any:
        """Wait for one that is not killed."""
        outcome = job.wait()
        assert (outcome.killed, outcome.error) == (False, ""), (job.what, outcome)
        return outcome.value

    def next_scene(self) -> None:
        self.before = self.after
        next(self.scenes)(self.source, self.chance)
        self.after = self.as_mirrored(snapshot(self.source))

    # what must be true

    def as_mirrored(self, tree: Tree) -> Tree:
        """A release is read-only."""
        if self.mode == "mirror":
            return tree
        return {path: (entry[0], entry[1] and entry[1] & ~0o222, *entry[2:]) for path, entry in tree.items()}

    def found(self, mirror: Path | None = None) -> Tree:
        mirror = mirror or self.mirror
        if self.mode == "release":
            return snapshot(mirror / "current") if (mirror / "current").exists() else {}
        return {path: entry for path, entry in snapshot(mirror).items() if path != "stray"}

    def check_between(self) -> None:
        """Path by path it is as before or as after, and what both have is there; a release is one or the other."""
        found = self.found()
        if self.mode == "release":
            assert found in (self.before, self.after)
            return
        for path in found.keys() | self.before.keys() | self.after.keys():
            now, old, new = (tree.get(path) for tree in (found, self.before, self.after))
            if now is not None and now[0] != "dir":
                assert (now[0], now[3]) in [(entry[0], entry[3]) for entry in (old, new) if entry is not None], path
            elif now is None and old is not None and new is not None:
                assert "dir" in {old[0], new[0]}, f"{path} is missing"

    def check_whole(self) -> None:
        assert self.found() in (self.before, self.after)

    def check_after(self, mirror: Path | None = None) -> None:
        found = self.found(mirror)
        differ = {
            p: (found.get(p), self.after.get(p)) for p in found.keys() | self.after if found.get(p) != self.after.get(p)
        }
        assert differ == {}

    def check_clean(self) -> None:
        assert litter(self.mirror) == []
        assert self.stray.read_text() == "not of syncd"
        if self.mode == "release":
            releases = sorted(path.name for path in (self.mirror / "releases").iterdir())
            assert len(releases) <= 2, releases
            assert not any(name.startswith(".") for name in releases), releases
            assert {path.name for path in self.mirror.iterdir()} == {".syncd", "releases", "current", "stray"}
        if self.hooked:
            ran = (self.directory / "hooks").read_text().split()
            assert ran[-1] == str(self.number), "the hook after the newest generation did not run"

    def check_bucket(self) -> None:
        """Nothing is in the bucket that nothing needs; what was removed leaves with a delay."""
        self.ends(self.publish("collect"))
        deadline = time.monotonic() + 30
        while loose := self.forks.run(FLEET + "orphans", url=self.server.url, folder="app").value:
            assert time.monotonic() < deadline, loose
            time.sleep(0.1)

    # kills

    def died(self, job: Job, kill_after: float | None = None) -> bool:
        """Wait for one that is killed, at its point or after some seconds; tell whether it came to that."""
        if kill_after is not None:
            time.sleep(kill_after)
            outcome = job.kill()
        else:
            outcome = job.wait()
        assert outcome.killed or not outcome.error, (job.what, outcome)
        self.kills += outcome.killed
        return outcome.killed

    def synced(self) -> None:
        """Bring the mirror to the source."""
        started = time.monotonic()
        self.number = self.ends(self.publish("push"))["generation"]
        between = time.monotonic()
        self.ends(self.subscribe())
        self.seconds = {"push": between - started, "pull": time.monotonic() - between}
        self.check_after()
        self.check_clean()

    def kill_subscriber(self, crash: str, kill_after: float | None = None, *, goes_on: bool = False) -> bool:
        """Once in a round, again in the next start; then without network it is whole, and with it as it must be.

        :param goes_on: the source changes meanwhile: what was applied and not remembered is not wanted any more.
        """
        self.next_scene()
        self.ends(self.publish("push"))
        killed = self.died(self.subscribe(crash=crash), kill_after)
        self.check_between()
        if killed:
            self.died(self.subscribe(crash=crash.partition(":")[0]), kill_after and kill_after / 2)
            self.check_between()
        if killed and goes_on:
            self.next_scene()
        elif killed:
            assert self.subscribe(offline=True).wait().error == "Unavailable"
            self.check_whole()
        self.synced()
        return killed

    def kill_publisher(self, crash: str, kill_after: float | None = None, *, goes_on: bool = False) -> bool:
        """What it has sent is announced whole or not at all, in the generations layout; then it goes on."""
        self.next_scene()
        killed = self.died(self.publish("push", crash=crash), kill_after)
        self.ends(self.subscribe())
        self.check_between()
        if self.layout == "generations":
            self.check_whole()
        if killed and goes_on:
            (self.source / "while-dead").write_bytes(self.chance.randbytes(200_000))
            self.after = self.as_mirrored(snapshot(self.source))
        self.synced()
        return killed

    def kill_collector(self, crash: str, kill_after: float | None = None, *, goes_on: bool = False) -> bool:
        """Nothing goes that is needed: somebody new gets all of it."""
        waits = {"grace": 1000.0} if self.layout == "objects" else {}  # else a push frees what it replaces
        for _ in range(2):
            self.next_scene()
            self.number = self.ends(self.publish("push", **waits))["generation"]
        killed = self.died(self.publish("collect", crash=crash), kill_after)
        fresh = self.directory / "fresh"
        self.ends(self.subscribe(mirror=fresh))
        self.check_after(fresh)
        shutil.rmtree(fresh)
        Path(f"{fresh}.db").unlink()
        if goes_on:
            self.next_scene()
        self.synced()
        return killed

    def kill_everywhere(self, role: Role) -> None:
        """At every passage of every point, as far as two scenes get to it; the first ones in both situations."""
        kill = getattr(self, f"kill_{role}")
        for point in points(role, self.layout, self.mode):
            self.hooked = point.hooked
            survived = passages = 0
            while survived < SCENES and passages < MOST_PASSAGES:
                crash = f"{point.name}:{passages + 1}"
                if kill(crash, goes_on=bool(passages % 2)):
                    passages, survived = passages + 1, 0
                    if passages == 1:
                        kill(crash, goes_on=True)
                else:
                    survived += 1
            print(f"{self.layout} {self.mode} {point.name}: {passages}")
            assert passages, f"nobody gets to {point.name}"
        self.hooked = False

    def kill_at_random(self, roles: list[Role], wanted: int) -> None:
        """At any moment of what takes about as long as it took last time, until there are as many as wanted."""
        while self.kills < wanted:
            role = self.chance.choice(roles)
            seconds = self.seconds["pull" if role == "subscriber" else "push"]
            goes_on = self.chance.random() < 0.5
            getattr(self, f"kill_{role}")("", self.chance.uniform(0, seconds), goes_on=goes_on)


@pytest.mark.slow
@pytest.mark.fault("C1 C3 C4")
@pytest.mark.layout("any")
@pytest.mark.timeout(300 + 10 * SHARE)
@pytest.mark.parametrize(("who", "where", "mode"), RUNS)
def test_the_matrix_of_kills(
    who: str, where: Layout, mode: Mode, tmp_path: Path, nats_server: NatsServer, record_property: Any
) -> None:
    """Subscriber, publisher or collector is killed (SIGKILL) at each passage of each named point, then at random.

    Both layouts, both modes: nothing mixed, nothing lost, no litter, and the next start goes on.
    """
    print(f"SYNCD_TEST_SEED={SEED}")
    forks = Forks(tmp_path / "forks")
    try:
        bench = Bench(tmp_path, nats_server, forks, where, mode)
        grow(bench.source, bench.chance)
        bench.after = bench.as_mirrored(snapshot(bench.source))
        bench.synced()
        roles: list[Role] = ["subscriber"] if who == "subscriber" else ["publisher", "collector"]
        started = time.monotonic()
        for role in roles:
            bench.kill_everywhere(role)
        named = bench.kills
        bench.kill_at_random(roles, SHARE)
        seconds = time.monotonic() - started
        bench.check_bucket()
    finally:
        forks.close()
    print(f"{named} kills at named points, {bench.kills - named} at random, {seconds / bench.kills:.2f} s each")
    record_property("fault_runs", bench.kills)
    assert bench.kills >= SHARE


# -- daemons -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("C1")
@pytest.mark.parametrize("point", ["journal_durable", "done", "batch_applied"])
async def test_what_was_applied_and_not_remembered_is_still_known_as_ours(
    point: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """A subscriber is killed (SIGKILL) with new paths applied and not yet in its index, and these are deleted upstream.

    Its next start removes them from the mirror, and not a file that somebody else put there.
    """
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


@pytest.mark.fault("C4")
async def test_a_publisher_killed_in_its_first_round_begins_where_it_was(
    layout: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """A publisher of 1,200 files is killed (SIGKILL) at a metadata write or before its commit, in each of three starts.

    The fourth completes it, and the trees are equal.
    """
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
@pytest.mark.timeout(240 + DAEMON_KILLS * 20)
async def test_killed_at_random_moments_while_the_tree_changes(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """Publisher, subscriber and server are killed (SIGKILL) at random moments, each alone, then all at once.

    The tree changes all the time; after each series all is equal, and nothing is left over.
    """
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
            await kill_at_random(victims, max(1, DAEMON_KILLS // 2), chance)
        await healed(nats_server, source, mirror)
        pulled = publisher.run("pull", "app", str(fresh))
        assert pulled.returncode == 0, pulled.stderr
        assert difference(source, fresh) == {}


@pytest.mark.fault("U5")
async def test_sigterm_at_random_moments_ends_within_five_seconds(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer
) -> None:
    """A daemon gets SIGTERM ten times, within a second of its start: in a first sync, in mid-upload of 20 MB files.

    Each time it ends within five seconds with exit code 0; what was interrupted is taken up again.
    """
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
