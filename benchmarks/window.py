"""How long a reader can see a mirror between two generations: 10,000 files that all change, in both modes.

    python -m benchmarks.window --dir DIR [--files 10000] [--repeat 5]

A process of its own opens a directory through the mirror's path and reads 40 files of it by their names, again and
again. In mirror mode each path changes by itself; the window is the time from the first to the last ctime of what was
put in place. In release mode there is one rename, which is timed; no reading may find two generations there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import trees
from benchmarks.peers.syncd import COMMAND
from benchmarks.processes import run
from benchmarks.world import FOLDER, World, nats_table, publish_table, subscribe_table, write_config

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE = 40


def stamp(root: Path, word: bytes) -> None:
    """Give every file content that names the generation."""
    for number, name in enumerate(trees.walk_files(root)):
        (root / name).write_bytes(word + b" %d" % number)


def read_on(tree: str, names: list[str], stop: Any, found: Any) -> None:
    """Read some files of one opened directory again and again; count the readings, and those that were mixed."""
    readings = mixed = 0
    while not stop.is_set():
        try:
            fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            words = set()
            for name in names:
                file = os.open(name, os.O_RDONLY, dir_fd=fd)
                words.add(os.read(file, 64).split(b" ")[0])
                os.close(file)
        finally:
            os.close(fd)
        readings += 1
        mixed += len(words) > 1
    found.put((readings, mixed))


def window_ms(root: Path) -> float:
    """Return the time from the first to the last ctime below a mirror, in ms."""
    stamps = [(root / name).lstat().st_ctime_ns for name in trees.walk_files(root) if not name.startswith(".syncd")]
    return (max(stamps) - min(stamps)) / 1e6


def measure(directory: Path, count: int, repeat: int) -> Iterator[str]:
    """Yield the rows of the table."""
    for mode in ("mirror", "release"):
        world = World(directory, "generations")
        source, target = world.new("source"), world.new("target")
        source.mkdir(exist_ok=True)
        for number in range(count):
            path = source / f"d{number % 100:02}" / f"f{number}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
        windows, switches, readings, mixed = [], [], 0, 0
        with world.server() as server:
            nats = nats_table(server)
            publisher = write_config(directory / f"p-{mode}", nats + publish_table(source, "generations"))
            table = subscribe_table(target) + f'mode = "{mode}"\n'
            subscriber = write_config(directory / f"s-{mode}", nats + table)
            push = [*COMMAND, "push", FOLDER, "--config", publisher]
            pull = [*COMMAND, "pull", FOLDER, target, "--config", subscriber]
            tree = target / "current" if mode == "release" else target
            names = random.Random(1).sample(sorted(trees.walk_files(source)), SAMPLE)
            for number in range(repeat + 1):
                stamp(source, b"g%d" % number)
                run([push], directory / "push.log", {})
                if not number:
                    run([pull], directory / "pull.log", {})
                    continue
                stop, found = multiprocessing.Event(), multiprocessing.Queue()
                reader = multiprocessing.Process(target=read_on, args=(str(tree), names, stop, found))
                reader.start()
                run([pull], directory / "pull.log", {})
                stop.set()
                more, torn = found.get()
                reader.join()
                readings, mixed = readings + more, mixed + torn
                if mode == "mirror":
                    windows.append(window_ms(target))
                else:
                    switches.append(rename_ms(target))
                if {(tree / name).read_bytes().split(b" ")[0] for name in names} != {b"g%d" % number}:
                    sys.exit(f"{mode}: the mirror is not what the source is")
        what = (
            f"{statistics.median(windows):.0f} ms" if windows else f"one rename, {statistics.median(switches):.3f} ms"
        )
        yield f"| {mode} | {what} | {readings} | {mixed} |"
        shutil.rmtree(source)
        _remove(target)


def rename_ms(target: Path) -> float:
    """Time one rename of a symlink onto ``current`` as the switch does it (the same link again)."""
    spare = target / "current.measured"
    spare.symlink_to((target / "current").readlink())
    begun = time.perf_counter()
    spare.replace(target / "current")
    return (time.perf_counter() - begun) * 1e3


def _remove(root: Path) -> None:
    for directory, _, _ in os.walk(root):
        Path(directory).chmod(0o755)
    shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a mirror is between two generations")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=5)
    chosen = parser.parse_args()
    chosen.dir.mkdir(parents=True, exist_ok=True)
    print(f"| mode | from the first visible change to the last, {chosen.files:,} files | readings | mixed |")
    print("|---|---|---|---|", flush=True)
    for line in measure(chosen.dir, chosen.files, chosen.repeat):
        print(line, flush=True)


if __name__ == "__main__":
    main()
