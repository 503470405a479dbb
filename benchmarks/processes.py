"""Processes, and what the kernel says of them: time, processor, memory, bytes on the wire."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.network import wire_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TICK = os.sysconf("SC_CLK_TCK")
LOOK_SECONDS = 0.03
"""How often the memory of running commands is read; VmHWM itself forgets nothing in between."""

Services = dict[str, list[int]]
"""Role -> processes that run beside the measured commands."""


@dataclass(frozen=True)
class Use:
    """Processor seconds of some processes in one step; the most bytes that one of them ever had resident."""

    cpu: float
    peak: int


@dataclass
class Leg:
    """One measured step.

    :ivar wire: bytes on the loopback interface, both directions.
    :ivar uses: by role; "command" is what the step itself started.
    """

    seconds: float = 0.0
    wire: int = 0
    uses: dict[str, Use] = field(default_factory=dict)


Legs = dict[str, Leg]


def peak_bytes(pid: int) -> int:
    """The most memory a process ever had resident (VmHWM); 0 where it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of all below it, those that ended included; 0 where it is gone."""
    ticks = 0
    for one in descendants(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICK


def descendants(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from descendants(int(child))


class _Watcher(threading.Thread):
    """Reads the peaks of processes, and of what they start, while they run."""

    def __init__(self, roles: Mapping[str, Sequence[int]]) -> None:
        super().__init__(daemon=True)
        self.roles = {role: list(pids) for role, pids in roles.items()}
        self.peaks = dict.fromkeys(roles, 0)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        for role, pids in self.roles.items():
            found = (peak_bytes(one) for pid in pids for one in descendants(pid))
            self.peaks[role] = max(self.peaks[role], *found, 0)

    def end(self) -> None:
        self._ended.set()
        self.join()


@contextlib.contextmanager
def measured(services: Services) -> Iterator[Leg]:
    """Measure the body: fills the yielded leg at its end."""
    leg = Leg()
    watcher = _Watcher(services)
    watcher.start()
    cpu = {role: sum(map(cpu_seconds, pids)) for role, pids in services.items()}
    wire, begin = wire_bytes(), time.perf_counter()
    try:
        yield leg
    finally:
        leg.seconds = time.perf_counter() - begin
        watcher.end()
    leg.wire = wire_bytes() - wire
    watcher.look()
    for role, pids in services.items():
        leg.uses[role] = Use(sum(map(cpu_seconds, pids)) - cpu[role], watcher.peaks[role])


def run(commands: Sequence[Sequence[str | Path]], log: Path, services: Services | None = None) -> Leg:
    """Run commands side by side, each to its end, and measure them as one step.

    :raises SystemExit: one of them failed.
    """
    started = []
    with log.open("w+") as output, measured(services or {}) as leg:
        begin = time.perf_counter()
        started = [_start(command, output) for command in commands]
        watcher = _Watcher({"command": [process.pid for process in started]})
        watcher.start()
        try:
            cpu = sum(map(_wait, started))
        finally:
            seconds = time.perf_counter() - begin
            watcher.end()
            for process in started:
                if process.returncode is None:
                    process.kill()
                    process.wait()
    leg.seconds = seconds
    leg.uses["command"] = Use(cpu, watcher.peaks["command"])
    for process in started:
        if process.returncode:
            command = " ".join(map(str, process.args))
            raise SystemExit(f"{command} ended with {process.returncode}: {log.read_text()[-2000:]}")
    return leg


def _start(command: Sequence[str | Path], output) -> subprocess.Popen[bytes]:
    return subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _wait(process: subprocess.Popen[bytes]) -> float:
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def service(command: Sequence[str | Path], log: Path, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process beside the measured ones; ended with the body."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | environ,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
