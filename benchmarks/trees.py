"""The trees that are measured: made from a seed, changed in place, compared by content."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB, MIB = 1024, 1024 * 1024
SEED = 20_26
OLD_NS = 1_700_000_000_000_000_000
"""Modification time of what is made here: long before the run, as most files are."""
LARGE_NAME = "large.bin"
OWN_NAMES = frozenset({".syncd", ".stfolder"})
"""What tools keep at the top of a tree for themselves."""

Digests = dict[str, str]


def make_large(root: Path, size: int) -> Path:
    """One incompressible file."""
    root.mkdir(parents=True)
    with (root / LARGE_NAME).open("wb") as file:
        _write_random(file.write, size, random.Random(SEED))
    age(root)
    return root


def _write_random(write, size: int, rng: random.Random) -> None:
    for start in range(0, size, 4 * MIB):
        write(rng.randbytes(min(4 * MIB, size - start)))


def make_small(root: Path, count: int) -> Path:
    """``count`` incompressible files of 100 B to 32 KiB, mean 8.6 KiB, a hundred to a directory."""
    rng = random.Random(SEED)
    for number in range(count):
        directory = root / f"d{number // 100:04}"
        if number % 100 == 0:
            directory.mkdir(parents=True)
        size = min(32 * KIB, max(100, int(rng.expovariate(1 / 9080))))
        (directory / f"file-{number:06}.dat").write_bytes(rng.randbytes(size))
    age(root)
    return root


def make_mixed(root: Path, size: int) -> Path:
    """``size`` bytes: a third of it in small files, the rest in four larger ones; incompressible."""
    make_small(root, size // 3 // 8800)
    rng = random.Random(SEED + 1)
    for number in range(4):
        with (root / f"part-{number}.bin").open("wb") as file:
            _write_random(file.write, size // 6, rng)
    age(root)
    return root


def age(root: Path) -> None:
    """Give everything a modification time of long ago."""
    for number, (top, _, files) in enumerate(os.walk(root, topdown=False)):
        for name in files:
            os.utime(Path(top) / name, ns=(OLD_NS, OLD_NS + number))
        os.utime(top, ns=(OLD_NS, OLD_NS + number))


# -- changes -----------------------------------------------------------------------------------------------------------


def change_runs(root: Path, count: int, length: int, rng: random.Random) -> None:
    """Write ``count`` runs of ``length`` new bytes into the large file, in place, each in a place of its own."""
    file = root / LARGE_NAME
    step = file.stat().st_size // count
    with file.open("r+b") as handle:
        for number in range(count):
            handle.seek(number * step + rng.randrange(max(1, step - length)))
            handle.write(rng.randbytes(length))


def insert_front(root: Path, length: int, rng: random.Random) -> None:
    """Put ``length`` new bytes before the large file's content."""
    file = root / LARGE_NAME
    longer = file.with_suffix(".new")
    with longer.open("wb") as target, file.open("rb") as source:
        target.write(rng.randbytes(length))
        shutil.copyfileobj(source, target, MIB)
    longer.replace(file)


def replace_tree(root: Path, new: Path) -> None:
    """Make ``root`` hold what ``new`` holds, times included; the directory itself stays."""
    root.mkdir(parents=True, exist_ok=True)
    for child in root.iterdir():
        if child.name in OWN_NAMES:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    shutil.copytree(new, root, symlinks=True, dirs_exist_ok=True)


# -- looking -----------------------------------------------------------------------------------------------------------


def walk_files(root: Path) -> Iterator[str]:
    """All files, relative, without what tools keep for themselves."""
    for top, dirs, files in os.walk(root):
        if Path(top) == root:
            dirs[:] = [name for name in dirs if name not in OWN_NAMES]
        for name in files:
            yield os.path.relpath(f"{top}/{name}", root)


def list_files(root: Path) -> list[str]:
    return sorted(walk_files(root))


def count_paths(root: Path) -> int:
    """Files and directories, as a status counts its entries."""
    return sum(len(dirs) + len(files) for _, dirs, files in os.walk(root))


def total_bytes(root: Path) -> int:
    return sum((root / name).stat().st_size for name in walk_files(root))


def digests(root: Path) -> Digests:
    """Relative path -> BLAKE3 of all files."""
    found = {}
    for name in list_files(root):
        with (root / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, blake3).hexdigest()  # type: ignore[arg-type]
    return found


def must_hold(want: Digests, target: Path, who: str = "syncd") -> None:
    """End the run where a destination does not hold exactly this content."""
    have = digests(target)
    if want != have:
        wrong = [name for name in want.keys() | have.keys() if want.get(name) != have.get(name)]
        raise SystemExit(f"{who}: {target} differs from its source in {len(wrong)} files: {sorted(wrong)[:5]}")


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
