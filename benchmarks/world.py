"""What the figures are taken in: trees, a fresh server per run, processes, and what the kernel says of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from tests.support.daemon import Daemon
from tests.support.server import NatsServer, nats_server_binary

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "app"
MIB = 1024 * 1024
SEED = 20_26
OLD_NS = 1_700_000_000_000_000_000
"""Modification time of what is made here: long before the run, as most files are."""
REPOSITORY = Path(__file__).resolve().parents[1]


# -- trees -------------------------------------------------------------------------------------------------------------


def make_large(root: Path, size: int) -> Path:
    """One incompressible file."""
    root.mkdir(parents=True)
    rng = random.Random(SEED)
    with (root / "large.bin").open("wb") as file:
        for start in range(0, size, 4 * MIB):
            file.write(rng.randbytes(min(4 * MIB, size - start)))
    _age(root)
    return root


def make_small(root: Path, count: int) -> Path:
    """``count`` incompressible files of 100 B to 32 KiB, mean 8.6 KiB, a hundred to a directory."""
    rng = random.Random(SEED)
    for number in range(count):
        directory = root / f"d{number // 100:04}"
        if number % 100 == 0:
            directory.mkdir(parents=True)
        size = min(32 * 1024, max(100, int(rng.expovariate(1 / 9080))))
        (directory / f"file-{number:06}.dat").write_bytes(rng.randbytes(size))
    _age(root)
    return root


def _age(root: Path) -> None:
    for number, (top, _, files) in enumerate(os.walk(root, topdown=False)):
        for name in files:
            os.utime(Path(top) / name, ns=(OLD_NS, OLD_NS + number))
        os.utime(top, ns=(OLD_NS, OLD_NS + number))


def list_files(root: Path) -> list[str]:
    """All files, relative, sorted."""
    found = []
    for top, dirs, files in os.walk(root):
        if Path(top) == root and ".syncd" in dirs:
            dirs.remove(".syncd")
        found += [os.path.relpath(f"{top}/{name}", root) for name in files]
    return sorted(found)


def digests(root: Path) -> dict[str, str]:
    """Relative path -> BLAKE3 of all files."""
    found = {}
    for name in list_files(root):
        with (root / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, blake3).hexdigest()  # type: ignore[arg-type]
    return found


def free_space(root: Path) -> None:
    """Remove the large files of a tree, not its many small ones.

    ext4 without a journal makes new files twenty times slower for minutes after many were removed nearby: what the
    benchmark itself throws away must not slow down what it measures next. All of it goes in the end.
    """
    for top, _, files in os.walk(root):
        for name in files:
            file = Path(top) / name
            if file.lstat().st_size >= MIB:
                file.unlink()


def count_paths(root: Path) -> int:
    """Files and directories, as a status counts its entries."""
    return sum(len(dirs) + len(files) for _, dirs, files in os.walk(root))


def must_equal(source: Path, target: Path) -> None:
    """End the run where a destination is not its source."""
    want, have = digests(source), digests(target)
    if want != have:
        wrong = [name for name in want.keys() | have.keys() if want.get(name) != have.get(name)]
        raise SystemExit(f"{target} differs from {source} in {len(wrong)} files: {sorted(wrong)[:5]}")


# -- processes ---------------------------------------------------------------------------------------------------------


def peak_bytes(pid: int | str) -> int:
    """The most memory a process ever had resident (VmHWM; unlike ``ru_maxrss`` it starts anew with exec)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM for process {pid}")


@dataclass(frozen=True)
class Run:
    """One process: seconds inside (connection to end), of the whole command, of CPU; peak memory in bytes."""

    seconds: float
    wall: float
    cpu: float
    peak: int


