"""The plain nats-py put loop and get loop (:mod:`benchmarks.natsloop`)."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers.base import FIRST, Peer, Session
from benchmarks.processes import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import Server, World

COMMAND = (sys.executable, "-m", "benchmarks.natsloop")


@dataclass
class NatsPySession(Session):
    server: Server
    source: Path
    targets: Sequence[Path]
    directory: Path

    def sync(self) -> Legs:
        services = {"server": [self.server.pid]}
        put = [*COMMAND, "put", self.server.url, self.source]
        gets = [[*COMMAND, "get", self.server.url, target] for target in self.targets]
        return {
            "push": run([put], self.directory / "put.log", services),
            "pull": run(gets, self.directory / "get.log", services),
        }


class NatsPy(Peer):
    name = "nats-py"
    label = "nats-py put, get loop"
    cases = FIRST
    slow = True

    @contextlib.contextmanager
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> Iterator[Session]:
        directory = world.new("nats-py")
        directory.mkdir()
        for target in targets:
            target.mkdir()
        with world.server() as server:
            yield NatsPySession(server, source, targets, directory)
