"""The cases. Each adds raw values to the figures; every destination is compared with its source, outside the clock."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.world import MIB, SEED, Figures, World, list_files, make_large, make_small, must_equal, peak_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.server import NatsServer

EDIT_BYTES = 4096
POLL_SECONDS = 0.0005
PAUSE_SECONDS = (0.05, 5.0)
EDIT_DEADLINE = 30.0


@dataclass(frozen=True)
class Scale:
    """How much of everything; sizes in bytes."""

    repeat: int
    large: int
    slow_get: int
    files: int
    tree: int
    edits: int
    memory_sizes: tuple[int, ...]
    memory_files: tuple[int, ...]


FULL = Scale(
    repeat=3,
    large=1024 * MIB,
    slow_get=128 * MIB,
    files=10_000,
    tree=10_000,
    edits=200,
    memory_sizes=(16 * MIB, 128 * MIB, 512 * MIB, 2048 * MIB),
    memory_files=(1_000, 10_000, 50_000),
)
QUICK = Scale(
    repeat=1,
    large=64 * MIB,
    slow_get=16 * MIB,
    files=1_000,
    tree=1_000,
    edits=20,
    memory_sizes=(16 * MIB, 64 * MIB),
    memory_files=(1_000,),
)


def large(world: World, scale: Scale, figures: Figures) -> None:
    """One incompressible file: syncd and nats-py take turns."""
    with world.scratch("large") as source:
        make_large(source, scale.large)
        for _ in range(scale.repeat):
            _nats_both_ways(world, figures, source, "large.nats", "put-file", "get-into")
            _syncd_both_ways(world, figures, source, "large.syncd")
    with world.scratch("large-plain") as source:  # nats-py's plain get is quadratic: a smaller file, once
        make_large(source, scale.slow_get)
        _nats_both_ways(world, figures, source, "large_plain.nats", "put-file", "get")


def small(world: World, scale: Scale, figures: Figures) -> None:
    """Many small files: syncd and nats-py take turns."""
    with world.scratch("small") as source:
        make_small(source, scale.files)
        for _ in range(scale.repeat):
            _nats_both_ways(world, figures, source, "small.nats", "put", "get")
            _syncd_both_ways(world, figures, source, "small.syncd")


def _nats_both_ways(world: World, figures: Figures, source: Path, name: str, put: str, get: str) -> None:
    with world.server() as server, world.scratch("target") as target:
        target.mkdir()
        figures.run(f"{name}.up", world.run(put, server.url, source))
        figures.run(f"{name}.down", world.run(get, server.url, target))
        must_equal(source, target)


def _syncd_both_ways(world: World, figures: Figures, source: Path, name: str) -> None:
    with world.server() as server, world.scratch("target") as target, world.scratch("state") as state:
        figures.run(f"{name}.up", world.push(server, source, state / "p"))
        figures.run(f"{name}.down", world.pull(server, target, state / "s"))
        must_equal(source, target)
        figures.add(f"{name}.server_peak", _server_peak(server))


def _server_peak(server: NatsServer) -> int:
    assert server.process is not None
    return peak_bytes(server.process.pid)


def latency(world: World, scale: Scale, figures: Figures) -> None:
    """From the moment before a file is opened for writing to the moment the mirror's file has its new content.

    Publisher, subscriber and server are processes of their own with default settings. Edits come one at a time, at
    random files, after log-uniform random pauses, so that they also meet full comparisons. Nothing is subtracted.
    """
    rng = random.Random(SEED)
    with world.scratch("source") as source, world.scratch("mirror") as mirror, world.server() as server:
        make_small(source, scale.tree)
        names = list_files(source)
        with world.daemons(server, source, mirror) as pair:
            pair.start()
            must_equal(source, mirror)
            low, high = map(math.log, PAUSE_SECONDS)
            for _ in range(scale.edits):
                time.sleep(math.exp(rng.uniform(low, high)))
                name = rng.choice(names)
                seconds = _edit(source / name, mirror / name, rng.randbytes(EDIT_BYTES))
                figures.add("latency.ms", seconds * 1000)
            must_equal(source, mirror)
            publisher, subscriber = pair.peaks()
            figures.add("latency.publisher_peak", publisher)
            figures.add("latency.subscriber_peak", subscriber)
            pair.stop()


def _edit(source: Path, mirror: Path, content: bytes) -> float:
    before = mirror.stat().st_ino
    begin = time.perf_counter()
    with source.open("wb") as file:
        file.write(content)
    while True:
        now = mirror.stat()
        if (now.st_ino != before or now.st_size == len(content)) and mirror.read_bytes() == content:
            return time.perf_counter() - begin
        if time.perf_counter() - begin > EDIT_DEADLINE:
            raise SystemExit(f"an edit did not arrive within {EDIT_DEADLINE:g} s: {source}")
        time.sleep(POLL_SECONDS)


def memory(world: World, scale: Scale, figures: Figures) -> None:
    """Peak memory of every process at a first sync, by size and by number of files."""
    kinds: list[tuple[str, Callable[[Path, int], Path], tuple[int, ...]]] = [
        ("size", make_large, scale.memory_sizes),
        ("files", make_small, scale.memory_files),
    ]
    for kind, make, amounts in kinds:
        for amount in amounts:
            with world.scratch("source") as source:
                make(source, amount)
                _peaks(world, figures, source, f"memory.{kind}.{amount}")


def _peaks(world: World, figures: Figures, source: Path, name: str) -> None:
    with world.server() as server, world.scratch("target") as target, world.scratch("state") as state:
        figures.add(f"{name}.push", world.push(server, source, state / "p").peak)
        figures.add(f"{name}.pull", world.pull(server, target, state / "s").peak)
        must_equal(source, target)
    with (
        world.server() as server,
        world.scratch("mirror") as mirror,
        world.daemons(server, source, mirror) as pair,
    ):
        pair.start()
        must_equal(source, mirror)
        publisher, subscriber = pair.peaks()
        figures.add(f"{name}.publisher", publisher)
        figures.add(f"{name}.subscriber", subscriber)
        figures.add(f"{name}.server", _server_peak(server))
        pair.stop()


def restart(world: World, scale: Scale, figures: Figures) -> None:
    """Everything is in sync, nothing has changed: how long until syncd knows that."""
    with (
        world.scratch("source") as source,
        world.scratch("mirror") as mirror,
        world.scratch("target") as target,
        world.scratch("state") as state,
        world.server() as server,
    ):
        make_small(source, scale.tree)
        with world.daemons(server, source, mirror) as pair:
            pair.start()
            pair.stop()
            for _ in range(scale.repeat):
                publisher, subscriber = pair.start()
                figures.add("restart.publisher", publisher)
                figures.add("restart.subscriber", subscriber)
                pair.stop()
            must_equal(source, mirror)
        world.push(server, source, state / "p")  # adopts what the daemon published
        world.pull(server, target, state / "s")
        for _ in range(scale.repeat):
            figures.run("restart.push", world.push(server, source, state / "p"))
            figures.run("restart.pull", world.pull(server, target, state / "s"))
        must_equal(source, target)


CASES: dict[str, Callable[[World, Scale, Figures], None]] = {
    "large": large,
    "small": small,
    "latency": latency,
    "restart": restart,
    "memory": memory,
}
