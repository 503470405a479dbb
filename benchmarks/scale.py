"""Large trees, one at a time: what a first sync and one edit in the middle cost. Half an hour, 25 GiB of disk.

    python -m benchmarks.scale --dir DIR [--only files|directory|file]

Prints a table for docs/performance.md. It is apart from the other cases because no peer takes part and it is long.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import network, trees
from benchmarks.peers.syncd import Syncd
from benchmarks.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.processes import Leg, Legs

GIB = 1 << 30
BLOCK = 8 * trees.MIB


def many_files(root: Path) -> Path:
    """200,000 files of 100 bytes to 2 KB in 2,000 directories."""
    chance = random.Random(1)
    for number in range(2_000):
        directory = root / f"d{number // 50:02}" / f"d{number:04}"
        directory.mkdir(parents=True)
        for file in range(100):
            (directory / f"file-{file:03}").write_bytes(chance.randbytes(chance.randrange(100, 2_000)))
    return root / "d20/d1000/file-050"


def one_directory(root: Path) -> Path:
    """100,000 files in one directory."""
    root.mkdir(parents=True)
    for number in range(100_000):
        (root / f"entry-{number:06}").write_bytes(b"%d" % number)
    return root / "entry-050000"


def one_file(root: Path) -> Path:
    """One incompressible file of 5 GiB."""
    root.mkdir(parents=True)
    with (root / "large").open("wb") as out:
        for _ in range(5 * GIB // BLOCK):
            out.write(os.urandom(BLOCK))
    return root / "large"


CASES: dict[str, Callable[[Path], Path]] = {"files": many_files, "directory": one_directory, "file": one_file}


def edit(path: Path) -> None:
    """Change 100 bytes in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(100))


def measure(directory: Path, name: str) -> Iterator[str]:
    """Yield the rows of one case."""
    world = World(directory, "generations")
    source, target = world.new("source"), world.new("target")
    middle = CASES[name](source)
    with Syncd().session(world, source, [target]) as session:
        for step in ("first sync", "nothing changed", "an edit in the middle"):
            if step.startswith("an edit"):
                edit(middle)
            legs = session.sync()
            yield row(CASES[name].__doc__ or name, step, legs)
        there = target / middle.relative_to(source)
        if there.stat().st_size != middle.stat().st_size or trees.digests(target) != trees.digests(source):
            sys.exit(f"{name}: the mirror is not what the source is")
    shutil.rmtree(source)
    shutil.rmtree(target)


def row(case: str, step: str, legs: Legs) -> str:
    """Format one measured push and pull."""

    def part(leg: Leg) -> str:
        use = leg.uses["command"]
        return f"{leg.seconds:.1f} s | {use.cpu:.1f} s | {leg.wire / 1e6:.2f} | {use.peak / 1e6:.0f}"

    return f"| {case.splitlines()[0].rstrip('.')} | {step} | {part(legs['push'])} | {part(legs['pull'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What large trees cost")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--only", choices=list(CASES), action="append")
    chosen = parser.parse_args()
    chosen.dir.mkdir(parents=True, exist_ok=True)
    if reason := network.isolate():
        print(f"no network of its own ({reason}): MB are those of everything on this machine's loopback\n")
    print("| tree | step | push | CPU | MB | peak MB | pull | CPU | MB | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in chosen.only or CASES:
        for line in measure(chosen.dir, name):
            print(line, flush=True)


if __name__ == "__main__":
    main()
