"""A directory of this run's own, fresh servers and daemons in it, and the machine that they run on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.processes import cpu_seconds, peak_bytes
from benchmarks.trees import count_paths, free_space
from tests.support.daemon import Daemon
from tests.support.server import NatsServer, free_port, nats_server_binary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOLDER = "app"
REPOSITORY = Path(__file__).resolve().parents[1]
START_SECONDS = 900.0


class World:
    """All that is started in it ends with it.

    :ivar layout: the bucket layout of syncd's folder.
    """

    def __init__(self, directory: Path, layout: str) -> None:
        self.directory = directory
        self.layout = layout
        self._number = 0
        self._in_memory = filesystem(directory) == "tmpfs"

    def new(self, name: str) -> Path:
        """A path that does not exist yet."""
        self._number += 1
        return self.directory / f"{self._number:04}-{name}"

    def drop(self, path: Path) -> None:
        """Give its space back."""
        if self._in_memory:
            shutil.rmtree(path, ignore_errors=True)
        else:
            free_space(path)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A path that is dropped afterwards."""
        path = self.new(name)
        try:
            yield path
        finally:
            self.drop(path)

    @contextlib.contextmanager
    def server(self) -> Iterator[Server]:
        """A fresh nats-server; its store goes with it."""
        server = Server(self.new("server"))
        try:
            server.start()
            yield server
        finally:
            server.stop()
            self.drop(server.directory)

    @contextlib.contextmanager
    def daemons(self, server: Server, source: Path, mirrors: Sequence[Path]) -> Iterator[Fleet]:
        """One publisher and its subscribers, each a process, with default settings; not started yet."""
        directory = self.new("daemons")
        fleet = Fleet(
            Daemon(directory / "p", nats_table(server) + publish_table(source, self.layout)),
            [
                Daemon(directory / f"s{number}", nats_table(server) + subscribe_table(mirror))
                for number, mirror in enumerate(mirrors)
            ],
            source,
        )
        try:
            yield fleet
        finally:
            for daemon in fleet.all:
                daemon.kill()
            self.drop(directory)


# -- syncd's configuration ---------------------------------------------------------------------------------------------


def nats_table(server: Server) -> str:
    return f'[nats]\nservers = ["{server.url}"]\n'


def publish_table(source: Path, layout: str) -> str:
    return f'[[publish]]\nfolder = "{FOLDER}"\npath = "{source}"\nlayout = "{layout}"\n'


def subscribe_table(mirror: Path) -> str:
    return f'[[subscribe]]\nfolder = "{FOLDER}"\npath = "{mirror}"\n'


def write_config(state: Path, text: str) -> Path:
    """A configuration file with a state directory of its own."""
    state.mkdir(parents=True, exist_ok=True)
    file = state / "syncd.toml"
    file.write_text(f'[daemon]\nstate_dir = "{state / "state"}"\n{text}')
    return file


# -- processes that stay -----------------------------------------------------------------------------------------------


class Server(NatsServer):
    """A nats-server that tells what its clients sent and got."""

    def __init__(self, directory: Path) -> None:
        self.monitor = free_port()
        super().__init__(directory, f'http: "127.0.0.1:{self.monitor}"')

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def peak(self) -> int:
        """The most memory it ever had resident, in bytes."""
        return peak_bytes(self.pid)

    def client_bytes(self) -> dict[int, int]:
        """Local port of a connected client -> bytes of its messages, both directions."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor}/connz?limit=1024") as answer:
            rows = json.load(answer)["connections"]
        return {row["port"]: row["in_bytes"] + row["out_bytes"] for row in rows}


@dataclass
class Fleet:
    """A publisher daemon and its subscriber daemons."""

    publisher: Daemon
    subscribers: list[Daemon]
    source: Path

    @property
    def all(self) -> list[Daemon]:
        return [self.publisher, *self.subscribers]

    def start(self) -> float:
        """Start all; returns the seconds until the last one is in sync, by its own status."""
        begin = time.time()
        for daemon in self.all:
            daemon.start()
        return self.wait(begin) - begin

    def wait(self, after: float) -> float:
        """Wait until all came to be in sync with all entries; returns when the last one did (wall clock)."""
        entries = count_paths(self.source)
        deadline = time.monotonic() + START_SECONDS
        while True:
            states = [status for daemon in self.all for status in _statuses(daemon)]
            if len(states) == len(self.all) and all(_settled(status, entries, after) for status in states):
                return max(status["since"] for status in states)
            for daemon in self.all:
                ended = daemon.process is None or daemon.process.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise SystemExit(f"not in sync with {entries} ({states}): {daemon.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def publisher_cpu(self) -> float:
        return cpu_seconds(_pid(self.publisher))

    def publisher_bytes(self, server: Server) -> int:
        """Bytes of the publisher's messages so far, both directions, as the server counted them."""
        ports = _local_ports(_pid(self.publisher))
        return sum(amount for port, amount in server.client_bytes().items() if port in ports)

    def peaks(self) -> tuple[int, int]:
        """Peak memory of the publisher, and of the largest subscriber."""
        return peak_bytes(_pid(self.publisher)), max(peak_bytes(_pid(daemon)) for daemon in self.subscribers)

    def stop(self) -> None:
        """SIGTERM, and wait."""
        for daemon in self.all:
            daemon.stop()


def _statuses(daemon: Daemon) -> list[dict[str, Any]]:
    with contextlib.suppress(ValueError):  # it is just being written
        return list(daemon.status().values())
    return []


def _settled(status: dict[str, Any], entries: int, after: float) -> bool:
    return bool(status["state"] == "in_sync" and status["entries"] == entries and status["since"] > after)


def _pid(daemon: Daemon) -> int:
    assert daemon.process is not None
    return daemon.process.pid


def _local_ports(pid: int) -> set[int]:
    """The local TCP ports of a process."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(descriptor.readlink()))
    ports = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if f"socket:[{fields[9]}]" in sockets:
            ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(directory: Path) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "kernel": platform.release(),
        "filesystem": filesystem(directory),
        "python": platform.python_version(),
        "nats_server": _output(nats_server_binary(), "--version").split()[-1].lstrip("v"),
        "nats_py": version("nats-py"),
        "load": round(os.getloadavg()[0], 2),
    }


def filesystem(directory: Path) -> str:
    """The type of the filesystem that a directory is on."""
    return (_output("findmnt", "-n", "-o", "FSTYPE", "-T", str(directory)) or "unknown").split()[-1]


def _output(*command: str) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ""


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