class World:
    """A directory of this run's own; all processes started in it end with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._number = 0

    def new(self, name: str) -> Path:
        """A path that does not exist yet."""
        self._number += 1
        return self.directory / f"{self._number:03}-{name}"

    @contextlib.contextmanager
    def server(self) -> Iterator[NatsServer]:
        """A fresh nats-server; its store goes with it."""
        server = NatsServer(self.new("server"))
        try:
            yield server.start()
        finally:
            server.stop()
            free_space(server.directory)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A path whose large files are removed afterwards."""
        path = self.new(name)
        try:
            yield path
        finally:
            free_space(path)

    def run(self, *arguments: str | Path) -> Run:
        """Run a worker in a fresh process, with a quiet disk; its failure ends the run."""
        result = self.new("result.json")
        os.sync()
        begin = time.perf_counter()
        kind, *rest = arguments
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker", str(kind), str(result), *map(str, rest)],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wall = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr[-2000:]}")
        return Run(wall=wall, **json.loads(result.read_text()))

    def push(self, server: NatsServer, source: Path, state: Path) -> Run:
        """``python -m syncd push``."""
        config = write_config(state, server, publish=source)
        return self.run("syncd", "push", BUCKET, "--config", config)

    def pull(self, server: NatsServer, target: Path, state: Path) -> Run:
        """``python -m syncd pull``."""
        config = write_config(state, server)
        return self.run("syncd", "pull", BUCKET, target, "--config", config)

    @contextlib.contextmanager
    def daemons(self, server: NatsServer, source: Path, mirror: Path) -> Iterator[Pair]:
        """A publisher and a subscriber, each a process, with default settings."""
        directory = self.new("daemons")
        nats = f'[nats]\nservers = ["{server.url}"]\n'
        publisher = Daemon(directory / "p", f'{nats}[[publish]]\nfolder = "{BUCKET}"\npath = "{source}"\n')
        subscriber = Daemon(directory / "s", f'{nats}[[subscribe]]\nfolder = "{BUCKET}"\npath = "{mirror}"\n')
        pair = Pair(publisher, subscriber, count_paths(source))
        try:
            yield pair
        finally:
            publisher.kill()
            subscriber.kill()
            free_space(directory)


def write_config(state: Path, server: NatsServer, publish: Path | None = None) -> Path:
    state.mkdir(parents=True, exist_ok=True)
    file = state / "syncd.toml"
    text = f'[daemon]\nstate_dir = "{state / "state"}"\n[nats]\nservers = ["{server.url}"]\n'
    if publish is not None:
        text += f'[[publish]]\nfolder = "{BUCKET}"\npath = "{publish}"\n'
    file.write_text(text)
    return file


@dataclass
class Pair:
    """A publisher daemon and a subscriber daemon."""

    publisher: Daemon
    subscriber: Daemon
    entries: int

    def start(self) -> tuple[float, float]:
        """Start both; returns the seconds until each is in sync with all entries, by its own status."""
        begin = time.time()
        self.publisher.start()
        self.subscriber.start()
        since = self.wait(begin)
        return since[0] - begin, since[1] - begin

    def wait(self, after: float, seconds: float = 900.0) -> tuple[float, float]:
        """Wait until both are in sync; returns since when (wall clock)."""
        deadline = time.monotonic() + seconds
        while True:
            states = [
                self.publisher.status().get(f"publish-{BUCKET}"),
                self.subscriber.status().get(f"subscribe-{BUCKET}"),
            ]
            if all(
                one and one["state"] == "in_sync" and one["entries"] == self.entries and one["since"] > after
                for one in states
            ):
                return states[0]["since"], states[1]["since"]  # type: ignore[index]
            for daemon in (self.publisher, self.subscriber):
                ended = daemon.process is None or daemon.process.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise SystemExit(f"not in sync ({states}): {daemon.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def peaks(self) -> tuple[int, int]:
        """Peak memory of both, in bytes."""
        assert self.publisher.process is not None
        assert self.subscriber.process is not None
        return peak_bytes(self.publisher.process.pid), peak_bytes(self.subscriber.process.pid)

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self.publisher.stop()
        self.subscriber.stop()


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(directory: Path) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    mount = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", str(directory)], capture_output=True, text=True, check=False
    )
    server = subprocess.run([nats_server_binary(), "--version"], capture_output=True, text=True, check=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "kernel": platform.release(),
        "filesystem": (mount.stdout.split() or ["unknown"])[-1],
        "python": platform.python_version(),
        "nats_server": server.stdout.split()[-1].lstrip("v"),
        "nats_py": version("nats-py"),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@dataclass
class Figures:
    """Named series of raw values, and notes; what is written as JSON."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, *values: float) -> None:
        """Append raw values."""
        self.values.setdefault(name, []).extend(values)

    def median(self, name: str) -> float:
        """The median of a series."""
        return statistics.median(self.values[name])

    def run(self, name: str, run: Run) -> None:
        """Append all that is known of one process."""
        self.add(f"{name}.seconds", run.seconds)
        self.add(f"{name}.wall", run.wall)
        self.add(f"{name}.cpu", run.cpu)
        self.add(f"{name}.peak", run.peak)


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that at least this share does not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]
