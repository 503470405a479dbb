"""The daemon as its user meets it: processes, signals, files."""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.daemon import Daemon
from tests.support.server import free_port
from tests.support.trees import equal_trees, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.server import NatsServer


@pytest.fixture
def daemons() -> Iterator[list[Daemon]]:
    running: list[Daemon] = []
    yield running
    for daemon in running:
        daemon.kill()


def publish(source: Path, folder: str = "app", extra: str = "") -> str:
    return f'[[publish]]\nfolder = "{folder}"\npath = "{source}"\n{extra}\n'


def subscribe(mirror: Path, folder: str = "app", extra: str = "") -> str:
    return f'[[subscribe]]\nfolder = "{folder}"\npath = "{mirror}"\n{extra}\n'


def nats(server: NatsServer) -> str:
    return f'[nats]\nservers = ["{server.url}"]\n'


async def test_one_process_publishes_and_mirrors_on_its_own_server(tmp_path: Path, daemons: list[Daemon]) -> None:
    """The README's demo: a file edited in the source is in the mirror a moment later; SIGTERM ends it with 0."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    source.mkdir()
    (source / "hello.txt").write_text("hello")
    address = f"127.0.0.1:{free_port()}"
    config = f'[nats]\nservers = ["nats://{address}"]\n[nats.embedded]\nlisten = "{address}"\n'
    daemon = Daemon(tmp_path / "d", config + publish(source) + subscribe(mirror))
    daemons.append(daemon.start())
    await equal_trees(source, mirror)
    (source / "hello.txt").write_text("changed")
    (source / "new").mkdir()
    (source / "new/file").write_text("n")
    await equal_trees(source, mirror)
    started = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - started < 5


async def test_two_hosts_stay_equal_through_restarts_of_everything(
    tmp_path: Path, daemons: list[Daemon], nats_server: NatsServer
) -> None:
    """Publisher, subscriber and server are each stopped and started in between; trees are equal each time."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/c").write_text("1")
    publisher = Daemon(tmp_path / "p", nats(nats_server) + publish(source, extra="max_delete_percent = 100"))
    subscriber = Daemon(tmp_path / "s", nats(nats_server) + subscribe(mirror))
    daemons += [publisher.start(), subscriber.start()]
    await equal_trees(source, mirror)

    subscriber.stop()
    (source / "while-away").write_bytes(os.urandom(300_000))
    (source / "a/b/c").unlink()
    publisher.wait_event("published", count=2)
    subscriber.start()
    await equal_trees(source, mirror)

    publisher.stop()
    shutil.rmtree(source / "a")
    (source / "later").symlink_to("while-away")
    publisher.start()
    await equal_trees(source, mirror)

    await nats_server.astop(kill=True)
    (source / "offline").write_text("written while the server was away")
    await nats_server.astart()
    await equal_trees(source, mirror)


