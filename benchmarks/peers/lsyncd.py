"""lsyncd: watches the source, and starts an rsync to the destination's daemon for what changed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers.base import LATENCY, Peer, Session
from benchmarks.peers.rsync import rsync_daemon
from benchmarks.peers.waiting import stamps, wait_for_stamps
from benchmarks.processes import measured, service

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import World

CONFIG = """\
sync {{
  default.rsync, source = "{source}", target = "rsync://127.0.0.1:{port}/tree/", delay = 0,
  rsync = {{ archive = true }},
}}
"""


@dataclass
class LsyncdSession(Session):
    """It works by itself; there is only waiting."""

    source: Path
    target: Path
    process: int

    def sync(self) -> Legs:
        with measured({"command": [self.process]}) as leg:
            wait_for_stamps(self.target, stamps(self.source))
        return {"sync": leg}


class Lsyncd(Peer):
    name = "lsyncd"
    label = "lsyncd, no delay"
    programs = ("lsyncd", "rsync")
    cases = LATENCY

    @contextlib.contextmanager
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> Iterator[Session]:
        directory = world.new("lsyncd")
        directory.mkdir()
        (target,) = targets
        target.mkdir()
        with rsync_daemon(directory / "rsync", target, read_only=False) as (port, _):
            config = directory / "lsyncd.lua"
            config.write_text(CONFIG.format(source=source, port=port))
            with service(["lsyncd", "-nodaemon", config], directory / "lsyncd.log") as process:
                yield LsyncdSession(source, target, process.pid)
