"""Trees on disk, as values to compare."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


async def eventually(claim: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until a claim about the outside world holds; its last value is in the failure."""
    deadline = time.monotonic() + seconds
    while True:
        value = await asyncio.to_thread(claim)
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {getattr(claim, '__name__', claim)}"
        await asyncio.sleep(0.02)


async def equal_trees(left: Path, right: Path, seconds: float = 20.0) -> None:
    """Wait until two trees are equal; shows the first differences otherwise."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            wrong = await asyncio.to_thread(difference, left, right)
        except FileNotFoundError:  # a file went away between listing and reading: they are changing
            wrong = {"?": (None, None)}
        if not wrong:
            return
        assert time.monotonic() < deadline, dict(list(wrong.items())[:5])
        await asyncio.sleep(0.05)
