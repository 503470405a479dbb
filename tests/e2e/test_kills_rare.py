"""SIGKILL in what is done once in a while: a bucket that changes its layout, a channel that a person moves.

After the kill the same command is given again, as a person does, and then everything is as if nothing had happened. The
matrix (test_kills.py) has the points that daemons pass all day.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd.channels import Channels
from syncd.errors import EXIT_USAGE
from syncd.store.bucket import NatsStore
from tests.support.fleet import FLEET
from tests.support.forks import Forks, Job, Outcome
from tests.support.killpoints import Layout, Role, points
from tests.support.mirror import litter
from tests.support.store import connected
from tests.support.trees import snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.server import NatsServer

PASSAGES = (1, 3)
"""Of one point that are killed at, of perhaps hundreds that are alike."""


class Bench:
    """One bucket, its publisher, and mirrors that begin anew."""

    def __init__(self, directory: Path, server: NatsServer, forks: Forks) -> None:
        self.directory, self.server, self.forks = directory, server, forks
        self.source = directory / "source"
        (self.source / "d").mkdir(parents=True)
        self.rounds = itertools.count(1)
        self.change()
        (directory / "syncd.toml").write_text(f'[nats]\nservers = ["{server.url}"]\n')

    def change(self) -> None:
        for number in range(4):
            (self.source / f"d/f{number}").write_bytes(os.urandom(2000))
        (self.source / "large").write_bytes(os.urandom(600_000))
        (self.source / f"new{next(self.rounds)}").write_text("new")

    def publish(self, task: str, layout: Layout, *, crash: str = "", **how: Any) -> Job:
        return self.forks.start(
            FLEET + task, crash=crash, url=self.server.url, folder="app", source=str(self.source),
            index=str(self.directory / "publisher.db"), layout=layout, keep=2, **how,
        )  # fmt: skip

    def ends(self, job: Job) -> Any:
        outcome = job.wait()
        assert (outcome.killed, outcome.error) == (False, ""), (job.what, outcome)
        return outcome.value

    def command(self, *arguments: str, crash: str = "") -> Outcome:
        config = ["--config", str(self.directory / "syncd.toml")]
        return self.forks.run(FLEET + "command", crash=crash, arguments=[*arguments, *config])

    def head(self, channel: str) -> int:
        return int(self.forks.run(FLEET + "channel", url=self.server.url, folder="app", name=channel).value[0])

    def check_new_host(self) -> None:
        """Somebody who begins now gets all of it."""
        mirror = self.directory / "fresh"
        job = self.forks.start(
            FLEET + "pull", url=self.server.url, folder="app", mirror=str(mirror), index=f"{mirror}.db"
        )
        assert self.ends(job)["problems"] == {}
        assert snapshot(mirror) == snapshot(self.source)
        shutil.rmtree(mirror)
        Path(f"{mirror}.db").unlink()

    def check_bucket(self, layout: Layout) -> None:
        """Nothing is in it that nothing needs; what was removed leaves with a delay."""
        self.ends(self.publish("collect", layout))
        deadline = time.monotonic() + 20
        while loose := self.forks.run(FLEET + "orphans", url=self.server.url, folder="app").value:
            assert time.monotonic() < deadline, loose
            time.sleep(0.2)


@pytest.fixture
def bench(tmp_path: Path, nats_server: NatsServer) -> Iterator[Bench]:
    forks = Forks(tmp_path / "forks")
    yield Bench(tmp_path, nats_server, forks)
    forks.close()


async def count_of(url: str, channel: str) -> int:
    """How often a channel was moved, as its last move says."""
    async with connected(url) as connection:
        shown = await Channels(NatsStore(connection).bucket("app"), time.time).show()
    return next(state.count for state in shown if state.name == channel)


LAYOUTS: tuple[Layout, Layout] = ("generations", "objects")
CONVERTER: Role = "converter"
STRANGERS_PASS = [
    point
    for point in points("subscriber", "generations", "mirror")
    if point.name in {"journal_durable", "after_each_step", "before_journal_removed", "done"}
]
"""What removes them is a commit of the mirror, like others."""


@pytest.mark.layout("any")
@pytest.mark.fault("C4 O4")
@pytest.mark.parametrize("to", LAYOUTS)
def test_a_bucket_changes_its_layout_although_its_publisher_is_killed(
    to: Layout, bench: Bench, record_property: Any
) -> None:
    """A push that changes the bucket's layout is killed (SIGKILL) at each of its points, first and third passage.

    The same command again ends it, a new host gets all, and nothing of the other layout is left.
    """
    other = LAYOUTS[to == "generations"]
    kills = 0
    bench.ends(bench.publish("push", other))
    for point, passage in itertools.product(points(CONVERTER, to), PASSAGES):
        bench.change()
        killed = bench.publish("push", to, crash=f"{point.name}:{passage}", change_layout=True).wait().killed
        assert killed or passage > 1, f"nobody gets to {point.name}"
        if killed:
            kills += 1
            bench.ends(bench.publish("push", to, change_layout=True))
            bench.check_new_host()
        bench.ends(bench.publish("push", other, change_layout=True))
    bench.ends(bench.publish("push", to, change_layout=True))
    bench.check_new_host()
    bench.check_bucket(to)
    record_property("fault_runs", kills)


@pytest.mark.layout("any")
def test_a_layout_that_is_changed_back_at_once_loses_nothing(bench: Bench) -> None:
    """Three pushes in a row give one bucket the layouts generations, objects and generations.

    What was removed a moment ago, and is refused as a duplicate by the server, is sent again: a new host gets all.
    """
    for to in (*LAYOUTS, "generations"):
        bench.ends(bench.publish("push", to, change_layout=True))
        bench.check_new_host()


@pytest.mark.layout("generations")
@pytest.mark.fault("C4")
@pytest.mark.parametrize(("command", "to"), [("promote", 1), ("rollback", 1)])
def test_who_moves_a_channel_and_is_killed_has_moved_it_or_not(command: str, to: int, bench: Bench) -> None:
    """`syncd promote` or `syncd rollback` is killed (SIGKILL) at the point in it where the channel is moved.

    It is moved, once: promoting again moves it anew, rolling back again is refused as there already; the count goes on.
    """
    count = 1

    def moves() -> int:
        return asyncio.run(count_of(bench.server.url, "stable"))

    bench.ends(bench.publish("push", "generations"))
    bench.change()
    bench.ends(bench.publish("push", "generations"))
    assert bench.command("promote", "app", "2", "--channel", "stable").value == 0
    arguments = [command, "app", *([str(to)] if command == "promote" else ["--to", str(to)]), "--channel", "stable"]
    for point in points("mover", "generations"):
        assert moves() == count
        assert bench.command(*arguments, crash=point.name).killed, f"nobody gets to {point.name}"
        assert (bench.head("stable"), moves()) == (to, count + 1)
        again = bench.command(*arguments).value
        count += 2 if command == "promote" else 1
        assert (again, bench.head("stable"), moves()) == (0 if command == "promote" else EXIT_USAGE, to, count)
        assert bench.command("promote", "app", "2", "--channel", "stable").value == 0
        count += 1
        assert (bench.head("stable"), moves()) == (2, count)
    bench.check_new_host()


@pytest.mark.layout("generations")
@pytest.mark.fault("C1")
def test_strangers_go_although_the_host_is_killed(bench: Bench, record_property: Any) -> None:
    """Under `extraneous = "delete"` a pull that removes three strangers is killed (SIGKILL) at each of its points.

    The next start has removed them all, and nothing else.
    """
    mirror = bench.directory / "mirror"

    def pull(crash: str = "") -> Outcome:
        return bench.forks.run(
            FLEET + "pull", crash=crash, url=bench.server.url, folder="app", mirror=str(mirror),
            index=f"{mirror}.db", extraneous="delete",
        )  # fmt: skip

    bench.ends(bench.publish("push", "generations"))
    assert pull().error == ""
    kills = 0
    for point, passage in itertools.product([*points("cleaner", "generations"), *STRANGERS_PASS], PASSAGES):
        (mirror / "d/stranger").mkdir()
        (mirror / "d/stranger/file").write_text("theirs")
        (mirror / "stranger").write_text("theirs")
        killed = pull(f"{point.name}:{passage}").killed
        assert killed or passage > 1, f"nobody gets to {point.name}"
        kills += killed
        assert pull().error == ""
        assert snapshot(mirror) == snapshot(bench.source)
        assert litter(mirror) == []
    record_property("fault_runs", kills)
