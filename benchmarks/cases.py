"""The cases. Each adds raw values to the figures; every destination is compared with its source, outside the clock.

Repetitions are interleaved: every peer has its turn before the first one has its second. Slow peers have one turn.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks import packages, trees
from benchmarks.trees import KIB, MIB, SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from benchmarks.figures import Figures
    from benchmarks.peers.base import Peer, Session
    from benchmarks.world import Fleet, Server, World

CHANGE_SEED = SEED + 1000  # the bytes that a change brings are in no tree yet
EDIT_BYTES = 4 * KIB
POLL_SECONDS = 0.0005
EDIT_DEADLINE = 30.0
MANY = 8


@dataclass(frozen=True)
class Scale:
    """How much of everything; sizes in bytes, pauses in seconds."""

    repeat: int
    large: int
    files: int
    mixed: int
    delta: int
    runs: int
    scattered: int
    tree: int
    edits: int
    edits_beside: int
    pause: tuple[float, float]
    restart_files: int
    memory_size: int


FULL = Scale(
    repeat=3,
    large=1024 * MIB,
    files=10_000,
    mixed=100 * MIB,
    delta=256 * MIB,
    runs=41,
    scattered=655,
    tree=10_000,
    edits=120,
    edits_beside=40,
    pause=(0.05, 1.5),
    restart_files=50_000,
    memory_size=2048 * MIB,
)
QUICK = Scale(
    repeat=1,
    large=64 * MIB,
    files=1_000,
    mixed=20 * MIB,
    delta=32 * MIB,
    runs=5,
    scattered=82,
    tree=1_000,
    edits=20,
    edits_beside=10,
    pause=(0.05, 0.5),
    restart_files=2_000,
    memory_size=64 * MIB,
)


@dataclass
class Bench:
    """What every case works with.

    :ivar updates: the package updates whose wheels are at hand in ``cache``.
    """

    world: World
    scale: Scale
    figures: Figures
    peers: list[Peer]
    cache: Path
    updates: list[packages.Update] = field(default_factory=list)

    def has(self, name: str) -> bool:
        """Whether a peer takes part."""
        return any(peer.name == name for peer in self.peers)

    def turns(self, case: str, repeat: int | None = None) -> Iterator[tuple[int, Peer]]:
        """Who measures when."""
        for turn in range(self.scale.repeat if repeat is None else repeat):
            for peer in self.peers:
                if case in peer.cases and not (turn and peer.slow):
                    yield turn, peer


def sync(bench: Bench, name: str, session: Session, want: trees.Digests, targets: Sequence[Path]) -> None:
    """One measured synchronisation, and its proof."""
    os.sync()
    bench.figures.add_legs(name, session.sync())
    for target in targets:
        trees.must_hold(want, target, name)


# -- first syncs -------------------------------------------------------------------------------------------------------


def large(bench: Bench) -> None:
    """One incompressible file."""
    with bench.world.scratch("large") as source:
        trees.make_large(source, bench.scale.large)
        first_syncs(bench, "large", source, 1)


def small(bench: Bench) -> None:
    """Many small files."""
    with bench.world.scratch("small") as source:
        trees.make_small(source, bench.scale.files)
        first_syncs(bench, "small", source, 1)


def eight(bench: Bench) -> None:
    """One tree to eight destinations at once; and what eight subscriber daemons cost the publisher."""
    with bench.world.scratch("mixed") as source:
        trees.make_mixed(source, bench.scale.mixed)
        first_syncs(bench, "eight", source, MANY)
        for count in (1, MANY):
            _publish_to_fleet(bench, source, count)


def first_syncs(bench: Bench, case: str, source: Path, count: int) -> None:
    """The first synchronisation to ``count`` new destinations, by every peer of the case."""
    world, want = bench.world, trees.digests(source)
    for _, peer in bench.turns(case):
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(world.scratch("target")) for _ in range(count)]
            session = stack.enter_context(peer.session(world, source, targets))
            sync(bench, f"{case}.{peer.name}", session, want, targets)


def _publish_to_fleet(bench: Bench, tree: Path, count: int) -> None:
    """Running daemons: a tree appears in the source by one rename, and reaches ``count`` mirrors."""
    if not bench.has("syncd"):
        return
    world, figures, name = bench.world, bench.figures, f"fleet.{count}"
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(world.scratch("source"))
        prepared = stack.enter_context(world.scratch("prepared"))
        mirrors = [stack.enter_context(world.scratch("mirror")) for _ in range(count)]
        (source / "first").mkdir(parents=True)
        trees.replace_tree(prepared, tree)
        server = stack.enter_context(world.server())
        fleet = stack.enter_context(world.daemons(server, source, mirrors))
        fleet.start()
        cpu, wire, begin = fleet.publisher_cpu(), fleet.publisher_bytes(server), time.time()
        prepared.rename(source / "new")
        figures.add(f"{name}.seconds", fleet.wait(begin) - begin)
        figures.add(f"{name}.publisher.cpu", fleet.publisher_cpu() - cpu)
        figures.add(f"{name}.publisher.wire", fleet.publisher_bytes(server) - wire)
        _add_peaks(figures, name, fleet, server)
        want = trees.digests(source)
        for mirror in mirrors:
            trees.must_hold(want, mirror)
        fleet.stop()


def _add_peaks(figures: Figures, name: str, fleet: Fleet, server: Server) -> None:
    publisher, subscriber = fleet.peaks()
    figures.add(f"{name}.publisher.peak", publisher)
    figures.add(f"{name}.subscriber.peak", subscriber)
    figures.add(f"{name}.server.peak", server.peak())


# -- updates -----------------------------------------------------------------------------------------------------------


def package_updates(bench: Bench) -> None:
    """Two successive releases: the first sync of the old one, then the update to the new one."""
    for update in bench.updates:
        with contextlib.ExitStack() as stack:
            old, new = (
                packages.unpack(update, version, bench.cache, stack.enter_context(bench.world.scratch(version)))
                for version in (update.old, update.new)
            )
            for _, peer in bench.turns("packages"):
                _update_package(bench, peer, f"packages_{update.name}", old, new)


def _update_package(bench: Bench, peer: Peer, name: str, old: Path, new: Path) -> None:
    world = bench.world
    with world.scratch("source") as source, world.scratch("target") as target:
        trees.replace_tree(source, old)
        with peer.session(world, source, [target]) as session:
            for kind, tree in (("first", old), ("update", new)):
                trees.replace_tree(source, tree)
                sync(bench, f"{name}_{kind}.{peer.name}", session, trees.digests(source), [target])


def delta(bench: Bench) -> None:
    """A large file that all have is changed in three ways, again and again; each change builds on the one before."""
    scale, rng = bench.scale, random.Random(CHANGE_SEED)
    changes: list[tuple[str, Callable[[Path], None]]] = [
        ("delta_runs", lambda source: trees.change_runs(source, scale.runs, 64 * KIB, rng)),
        ("delta_scattered", lambda source: trees.change_runs(source, scale.scattered, 4 * KIB, rng)),
        ("delta_insert", lambda source: trees.insert_front(source, MIB, rng)),
    ]
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(bench.world.scratch("delta"))
        trees.make_large(source, scale.delta)
        sessions: list[tuple[Peer, Session, Path]] = []
        for _, peer in bench.turns("delta", repeat=1):
            target = stack.enter_context(bench.world.scratch("target"))
            session = stack.enter_context(peer.session(bench.world, source, [target]))
            session.sync()
            sessions.append((peer, session, target))
        for turn in range(scale.repeat):
            for case, change in changes:
                change(source)
                want = trees.digests(source)
                for peer, session, target in sessions:
                    if not (turn and peer.slow):
                        sync(bench, f"{case}.{peer.name}", session, want, [target])


# -- daemons -----------------------------------------------------------------------------------------------------------


def latency(bench: Bench) -> None:
    """From the moment before a file is opened for writing to the moment the mirror's file has its new content.

    Everything runs as processes of its own, syncd with default settings. Edits come one at a time, at random files,
    after log-uniform random pauses, so that they also meet full comparisons. Nothing is subtracted.
    """
    world = bench.world
    with world.scratch("source") as source:
        trees.make_small(source, bench.scale.tree)
        if bench.has("syncd"):
            _latency_of_daemons(bench, source)
        for _, peer in bench.turns("latency", repeat=1):
            with world.scratch("mirror") as mirror, peer.session(world, source, [mirror]) as session:
                session.sync()
                _edits(bench, peer.name, source, mirror, bench.scale.edits_beside)


def _latency_of_daemons(bench: Bench, source: Path) -> None:
    world = bench.world
    with (
        world.scratch("mirror") as mirror,
        world.server() as server,
        world.daemons(server, source, [mirror]) as fleet,
    ):
        fleet.start()
        _edits(bench, "syncd", source, mirror, bench.scale.edits)
        _add_peaks(bench.figures, "latency", fleet, server)
        fleet.stop()


def _edits(bench: Bench, name: str, source: Path, mirror: Path, count: int) -> None:
    trees.must_hold(trees.digests(source), mirror, name)
    rng, names = random.Random(f"{CHANGE_SEED} {name}"), trees.list_files(source)
    low, high = map(math.log, bench.scale.pause)
    for _ in range(count):
        time.sleep(math.exp(rng.uniform(low, high)))
        file = rng.choice(names)
        seconds = _edit(source / file, mirror / file, rng.randbytes(EDIT_BYTES))
        bench.figures.add(f"latency.{name}.ms", seconds * 1000)
    trees.must_hold(trees.digests(source), mirror, name)


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


def restart(bench: Bench) -> None:
    """Everything is in sync, nothing has changed: how long until that is known, from nothing running."""
    world, scale, figures = bench.world, bench.scale, bench.figures
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(world.scratch("source"))
        trees.make_small(source, scale.restart_files)
        want = trees.digests(source)
        sessions: dict[str, Session] = {}
        for _, peer in bench.turns("restart", repeat=1):
            target = stack.enter_context(world.scratch("target"))
            sessions[peer.name] = stack.enter_context(peer.session(world, source, [target]))
            sync(bench, f"restart_first.{peer.name}", sessions[peer.name], want, [target])
        for _, peer in bench.turns("restart"):
            figures.add_legs(f"restart.{peer.name}", sessions[peer.name].sync())
        if "syncd" in sessions:
            _restart_daemons(bench, source, want)


def _restart_daemons(bench: Bench, source: Path, want: trees.Digests) -> None:
    world, figures = bench.world, bench.figures
    with (
        world.scratch("mirror") as mirror,
        world.server() as server,
        world.daemons(server, source, [mirror]) as fleet,
    ):
        fleet.start()
        trees.must_hold(want, mirror)
        _add_peaks(figures, "restart_daemons", fleet, server)
        for _ in range(bench.scale.repeat):
            fleet.stop()
            figures.add("restart_daemons.seconds", fleet.start())
        fleet.stop()


def memory(bench: Bench) -> None:
    """Peak memory of the daemons at the first sync of a file larger than that of any other case."""
    world = bench.world
    with world.scratch("source") as source, world.scratch("mirror") as mirror, world.server() as server:
        trees.make_large(source, bench.scale.memory_size)
        with world.daemons(server, source, [mirror]) as fleet:
            fleet.start()
            trees.must_hold(trees.digests(source), mirror)
            _add_peaks(bench.figures, "memory", fleet, server)
            fleet.stop()


def startup(bench: Bench) -> None:
    """What Python and the imports cost every command of syncd: ``syncd --version``."""
    for _ in range(bench.scale.repeat):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "syncd", "--version"], check=True, capture_output=True)
        bench.figures.add("startup.syncd.seconds", time.perf_counter() - begin)


CASES: dict[str, Callable[[Bench], None]] = {
    "startup": startup,
    "large": large,
    "small": small,
    "eight": eight,
    "packages": package_updates,
    "delta": delta,
    "latency": latency,
    "restart": restart,
    "memory": memory,
}
