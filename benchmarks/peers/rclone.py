"""rclone: ``rclone serve sftp`` at the source, ``rclone sync`` at the destination."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers.base import FIRST, Peer, Session
from benchmarks.peers.waiting import wait_for_port
from benchmarks.processes import run, service
from tests.support.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import World

USER = PASSWORD = "benchmark"


@dataclass
class RcloneSession(Session):
    target: Path
    port: int
    server: int
    directory: Path

    def sync(self) -> Legs:
        obscured = subprocess.run(
            ["rclone", "obscure", PASSWORD], capture_output=True, text=True, check=True
        ).stdout.strip()
        command = [
            "env", f"HOME={self.directory}", "rclone", "sync", ":sftp:", self.target, "--create-empty-src-dirs",
            "--sftp-host", "127.0.0.1", "--sftp-port", str(self.port),
            "--sftp-user", USER, "--sftp-pass", obscured, "--exclude", "/.stfolder/**",
        ]  # fmt: skip
        return {"pull": run([command], self.directory / "client.log", {"server": [self.server]})}


class Rclone(Peer):
    name = "rclone"
    label = "rclone, sftp"
    programs = ("rclone",)
    cases = FIRST
    slow = True

    @contextlib.contextmanager
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> Iterator[Session]:
        directory, port = world.new("rclone"), free_port()
        directory.mkdir()
        (target,) = targets
        command = [
            "rclone", "serve", "sftp", source, "--addr", f"127.0.0.1:{port}", "--user", USER, "--pass", PASSWORD,
            "--dir-cache-time", "0s",
        ]  # fmt: skip
        with service(command, directory / "server.log", HOME=str(directory)) as server:
            wait_for_port(port)
            yield RcloneSession(target, port, server.pid, directory)
