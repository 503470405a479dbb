"""Unison, its server at the source (``-socket``), its client at the destination."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers.base import DELTA, FIRST, PACKAGES, Peer, Session
from benchmarks.peers.waiting import wait_for_port
from benchmarks.processes import run, service
from tests.support.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import World

OPTIONS = ("-ui", "text", "-batch", "-silent", "-times", "-confirmbigdel=false", "-ignore", "Name .stfolder")


@dataclass
class UnisonSession(Session):
    source: Path
    target: Path
    port: int
    server: int
    directory: Path

    def sync(self) -> Legs:
        remote = f"socket://127.0.0.1:{self.port}/{self.source}"
        home = f"UNISON={self.directory / 'client'}"
        command = ["env", home, "unison", self.target, remote, *OPTIONS, "-force", remote]
        return {"pull": run([command], self.directory / "client.log", {"server": [self.server]})}


class Unison(Peer):
    name = "unison"
    label = "Unison, socket"
    programs = ("unison",)
    cases = FIRST | PACKAGES | DELTA
    slow = True

    @contextlib.contextmanager
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> Iterator[Session]:
        directory, port = world.new("unison"), free_port()
        (target,) = targets
        target.mkdir()
        for side in ("client", "server"):
            (directory / side).mkdir(parents=True)
        command = ["unison", "-socket", str(port)]
        with service(command, directory / "server.log", UNISON=str(directory / "server")) as server:
            wait_for_port(port)
            yield UnisonSession(source, target, port, server.pid, directory)
