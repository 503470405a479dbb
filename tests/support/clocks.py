"""Clocks that a test moves on by hand."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class ServerClock:
    """What the store in memory is given for the module ``time``, as in ``setattr(memory, "time", ServerClock(...))``.

    :param now: the server's time, seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.time = now
        self.monotonic = time.monotonic

    def time_ns(self) -> int:
        return int(self.time() * 1e9)