@pytest.mark.fault("U2")
async def test_a_reload_takes_a_new_folder_and_keeps_the_old_one_when_the_file_is_broken(
    tmp_path: Path, daemons: list[Daemon], nats_server: NatsServer
) -> None:
    """SIGHUP with a broken file changes nothing and says so (U2); with a good one it starts what is new."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    (one / "f").write_text("1")
    (two / "f").write_text("2")
    daemon = Daemon(tmp_path / "d", nats(nats_server) + publish(one, "one") + subscribe(tmp_path / "m1", "one"))
    daemons.append(daemon.start())
    await equal_trees(one, tmp_path / "m1")
    daemon.config.write_text("[nats\n")
    daemon.signal(signal.SIGHUP)
    daemon.wait_event("config_refused")
    (one / "still").write_text("works")
    await equal_trees(one, tmp_path / "m1")
    daemon.write_config(
        nats(nats_server) + publish(one, "one") + publish(two, "two") + subscribe(tmp_path / "m2", "two")
    )
    daemon.signal(signal.SIGHUP)
    daemon.wait_event("config_reloaded")
    await equal_trees(two, tmp_path / "m2")
    await eventually(lambda: set(daemon.status()) == {"publish-one", "publish-two", "subscribe-two"})
    assert daemon.stop() == 0


async def test_one_folders_failure_does_not_stop_the_others(
    tmp_path: Path, daemons: list[Daemon], nats_server: NatsServer
) -> None:
    """A mirror that cannot be made and a source that is missing leave the third folder working."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_text("1")
    (tmp_path / "blocked").write_text("a file, not a directory")
    daemon = Daemon(
        tmp_path / "d",
        nats(nats_server)
        + publish(source)
        + publish(tmp_path / "missing", "gone")
        + subscribe(tmp_path / "mirror")
        + subscribe(tmp_path / "blocked/mirror", "app"),
    )
    daemons.append(daemon.start())
    await equal_trees(source, tmp_path / "mirror")
    await eventually(lambda: daemon.status().get("publish-gone", {}).get("state") == "waiting")
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing/late").write_text("late")
    await eventually(lambda: daemon.status()["publish-gone"]["state"] == "in_sync")
    assert daemon.stop() == 0


async def test_a_second_signal_exits_at_once(tmp_path: Path, daemons: list[Daemon], nats_server: NatsServer) -> None:
    """Two SIGTERMs in a row end the process without a drain."""
    daemon = Daemon(tmp_path / "d", nats(nats_server) + subscribe(tmp_path / "m"))
    daemons.append(daemon.start())
    daemon.wait_event("daemon_started")
    daemon.signal(signal.SIGTERM)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(5) in {0, 128 + signal.SIGTERM}


async def test_two_daemons_on_one_state_directory(
    tmp_path: Path, daemons: list[Daemon], nats_server: NatsServer
) -> None:
    """The second one ends with exit code 75 and names the first one's process."""
    daemon = Daemon(tmp_path / "d", nats(nats_server) + subscribe(tmp_path / "m"))
    daemons.append(daemon.start())
    daemon.wait_event("daemon_started")
    second = daemon.run("run")
    assert second.returncode == 75
    assert str(daemon.process.pid) in second.stderr  # type: ignore[union-attr]
    assert "Traceback" not in second.stderr


async def test_two_daemons_on_one_mirror(tmp_path: Path, daemons: list[Daemon], nats_server: NatsServer) -> None:
    """The second mirror reports who holds it; the first goes on."""
    first = Daemon(tmp_path / "one", nats(nats_server) + subscribe(tmp_path / "m"))
    second = Daemon(tmp_path / "two", nats(nats_server) + subscribe(tmp_path / "m"))
    daemons.append(first.start())
    await eventually((tmp_path / "m/.syncd/lock").exists)
    daemons.append(second.start())
    failed = second.wait_event("folder_failed")
    assert str(first.process.pid) in failed["error"]  # type: ignore[union-attr]


async def test_a_safety_halt_waits_for_a_person(tmp_path: Path, daemons: list[Daemon], nats_server: NatsServer) -> None:
    """Emptying a source halts, status says what to do, and `syncd allow` lets it pass, mirrors included."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    (source / "d").mkdir(parents=True)
    for number in range(4):
        (source / "d" / f"f{number}").write_text("x")
    daemon = Daemon(tmp_path / "d", nats(nats_server) + publish(source) + subscribe(mirror))
    daemons.append(daemon.start())
    await equal_trees(source, mirror)
    (source / "d").rename(tmp_path / "gone")  # all at once: one by one, the first might go alone on a busy machine
    await eventually(lambda: daemon.status()["publish-app"]["state"] == "halted")
    assert len(list((mirror / "d").iterdir())) == 4
    assert "syncd allow app" in daemon.run("status").stdout
    allowed = daemon.run("allow", "app")
    assert (allowed.returncode, allowed.stdout) == (0, "app (publish): allowed\n")
    await equal_trees(source, mirror)
    assert daemon.run("allow", "app").returncode == 64
