"""Trees on disk, as values to compare."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Callable


def snapshot(root: Path, *, times: bool = True) -> dict[str, tuple[Any, ...]]:
    """Relative path -> (kind, mode, mtime_ns, content digest or link text), without ``.syncd``."""
    found: dict[str, tuple[Any, ...]] = {}
    for directory, names, files in os.walk(root):
        here = Path(directory)
        if here == root and ".syncd" in names:
            names.remove(".syncd")
        for name in names + files:
            path = here / name
            relative = str(path.relative_to(root))
            st = path.lstat()
            when = st.st_mtime_ns if times else None
            if stat.S_ISLNK(st.st_mode):
                found[relative] = ("symlink", None, when, str(path.readlink()))
            elif stat.S_ISDIR(st.st_mode):
                found[relative] = ("dir", stat.S_IMODE(st.st_mode), when, None)
            else:
                digest = hashlib.blake2b(path.read_bytes()).hexdigest()
                found[relative] = ("file", stat.S_IMODE(st.st_mode), when, digest)
    return found


def difference(left: Path, right: Path) -> dict[str, tuple[Any, Any]]:
    """Paths where two trees differ; empty: they are equal in kinds, modes, times, content and link texts."""
    a, b = snapshot(left), snapshot(right)
    return {path: (a.get(path), b.get(path)) for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)}


async def eventually(claim: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until a claim about the outside world holds; its last value is in the failure."""
    deadline = time.monotonic() + seconds
    while True:
        value = await asyncio.to_thread(claim)
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {getattr(claim, '__name__', claim)}"
        await asyncio.sleep(0.02)


async def equal_trees(left: Path, right: Path, seconds: float = 60.0) -> None:
    """Wait until two trees are equal; shows the first differences otherwise."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            wrong = await asyncio.to_thread(difference, left, right)
        except (FileNotFoundError, NotADirectoryError):  # it went away between listing and reading: they are changing
            wrong = {"?": (None, None)}
        if not wrong:
            return
        assert time.monotonic() < deadline, dict(list(wrong.items())[:5])
        await asyncio.sleep(0.05)


def root_digest(directory: Path, *, top: bool = True) -> str:
    """The tree digest of what is on disk, written from docs/format.md and sharing no code with syncd."""
    whole = blake3()
    for name in sorted(os.fsencode(path.name) for path in directory.iterdir()):
        if top and name == b".syncd":
            continue
        path = directory / os.fsdecode(name)
        st = path.lstat()
        mode, size, kind, rest = stat.S_IMODE(st.st_mode), 0, 0, b""
        if stat.S_ISLNK(st.st_mode):
            target = os.fsencode(path.readlink())
            mode, kind, rest = 0o777, 2, struct.pack("<H", len(target)) + target
        elif stat.S_ISDIR(st.st_mode):
            kind, rest = 1, bytes.fromhex(root_digest(path, top=False))
        else:
            size, rest = st.st_size, blake3(path.read_bytes()).digest()
        whole.update(struct.pack("<HBHqQ", len(name), kind, mode, st.st_mtime_ns, size) + name + rest)
    return whole.hexdigest()
