"""rsync from its own daemon: the destination asks, as with syncd."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from benchmarks.peers.base import ALL, DELTA, PACKAGES, Peer, Session
from benchmarks.peers.waiting import wait_for_port
from benchmarks.processes import run, service
from tests.support.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import World

CONFIG = """\
use chroot = no
address = 127.0.0.1
{identity}
[tree]
path = {path}
read only = {read_only}
exclude = /.stfolder/
"""


@contextlib.contextmanager
def rsync_daemon(directory: Path, path: Path, *, read_only: bool) -> Iterator[tuple[int, int]]:
    """Serve one directory as the module "tree"; yields the port and the process."""
    directory.mkdir()
    port, config = free_port(), directory / "rsyncd.conf"
    identity = "uid = root\ngid = root" if os.geteuid() == 0 else ""
    config.write_text(CONFIG.format(identity=identity, path=path, read_only="yes" if read_only else "no"))
    command = ["rsync", "--daemon", "--no-detach", f"--config={config}", f"--port={port}"]
    with service(command, directory / "daemon.log") as daemon:
        wait_for_port(port)
        yield port, daemon.pid


@dataclass
class RsyncSession(Session):
    options: tuple[str, ...]
    port: int
    daemon: int
    targets: Sequence[Path]
    log: Path

    def sync(self) -> Legs:
        url = f"rsync://127.0.0.1:{self.port}/tree/"
        commands = [["rsync", *self.options, "--delete", url, f"{target}/"] for target in self.targets]
        return {"pull": run(commands, self.log, {"server": [self.daemon]})}


class Rsync(Peer):
    name = "rsync"
    label = "rsync daemon, -a"
    programs = ("rsync",)
    cases = ALL
    options: ClassVar[tuple[str, ...]] = ("-a",)

    @contextlib.contextmanager
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> Iterator[Session]:
        directory = world.new("rsync")
        with rsync_daemon(directory, source, read_only=True) as (port, daemon):
            yield RsyncSession(self.options, port, daemon, targets, directory / "rsync.log")


class RsyncCompressed(Rsync):
    name = "rsync-z"
    label = "rsync daemon, -az"
    cases = PACKAGES
    options = ("-az",)


class RsyncWhole(Rsync):
    name = "rsync-whole"
    label = "rsync daemon, -a --whole-file"
    cases = DELTA
    options = ("-a", "--whole-file")
