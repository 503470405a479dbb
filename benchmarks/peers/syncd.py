"""syncd itself, as a user drives it: ``syncd push`` on the one side, ``syncd pull`` on every other."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers.base import ALL, Peer, Session
from benchmarks.processes import run
from benchmarks.world import FOLDER, nats_table, publish_table, write_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import Server, World

COMMAND = (sys.executable, "-m", "syncd")


@dataclass
class SyncdSession(Session):
    """A server that stays; every push and pull is a fresh process."""

    server: Server
    directory: Path
    publisher: Path
    subscribers: list[tuple[Path, Path]]

    def sync(self) -> Legs:
        services = {"server": [self.server.pid]}
        push = [*COMMAND, "push", FOLDER, "--config", self.publisher]
        pulls = [[*COMMAND, "pull", FOLDER, target, "--config", config] for target, config in self.subscribers]
        return {
            "push": run([push], self.directory / "push.log", services),
            "pull": run(pulls, self.directory / "pull.log", services),
        }


class Syncd(Peer):
    name = "syncd"
    label = "syncd push, pull"
    cases = ALL

    @contextlib.contextmanager
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> Iterator[Session]:
        directory = world.new("syncd")
        with world.server() as server:
            nats = nats_table(server)
            publisher = write_config(directory / "p", nats + publish_table(source, world.layout))
            subscribers = [
                (target, write_config(directory / f"s{number}", nats)) for number, target in enumerate(targets)
            ]
            yield SyncdSession(server, directory, publisher, subscribers)
