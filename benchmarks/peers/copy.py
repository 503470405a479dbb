"""``cp -a``: no network, no check; what the machine's memory and filesystem allow."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers.base import FIRST, Peer, Session
from benchmarks.processes import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import World


@dataclass
class CopySession(Session):
    source: Path
    targets: Sequence[Path]
    log: Path

    def sync(self) -> Legs:
        return {"copy": run([["cp", "-a", self.source, target] for target in self.targets], self.log)}


class Copy(Peer):
    name = "cp"
    label = "cp -a (the limit)"
    programs = ("cp",)
    cases = FIRST

    @contextlib.contextmanager
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> Iterator[Session]:
        yield CopySession(source, targets, world.new("cp.log"))
