"""Named places at which a test may kill this process with SIGKILL (fault catalogue C1, C4).

Rules kept here:
 * armed by the environment variable ``SYNCD_CRASH_POINT`` alone, read once at import: ``name`` kills at the first
   passage of that point, ``name:N`` at the N-th;
 * unarmed, a passage costs one comparison and does nothing.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

ENV_CRASH_POINT = "SYNCD_CRASH_POINT"


@dataclass(slots=True)
class _Armed:
    """The point to die at, and how many passages of it are left."""

    name: str
    left: int


def _parse(text: str) -> _Armed:
    name, colon, count = text.partition(":")
    return _Armed(name, int(count) if colon else 1)


_armed = _parse(os.environ.get(ENV_CRASH_POINT, ""))


def crash_point(name: str) -> None:
    """Die here if a test asked for it; nothing is flushed, closed or cleaned up."""
    if name != _armed.name:
        return
    _armed.left -= 1
    if _armed.left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
