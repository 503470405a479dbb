"""Waiting for what other tools do by themselves."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

from benchmarks.trees import list_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POLL_SECONDS = 0.02
START_SECONDS = 30.0
SYNC_SECONDS = 600.0

Stamps = dict[str, tuple[int, int]]
"""File -> size and modification time."""


def wait_for(done: Callable[[], bool], what: str, seconds: float) -> None:
    """Return as soon as it is done; a network or a disk that refuses means "not yet".

    :raises SystemExit: it is not, for so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if done():
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:g} s for {what}")
        time.sleep(POLL_SECONDS)


def wait_for_port(port: int) -> None:
    """Return as soon as somebody listens."""

    def listening() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True

    wait_for(listening, f"somebody on port {port}", START_SECONDS)


def stamps(root: Path) -> Stamps:
    """What a mirror of ``root`` must come to have."""
    found = {}
    for name in list_files(root):
        stat = (root / name).stat()
        found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def wait_for_stamps(root: Path, wanted: Stamps) -> None:
    """Return as soon as every file, and no other, has its size and time."""
    pending = dict(wanted)

    def done() -> bool:
        for name, stamp in list(pending.items()):
            stat = (root / name).stat()
            if (stat.st_size, stat.st_mtime_ns) != stamp:
                return False
            del pending[name]
        return list_files(root) == list(wanted)

    wait_for(done, f"the files in {root}", SYNC_SECONDS)
